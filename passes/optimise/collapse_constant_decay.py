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
from collections.abc import Mapping

from etcompile.pass_api import (
    Equation,
    Ref,
    Relation,
    Rewriter,
    Symbol,
    TraceProgram,
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
        for relation in program.header.relations:
            if relation.constant and not relation.filtered:
                filters = filters_of(out, relation)
                if filters is not None and len(filters.responses) <= self.most:
                    collapsed = _collapsed(out, relation, filters)
                    if collapsed is not out.program:
                        out = Rewriter(collapsed)
        return out.program


def _collapsed(out: Rewriter, relation: Relation, filters: Filters) -> TraceProgram:
    """The program in which nobody reads these traces any more, if less is carried then; the traces are swept up later."""
    program = out.program
    kind = infer_type(program.header, "factor", (Symbol(relation.site),), {})
    rows = carried_rows(program)
    numbers = sum(sum(rows[e.name]) * math.prod(e.type.shape[1:]) for e in filters.traces if e.name in rows)
    carried = [(name, r, state) for name, r, state in filters.sums if name in rows and rows[name][state]]
    if len(carried) * math.prod(kind.shape) >= numbers:
        return program
    #: z of every entry: under a name of its own where it is carried, since its own sum reads it
    values = {key: Ref(out.fresh("z", kind)) for key in filters.sums if key[0] in rows}
    can = support(program)
    traces = {e.name for e in filters.traces}
    for e in program.equations:
        credit = None
        if e.name not in traces and any(ref.name in traces for ref in e.refs):
            credit = _gradient(out, relation, filters, e, values, can)
        if credit is None:
            out.keep(e)
        else:
            out.define(e, credit)
        for key, terms in filters.sums.items() if e.name in traces else ():
            if key[0] == e.name:
                total = _sum(out, relation, terms, values)
                values[key] = out.define(values[key], total) if key in values else total
    decays = len({response.decay for response in filters.responses})
    changed = dataclasses.replace(relation, filtered=numbers, decays=decays)
    relations = tuple(changed if r == relation else r for r in program.header.relations)
    return out.finish(dataclasses.replace(program.header, relations=relations))


def _sum(out: Rewriter, relation: Relation, terms: list[Term], values: Mapping[Key, Ref]) -> Ref:
    """z_t = Σ d z_{t-1} + φ x_t."""
    total: Ref | None = None
    for term in terms:
        value = term.source if term.entry is None else values[term.entry]
        if term.entry is None and out.kind(value).as_array:
            value = out.op(out.kind(value).as_array, Symbol(relation.site))
        value = dataclasses.replace(value, delay=term.source.delay)
        if term.factor == -1.0 and term.power == 1 and total is not None:
            total = out.op("sub", total, value)
            continue
        if term.power == -1:
            value = out.op("div", value, term.factor)
        elif term.factor != 1.0:
            value = out.op("mul", term.factor, value)
        total = value if total is None else out.op("add", total, value)
    assert total is not None
    return total


def _gradient(
    out: Rewriter, relation: Relation, filters: Filters, e: Equation, values: Mapping[Key, Ref], can: Mapping
) -> Ref | None:
    """``contract(L, e)`` as Σ_k pullback(z_k, L_k s); None where it is zero for every input."""
    signal, trace = e.refs
    credits: dict[Ref, Ref] = {}
    for response, numbers in filters.responses.items():
        for state in range(len(relation.rows)):
            key = (trace.name, response, state)
            if key not in filters.sums or not can[signal.name][state]:
                continue
            z = dataclasses.replace(values[key], delay=trace.delay)
            for number in numbers:
                credit = out.op(
                    "back", signal, out.op("gain", Symbol(relation.name), number, state), prefix="q"
                )
                credits[z] = credit if z not in credits else out.op("add", credits[z], credit)
    return out.sum(out.op("pullback", z, credit) for z, credit in credits.items())
