"""Traces of a chunk as recurrences of the size of the states, run backwards.

A trace row's time course at one position does not depend on the weight that it is kept for: every trace equation multiplies by
numbers and transitions, which belong to positions. So the relations of a group whose trace equations are alike form a
class, and two questions are answered once for each class, on arrays over the group's positions:

* what do the gradients of the chunk ask of an addition made at step t (the credit that comes back from later steps)?
* how much of an addition made at step t, or of a trace from before the chunk, is left at its end?

Both are the recurrence transposed: one loop backwards in time, without weights in it. The answers are a_t and r_t of
:mod:`etcompile.lowering.schedules.chunked`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, reduce
from operator import add, mul
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.ir.kinds import KINDS
from etcompile.ir.ops import OPS
from etcompile.ir.program import Argument, Equation, Ref, TraceProgram
from etcompile.lowering.begun import times
from etcompile.lowering.evaluate import EVALUATE, Context
from etcompile.lowering.pushed import PushedTransition

__all__ = [
    "Again",
    "Answers",
    "Left",
    "Recurrence",
    "Rows",
    "TraceClass",
    "referred",
    "trace_classes",
    "value_key",
    "weighted",
]

Array = Any
Value = Any
Rows = tuple[Array | None, ...]

#: Of a row at the end of a chunk: how much of each step's additions, and of the traces at the start, is in it. None: no such row.
Left = tuple[dict[str, Rows], dict[str, Rows]] | None


def value_key(ref: Ref) -> str:
    """The name under which a value, or the value of the step before, is kept for all steps of a chunk."""
    return f"{ref.name}'" if ref.delay else ref.name


def referred(argument: Argument) -> Ref:
    """An argument that is a reference."""
    assert isinstance(argument, Ref)
    return argument


@dataclasses.dataclass(frozen=True)
class TraceClass:
    """Relations of one group with like trace equations; per relation the equations, in one order for all."""

    group: str
    traces: Mapping[str, tuple[Equation, ...]]
    contracts: tuple[Equation, ...]

    @property
    def first(self) -> tuple[Equation, ...]:
        return next(iter(self.traces.values()))

    @cached_property
    def joined(self) -> dict[str, str]:
        """For each addition of the first relation the first one that goes into the same sum and nowhere else: its answers."""
        firsts: dict[str, str] = {}
        return {e.name: firsts.setdefault(self._sum(e.name), e.name) for e in self.first if OPS[e.op].injects}

    def _sum(self, name: str) -> str:
        """The last sum that a value goes into unchanged, with no other reader before."""
        reads = [(e, ref) for e in (*self.first, *self.contracts) for ref in e.refs if ref.name == name]
        if len(reads) != 1:
            return name
        ((e, ref),) = reads
        plain = not ref.delay and OPS[e.op].terms and OPS[e.op].terms[e.args.index(ref)] == 1
        return self._sum(e.name) if plain else name


def trace_classes(program: TraceProgram) -> tuple[TraceClass, ...]:
    """Relations with traces, by class."""
    found: dict[Any, dict[str, tuple[Equation, ...]]] = {}
    contracts: dict[Any, tuple[Equation, ...]] = {}
    of_traces = {e.name for e in program.equations if KINDS[e.type.kind].trace}
    scaled = _scaled(program)
    for relation in program.header.relations:
        traces = tuple(e for e in program.equations if e.name in of_traces and e.type.of == relation.name)
        if not traces:
            continue
        index = {e.name: k for k, e in enumerate(traces)}
        asked = tuple(
            e for e in program.equations if OPS[e.op].contracts and referred(e.args[1]).name in index
        )

        def seen(argument: Argument, index: dict[str, int] = index) -> Any:
            if isinstance(argument, Ref) and argument.name in of_traces:
                return index[argument.name], argument.delay
            return str(argument)

        key = (
            relation.group,
            tuple((e.op, () if OPS[e.op].injects else tuple(map(seen, e.args))) for e in traces),
            tuple((*map(seen, e.args), e.name if e.name in scaled else "") for e in asked),
        )
        found.setdefault(key, {})[relation.name] = traces
        contracts.setdefault(key, asked)
    return tuple(TraceClass(key[0], traces, contracts[key]) for key, traces in found.items())


def _scaled(program: TraceProgram) -> set[str]:
    """Gradient values that do not go straight into a gradient."""
    return {r.name for e in program.equations if KINDS[e.type.kind].gradient for r in e.refs}


@dataclasses.dataclass(frozen=True, eq=False)
class Again:
    """Values that are made at each step where they are needed, since they are not arrays that could be kept for all.

    Attributes
    ----------
    given : pytree of arrays
        What they are made of, time on axis 0.
    make : callable
        These values by name, from one step's share.
    """

    given: Any
    make: Callable[[Any], Mapping[str, Value]]


@dataclasses.dataclass(frozen=True)
class Answers:
    """What is asked of a class of traces over one chunk; empty where it was not asked for.

    Attributes
    ----------
    asked : dict of str to tuple of arrays
        a_t: what the chunk's gradients ask of each step's additions, by the ``outer`` equations of the class's first relation,
        time on axis 0.
    before : dict of str to tuple of arrays
        a_0: what they ask of the traces at its start, by the carried traces.
    left : dict of str to list
        r_t and r_0: how much of each step's additions, and of the traces at the start, is in a row at the end; by carried trace
        and row.
    """

    asked: dict[str, Rows]
    before: dict[str, Rows]
    left: dict[str, list[Left]]


@dataclasses.dataclass(frozen=True, eq=False)
class Recurrence:
    """One class of traces over one chunk.

    Parameters
    ----------
    context : Context
        Knows program and model, but no step.
    traces : TraceClass
    plain : mapping of str to value
        What the equations read beside traces, for all steps, by :func:`value_key`.
    added : mapping of str to tuple of arrays
        Per ``outer`` equation of the class's first relation the shape and dtype of its rows, ``(C, *group shape)``; one for
        those that are :attr:`TraceClass.joined`.
    start : mapping of str to tuple of arrays
        Per carried trace of the first relation the shape and dtype of its rows, over the group's positions.
    again : Again, optional
        Its transitions, where they are not written down; no others are among ``plain`` then.
    """

    context: Context
    traces: TraceClass
    plain: Mapping[str, Value]
    added: Mapping[str, Rows]
    start: Mapping[str, Rows]
    again: Again | None = None

    def backwards(
        self, weight: Mapping[str, Any] | None, later: Mapping[str, Rows] | None = None, *, ends: bool = True
    ) -> Answers:
        """Both answers, by one loop from the last step to the first: in each, the equations of the step transposed.

        Parameters
        ----------
        weight : mapping, optional
            What a contraction counts in its gradient, by name: a number, or one per step. None: no gradient is asked for.
        later : mapping, optional
            a_0 of the steps after these: their gradients ask as well.
        ends : bool
            Whether the traces at the chunk's end are asked for.
        """
        signals, seeds = self._signals(weight or {}), self._seeds() if ends else []
        asks = later if later is not None else _zeros(self.start) if jax.tree.leaves(signals) else None
        first = (None if asks is None else dict(asks), self._seeded(seeds) if seeds else None)
        given = self.again.given if self.again is not None else None
        of_steps = (self._read, signals, given)
        steps = next((v.shape[0] for v in jax.tree.leaves((dict(self.added), of_steps))), 0)
        added = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), dict(self.added))
        one = jnp.ones((), self._dtype)

        def back(after: Any, now: Any) -> tuple[Any, Any]:
            """What is asked of a step's additions, and of the traces before it, by what is asked of those after it."""
            plain, signal, given = now
            known = {**plain, **self.again.make(given)} if self.again is not None else plain

            def kept(added: dict[str, Rows], before: dict[str, Rows]) -> dict[str, Rows]:
                return self._step(added, before, known)[1]

            def kept_and_contracted(added: dict[str, Rows], before: dict[str, Rows]) -> Any:
                found, kept = self._step(added, before, known)
                return kept, self._contracted(found, before, signal)

            asks, left = after
            of_asks = of_left = None
            if asks is not None:
                pull = jax.linear_transpose(kept_and_contracted, added, dict(self.start))
                of_asks, asks = pull((asks, one))
            if left is not None:
                of_left, left = jax.vmap(jax.linear_transpose(kept, added, dict(self.start)))(left)
            return (asks, left), (of_asks, of_left)

        (a_0, r_0), (a_t, r_t) = lax.scan(back, first, of_steps, length=steps, reverse=True)
        if asks is None and weight is not None:  # no contraction counts
            a_t, a_0 = _zeros(self.added), _zeros(self.start)
        left: dict[str, list[Any]] = {name: [None] * len(rows) for name, rows in self.start.items()}
        for j, (name, k) in enumerate(seeds):
            left[name][k] = (
                jax.tree.map(lambda v, j=j: v[:, j], r_t),
                jax.tree.map(lambda v, j=j: v[j], r_0),
            )
        return Answers(a_t or {}, a_0 or {}, left)

    def _signals(self, weight: Mapping[str, Any]) -> dict[str, Rows]:
        """L_t of each contraction that counts, as much as it counts."""
        return {
            e.name: tuple(
                None if s is None else weighted(s, weight[e.name])
                for s in self.plain[value_key(referred(e.args[0]))] or ()
            )
            for e in self.traces.contracts
            if e.name in weight
        }

    def _seeds(self) -> list[tuple[str, int]]:
        """The rows at the end: of each carried trace those that it has."""
        return [
            (name, k) for name, rows in self.start.items() for k, row in enumerate(rows) if row is not None
        ]

    def _seeded(self, seeds: list[tuple[str, int]]) -> dict[str, Rows]:
        """Asking for each row at the end alone; which of them, on axis 0."""
        return {
            name: tuple(
                None
                if row is None
                else jnp.stack([jnp.full(row.shape, seed == (name, k), row.dtype) for seed in seeds])
                for k, row in enumerate(rows)
            )
            for name, rows in self.start.items()
        }

    @property
    def _dtype(self) -> Any:
        rows = jax.tree.leaves((dict(self.added), dict(self.start)))
        return jnp.result_type(jnp.float32, *[v.dtype for v in rows])

    @property
    def _read(self) -> dict[str, Value]:
        """What the equations read beside traces and what they add, for all steps."""
        read = (e for e in self.traces.first if not OPS[e.op].injects)
        return {key: self.plain[key] for e in read for key in map(value_key, e.refs) if key in self.plain}

    def _step(
        self, added: dict[str, Rows], before: dict[str, Rows], plain: Mapping[str, Value]
    ) -> tuple[dict[str, Any], dict[str, Rows]]:
        """The trace equations of a step, with what it adds given, and what is kept: e_t = D_t e_{t-1} + added_t, for one."""
        found: dict[str, Any] = {}
        for e in self.traces.first:
            found[e.name] = added.get(e.name) if OPS[e.op].injects else self._value(e, plain, found, before)
        return found, {name: _kept(rows, found[name]) for name, rows in before.items()}

    def _contracted(self, found: dict[str, Any], before: dict[str, Rows], signal: dict[str, Rows]) -> Array:
        """The sum of contract(L_t, e_t), with the positions' share of each alone: linear in what is added."""
        total = jnp.zeros((), self._dtype)
        for e in self.traces.contracts:
            rows = _trace(e.args[1], found, before)
            product = _dot(signal[e.name], rows) if rows is not None and e.name in signal else None
            if product is not None:
                total = total + jnp.sum(product)
        return total

    def _value(
        self, e: Equation, plain: Mapping[str, Value], found: dict[str, Rows], before: dict[str, Rows]
    ) -> Any:
        args: list[Any] = [
            a
            if not isinstance(a, Ref)
            else plain[value_key(a)]
            if value_key(a) in plain
            else _trace(a, found, before)
            for a in e.args
        ]
        if OPS[e.op].couples:
            transition, rows = args
            if isinstance(transition, PushedTransition):
                return None if rows is None else transition.of_positions(rows)
            product = times if self.context.model.analysis.steep else mul
            return None if rows is None else tuple(_dot(line, rows, product) for line in transition)
        if OPS[e.op].by_unit:
            units, rows = args
            return None if rows is None else _scaled_rows(units, rows)
        return EVALUATE[e.op](self.context, e, args)


def _zeros(shapes: Mapping[str, Rows]) -> dict[str, Rows]:
    return jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), dict(shapes))


def _trace(argument: Argument, found: dict[str, Rows], before: dict[str, Rows]) -> Rows | None:
    ref = referred(argument)
    return before.get(ref.name) if ref.delay else found[ref.name]


def _kept(before: Rows, now: Rows | None) -> Rows:
    return tuple(
        None if b is None else jnp.zeros_like(b) if v is None else v.astype(b.dtype)
        for b, v in zip(before, now or (None,) * len(before), strict=True)
    )


def _dot(
    line: Sequence[Array | None], rows: Rows, product: Callable[[Array, Array], Array] = mul
) -> Array | None:
    terms = [product(d, row) for d, row in zip(line, rows, strict=True) if d is not None and row is not None]
    return reduce(add, terms) if terms else None


def weighted(values: Array, weight: Any) -> Array:
    """Values of all steps times one number, or one per step."""
    if isinstance(weight, (int, float)):
        return values if weight == 1 else values * jnp.asarray(weight, values.dtype)
    return values * weight.astype(values.dtype).reshape(-1, *(1,) * (values.ndim - 1))


def _scaled_rows(units: Any, rows: Rows) -> Rows:
    """Rows times the numbers of their units: one for each state, or one for all of them."""
    of_row = units if isinstance(units, tuple) else (units,) * len(rows)
    return tuple(None if n is None or r is None else n * r for n, r in zip(of_row, rows, strict=True))
