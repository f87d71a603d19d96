"""One step, executed with its derivatives at hand.

A :class:`Tape` runs the body once and keeps every value. Cotangents are then pulled back through it as often as needed:
with some uses cut (local Jacobians), or with some variables taken as independent (learning signals).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import reduce
from operator import or_
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.analysis.dependence import NO_DERIVATIVE, NO_REVERSE
from etcompile.analysis.steep import STEEP_ELEMENTS
from etcompile.frontend.jaxpr import Constant, Graph, Operation, bind, read, silenced, without_derivative
from etcompile.frontend.loops import Use, within
from etcompile.frontend.walks import BackwardWalk, ForwardWalk
from etcompile.lowering.joined import JoinedOperand, pullback_to_parts
from etcompile.lowering.refused import REFUSALS, refusal
from etcompile.lowering.transposes import written_pullback

__all__ = ["Tape"]

Array = Any


class Tape:
    """The values of one execution of ``graph`` and pullbacks of its operations.

    Parameters
    ----------
    graph : Graph
    inputs : sequence of arrays
    frozen : set of Use
        Operand uses that no cotangent passes (weights at sites: their gradient is made from y's cotangent).
    known : mapping of variable to array
        Values computed elsewhere; the operations that would compute them are skipped.
    quiet : bool
        Whether the step ran before: what it does beside its results (prints, calls to the host) is not done again. ``known`` then
        holds the results of such operations.
    parts : bool
        Whether of ``concatenate([x, h]) @ W`` credit is pulled to those parts alone that are asked for. It is less work, and
        worth a copy of the weight's rows where many steps have the same weights.
    """

    def __init__(
        self,
        graph: Graph,
        inputs: Any,
        frozen: Set[Use],
        known: Mapping[int, Array] | None = None,
        quiet: bool = False,
        parts: bool = False,
    ) -> None:
        self.graph = graph
        self.frozen = frozen
        self._parts = parts
        self.values: dict[int, Array] = dict(zip(graph.inputs, inputs, strict=True))
        known = known or {}
        for operation in graph.operations:
            if operation.outputs and all(v in known for v in operation.outputs):
                self.values.update((v, known[v]) for v in operation.outputs)
                continue
            if quiet and not operation.outputs:
                continue
            if quiet:
                operation = silenced(operation)
            results = bind(operation, [read(self.values, v) for v in operation.inputs])
            self.values.update(zip(operation.outputs, results, strict=True))
        self._pulls: dict[Any, Any] = {}
        #: Cotangents by what they were made of; what is kept is the only object with its id.
        self._made: dict[Any, tuple[Any, Any]] = {}
        self._reach: dict[frozenset[int], set[int]] = {}
        self._led: dict[frozenset[int], set[int]] = {}

    def read(self, operand: Any) -> Array:
        return read(self.values, operand)

    def pull(
        self,
        seeds: Mapping[int, Array],
        targets: Set[int],
        cuts: Mapping[Use, np.ndarray] | None = None,
        independent: Set[int] = frozenset(),
    ) -> dict[int, Array]:
        """Cotangents of ``targets`` for cotangents ``seeds`` of any variables.

        ``cuts`` maps uses, in the bodies of loops as well, to the elements at which no cotangent passes. Variables in
        ``independent`` are treated as if they were inputs: their cotangent is reported and goes no further.
        """
        cuts = cuts or {}
        wanted = frozenset(targets)
        reach = self._reaching(wanted)
        cotangents: dict[int, Array] = {}
        result: dict[int, Array] = {}
        for variable, seed in seeds.items():
            if variable in reach:
                self._accumulate(cotangents, variable, seed)
        walk = BackwardWalk(self.graph, cotangents)
        for number in walk:
            operation = self.graph.operations[number]
            found: list[Array | None] = []
            for v in operation.outputs:
                cotangent = cotangents.pop(v, None)
                if cotangent is not None and v in wanted:
                    result[v] = cotangent
                found.append(None if v in independent else cotangent)
            if all(c is None for c in found):
                continue
            moving = tuple(
                k
                for k, v in enumerate(operation.inputs)
                if not isinstance(v, Constant)
                and v in reach
                and (number, k) not in self.frozen
                and self.graph.avals[v].differentiable
            )
            if not moving or _passes_none(operation):
                continue
            if self._parts and (parts := self._pulled_to_parts(number, moving, wanted, reach, cuts, found)):
                for variable, cotangent in parts:
                    self._accumulate(cotangents, variable, cotangent)
                    walk.add(variable)
                continue
            pulled = self._pulled(number, moving, within(cuts, number) if operation.loop else {}, found)
            for k, cotangent in zip(moving, pulled, strict=True):
                mask = cuts.get((number, k))
                if mask is not None:
                    if mask.all():
                        continue
                    cotangent = jnp.where(mask, jnp.zeros((), cotangent.dtype), cotangent)
                variable = operation.inputs[k]
                assert isinstance(variable, int)
                self._accumulate(cotangents, variable, cotangent)
                walk.add(variable)
        result.update((v, c) for v, c in cotangents.items() if v in wanted)
        return result

    def push(
        self,
        tangents: Mapping[int, Array],
        targets: Sequence[int],
        independent: Set[int] = frozenset(),
        cuts: Mapping[Use, np.ndarray] | None = None,
        onto: bool = False,
        zeros: bool = False,
    ) -> dict[int, Array]:
        """Tangents of ``targets`` for tangents of any variables: the transpose of :meth:`pull`.

        Variables in ``independent`` do not move, whatever they are made of. With ``cuts`` no tangent passes these uses, nor those
        of weights at sites. With ``onto`` what reaches a variable with a tangent of its own is added to it, otherwise dropped.
        With ``zeros`` tangents of zero stay zero at poles of the derivative too; such a push has no transpose.
        """
        found = dict(tangents)
        stopped = frozenset() if cuts is None else self.frozen
        leading = self._leading(frozenset(targets))
        for number in sorted(leading):
            operation = self.graph.operations[number]
            moving = tuple(
                k
                for k, v in enumerate(operation.inputs)
                if not isinstance(v, Constant)
                and v in found
                and self.graph.avals[v].differentiable
                and (number, k) not in stopped
            )
            if not moving or _passes_none(operation):
                continue
            given = [
                _passing(found[v], (cuts or {}).get((number, k)))
                for k in moving
                if isinstance(v := operation.inputs[k], int)
            ]
            pushed = self._pushed(number, moving, given)
            if zeros and operation.name in STEEP_ELEMENTS:
                pushed = [_of_moving(v, given) for v in pushed]
            for v, tangent in zip(self._live(number), pushed, strict=True):
                if v in independent or (v in tangents and not onto):
                    continue
                found[v] = tangents[v] + tangent if v in tangents else tangent
        return {v: found[v] for v in targets if v in found}

    def _leading(self, targets: frozenset[int]) -> set[int]:
        """Numbers of the operations by which targets are made."""
        if targets not in self._led:
            found: set[int] = set()
            walk = BackwardWalk(self.graph, targets)
            for number in walk:
                found.add(number)
                for v in self.graph.operations[number].inputs:
                    if not isinstance(v, Constant):
                        walk.add(v)
            self._led[targets] = found
        return self._led[targets]

    def _live(self, number: int) -> list[int]:
        """Results that have a derivative."""
        return [v for v in self.graph.operations[number].outputs if self.graph.avals[v].differentiable]

    def _function(
        self, number: int, moving: tuple[int, ...], cuts: Mapping[Use, np.ndarray] | None = None
    ) -> tuple[Callable[..., list[Array]], tuple[Array, ...]]:
        """An operation as a function from some operands to its results that have a derivative; and those operands."""
        operation = silenced(self.graph.operations[number])
        values = [self.read(v) for v in operation.inputs]
        live = [k for k, v in enumerate(operation.outputs) if self.graph.avals[v].differentiable]

        def fn(*moved: Array) -> list[Array]:
            args = list(values)
            for k, v in zip(moving, moved, strict=True):
                args[k] = v
            results = bind(operation, args, cuts)
            return [results[k] for k in live]

        return fn, tuple(values[k] for k in moving)

    def _pushed(self, number: int, moving: tuple[int, ...], given: list[Array]) -> list[Array]:
        operation = self.graph.operations[number]
        if operation.name == "custom_vjp_call" or _backward_only(
            operation
        ):  # it has no forward derivative: transpose the backward one
            avals = [self.graph.avals[v] for v in operation.outputs]
            zeros = [jax.ShapeDtypeStruct(a.shape, a.dtype) if a.differentiable else None for a in avals]
            pull = self._pullback(number, moving)
            try:
                (pushed,) = jax.linear_transpose(lambda found: pull(found), zeros)(tuple(given))
            except Exception as error:  # JAX has many ways to refuse what is not linear
                raise refusal(operation, error) from error
            return [t for t, a in zip(pushed, avals, strict=True) if a.differentiable]
        fn, at = self._function(number, moving)
        try:
            return jax.jvp(fn, at, tuple(given))[1]
        except REFUSALS as error:
            raise refusal(operation, error) from error

    @contextmanager
    def inner(self) -> Iterator[None]:
        """For use inside of a loop that jax traces: pullbacks made there must not be kept for use outside."""
        kept = self._pulls, self._made
        self._pulls, self._made = {}, {}
        try:
            yield
        finally:
            self._pulls, self._made = kept

    @contextmanager
    def shared(self) -> Iterator[None]:
        """For use below ``vmap``, where what is linearised does not depend on what is mapped and may be kept for use outside.

        Not that of an operation with a function of its own, such as a custom derivative: JAX maps this one whatever it reads.
        """
        before = set(self._pulls), set(self._made)
        try:
            yield
        finally:
            self._made = {key: made for key, made in self._made.items() if key in before[1]}
            for key in set(self._pulls) - before[0]:
                if _has_functions(self.graph.operations[key[0]]):
                    del self._pulls[key]

    def _reaching(self, targets: frozenset[int]) -> set[int]:
        """Variables that depend on a target, the targets themselves included."""
        if targets not in self._reach:
            reach = set(targets)
            walk = ForwardWalk(self.graph, targets)
            for number in walk:
                operation = self.graph.operations[number]
                moved = any(
                    not isinstance(v, Constant) and v in reach and (number, k) not in self.frozen
                    for k, v in enumerate(operation.inputs)
                )
                if moved and not _passes_none(operation):
                    for v in operation.outputs:
                        if v not in reach and self.graph.avals[v].differentiable:
                            reach.add(v)
                            walk.add(v)
            self._reach[targets] = reach
        return self._reach[targets]

    def _pulled(
        self,
        number: int,
        moving: tuple[int, ...],
        cuts: Mapping[Use, np.ndarray],
        found: list[Array | None],
    ) -> tuple[Array, ...]:
        """Cotangents of operands. Pulls that meet where the same comes back share what lies behind: it is computed once."""
        if cuts:
            return self._pullback(number, moving, cuts)(found)
        return self._once(
            (number, moving, *map(id, found)), found, lambda: self._pullback(number, moving)(found)
        )

    def _pulled_to_parts(
        self,
        number: int,
        moving: tuple[int, ...],
        wanted: Set[int],
        reach: Set[int],
        cuts: Mapping[Use, np.ndarray],
        found: list[Array | None],
    ) -> list[tuple[int, Array]] | None:
        """Of a product the cotangents of what an operand joins, where not all of it is asked for and none of it is cut."""
        operation = self.graph.operations[number]
        joined = JoinedOperand.of(self.graph, operation, moving[0]) if len(moving) == 1 else None
        if joined is None or joined.variable in wanted:
            return None
        asked = joined.asked_for(reach)
        uses = {(number, moving[0]), *((joined.joining, k) for k in asked)}
        if len(asked) == len(joined.parts) or not uses.isdisjoint(self.frozen | cuts.keys()):
            return None
        key = (number, "parts", asked)
        if key not in self._pulls:
            operands = [self.read(v) for v in operation.inputs]
            (result,) = operation.outputs
            self._pulls[key] = pullback_to_parts(operation, joined, asked, operands, self.values[result])
        pull, (cotangent,) = self._pulls[key], found
        if pull is None:
            return None
        return self._once((*key, id(cotangent)), found, lambda: pull(cotangent))

    def _accumulate(self, cotangents: dict[int, Array], variable: int, value: Array) -> None:
        if variable in cotangents:
            before = cotangents[variable]
            value = self._once(("sum", id(before), id(value)), (before, value), lambda: before + value)
        cotangents[variable] = value

    def _once(self, key: Any, of: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = of, make()
        return self._made[key][1]

    def _pullback(
        self, number: int, moving: tuple[int, ...], cuts: Mapping[Use, np.ndarray] | None = None
    ) -> Callable[[Sequence[Array | None]], tuple[Array, ...]]:
        key = (number, moving, tuple((use, mask.tobytes()) for use, mask in sorted((cuts or {}).items())))
        if key not in self._pulls:
            operation = self.graph.operations[number]
            written = written_pullback(
                operation,
                [self.read(v) for v in operation.inputs],
                [self.values[v] for v in operation.outputs],
                moving,
            )
            if written is not None:
                self._pulls[key] = written
                return written
            live = [k for k, v in enumerate(operation.outputs) if self.graph.avals[v].differentiable]
            fn, at = self._function(number, moving, cuts)
            try:
                _, pull = jax.vjp(fn, *at)
            except REFUSALS as error:
                raise refusal(operation, error) from error

            def pullback(found: Sequence[Array | None]) -> tuple[Array, ...]:
                full = []
                for k in live:
                    aval = self.graph.avals[operation.outputs[k]]
                    c = found[k]
                    full.append(jnp.zeros(aval.shape, aval.dtype) if c is None else c)
                return pull(full)

            self._pulls[key] = pullback
        return self._pulls[key]


def _passing(tangent: Array, cut: np.ndarray | None) -> Array:
    return tangent if cut is None else jnp.where(cut, jnp.zeros((), tangent.dtype), tangent)


def _of_moving(tangent: Array, given: Sequence[Array]) -> Array:
    """A tangent that is zero where none is given, also at a pole of the derivative."""
    moves = reduce(or_, [v != 0 for v in given])
    return jnp.where(moves, tangent, jnp.zeros((), tangent.dtype))


def _passes_none(operation: Operation) -> bool:
    """Whether no credit passes an operation, backwards or forwards."""
    return operation.name in NO_DERIVATIVE | NO_REVERSE or without_derivative(operation)


def _has_functions(operation: Operation) -> bool:
    """Whether an operation runs others: loops, branches, custom derivatives."""
    return any(
        callable(p) or hasattr(p, "jaxpr") or hasattr(p, "eqns") for p in _flat(operation.params.values())
    )


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, (tuple, list)) else (value,)


def _backward_only(operation: Operation) -> bool:
    """Whether a loop has operations in its rounds that have no forward derivative."""
    body = operation.loop.body.operations if operation.loop is not None else ()
    return any(inner.name == "custom_vjp_call" or _backward_only(inner) for inner in body)
