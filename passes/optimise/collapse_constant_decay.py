"""Carry filtered presynaptic values in place of a trace whose decay is constant.

Where D and f are constant in time, e_t = D e_{t-1} + f (x) x_t is f (x) x̄_t: all that the steps add is x, so all that has to
be kept is x, filtered,

    x̄_t = d x̄_{t-1} + x_t                e_t[o, i] = f[o] x̄_t[i]

once for each value d that D takes over the units o. With several states in a group D is a matrix, and a filter has one value per
state: z_t = D z_{t-1} + φ x_t, where f[o] = s[o] φ. Whatever is linear in a trace and the same for all of its entries goes along:
sums, products with numbers, further filters such as that of e-prop. A gradient contract(L, e) becomes
Σ_k pullback(z_k, L_k s), an ordinary weight gradient with z in place of x.

Where only some rows of D and f are constant, as that of an exponential synapse beside a membrane that spikes, filters take the
place of these rows, and the trace keeps the others. With S the rows that are filters and u[k] the gain of row k,

    e_t = D e_{t-1} + Σ_{j in S} (D u[j]) (x) z_{t-1}[j] + f (x) x_t        in the rows that are left

The header tells which relations have a constant response, and which ones (``constant=D:f;D:f``): numbers that no state,
input or parameter enters, so that the same holds while weights change. The result is the same to rounding. Memory goes from
O(B I O) to O(B I) per response and state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etcompile.pass_api import (
    Equation,
    Ref,
    Relation,
    Rewriter,
    Symbol,
    TraceProgram,
    Type,
    carried_rows,
    infer_type,
    support,
)
from etcompile.passes.optimise.filters import Filters, Key, Term, filters_of

__all__ = ["CollapseConstantDecay"]


@dataclasses.dataclass(frozen=True)
class CollapseConstantDecay:
    """Replace traces by filtered presynaptic values where the relation has at most ``most`` constant responses."""

    most: int = 8
    name: str = "collapse_constant_decay"
    preserves: str = "gradients"

    def __call__(self, program: TraceProgram) -> TraceProgram:
        out = Rewriter(program)
        solved = {r: filters_of(out, r) for r in program.header.relations if r.constant and not r.filtered}
        few = {r: f for r, f in solved.items() if f is not None and len(f.responses) <= self.most}
        if not few:
            return program
        rows = carried_rows(program)
        smaller = {r: _numbers_instead(program, r, f, rows) for r, f in few.items()}
        replaced = [_Replaced.of(out, r, few[r], rows) for r, numbers in smaller.items() if numbers]
        if not replaced:
            return program
        _rewrite(out, {e.name: r for r in replaced for e in r.filters.traces}, support(program))
        changed = {
            r.relation: dataclasses.replace(r.relation, filtered=smaller[r.relation], decays=r.decays)
            for r in replaced
        }
        relations = tuple(changed.get(r, r) for r in program.header.relations)
        return out.finish(dataclasses.replace(program.header, relations=relations))


@dataclasses.dataclass(frozen=True)
class _Replaced:
    """A relation whose traces nobody reads any more.

    Attributes
    ----------
    relation : Relation
    filters : Filters
    values : dict of Key to Ref
        z of every entry that is written by now. One that is carried has a name from the start, since its own sum reads it.
    """

    relation: Relation
    filters: Filters
    values: dict[Key, Ref]

    @classmethod
    def of(cls, out: Rewriter, relation: Relation, filters: Filters, rows: Mapping[str, Any]) -> _Replaced:
        kind = _factor(out.program, relation)
        return cls(
            relation, filters, {key: Ref(out.fresh("z", kind)) for key in filters.sums if key[0] in rows}
        )

    @property
    def decays(self) -> int:
        return len({response.decay for response in self.filters.responses})


def _factor(program: TraceProgram, relation: Relation) -> Type:
    return infer_type(program.header, "factor", (Symbol(relation.site),), {})


def _numbers_instead(
    program: TraceProgram, relation: Relation, filters: Filters, rows: Mapping[str, Any]
) -> int:
    """How many numbers the traces carry, if filters carry fewer; else none."""
    numbers = sum(
        sum(carried and k not in filters.left[e.name] for k, carried in enumerate(rows[e.name]))
        * math.prod(e.type.shape[1:])
        for e in filters.traces
        if e.name in rows
    )
    carried = [(name, r, state) for name, r, state in filters.sums if name in rows and rows[name][state]]
    return numbers if len(carried) * math.prod(_factor(program, relation).shape) < numbers else 0


def _rewrite(out: Rewriter, by_trace: Mapping[str, _Replaced], can: Mapping[str, Any]) -> None:
    """Beside each trace its filters, and gradients made of them; the traces are swept up later."""
    for e in out.program.equations:
        if e.name in by_trace:
            replaced = by_trace[e.name]
            if replaced.filters.left[e.name]:
                out.define(e, _left(out, replaced, e))
            else:
                out.keep(e)
            _write_filters(out, replaced, e)
            continue
        read = next((by_trace[ref.name] for ref in e.refs if ref.name in by_trace), None)
        credit = None if read is None else _gradient(out, read, e, can)
        if credit is None:
            out.keep(e)
        else:
            out.define(e, credit)


def _write_filters(out: Rewriter, replaced: _Replaced, e: Equation) -> None:
    values = replaced.values
    for key, terms in replaced.filters.sums.items():
        if key[0] == e.name:
            total = _sum(out, replaced.relation, terms, values)
            values[key] = out.define(values[key], total) if key in values else total


def _sum(out: Rewriter, relation: Relation, terms: list[Term], values: Mapping[Key, Ref]) -> Ref:
    """z_t = Σ d z_{t-1} + φ x_t."""
    total: Ref | None = None
    for term in terms:
        value = Ref(term.source.name) if term.entry is None else values[term.entry]
        if term.entry is None and out.kind(value).as_array:
            value = out.op(out.kind(value).as_array, Symbol(relation.site))
        value = _late(value, term.source.delay)
        if term.factor == -1.0 and term.power == 1 and total is not None:
            total = out.op("sub", total, value)
            continue
        assert term.factor is not None  # entries of such terms are left
        if term.power == -1:
            value = out.op("div", value, term.factor)
        elif term.factor != 1.0:
            value = out.op("mul", term.factor, value)
        total = value if total is None else out.op("add", total, value)
    assert total is not None
    return total


def _late(value: Ref, delay: int) -> Ref:
    """A value so many steps ago; what stands for it may be one of the step before, as in a delay line."""
    return Ref(value.name, value.delay + delay)


def _gradient(out: Rewriter, replaced: _Replaced, e: Equation, can: Mapping[str, Any]) -> Ref | None:
    """``contract(L, e)`` as Σ_k pullback(z_k, L_k s), with the rows that are left; None where it is zero for every input."""
    relation, filters, values = replaced.relation, replaced.filters, replaced.values
    signal, trace = e.refs
    credits: dict[Ref, Ref] = {}
    for response, numbers in filters.responses.items():
        for state in range(len(relation.rows)):
            key = (trace.name, response, state)
            if key not in filters.sums or not can[signal.name][state]:
                continue
            z = _late(values[key], trace.delay)
            for number in numbers:
                credit = out.op(
                    "back", signal, out.op("gain", Symbol(relation.name), number, state), prefix="q"
                )
                credits[z] = credit if z not in credits else out.op("add", credits[z], credit)
    found = [out.op("pullback", z, credit) for z, credit in credits.items()]
    if filters.left[trace.name]:
        found.append(out.op(e.op, *e.args, prefix="G"))
    return out.sum(found)


def _left(out: Rewriter, replaced: _Replaced, e: Equation) -> Ref:
    """The rows of a trace that are left: what they were made of, where rows that are filters are read as these."""
    filters, row = replaced.filters, out.row(e)
    left = filters.left[e.name]
    if row.injects:
        f, x = e.refs
        return out.op(e.op, _rows(out, f, left), x)
    if row.couples:
        decay, trace = e.refs
        found = [out.op(e.op, decay, trace)] if filters.left[trace.name] else []
        for state in range(len(replaced.relation.rows)):
            for gain, z in _filtered(out, replaced, trace, state):
                found.append(out.op("outer", _rows(out, out.op(e.op, decay, gain), left), z))
    elif row.power:
        return out.op(e.op, *e.args)
    else:
        found = []
        for sign, trace in zip(row.terms, e.refs, strict=True):
            mine = [trace] if filters.left[trace.name] else []
            for state in left:
                mine += [out.op("outer", gain, z) for gain, z in _filtered(out, replaced, trace, state)]
            found += mine if sign == 1 else [out.op("mul", sign, value) for value in mine]
    total = out.sum(found)
    assert total is not None
    return total


def _filtered(out: Rewriter, replaced: _Replaced, trace: Ref, state: int) -> Iterator[tuple[Ref, Ref]]:
    """The row of a state as gains and filters, where it is one."""
    for key, number in replaced.filters.numbers(trace.name, state):
        gain = out.op("gain", Symbol(replaced.relation.name), number, state)
        yield gain, dataclasses.replace(replaced.values[key], delay=trace.delay)


def _rows(out: Rewriter, f: Ref, states: Sequence[int]) -> Ref:
    total = out.sum(out.op("row", f, state) for state in states)
    assert total is not None
    return total
