"""Which entries of a value can differ from zero, op by op, and which entries of an argument an op reads.

A table has a bool for each hidden state of a group (a matrix of them for a transition), or one bool for a value without such
rows. A row of :data:`etcompile.ir.ops.OPS` names one function of this file for each of the two questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from etcompile.ir.header import Header
from etcompile.ir.kinds import KINDS
from etcompile.ir.program import Equation, Ref
from etcompile.ir.types import Type

__all__ = [
    "Reads", "Table", "Zeros", "anywhere", "both", "by_columns", "by_signal", "either", "filled", "of_arguments", "of_bypass",
    "of_contraction", "of_first", "of_immediate", "of_matrix", "of_product", "of_row", "of_state", "of_sum", "of_transition",
    "wholly",
]  # fmt: skip

Table = Any  #: tuple of bool (rows), tuple of tuple of bool (transition), or bool
#: The table of ``equation`` from those of its arguments; an argument that is no reference stands for itself.
Zeros = Callable[[Header, Equation, Sequence[Any]], Table]
#: Which entries of argument ``place`` are read: ``(equation, place, whole, tables)``.
Reads = Callable[[Equation, int, Table, Sequence[Any]], Table]


# --- tables -------------------------------------------------------------------------------------------------------------


def both(a: Table, b: Table) -> Table:
    """Entry by entry."""
    return tuple(both(x, y) for x, y in zip(a, b, strict=True)) if isinstance(a, tuple) else a and b


def either(a: Table, b: Table) -> Table:
    """Entry by entry."""
    return tuple(either(x, y) for x, y in zip(a, b, strict=True)) if isinstance(a, tuple) else a or b


def filled(kind: Type, value: bool) -> Table:
    """The table of a type with one value everywhere."""
    rows = KINDS[kind.kind].rows
    table: Table = value
    for _ in range(rows):
        table = (table,) * kind.shape[0]
    return table


def _product(a: Table, b: Table) -> Table:
    """Of two values of one type entry by entry, of a number and a value for all entries."""
    if isinstance(a, tuple) and not isinstance(b, tuple):
        return tuple(_product(x, b) for x in a)
    if isinstance(b, tuple) and not isinstance(a, tuple):
        return tuple(_product(a, y) for y in b)
    return both(a, b)


def _tables(equation: Equation, args: Sequence[Any]) -> list[Table]:
    return [t for a, t in zip(equation.args, args, strict=True) if isinstance(a, Ref)]


# --- what can differ from zero ----------------------------------------------------------------------------------------------


def anywhere(header: Header, equation: Equation, args: Sequence[Any]) -> Table:
    """All of it."""
    return filled(equation.type, True)


def of_transition(header: Header, equation: Equation, args: Sequence[Any]) -> Table:
    """Where the group's new states depend on its old ones."""
    return header.group(str(equation.args[0])).pattern


def of_bypass(header: Header, equation: Equation, args: Sequence[Any]) -> Table:
    """Old states that a result reads without passing the new ones."""
    return header.group(str(equation.args[0])).bypass


def of_immediate(header: Header, equation: Equation, args: Sequence[Any]) -> Table:
    """States that the relation's y reaches."""
    return header.relation(str(equation.args[0])).rows


def of_state(header: Header, equation: Equation, args: Sequence[Any]) -> Table:
    """The one state that the last argument names."""
    return tuple(k == equation.args[2] for k in range(len(header.relation(str(equation.args[0])).rows)))


def of_first(header: Header, equation: Equation, args: Sequence[Any]) -> Table:
    """Where the first argument can."""
    return args[0]


def of_row(header: Header, equation: Equation, args: Sequence[Any]) -> Table:
    """The one row that the last argument names, where the first argument can."""
    return tuple(can and k == args[1] for k, can in enumerate(args[0]))


def of_sum(header: Header, equation: Equation, args: Sequence[Any]) -> Table:
    """Where either can."""
    return either(args[0], args[1])


def of_product(header: Header, equation: Equation, args: Sequence[Any]) -> Table:
    """Where both can."""
    tables = _tables(equation, args)
    return tables[0] if len(tables) == 1 else _product(tables[0], tables[1])


def of_matrix(header: Header, equation: Equation, args: Sequence[Any]) -> Table:
    """A product over the group's states: row k where some j has D[k, j] and the row j of the other."""
    a, b = args
    if not isinstance(a, tuple):
        return a and b
    if not isinstance(a[0], tuple):  # a signal times a transition
        return tuple(any(s and b[k][j] for k, s in enumerate(a)) for j in range(len(b[0])))
    if isinstance(b[0], tuple):
        return tuple(
            tuple(any(x and b[k][j] for k, x in enumerate(row)) for j in range(len(b[0]))) for row in a
        )
    return tuple(any(x and b[k] for k, x in enumerate(row)) for row in a)


def of_arguments(header: Header, equation: Equation, args: Sequence[Any]) -> Table:
    """Where any argument of the result's own structure can; a function of zeros is taken to be zero."""
    total = filled(equation.type, False)
    for table in _tables(equation, args):
        total = either(total, table) if isinstance(table, tuple) == isinstance(total, tuple) else total
    return total


def of_contraction(header: Header, equation: Equation, args: Sequence[Any]) -> Table:
    """Where a signal meets a row of the trace that can."""
    signal, trace = args
    return any(map(both, signal, trace)) if isinstance(signal, tuple) else signal and trace


# --- what is read -------------------------------------------------------------------------------------------------------------


def wholly(equation: Equation, place: int, whole: Table, tables: Sequence[Any]) -> Table:
    """All of it."""
    return whole


def by_columns(equation: Equation, place: int, whole: Table, tables: Sequence[Any]) -> Table:
    """Of the right side of a matrix product: rows for which the matrix has a column."""
    matrix = tables[0]
    if place != 1 or not isinstance(matrix, tuple) or not isinstance(matrix[0], tuple):
        return whole
    columns = tuple(any(row[j] for row in matrix) for j in range(len(matrix[0])))
    return columns if not isinstance(whole[0], tuple) else tuple((c,) * len(whole) for c in columns)


def by_signal(equation: Equation, place: int, whole: Table, tables: Sequence[Any]) -> Table:
    """Of a trace that is contracted: rows that the signal has."""
    return tables[0] if place == 1 else whole
