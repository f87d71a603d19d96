"""Traces that are written once in some steps: what is added in between stands beside them as f and x.

A step reads a trace to contract it, reads it again to decay it, and writes it. With c the product of the transitions since it
was last written, at s,

    e_t = c e_s + sum_{s<tau<=t} f_tau (x) x_tau,    c <- D_t c,   f_tau <- D_t f_tau

the trace is read alone, and a gradient is contract(L c, e_s) + sum_tau (L f_tau) (x) x_tau, whose sum is one product over tau and
the batch. The numbers are those of a trace written at every step, to rounding.

Let e be the bytes of a trace. A step that writes it reads it twice, to contract and to decay it, and writes it: 3 e. One that
defers that reads it once, and in k steps reads and writes it once more: (1 + 2 / k) e. In place of that, a product has k times as
many rows at each step: 2 k operations for each number of the trace. So k is of use where memory is slow beside products, and not
in a cache.

The traces of a program that are written later: :func:`deferrals`. What one of them is in between: :class:`DeferredTrace`.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from etcompile.errors import OptionError
from etcompile.ir.kinds import KINDS
from etcompile.ir.ops import OPS
from etcompile.ir.program import Equation, TraceProgram
from etcompile.ir.support import support
from etcompile.lowering.caches import shared_cache
from etcompile.lowering.derivatives import LoweredModel
from etcompile.lowering.geometry import TraceGeometry
from etcompile.lowering.in_place import changed_if, spread_once
from etcompile.schedule import Schedule

__all__ = ["Deferral", "DeferredTrace", "Outer", "deferrals"]

Array = Any
#: One array for each hidden state of a group; None: zero for every input.
Rows = tuple[Array | None, ...]
Matrix = tuple[Rows, ...]
#: What the operation of a site reads, or the factor made of it.
Presynaptic = Any
#: Shape and dtype of one entry of a value, of lists where that is several arrays.
Entry = Callable[[Equation], tuple[Any, Any]]

#: Operations of a product of few rows in the time in which a number goes through memory, both in one precision.
_BALANCE = 16.0
#: Most steps: at each write all that was added is multiplied out, by code that is as long.
_MOST = 8
#: From which part of the time on it is worth the code.
_WORTH = 0.9


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


# -- which traces, and in how many steps ------------------------------------------------------------------------------


def deferrals(
    program: TraceProgram,
    model: LoweredModel,
    schedule: Schedule,
    rows: Mapping[str, Any],
    entry: Entry,
    stored: Callable[[str], Any],
) -> dict[str, Deferral]:
    """The traces that are written later, by name.

    Parameters
    ----------
    program : TraceProgram
    model : LoweredModel
    schedule : Schedule
    rows : mapping of str to table
        Entries of each carried value that are kept.
    entry : callable
    stored : callable
        The dtype in which a trace is stored.

    Raises
    ------
    OptionError
        The schedule asks for it, and none of the traces can be written later.
    """
    traces = {
        name: kept
        for name, kept in rows.items()
        if KINDS[program.equation(name).type.kind].trace and any(kept)
    }
    asked = schedule.write_every
    if asked == "auto":
        size = sum(_bytes(model, program.equation(name), kept, stored(name)) for name, kept in traces.items())
        if size <= shared_cache() or jax.default_backend() != "cpu" or schedule.mesh is not None:
            return {}
    reason = _reason(program, schedule)
    added = {name: () if reason else _added(program, model, name, kept) for name, kept in traces.items()}
    if asked != "auto" and not any(added.values()):
        raise OptionError(
            f"no trace of {program.name} can be written later.",
            got=f"write_every={asked}",
            expected=reason or "a trace e = D e + f (x) x, of a matrix or a kernel",
            hint="leave write_every out: traces are then written at every step where they have to be.",
        )

    def every(name: str) -> int:
        geometry = model.traces[program.equation(name).type.of]
        best = _best(geometry, len(added[name]), rows[name], model.examples, stored(name))
        return best if isinstance(asked, str) else asked

    steps = {name: every(name) for name, outers in added.items() if outers}
    return {
        name: _deferral(program, model, name, added[name], rows[name], entry, k)
        for name, k in steps.items()
        if k > 1
    }


def _reason(program: TraceProgram, schedule: Schedule) -> str:
    """What would have to be otherwise of the whole program; nothing where traces can be written later."""
    if program.window is not None:
        return "a rule that does not run in windows"
    return "a schedule without events" if schedule.events is not None else ""


def _best(geometry: TraceGeometry, terms: int, rows: Sequence[bool], examples: int | None, dtype: Any) -> int:
    """Steps between two writes that take the least time, where memory holds the traces.

    1 of kernels, where it was measured to be slower: they have a sum over places as well.
    """
    if math.prod(geometry.logical_shape[a] for a in geometry.summed) != (examples or 1):
        return 1
    # For each step kept, beside one pass over the rows of the trace, which may be stored in fewer bits.
    narrower = np.dtype(geometry.dtype).itemsize / np.dtype(dtype).itemsize
    of_product = 2 * terms * narrower / (_BALANCE * sum(rows))

    def time(k: int) -> float:
        return 3.0 if k == 1 else 1 + 2 / k + k * of_product

    best = min(range(1, _MOST + 1), key=time)
    return best if time(best) <= _WORTH * time(1) else 1


def _bytes(model: LoweredModel, equation: Equation, rows: Sequence[bool], dtype: Any) -> int:
    return sum(rows) * math.prod(model.traces[equation.type.of].shape) * np.dtype(dtype).itemsize


# -- which can be -----------------------------------------------------------------------------------------------------


def _added(program: TraceProgram, model: LoweredModel, name: str, rows: Any) -> tuple[str, ...]:
    """The equations ``f (x) x`` that a trace adds at each step, where it is ``D e + their sum`` and is else contracted alone.

    None of them: it is made in another way, or what is added is no smaller than the trace.
    """
    made = program.equation(name).type
    if not _smaller(model, made.of):
        return ()
    found: list[str] = []
    chain = [program.equation(name)]
    while not OPS[chain[-1].op].couples:
        one, rest = _one_outer(program, chain[-1])
        if one is None or rest is None:
            return ()
        found.append(one)
        chain.append(rest)
    before = chain[-1].refs[-1]
    if (before.name, before.delay) != (name, -1):
        return ()
    own = {*found, *(e.name for e in chain)}
    others = [e for e in program.equations if e.name not in own]
    read = [(e, r) for e in others for r in e.refs if r.name in own]
    now = any(r.delay == 0 for _, r in read)  # then rows count that no later step reads
    if any(not OPS[e.op].contracts or r.name != name for e, r in read) or (
        now and rows != support(program)[name]
    ):
        return ()
    return () if any(KINDS[e.type.kind].trace and e.type.of == made.of for e in others) else tuple(found)


def _one_outer(program: TraceProgram, at: Equation) -> tuple[str | None, Equation | None]:
    """Of the sum of an outer product and something else of this step: the name of the one, and the other."""
    if OPS[at.op].terms != (1.0, 1.0) or len(at.refs) != 2 or any(r.delay for r in at.refs):
        return None, None
    a, b = (program.equation(r.name) for r in at.refs)
    if OPS[b.op].injects:
        return b.name, a
    return (a.name, b) if OPS[a.op].injects else (None, None)


def _smaller(model: LoweredModel, relation: str) -> bool:
    """Whether what a step adds is smaller than the trace, and its transition an array of finite numbers."""
    geometry = model.traces[relation]
    group = model.analysis.group(geometry.relation.group)
    pushed = group.pushed or group.name in model.unwritten
    kind = geometry.site.closed and math.prod(geometry.contracted) > 1 and not geometry.scattered
    return kind and not pushed and not geometry.steep


def _deferral(
    program: TraceProgram,
    model: LoweredModel,
    name: str,
    added: Sequence[str],
    rows: Sequence[bool],
    entry: Entry,
    every: int,
) -> Deferral:
    geometry = model.traces[program.equation(name).type.of]
    group = model.analysis.group(geometry.relation.group)
    read, dtypes = {}, []
    for outer in added:
        f, x = (program.equation(r.name) for r in program.equation(outer).refs)
        dtypes.append(entry(f)[1])
        read[outer] = _as_shapes(*entry(x))
    dtype = np.result_type(*dtypes)
    return Deferral(
        every,
        geometry,
        tuple(rows),
        _reached(group.pattern, rows),
        jax.ShapeDtypeStruct(group.shape, dtype),
        jax.ShapeDtypeStruct(geometry.relation.shape, dtype),
        read,
    )


def _as_shapes(shape: Any, dtype: Any) -> Any:
    if isinstance(shape, list):
        return tuple(jax.ShapeDtypeStruct(s, d) for s, d in zip(shape, dtype, strict=True))
    return jax.ShapeDtypeStruct(shape, dtype)


def _reached(pattern: Any, rows: Sequence[bool]) -> tuple[tuple[bool, ...], ...]:
    """Whether an old state reaches a new one in any number of steps, none among them, of the states whose rows are carried."""
    live = np.outer(rows, rows)
    reached = np.eye(len(rows), dtype=bool) & live
    for _ in rows:
        reached = reached | ((np.asarray(pattern, bool) @ reached) & live)
    return tuple(tuple(bool(v) for v in line) for line in reached)
