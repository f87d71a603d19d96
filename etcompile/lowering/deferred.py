"""Traces that are written once in some steps: what is added in between stands beside them as f and x.

A step reads a trace to contract it, reads it again to decay it, and writes it. With c the product of the transitions since it
was last written, at s,

    e_t = c e_s + sum_{s<tau<=t} f_tau (x) x_tau,    c <- D_t c,   f_tau <- D_t f_tau

the trace is read alone, and a gradient is contract(L c, e_s) + sum_tau (L f_tau) (x) x_tau, whose sum is one product over tau and
the batch. The numbers are those of a trace written at every step, to rounding.
Which traces, and how many steps: :mod:`etcompile.lowering.write_every`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.lowering.geometry import TraceGeometry
from etcompile.lowering.in_place import changed_if, spread_once

__all__ = ["Deferral", "DeferredTrace", "Outer"]

Array = Any
#: One array for each hidden state of a group; None: zero for every input.
Rows = tuple[Array | None, ...]
Matrix = tuple[Rows, ...]
#: What the operation of a site reads, or the factor made of it.
Presynaptic = Any


@dataclasses.dataclass(frozen=True)
class Outer:
    """f (x) x of one step, not multiplied out: what the equation ``name`` adds to a trace that is written later."""

    name: str
    f: Rows
    x: Presynaptic


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeferredTrace:
    """A trace as it was last written, and what happened to it since.

    Attributes
    ----------
    written : rows
        As it is stored.
    since : matrix
        The product of the transitions since, over the positions of the group.
    added : dict of str to (rows, presynaptic)
        By equation, for each step since: f, decayed up to now, over the span of y, and x. Zero in the place of steps to come.
    count : array
        Steps since.
    """

    written: Rows
    since: Matrix
    added: dict[str, tuple[Rows, Presynaptic]]
    count: Array

    def decayed(self, geometry: TraceGeometry, transition: Matrix) -> DeferredTrace:
        """The transition of a step times the trace."""

        def of_span(d: Array | None) -> Array | None:
            return None if d is None else geometry.from_positions(d)

        placed = tuple(tuple(map(of_span, line)) for line in transition)
        columns = range(len(self.since))
        since = tuple(
            tuple(_dot(line, [row[j] for row in self.since]) for j in columns) for line in transition
        )
        added = {name: (tuple(_dot(line, f) for line in placed), x) for name, (f, x) in self.added.items()}
        return DeferredTrace(
            self.written, _in_place_of(since, self.since), _all_in_place_of(added, self.added), self.count
        )

    def __add__(self, other: Outer) -> DeferredTrace:
        fs, xs = self.added[other.name]

        def put(of_steps: Array, now: Array) -> Array:
            now = jnp.broadcast_to(now, of_steps.shape[1:]).astype(of_steps.dtype)
            return lax.dynamic_update_index_in_dim(of_steps, now, self.count, 0)

        rows = tuple(
            before if before is None or now is None else put(before, now)
            for before, now in zip(fs, other.f, strict=True)
        )
        added = {**self.added, other.name: (rows, jax.tree.map(put, xs, other.x))}
        return dataclasses.replace(self, added=added)

    __radd__ = __add__

    def contracted(self, geometry: TraceGeometry, signal: Rows) -> Array | None:
        """A gradient of the weight: the sum over states, examples and steps."""
        columns = range(len(self.since))
        credit = [_dot(signal, [row[j] for row in self.since]) for j in columns]
        pairs = [
            (spread_once(geometry.factor(c, e)), e)
            for c, e in zip(credit, self.written, strict=True)
            if c is not None and e is not None
        ]
        found = [geometry.contract(pairs)] if pairs else []
        placed = [None if s is None else geometry.from_positions(s) for s in signal]
        for fs, xs in self.added.values():
            of_span = _dot(placed, fs)
            if of_span is not None:
                credits = jax.vmap(geometry.place)(of_span)
                span = geometry.relation.span
                found.append(geometry.site.pulled_within(xs, credits, span, steps=True))
        return reduce(operator.add, found) if found else None


@dataclasses.dataclass(frozen=True, eq=False)
class Deferral:
    """How a trace of a program is deferred.

    Attributes
    ----------
    every : int
        Steps from one time that it is written to the next.
    geometry : TraceGeometry
    rows : tuple of bool
        Which rows are carried.
    reached : matrix of bool
        Whether c can be other than zero, for each pair of states.
    position, span : (shape, dtype)
        Of an entry of c and of f.
    read : mapping of str to presynaptic
        By equation that adds to it, shapes and dtypes of x.
    """

    every: int
    geometry: TraceGeometry
    rows: tuple[bool, ...]
    reached: tuple[tuple[bool, ...], ...]
    position: jax.ShapeDtypeStruct
    span: jax.ShapeDtypeStruct
    read: Mapping[str, Any]

    def begun(self, rows: Rows) -> DeferredTrace:
        """A trace that has just been written."""
        return DeferredTrace(rows, self._unit(), self._nothing(), jnp.zeros((), jnp.int32))

    def at_next_step(self, trace: DeferredTrace) -> DeferredTrace:
        """Before a step: written first where there is no place for what the step adds."""
        full = trace.count == self.every
        rows = self._written_if(full, trace)
        since = jax.tree.map(lambda new, old: jnp.where(full, new, old), self._unit(), trace.since)
        added = {
            name: (jax.tree.map(lambda f: jnp.where(full, jnp.zeros((), f.dtype), f), fs), xs)
            for name, (fs, xs) in trace.added.items()
        }
        return DeferredTrace(rows, since, added, jnp.where(full, 0, trace.count))

    def after_step(self, trace: DeferredTrace) -> DeferredTrace:
        return dataclasses.replace(trace, count=trace.count + 1)

    def whole(self, trace: DeferredTrace) -> Rows:
        """The rows as they would have been written by now, in the dtype that they are stored in."""
        return self._written_if(trace.count > 0, trace)

    def _written_if(self, wanted: Array, trace: DeferredTrace) -> Rows:
        def write(rows: Rows, given: tuple[Matrix, dict[str, tuple[Rows, Presynaptic]]]) -> Rows:
            return self._whole(DeferredTrace(rows, *given, trace.count))

        return changed_if(wanted, write, trace.written, (trace.since, trace.added))

    def _whole(self, trace: DeferredTrace) -> Rows:
        geometry = self.geometry
        made: list[Array | None] = []
        for k, before in enumerate(trace.written):
            if before is None:
                made.append(None)
                continue
            terms = [
                geometry.spread(spread_once(geometry.factor(c, e))) * e
                for c, e in zip(trace.since[k], trace.written, strict=True)
                if c is not None and e is not None
            ]
            for fs, xs in trace.added.values():
                if (f := fs[k]) is not None:
                    terms += [self._outer(f, xs, tau) for tau in range(self.every)]
            made.append(reduce(operator.add, terms).astype(before.dtype))
        return tuple(made)

    def _outer(self, f: Array, x: Presynaptic, tau: int) -> Array:
        """What the step number ``tau`` since the last write adds to a row."""
        now = jax.tree.map(lambda v: v[tau], x)
        return self.geometry.spread(spread_once(f[tau])) * self.geometry.presynaptic(now)

    def _unit(self) -> Matrix:
        def entry(k: int, j: int) -> Array | None:
            if not self.reached[k][j]:
                return None
            return jnp.full(self.position.shape, float(k == j), self.position.dtype)

        every = range(len(self.rows))
        return tuple(tuple(entry(k, j) for j in every) for k in every)

    def _nothing(self) -> dict[str, tuple[Rows, Presynaptic]]:
        def zeros(of: Any) -> Array:
            return jnp.zeros((self.every, *of.shape), of.dtype)

        return {
            name: (tuple(zeros(self.span) if live else None for live in self.rows), jax.tree.map(zeros, x))
            for name, x in self.read.items()
        }


def _dot(a: Sequence[Array | None], b: Sequence[Array | None]) -> Array | None:
    terms = [x * y for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return reduce(operator.add, terms) if terms else None


def _in_place_of(new: Any, old: Any) -> Any:
    """Entries of the shape and dtype that they had: what can be other than zero is an array, also where it is zero now."""
    if isinstance(old, tuple):
        return tuple(_in_place_of(n, o) for n, o in zip(new, old, strict=True))
    if old is None:
        return None
    return jnp.zeros_like(old) if new is None else jnp.broadcast_to(new, old.shape).astype(old.dtype)


def _all_in_place_of(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    return {name: (_in_place_of(fs, old[name][0]), xs) for name, (fs, xs) in new.items()}
