"""The first pass over a chunk: its states, and with them what was computed at a price; no derivatives.

What reads no state (encoders, embeddings, convolutions of the input) leaves the loop: it is computed for all steps at once.
So does the part of a product that reads none (:mod:`etcompile.lowering.schedules.divided`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.analysis.index_rules import CHEAP
from etcompile.frontend.jaxpr import (
    Operation,
    has_effects,
    needed_operations,
    read,
    run_operations,
    variables,
)
from etcompile.lowering.derivatives import LoweredModel
from etcompile.lowering.mapped import mapped
from etcompile.lowering.schedules.divided import divided_products
from etcompile.lowering.schedules.split import expands

__all__ = ["FirstPass", "Passed", "in_blocks"]

Array = Any

#: Bytes of states that a cache holds, and steps of a block at most.
_CACHED, _BLOCK = 1 << 21, 32
#: Operations of which no derivative reads what they are applied to, indices and conditions apart.
_LINEAR = frozenset(
    """add add_any broadcast_in_dim concatenate convert_element_type copy dynamic_slice dynamic_update_slice gather neg pad
    reduce_sum reshape rev scatter scatter-add select_n slice split squeeze sub transpose""".split()  # noqa: SIM905
)


@dataclasses.dataclass(frozen=True)
class Passed:
    """What the first pass leaves.

    Attributes
    ----------
    states : list of arrays
        After the chunk.
    before : list of arrays
        Before each of its steps, time on axis 0.
    starts : list of arrays or None
        Before each block of steps, if they are taken in blocks.
    across : dict of int to array
        What the loop was given, made for all steps at once.
    costly : dict of int to array
        Variables of the step that are not worth computing again: products, convolutions, random numbers; and the new states, or
        XLA would compute them once more in every loop and product that reads an output. Time on axis 0.
    """

    states: list[Array]
    before: list[Array]
    costly: dict[int, Array]
    across: dict[int, Array]
    starts: list[Array] | None = None

    def part(self, first: Any, count: int) -> Passed:
        """Some of the steps, where these are not taken in blocks; :attr:`states` are still those after all."""
        assert self.starts is None, "states of all steps are kept"
        before, costly = jax.tree.map(
            lambda v: lax.dynamic_slice_in_dim(v, first, count), (self.before, self.costly)
        )
        return Passed(self.states, before, costly, {})


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The operations of a step on the way to its new states.

    Attributes
    ----------
    ahead : tuple of Operation
        They read inputs and weights alone, and at least one of them is costly: for all steps at once.
    across : tuple of int
        What they make that the loop reads.
    inside : tuple of Operation
        The loop's; some that are cheap stand in both.
    once : tuple of Operation
        Parts of weights, which both read.
    """

    ahead: tuple[Operation, ...]
    across: tuple[int, ...]
    inside: tuple[Operation, ...]
    once: tuple[Operation, ...]


class FirstPass:
    """The model alone, step by step."""

    def __init__(self, model: LoweredModel, wide: int | None = None) -> None:
        #: What is larger counts as wide: it is made again where it is read, if that is quick.
        self._wide = wide
        self._model = model
        self._graph = model.analysis.split.body
        self._weights = self._graph.inputs[: len(model.weight_vars)]
        self._states = model.analysis.model.state_vars
        self._divided_graph = divided_products(self._graph, self._weights, self._states)
        self._avals = self._divided_graph.avals
        self._after = model.analysis.model.new_state_vars

    def last(self, weights: list[Array], states: list[Array], inputs: list[Array]) -> list[Array]:
        """The states after the steps alone: nothing is kept of these."""
        parts, values = self._parts, partial(self._values, self._once(weights))

        def first(x: list[Array]) -> dict[int, Array]:
            env = run_operations(parts.ahead, values(None, x))
            return {v: env[v] for v in parts.across}

        def forward(now: list[Array], given: Any) -> tuple[list[Array], None]:
            x, made = given
            env = run_operations(parts.inside, {**values(now, x), **made})
            return [read(env, v) for v in self._after], None

        return lax.scan(forward, states, (inputs, mapped(first, inputs) if parts.ahead else {}))[0]

    def __call__(self, weights: list[Array], states: list[Array], inputs: list[Array]) -> Passed:
        """Run it; ``inputs`` have time on axis 0."""
        parts, values = self._parts, partial(self._values, self._once(weights))

        def first(x: list[Array]) -> dict[int, Array]:
            env = run_operations(parts.ahead, values(None, x))
            return {v: env[v] for v in {*parts.across, *self._costly} if v in env}

        def forward(now: list[Array], given: Any) -> tuple[list[Array], Any]:
            x, made = given
            env = run_operations(parts.inside, {**values(now, x), **made})
            costly = {v: env[v] for v in self._costly if v in env and v not in ahead}
            return [read(env, v) for v in self._after], (now, costly)

        ahead = mapped(first, inputs) if parts.ahead else {}
        across = {v: ahead[v] for v in parts.across}
        block = self.block(jax.tree.leaves(inputs)[0].shape[0]) if inputs else 0
        if not block:
            last, (before, costly) = lax.scan(forward, states, (inputs, across))
            return Passed(
                last, before, {**costly, **{v: ahead[v] for v in self._costly if v in ahead}}, across
            )

        def of_block(now: list[Array], given: Any) -> tuple[list[Array], Any]:
            end, found = lax.scan(forward, now, given)
            return end, (now, found)

        last, (starts, found) = lax.scan(of_block, states, in_blocks((inputs, across), block))
        before, costly = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), found)
        costly |= {v: ahead[v] for v in self._costly if v in ahead}
        return Passed(last, before, costly, across, starts)

    def again(self, weights: list[Array], start: list[Array], given: Any) -> list[Array]:
        """States before each step of a block; ``given`` has the inputs of its steps and what of them is known."""
        once = self._once(weights)

        def forward(now: list[Array], given: Any) -> tuple[list[Array], list[Array]]:
            x, known = given
            left = [
                operation for operation in self._parts.inside if not set(operation.outputs) <= known.keys()
            ]
            env = run_operations(left, {**self._values(once, now, x), **known})
            return [read(env, v) for v in self._after], now

        return lax.scan(forward, start, given)[1]

    def _once(self, weights: list[Array]) -> dict[int, Array]:
        """Weights, and what the same parts of them are in every step."""
        return run_operations(self._parts.once, dict(zip(self._weights, weights, strict=True)))

    def _values(self, once: dict[int, Array], now: list[Array] | None, x: list[Array]) -> dict[int, Array]:
        own = [None] * len(self._states) if now is None else now
        given = zip(self._graph.inputs[len(self._weights) :], [*own, *x], strict=True)
        return {**once, **dict(given)}

    @cached_property
    def remade(self) -> tuple[int, ...]:
        """Numbers of the states that derivatives read and that are wide: in blocks they are made again from a block's start."""
        read = self._read_by_derivatives
        return tuple(k for k, v in enumerate(self._states) if self._is_wide(v) and v in read)

    def block(self, steps: int) -> int:
        """Steps of a block: such that states fit into a cache; 0 where they do anyway, or where nothing would be gained."""
        size = self._bytes(self._states[k] for k in self.remade)
        if self._model.effects is not None or size * steps <= _CACHED:
            return 0
        return next((n for n in range(min(_BLOCK, steps // 2), 3, -1) if steps % n == 0), 0)

    @cached_property
    def bytes_of_a_step(self) -> int:
        """What one step holds in a chunk, about: its values, and as much for their derivatives; of wide ones, what is kept."""
        live = needed_operations(self._graph.operations, self._graph.outputs, has_effects)
        made = [v for operation in live for v in operation.outputs if not self._is_wide(v)]
        kept = (*self._states, *self._costly, *self._parts.across)
        wide = [v for v in kept if self._is_wide(v) and v in self._read_by_derivatives]
        return max(1, 2 * self._bytes(made) + self._bytes(dict.fromkeys(wide)))

    @cached_property
    def bytes_left(self) -> int:
        """What the first pass leaves of one step."""
        return self._bytes(dict.fromkeys((*self._states, *self._costly, *self._parts.across)))

    @cached_property
    def _read_by_derivatives(self) -> set[int]:
        nonlinear = [operation for operation in self._graph.operations if operation.name not in _LINEAR]
        return {v for operation in nonlinear for v in variables(operation.inputs)}

    def _bytes(self, variables: Iterable[int]) -> int:
        return sum(a.size * a.dtype.itemsize for a in (self._avals[v] for v in variables))

    def _is_wide(self, variable: int) -> bool:
        return self._wide is not None and self._avals[variable].size > self._wide

    def _narrows(self, operation: Operation) -> bool:
        """Whether an operation makes of something wide what is not."""
        return any(map(self._is_wide, variables(operation.inputs))) and not any(
            map(self._is_wide, operation.outputs)
        )

    @cached_property
    def _needed(self) -> tuple[Operation, ...]:
        return self._needed_of(self._graph.operations)

    def _needed_of(self, operations: Sequence[Operation]) -> tuple[Operation, ...]:
        """Operations on the way to the new states, and those that do something beside their results.

        Also those that read something wide and make less of it: it is there, and need not be read again for all steps.
        """

        def kept(operation: Operation) -> bool:
            return has_effects(operation) or (operation.loop is None and self._narrows(operation))

        return needed_operations(operations, self._after, kept)

    @cached_property
    def _costly(self) -> tuple[int, ...]:
        """Variables on the way to the new states whose operations are worth keeping, and what comes from outside."""
        costly = [v for operation in self._needed if self._is_costly(operation) for v in operation.outputs]
        new = [v for v in self._after if isinstance(v, int) and self._is_plain(v) and not self._is_wide(v)]
        return tuple(dict.fromkeys([*costly, *new, *(self._model.effects or ())]))

    def _is_costly(self, operation: Operation) -> bool:
        costly = operation.name not in CHEAP and not self._expands(operation)
        return (costly or self._narrows(operation)) and all(map(self._is_plain, operation.outputs))

    def _expands(self, operation: Operation) -> bool:
        return self._wide is not None and expands(operation, self._avals, self._wide)

    def _is_plain(self, variable: int) -> bool:
        return not jnp.issubdtype(self._avals[variable].dtype, jax.dtypes.extended)

    @cached_property
    def _parts(self) -> _Parts:
        once, needed = self._divided
        still = set(self._model.analysis.model.input_vars)  # made of inputs, and of no state
        moving = set(self._states)
        costly: set[int] = set()  # of what is still: made by a costly operation, or of what one makes
        for operation in needed:
            reads = set(variables(operation.inputs))
            if has_effects(operation) or not moving.isdisjoint(reads):
                moving.update(operation.outputs)
            elif not still.isdisjoint(reads):
                still.update(operation.outputs)
                if self._expands(operation):  # quicker to make in the loop than to read there
                    continue
                if self._is_costly(operation) or not costly.isdisjoint(reads):
                    costly.update(operation.outputs)
        away = [not costly.isdisjoint(operation.outputs) for operation in needed]
        inside = [operation for operation, leaves in zip(needed, away, strict=True) if not leaves]
        wanted = {v for operation in inside for v in variables(operation.inputs)} | set(self._after)
        ahead: list[Operation] = []
        needs: set[int] = set()
        for operation, leaves in zip(reversed(needed), reversed(away), strict=True):
            if leaves or not needs.isdisjoint(operation.outputs):  # what is cheap before them is done twice
                needs.update(variables(operation.inputs))
                ahead.append(operation)
        across = tuple(v for v in costly if v in wanted)
        return _Parts(tuple(reversed(ahead)), across, tuple(inside), once)

    @cached_property
    def _divided(self) -> tuple[tuple[Operation, ...], tuple[Operation, ...]]:
        """The needed operations with products divided: those that take parts of weights, and all others."""
        of_weights, once, others = set(self._weights), [], []
        for operation in self._needed_of(self._divided_graph.operations):
            added = min(operation.outputs, default=-1) >= len(self._graph.avals)  # by dividing a product
            if added and of_weights.issuperset(variables(operation.inputs)):
                of_weights.update(operation.outputs)
                once.append(operation)
            else:
                others.append(operation)
        return tuple(once), tuple(others)


def in_blocks(tree: Any, size: int) -> Any:
    """Arrays with time on axis 0 as blocks of so many steps."""
    return jax.tree.map(lambda v: v.reshape(-1, size, *v.shape[1:]), tree)
