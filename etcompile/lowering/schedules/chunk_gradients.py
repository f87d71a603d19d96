"""Gradients of a chunk: every weight has one credit of its y for all steps, and its gradient is one product over time and batch.

In the words of :mod:`etcompile.lowering.schedules.chunked`: sum_t pullback(x_t, q_t + f_t a_t) + a_0 e_0, with q_t the credit of
the step alone. Credits are found by class of traces, over positions, or all at once by the loop of
:mod:`etcompile.lowering.schedules.pulled`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from etcompile.ir.ops import OPS
from etcompile.lowering.begun import once_begun
from etcompile.lowering.causal import Traces
from etcompile.lowering.evaluate import covered
from etcompile.lowering.schedules.chunk_program import ChunkProgram
from etcompile.lowering.schedules.chunk_values import ChunkValues
from etcompile.lowering.schedules.class_traces import ClassTraces
from etcompile.lowering.schedules.counts import counts
from etcompile.lowering.schedules.filter_credits import FilterCredits
from etcompile.lowering.schedules.first_pass import FirstPass, Passed, in_blocks
from etcompile.lowering.schedules.pulled import PulledCredit
from etcompile.lowering.schedules.recurrence import referred, value_key, weighted
from etcompile.lowering.schedules.relation_traces import RelationTraces
from etcompile.lowering.schedules.split import Blocks
from etcompile.sites.operation import Span

__all__ = ["ChunkGradients", "Credit", "chunk_gradients"]

Array = Any
Value = Any

#: What steps ask of the traces before them, of the size of states: of D-RTRL b_0; by what makes it, the loop or the classes.
Credit = Any


@dataclasses.dataclass(frozen=True)
class ChunkGradients:
    """Gradients of a chunk.

    Attributes
    ----------
    sites : dict of str to array
        Of the sites' weights.
    starts : dict of str to array
        What of them is made of the traces before the chunk, by relation.
    before : Credit
        What is asked of traces at the chunk's start.
    """

    sites: dict[str, Array]
    starts: dict[str, Array] = dataclasses.field(default_factory=dict)
    before: Credit = None


def chunk_gradients(
    program: ChunkProgram,
    weights: list[Array],
    seen: ChunkValues,
    classes: list[ClassTraces],
    traces: Traces,
    later: Credit = None,
) -> ChunkGradients:
    """Gradients of the sites, with what steps after the chunk ask of its traces; None: nothing."""
    if program.pulled is None:
        return _by_classes(program, seen.values, classes, traces)
    return _by_loop(program, program.pulled, weights, seen, traces, later)


def _by_classes(
    program: ChunkProgram,
    values: dict[str, Value],
    classes: list[ClassTraces],
    traces: Traces,
) -> ChunkGradients:
    weight = counts(program, values)
    credits: dict[str, dict[str, Array]] = {}  # of y for all steps, by the site and the x that meets it
    spans: dict[tuple[str, str], set[Span | None]] = {}  # outside of which such a credit is zero
    gradients: dict[str, Array] = {}
    starts: dict[str, Array] = {}
    for e in program.equations.gradients:  # q_t, which needs no trace
        if OPS[e.op].pulls_back and e.name in weight:
            x, q = map(referred, e.args)
            if values[value_key(q)] is not None:
                q_t = weighted(values[value_key(q)], weight[e.name])
                site = program.equation(x.name).type.of
                _add(credits.setdefault(site, {}), value_key(x), q_t)
                spans.setdefault((site, value_key(x)), set()).add(covered(program.context, q))
    for of_class in classes:
        for own in of_class.relations:
            for x, credit in own.credits(values, of_class.answers.asked):
                _add(credits.setdefault(own.site, {}), x, credit)  # f_t a_t
                spans.setdefault((own.site, x), set()).add(own.geometry.relation.span)
            _add(starts, own.relation, own.gradient_of_start(traces, of_class.answers.before))  # a_0 e_0
            _add(gradients, own.site, starts.get(own.relation))
    for site, of_site in credits.items():  # sum_t pullback(x_t, q_t + f_t a_t)
        does = program.causal.model.sites[site]
        (met,) = FilterCredits(program.context, site)([of_site])
        for x, credit in met.steps.items():
            span, *others = spans[site, x] if of_site.get(x) is credit else (None,)
            found = (
                does.pullback_of_steps(values[x], credit)
                if span is None or others
                else does.pulled_within(values[x], credit, span, steps=True)
            )
            _add(gradients, site, found)
        for z, credit in met.start.items():
            if program.context.model.analysis.steep:
                credit = once_begun(credit, traces[z])
            _add(gradients, site, does.pullback(traces[z], credit))
    return ChunkGradients(gradients, starts, [one.answers.before for one in classes])


def _by_loop(
    program: ChunkProgram,
    loop: PulledCredit,
    weights: list[Array],
    seen: ChunkValues,
    traces: Traces,
    later: Credit,
) -> ChunkGradients:
    """The same where one loop finds all credits of y."""
    model = program.causal.model
    of_steps = (seen.passed.before, seen.passed.costly, seen.inputs, *seen.asked)
    pulled = loop(weights, of_steps, _blocks(program.first_pass, weights, seen.passed, seen.inputs), later)
    gradients: dict[str, Array] = {}
    starts: dict[str, Array] = {}
    for site, gradient in pulled.gradients.items():
        _add(gradients, site, gradient)
    for site, credit in pulled.credits.items():
        x = seen.values[loop.sites[site]]
        _add(gradients, site, model.sites[site].pullback_of_steps(x, credit))
    for one in program.equations.classes:
        for relation, equations in one.traces.items():
            own = RelationTraces(model.traces[relation], [(e, e.name) for e in equations])
            asked = {e.name: pulled.start[one.group] for e in equations if e.name in program.carried}
            _add(starts, relation, own.gradient_of_start(traces, asked))
            _add(gradients, own.site, starts.get(relation))
    return ChunkGradients(gradients, starts, before=pulled.before)


def _blocks(
    first_pass: FirstPass, weights: list[Array], passed: Passed, inputs: list[Array]
) -> Blocks | None:
    """Blocks of the first pass, in which wide states are made again where the loop of credits needs them."""
    if passed.starts is None:
        return None
    size = jax.tree.leaves(inputs)[0].shape[0] // passed.starts[0].shape[0]
    given = (passed.starts, in_blocks((inputs, {**passed.across, **passed.costly}), size))

    def make(of: Any) -> list[Array]:
        before = first_pass.again(weights, *of)
        return [before[k] for k in first_pass.remade]

    return Blocks(
        size, first_pass.remade, given, make
    )  # old states are the first leaves of what steps are given


def _add(total: dict[Any, Any], key: Any, value: Any) -> None:
    if value is not None:
        total[key] = total[key] + value if key in total else value
