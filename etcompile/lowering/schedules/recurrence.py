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
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.ir.kinds import KINDS
from etcompile.ir.ops import OPS
from etcompile.ir.program import Argument, Equation, Ref, TraceProgram
from etcompile.lowering.evaluate import EVALUATE, Context
from etcompile.lowering.pushed import PushedTransition

__all__ = [
    "Again",
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

    def asked(
        self, weight: Mapping[str, Any], later: Mapping[str, Rows] | None = None
    ) -> tuple[dict[str, Rows], dict[str, Rows]]:
        """a_t and a_0: what the chunk's gradients ask of each step's additions, and of the traces at its start.

        ``weight`` is what a contraction counts in its gradient: a number, or one per step. With ``later``, a_0 of the steps after
        these, their gradients ask as well.
        """
        signals = {
            e.name: tuple(
                None if s is None else weighted(s, weight[e.name])
                for s in self.plain[value_key(referred(e.args[0]))] or ()
            )
            for e in self.traces.contracts
            if e.name in weight
        }

        dtype = _widest(self.added, self.start)

        # sum_t contract(L_t, e_t), with the positions' share of a contraction alone: linear in what is added
        def contracted(found: dict[str, Rows], before: dict[str, Rows], signal: dict[str, Rows]) -> Array:
            total = jnp.zeros((), dtype)
            for e in self.traces.contracts:
                rows = _trace(e.args[1], found, before)
                product = _dot(signal[e.name], rows) if rows is not None and e.name in signal else None
                if product is not None:
                    total = total + jnp.sum(product)
            return total

        one = jnp.ones((), dtype)
        if self.again is not None:
            return self._step_by_step(self._zeros() if later is None else later, signals, contracted, one)

        def total(added: dict[str, Rows], start: dict[str, Rows]) -> Any:
            end, per_step = self._run(added, start, signals, contracted)
            return jnp.sum(per_step) if later is None else (jnp.sum(per_step), end)

        asks = one if later is None else (one, dict(later))
        return jax.linear_transpose(total, dict(self.added), dict(self.start))(asks)

    def left(self) -> dict[str, list[Left]]:
        """r_t and r_0, per carried trace and row: how much of each step's additions, and of the traces at the start, is in it."""
        seeds = [
            (name, k) for name, rows in self.start.items() for k, row in enumerate(rows) if row is not None
        ]
        result: dict[str, list[Any]] = {name: [None] * len(rows) for name, rows in self.start.items()}
        if not seeds:
            return result
        ends = self._step_by_step
        if self.again is None:
            ends = jax.linear_transpose(
                lambda added, start: self._run(added, start, None, None)[0],
                dict(self.added),
                dict(self.start),
            )
        stacked = {
            name: tuple(
                None
                if row is None
                else jnp.stack([jnp.full(row.shape, seed == (name, k), row.dtype) for seed in seeds])
                for k, row in enumerate(rows)
            )
            for name, rows in self.start.items()
        }
        found = jax.vmap(ends)(stacked)
        for j, (name, k) in enumerate(seeds):
            result[name][k] = jax.tree.map(lambda v, j=j: v[j], found)
        return result

    def _run(
        self, added: dict[str, Rows], start: dict[str, Rows], signals: Any, contracted: Callable | None
    ) -> tuple[dict[str, Rows], Any]:
        """The trace equations forward in time, with what each step adds given: e_t = D_t e_{t-1} + added_t, for one."""

        def one(before: dict[str, Rows], now: Any) -> tuple[dict[str, Rows], Array | None]:
            added, plain, signal = now
            return self._step(before, added, plain, signal, contracted)

        steps = (added, self._read, signals)
        return lax.scan(
            one, start, steps, length=None if jax.tree.leaves(steps) else 0
        )  # 0: all of it is zero

    def _step_by_step(
        self,
        later: Mapping[str, Rows],
        signals: Any = None,
        contracted: Callable | None = None,
        one: Array | None = None,
    ) -> tuple[dict[str, Rows], dict[str, Rows]]:
        """The same transposed, each step by itself: JAX would keep what all of a loop's transitions are made of."""
        again = self.again
        assert again is not None
        added = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), dict(self.added))

        def back(later: dict[str, Rows], now: Any) -> tuple[dict[str, Rows], dict[str, Rows]]:
            plain, signal, given = now
            known = {**plain, **again.make(given)}
            pull = jax.linear_transpose(
                lambda before, added: self._step(before, added, known, signal, contracted),
                dict(self.start),
                added,
            )
            return pull((later, one))

        start, steps = lax.scan(back, dict(later), (self._read, signals, again.given), reverse=True)
        return steps, start

    def _zeros(self) -> dict[str, Rows]:
        return jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), dict(self.start))

    @property
    def _read(self) -> dict[str, Value]:
        """What the equations read beside traces and what they add, for all steps."""
        read = (e for e in self.traces.first if not OPS[e.op].injects)
        return {key: self.plain[key] for e in read for key in map(value_key, e.refs) if key in self.plain}

    def _step(
        self,
        before: dict[str, Rows],
        added: dict[str, Rows],
        plain: Mapping[str, Value],
        signal: Any,
        contracted: Callable | None,
    ) -> tuple[dict[str, Rows], Array | None]:
        """The traces after one step, and what it contracts."""
        found: dict[str, Any] = {}
        for e in self.traces.first:
            found[e.name] = added.get(e.name) if OPS[e.op].injects else self._value(e, plain, found, before)
        kept = {name: _kept(rows, found[name]) for name, rows in before.items()}
        return kept, contracted(found, before, signal) if contracted else None

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
            return None if rows is None else tuple(_dot(line, rows) for line in transition)
        if OPS[e.op].by_unit:
            units, rows = args
            return None if rows is None else _scaled_rows(units, rows)
        return EVALUATE[e.op](self.context, e, args)


def _trace(argument: Argument, found: dict[str, Rows], before: dict[str, Rows]) -> Rows | None:
    ref = referred(argument)
    return before.get(ref.name) if ref.delay else found[ref.name]


def _kept(before: Rows, now: Rows | None) -> Rows:
    return tuple(
        None if b is None else jnp.zeros_like(b) if v is None else v.astype(b.dtype)
        for b, v in zip(before, now or (None,) * len(before), strict=True)
    )


def _dot(line: Sequence[Array | None], rows: Rows) -> Array | None:
    terms = [d * row for d, row in zip(line, rows, strict=True) if d is not None and row is not None]
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


def _widest(*trees: Any) -> Any:
    return jnp.result_type(jnp.float32, *[v.dtype for v in jax.tree.leaves(trees)])
