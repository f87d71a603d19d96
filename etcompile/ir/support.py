"""Structural zeros of a whole program: which entries of each value can differ from zero, and which entries anybody reads.

A trace of an LSTM has a row for c and a row for h, but the old h reaches nothing locally, so its row is never read one
step later. The lowering carries only entries that can be nonzero and are read. What each op does to zeros is in
:mod:`etcompile.ir.zeros`.
"""

from __future__ import annotations

from etcompile.ir.ops import OPS
from etcompile.ir.program import Ref, TraceProgram
from etcompile.ir.zeros import Table, both, either, filled

__all__ = ["carried_rows", "support"]


def support(program: TraceProgram) -> dict[str, Table]:
    """Least fixpoint of "can be nonzero" over the recurrences, starting from zero traces."""
    found = {e.name: filled(e.type, False) for e in program.equations}
    while True:
        grown = {
            e.name: OPS[e.op].zeros(
                program.header, e, [found[a.name] if isinstance(a, Ref) else a for a in e.args]
            )
            for e in program.equations
        }
        if grown == found:
            return found
        found = grown


def carried_rows(program: TraceProgram) -> dict[str, Table]:
    """Per carried value, the entries to keep from one step to the next."""
    can = support(program)
    read = _read_entries(program, can)
    return {name: both(can[name], read[name]) for name in program.carried}


def _read_entries(program: TraceProgram, can: dict[str, Table]) -> dict[str, Table]:
    """Entries of each carried value that an equation or gradient reads one step later."""
    types = {e.name: e.type for e in program.equations}
    read = {name: filled(kind, False) for name, kind in types.items()}
    for e in program.equations:
        tables = [can[a.name] if isinstance(a, Ref) else a for a in e.args]
        for place, ref in enumerate(e.args):
            if isinstance(ref, Ref) and ref.delay == -1:
                wanted = OPS[e.op].reads(e, place, filled(types[ref.name], True), tables)
                read[ref.name] = either(read[ref.name], wanted)
    for g in program.gradients:
        if g.value.delay == -1:
            read[g.value.name] = filled(types[g.value.name], True)
    return read
