"""Carry filtered presynaptic values in place of a trace whose decay is constant.

Where D and f are constant in time, e_t = D e_{t-1} + f (x) x_t is f (x) x̄_t: all that the steps add is x, so all that has to
be kept is x, filtered,

    x̄_t = d x̄_{t-1} + x_t                e_t[o, i] = f[o] x̄_t[i]

once for each value d that D takes over the units o. With several states in a group D is a matrix, and a filter has one value per
state: z_t = D z_{t-1} + φ x_t, where f[o] = s[o] φ. Whatever is linear in a trace and the same for all of its entries goes along:
sums, products with numbers, further filters such as that of e-prop. A gradient contract(L, e) becomes
Σ_k pullback(z_k, L_k s), an ordinary weight gradient with z in place of x.

The header tells which relations have a constant response, and which ones (``constant=D:f;D:f``): numbers that no state,
input or parameter enters, so that the same holds while weights change. The result is the same to rounding. Memory goes from
O(B I O) to O(B I) per response and state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from etcompile.pass_api import (
    Argument,
    Equation,
    Ref,
    Relation,
    Response,
    Symbol,
    TraceProgram,
    Type,
    carried_rows,
    infer_type,
    support,
)

__all__ = ["CollapseConstantDecay"]

#: An entry of a trace: its name, the class of elements, the state.
Key = tuple[str, int, int]
Vector = tuple[float, ...]
Matrix = tuple[Vector, ...]

#: First letters of values.
_PREFIX = {"factor": "x", "gain": "u", "back": "q", "pullback": "P"}


@dataclasses.dataclass(frozen=True)
class CollapseConstantDecay:
    """Replace traces by filtered presynaptic values where the relation has at most ``most`` constant responses."""

    most: int = 8
    name: str = "collapse_constant_decay"
    preserves: str = "gradients"

    def __call__(self, program: TraceProgram) -> TraceProgram:
        for relation in program.header.relations:
            if relation.constant and not relation.filtered:
                collapse = _Collapse(program, relation)
                if collapse.possible and len(collapse.classes) <= self.most and collapse.saves:
                    program = collapse.run()
        return program


@dataclasses.dataclass(frozen=True)
class _Term:
    """One summand of a trace's entry: ``factor`` times (or, with op ``div``, divided by it) a presynaptic value or an entry."""

    op: str
    factor: Any
    source: Ref
    entry: tuple[int, int] | None  # class and state of the trace ``source``; None: it is presynaptic


class _Collapse:
    """The traces of one relation as filtered presynaptic values."""

    def __init__(self, program: TraceProgram, relation: Relation) -> None:
        self.program, self.relation = program, relation
        self.by_name = {e.name: e for e in program.equations}
        self.traces = [e for e in program.equations if (e.type.kind, e.type.of) == ("trace", relation.name)]
        faded = any(e.op == "matmul" for e in self.traces)
        #: Responses that differ in what the traces use of them, each with their numbers in the header.
        self.classes: dict[Response, list[int]] = {}
        for number, response in enumerate(relation.constant):
            used = response if faded else dataclasses.replace(response, decay=None)
            self.classes.setdefault(used, []).append(number)
        self.responses = tuple(self.classes)
        self.states = range(len(relation.rows))
        self.possible = all(map(self._linear, self.traces)) and self._only_contracted()
        self.live: set[Key] = self._live() if self.possible else set()
        self.kept = carried_rows(program)

    # -- whether ------------------------------------------------------------------------------------------------

    def _linear(self, e: Equation) -> bool:
        """Whether an equation adds and scales traces, all of their elements alike."""
        kinds = [self.by_name[a.name].type.kind if isinstance(a, Ref) else "number" for a in e.args]
        if e.op == "outer":
            return self._vector(e.args[0], self.responses[0]) is not None
        if e.op == "matmul":
            return self._matrix(e.args[0], self.responses[0]) is not None
        if e.op in ("add", "sub", "copy"):
            return True
        return e.op in ("mul", "div") and kinds.count("trace") == 1 and kinds.count("number") == 1

    def _only_contracted(self) -> bool:
        """Whether nothing but the traces themselves and contractions reads a trace."""
        names = {e.name for e in self.traces}
        return not any(
            e.name not in names and e.op != "contract" and any(ref.name in names for ref in e.refs)
            for e in self.program.equations
        )

    def _matrix(self, a: Argument, response: Response) -> Matrix | None:
        """A value of the kind of D as numbers."""
        if not isinstance(a, Ref) or a.delay or response.decay is None:
            return None
        e = self.by_name[a.name]
        if e.op == "transition":
            return response.decay
        if e.op == "mul":
            number, value = _number_first(e)
            found = self._matrix(value, response)
            if found is not None and number is not None:
                return tuple(_scaled(number, row) for row in found)
        return None

    def _vector(self, a: Argument, response: Response) -> Vector | None:
        """A value of the kind of f as numbers."""
        if not isinstance(a, Ref) or a.delay:
            return None
        e = self.by_name[a.name]
        if e.op == "immediate":
            return response.inject
        if e.op == "mul":
            number, value = _number_first(e)
            found = self._vector(value, response)
            return None if found is None or number is None else _scaled(number, found)
        return None

    @property
    def saves(self) -> bool:
        """Whether less is carried than now."""
        site = self.program.header.site(self.relation.site)
        kind = infer_type(self.program.header, "factor", (Symbol(site.name),), {})
        return len(self._carried()) * math.prod(kind.shape) < self.numbers

    @property
    def numbers(self) -> int:
        """Numbers that the traces carry now."""
        return sum(
            sum(self.kept[e.name]) * math.prod(e.type.shape[1:]) for e in self.traces if e.name in self.kept
        )

    def _carried(self) -> list[Key]:
        return [key for key in self.live if key[0] in self.kept and self.kept[key[0]][key[2]]]

    # -- entries as sums ----------------------------------------------------------------------------------------

    def _terms(self, e: Equation, number: int, state: int) -> Iterator[_Term]:
        """What an equation says about one entry: a sum of scaled entries and presynaptic values."""
        response = self.responses[number]
        if e.op == "outer":
            vector = self._vector(e.args[0], response)
            assert vector is not None and isinstance(e.args[1], Ref)
            yield _Term("mul", vector[state], e.args[1], None)
        elif e.op == "matmul":
            matrix = self._matrix(e.args[0], response)
            assert matrix is not None and isinstance(e.args[1], Ref)
            for j in self.states:
                yield _Term("mul", matrix[state][j], e.args[1], (number, j))
        elif e.op in ("add", "sub", "copy"):
            for a, sign in zip(e.refs, (1.0, -1.0 if e.op == "sub" else 1.0), strict=False):
                yield _Term("mul", sign, a, (number, state))
        else:
            places = [k for k, a in enumerate(e.args) if not self._is_trace(a)]
            source = e.args[1 - places[0]]
            assert isinstance(source, Ref)
            yield _Term(e.op, e.args[places[0]], source, (number, state))

    def _is_trace(self, a: Argument) -> bool:
        return isinstance(a, Ref) and self.by_name[a.name].type.kind == "trace"

    def _sum(self, e: Equation, number: int, state: int, live: set[Key]) -> list[_Term]:
        """The summands that are not zero for every input."""
        return [
            term
            for term in self._terms(e, number, state)
            if term.factor != 0.0 and (term.entry is None or (term.source.name, *term.entry) in live)
        ]

    def _keys(self, e: Equation) -> list[Key]:
        keys = [(e.name, number, state) for number in range(len(self.responses)) for state in self.states]
        return [key for key in keys if key in self.live]

    def _live(self) -> set[Key]:
        """Entries that can differ from zero: the least fixpoint, starting from zero traces."""
        live: set[Key] = set()
        while True:
            grown = {
                (e.name, number, state)
                for e in self.traces
                for number in range(len(self.responses))
                for state in self.states
                if self._sum(e, number, state, live)
            }
            if grown == live:
                return live
            live = grown

    # -- the program --------------------------------------------------------------------------------------------

    def run(self) -> TraceProgram:
        """The program in which nobody reads these traces any more; dead ones are swept up later."""
        header = self.program.header
        out = _Writer(self.program)
        kind = infer_type(header, "factor", (Symbol(self.relation.site),), {})
        names: dict[Key, str] = {}
        for e in self.traces:
            for key in self._keys(e):
                if e.name in self.kept:
                    names[key] = out.fresh("z", kind)
        values: dict[Key, Ref] = {key: Ref(name) for key, name in names.items()}
        can = support(self.program)
        ours = {e.name for e in self.traces}

        def value(term: _Term) -> Ref:
            if term.entry is not None:
                return dataclasses.replace(values[(term.source.name, *term.entry)], delay=term.source.delay)
            if self.by_name[term.source.name].type.kind == "factor":
                return term.source
            factor = out.emit("factor", Symbol(self.relation.site))
            return dataclasses.replace(factor, delay=term.source.delay)

        for e in self.program.equations:
            if e.op == "contract" and e.refs[1].name in ours:
                written = self._gradient(out, e, values, can)
            else:
                written = False
            if not written:
                out.keep(e)
            for key in self._keys(e) if e.name in ours else ():
                start = len(out.equations)
                total = self._written(out, self._sum(e, key[1], key[2], self.live), value)
                values[key] = out.named(names[key], total, start) if key in names else total
        decays = len({response.decay for response in self.responses})
        changed = dataclasses.replace(self.relation, filtered=self.numbers, decays=decays)
        relations = tuple(changed if r == self.relation else r for r in header.relations)
        return dataclasses.replace(
            self.program,
            header=dataclasses.replace(header, relations=relations),
            equations=tuple(out.equations),
        )

    def _written(self, out: _Writer, terms: Sequence[_Term], value: Any) -> Ref:
        total: Ref | None = None
        for term in terms:
            ref = value(term)
            if term.op == "mul" and term.factor == -1.0 and total is not None:
                total = out.emit("sub", total, ref)
                continue
            if term.op == "div":
                ref = out.emit("div", ref, term.factor)
            elif term.factor != 1.0:
                ref = out.emit("mul", term.factor, ref)
            total = ref if total is None else out.emit("add", total, ref)
        assert total is not None
        return total

    def _gradient(self, out: _Writer, e: Equation, values: dict[Key, Ref], can: dict[str, Any]) -> bool:
        """``contract(L, e)`` as the pullback of L's credit through each filtered presynaptic value."""
        signal, trace = e.refs
        credits: dict[Ref, Ref] = {}
        start = len(out.equations)
        for number, members in enumerate(self.classes.values()):
            for state in self.states:
                key = (trace.name, number, state)
                if key not in self.live or not can[signal.name][state]:
                    continue
                z = dataclasses.replace(values[key], delay=trace.delay)
                for member in members:
                    gain = out.emit("gain", Symbol(self.relation.name), member, state)
                    credit = out.emit("back", signal, gain)
                    credits[z] = credit if z not in credits else out.emit("add", credits[z], credit)
        total: Ref | None = None
        for z, credit in credits.items():
            found = out.emit("pullback", z, credit)
            total = found if total is None else out.emit("add", total, found)
        if total is not None:
            out.named(e.name, total, start)
        return total is not None


class _Writer:
    """Equations of the new program, in order."""

    def __init__(self, program: TraceProgram) -> None:
        self.header = program.header
        self.equations: list[Equation] = []
        self.types = {e.name: e.type for e in program.equations}
        self.made: dict[tuple[str, tuple[Argument, ...]], Ref] = {}

    def fresh(self, prefix: str, kind: Type) -> str:
        number = 0
        while f"{prefix}{number}" in self.types:
            number += 1
        self.types[f"{prefix}{number}"] = kind
        return f"{prefix}{number}"

    def keep(self, e: Equation) -> None:
        self.equations.append(e)
        self.made.setdefault((e.op, e.args), Ref(e.name))

    def emit(self, op: str, *args: Argument) -> Ref:
        """A new equation, or the one that says the same."""
        if (op, args) not in self.made:
            kind = infer_type(self.header, op, args, self.types)
            name = self.fresh(_PREFIX.get(op, "v"), kind)
            self.equations.append(Equation(name, op, args, kind))
            self.made[op, args] = Ref(name)
        return self.made[op, args]

    def named(self, name: str, value: Ref, start: int) -> Ref:
        """A value, computed by the equations from number ``start`` on, under the name that others know it by."""
        last = self.equations[-1]
        if len(self.equations) > start and value == Ref(last.name):
            self.equations[-1] = dataclasses.replace(last, name=name)
            self.made[last.op, last.args] = Ref(name)
        else:
            self.equations.append(Equation(name, "copy", (value,), self.types[value.name]))
        return Ref(name)


def _number_first(e: Equation) -> tuple[float | None, Argument]:
    """The number, if there is one, and the value of a product."""
    a, b = e.args
    if isinstance(b, (int, float)):
        a, b = b, a
    return (a if isinstance(a, (int, float)) else None), b


def _scaled(number: float, vector: Vector) -> Vector:
    return tuple(number * v for v in vector)
