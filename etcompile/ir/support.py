"""Structural zeros: which entries of each value can differ from zero, and which entries anybody reads.

A trace of an LSTM has a row for c and a row for h, but the old h reaches nothing locally, so its row is never read one
step later. The lowering carries only entries that can be nonzero and are read.
"""

from __future__ import annotations

from typing import Any

from etcompile.ir.program import Equation, Ref, TraceProgram

__all__ = ["carried_rows", "support"]

Support = Any  #: tuple of bool (rows), tuple of tuple of bool (transition), or bool


def support(program: TraceProgram) -> dict[str, Support]:
    """Least fixpoint of "can be nonzero" over the recurrences, starting from zero traces."""
    found: dict[str, Support] = {e.name: _empty(program, e) for e in program.equations}
    while True:
        grown = {e.name: _support(program, e, found) for e in program.equations}
        if grown == found:
            return found
        found = grown


def carried_rows(program: TraceProgram) -> dict[str, Support]:
    """Per carried value, the entries to keep from one step to the next."""
    can = support(program)
    read = _read_entries(program, can)
    return {name: _both(can[name], read[name]) for name in program.carried}


def _both(a: Support, b: Support) -> Support:
    return tuple(_both(x, y) for x, y in zip(a, b, strict=True)) if isinstance(a, tuple) else a and b


def _either(a: Support, b: Support) -> Support:
    return tuple(_either(x, y) for x, y in zip(a, b, strict=True)) if isinstance(a, tuple) else a or b


def _empty(program: TraceProgram, equation: Equation) -> Support:
    return _fill(program, equation, False)


def _fill(program: TraceProgram, equation: Equation, value: bool) -> Support:
    kind, n = equation.type.kind, equation.type.shape[0] if equation.type.shape else 0
    if kind == "transition":
        return ((value,) * n,) * n
    if kind in ("state", "immediate", "trace"):
        return (value,) * n
    return value


def _support(program: TraceProgram, e: Equation, found: dict[str, Support]) -> Support:
    args = [found[a.name] if isinstance(a, Ref) else a for a in e.args]
    header = program.header
    if e.op == "transition":
        return header.group(str(e.args[0])).pattern
    if e.op == "immediate":
        return header.relation(str(e.args[0])).rows
    if e.op == "gain":
        return tuple(k == e.args[2] for k in range(len(header.relation(str(e.args[0])).rows)))
    if e.op == "bypass":
        return header.group(str(e.args[0])).bypass
    if e.op == "outer":
        return args[0]
    if e.op in ("add", "sub"):
        return _either(args[0], args[1])
    if e.op == "mul":
        tables = [t for a, t in zip(e.args, args, strict=True) if isinstance(a, Ref)]
        return tables[0] if len(tables) == 1 else _product(tables[0], tables[1])
    if e.op in ("div", "copy"):
        return args[0]
    if e.op == "matmul":
        return _matmul(args[0], args[1], e)
    if e.op == "map":
        tables = [t for a, t in zip(e.args, args, strict=True) if isinstance(a, Ref)]
        total = _fill(program, e, False)
        for table in tables:
            total = _either(total, table) if isinstance(table, tuple) == isinstance(total, tuple) else total
        return total
    return _fill(program, e, True)


def _product(a: Support, b: Support) -> Support:
    """Of two values of one type entry by entry, of a number and a value for all entries."""
    if isinstance(a, tuple) and not isinstance(b, tuple):
        return tuple(_product(x, b) for x in a)
    if isinstance(b, tuple) and not isinstance(a, tuple):
        return tuple(_product(a, y) for y in b)
    return _both(a, b)


def _matmul(a: Support, b: Support, e: Equation) -> Support:
    if not isinstance(a, tuple):
        return a and b
    if e.type.kind == "state":
        return tuple(any(s and b[k][j] for k, s in enumerate(a)) for j in range(len(b[0])))
    if e.type.kind == "transition":
        return tuple(
            tuple(any(x and b[k][j] for k, x in enumerate(row)) for j in range(len(b[0]))) for row in a
        )
    return tuple(any(x and b[k] for k, x in enumerate(row)) for row in a)


def _read_entries(program: TraceProgram, can: dict[str, Support]) -> dict[str, Support]:
    """Entries of each carried value that an equation or gradient reads one step later."""
    read = {e.name: _fill(program, e, False) for e in program.equations}
    for e in program.equations:
        for place, ref in enumerate(e.args):
            if not isinstance(ref, Ref) or ref.delay != -1:
                continue
            wanted = _fill(program, program.equation(ref.name), True)
            other = e.args[1 - place] if len(e.args) == 2 else None
            if e.op == "matmul" and place == 1 and isinstance(other, Ref) and e.type.kind != "state":
                table = can[other.name]
                if not isinstance(table, tuple):
                    read[ref.name] = True
                    continue
                columns = tuple(any(row[j] for row in table) for j in range(len(table[0])))
                wanted = (
                    columns
                    if not isinstance(wanted[0], tuple)
                    else tuple((c,) * len(wanted) for c in columns)
                )
            elif e.op == "contract" and place == 1 and isinstance(other, Ref):
                wanted = can[other.name]
            read[ref.name] = _either(read[ref.name], wanted)
    for g in program.gradients:
        if g.value.delay == -1:
            read[g.value.name] = True
    return read
