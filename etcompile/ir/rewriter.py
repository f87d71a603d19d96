"""Rewriting programs: the interface in which optimisations are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from etcompile.ir.header import Header
from etcompile.ir.kinds import KINDS, Kind
from etcompile.ir.ops import OPS, Op, infer_type
from etcompile.ir.program import Argument, Equation, Gradient, Ref, TraceProgram
from etcompile.ir.types import Type

__all__ = ["Rewriter"]


class Rewriter:
    """A program on its way to another one: walk its equations in order, and say of each what becomes of it.

    ``keep`` it as it is, ``replace`` it by a value that is the same, ``define`` it by another value, or do nothing, and it is
    gone. ``op`` writes new equations before it. :meth:`finish` returns the new program, in which all that read a replaced value
    read the other one.

    Attributes
    ----------
    program : TraceProgram
        The program that is rewritten.
    header : Header
        Its header.

    Examples
    --------
    >>> from etcompile.pass_api import Rewriter
    >>> def without_copies(program):
    ...     out = Rewriter(program)
    ...     for e in program.equations:
    ...         if e.op == "copy":
    ...             out.replace(e, e.refs[0])
    ...         else:
    ...             out.keep(e)
    ...     return out.finish()
    """

    def __init__(self, program: TraceProgram) -> None:
        self.program = program
        self.header: Header = program.header
        self._made_by = {e.name: e for e in program.equations}
        self._types = {e.name: e.type for e in program.equations}
        self._late = {ref.name for ref in program.uses() if ref.delay}
        self._traces: dict[str, list[Equation]] = {}
        self._readers: dict[str, list[Equation]] = {}
        for e in program.equations:
            if KINDS[e.type.kind].trace:
                self._traces.setdefault(e.type.of, []).append(e)
            for name in dict.fromkeys(ref.name for ref in e.refs):
                self._readers.setdefault(name, []).append(e)
        self._equations: list[Equation] = []
        self._found: dict[tuple[str, tuple[Argument, ...]], Ref] = {}
        self._same: dict[str, Ref] = {}
        self._started = 0
        self._tried: dict[str, int] = {}  # by prefix, the numbers below which no name is free

    # -- what the program says ----------------------------------------------------------------------------------

    def maker(self, argument: Argument) -> Equation | None:
        """The equation of the program that makes this value; None for a symbol, a number, or a value of the step before."""
        return self._made_by[argument.name] if isinstance(argument, Ref) and not argument.delay else None

    def traces(self, relation: str) -> tuple[Equation, ...]:
        """The equations of the program that make the traces of a relation."""
        return tuple(self._traces.get(relation, ()))

    def readers(self, name: str) -> tuple[Equation, ...]:
        """The equations of the program that read a value, at this step or at the next."""
        return tuple(self._readers.get(name, ()))

    def row(self, equation: Equation) -> Op:
        """What the table of ops says of an equation's op."""
        return OPS[equation.op]

    def kind(self, argument: Argument) -> Kind:
        """What the table of kinds says of an argument; a number that is written out is of the kind of numbers."""
        return KINDS[self._types[argument.name].kind if isinstance(argument, Ref) else "number"]

    # -- what becomes of it -------------------------------------------------------------------------------------

    def keep(self, equation: Equation) -> None:
        """It stays."""
        equation = self._renamed(equation)
        self._equations.append(equation)
        self._found.setdefault((equation.op, equation.args), Ref(equation.name))
        self._started = len(self._equations)

    def replace(self, equation: Equation, value: Ref) -> None:
        """``value`` is the same: whoever reads the one reads the other from now on."""
        if value.delay and equation.name in self._late:  # nothing is read two steps late
            self.define(equation, value)
        else:
            self._same[equation.name] = value

    def op(self, op: str, *args: Argument, prefix: str = "") -> Ref:
        """The value of ``op(*args)``: a new equation, or the one that says the same. ``prefix`` begins its name."""
        args = tuple(map(self._followed, args))
        if (op, args) not in self._found:
            kind = infer_type(self.header, op, args, self._types)
            name = self.fresh(prefix or OPS[op].prefix, kind)
            self._equations.append(Equation(name, op, args, kind))
            self._found[op, args] = Ref(name)
        return self._found[op, args]

    def sum(self, values: Iterable[Ref]) -> Ref | None:
        """Of values of one type; None of none."""
        total: Ref | None = None
        for value in values:
            total = value if total is None else self.op("add", total, value)
        return total

    def define(self, equation: Equation | Ref, value: Ref) -> Ref:
        """``value`` under the name of an equation, or under one from :meth:`fresh`."""
        name = equation.name
        last = self._equations[-1] if len(self._equations) > self._started else None
        if last is not None and value == Ref(last.name):  # made for this
            self._equations[-1] = dataclasses.replace(last, name=name)
            self._found[last.op, last.args] = self._same[last.name] = Ref(name)
        else:
            self._equations.append(Equation(name, "copy", (value,), self._types[value.name]))
        self._started = len(self._equations)
        return Ref(name)

    def fresh(self, prefix: str, kind: Type) -> str:
        """A name that is free, for a value of this type."""
        number = self._tried.get(prefix, 0)
        while f"{prefix}{number}" in self._types:
            number += 1
        self._tried[prefix] = number + 1
        self._types[f"{prefix}{number}"] = kind
        return f"{prefix}{number}"

    def finish(self, header: Header | None = None) -> TraceProgram:
        """The new program; gradients of values that are gone are gone."""
        equations = tuple(map(self._renamed, self._equations))
        names = {e.name for e in equations}
        gradients = (Gradient(g.site, self._read(g.value)) for g in self.program.gradients)
        return dataclasses.replace(
            self.program,
            header=header or self.header,
            equations=equations,
            gradients=tuple(g for g in gradients if g.value.name in names),
        )

    def _renamed(self, equation: Equation) -> Equation:
        return dataclasses.replace(equation, args=tuple(map(self._followed, equation.args)))

    def _followed(self, argument: Argument) -> Argument:
        return self._read(argument) if isinstance(argument, Ref) else argument

    def _read(self, ref: Ref) -> Ref:
        """What is read where a value was that is replaced."""
        while ref.name in self._same:
            value = self._same[ref.name]
            ref = Ref(value.name, value.delay + ref.delay)
        return ref
