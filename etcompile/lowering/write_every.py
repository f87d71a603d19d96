"""Which traces are written once in some steps rather than at each, and in how many.

Let e be the bytes of a trace. A step that writes it reads it twice, to contract and to decay it, and writes it: 3 e. One that
defers that reads it once, and in k steps reads and writes it once more: (1 + 2 / k) e. In place of that, a product has k times as
many rows at each step: 2 k operations for each number of the trace. So k is of use where memory is slow beside products, and not
in a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from etcompile.errors import OptionError
from etcompile.ir.kinds import KINDS
from etcompile.ir.ops import OPS
from etcompile.ir.program import Equation, TraceProgram
from etcompile.ir.support import support
from etcompile.lowering.caches import shared_cache
from etcompile.lowering.deferred import Deferral
from etcompile.lowering.derivatives import LoweredModel
from etcompile.lowering.geometry import TraceGeometry
from etcompile.schedule import Schedule

__all__ = ["deferrals"]

#: Shape and dtype of one entry of a value, of lists where that is several arrays.
Entry = Callable[[Equation], tuple[Any, Any]]

#: Operations of a product of few rows in the time in which a number goes through memory, both in one precision.
_BALANCE = 16.0
#: Most steps: at each write all that was added is multiplied out, by code that is as long.
_MOST = 8
#: From which part of the time on it is worth the code.
_WORTH = 0.9


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
