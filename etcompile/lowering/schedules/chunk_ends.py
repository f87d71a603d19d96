"""The traces at the end of a chunk, from those before it."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

from etcompile.lowering.causal import CausalProgram, Traces
from etcompile.lowering.evaluate import Context, evaluate
from etcompile.lowering.in_place import large_ones
from etcompile.lowering.schedules.chunk_gradients import ChunkGradients
from etcompile.lowering.schedules.chunk_program import ChunkProgram
from etcompile.lowering.schedules.class_traces import ClassTraces
from etcompile.lowering.schedules.filter_credits import FilterCredits
from etcompile.lowering.schedules.first_pass import Passed

__all__ = ["ends_of_classes", "ends_step_by_step"]

Array = Any
Value = Any


def ends_of_classes(
    program: ChunkProgram,
    values: dict[str, Value],
    classes: list[ClassTraces],
    traces: Traces,
    gradients: ChunkGradients,
) -> Traces:
    """The traces after the chunk: r_0 e_0 + sum_t (r_t f_t) (x) x_t; ``traces`` are those before it, widened.

    Each is overwritten after the gradients have read it, and one after the other: what each is made of would be held for all at
    a time else.
    """
    ends: Traces = {}
    before: list[Array] = []
    for of_class in classes:
        for own in of_class.relations:
            read = [gradients.starts[own.relation]] if own.relation in gradients.starts else []
            filters = FilterCredits(program.context, own.site)
            found = own.at_end(values, traces, of_class.answers.left, filters, [*before, *read])
            ends.update(found)
            before = large_ones(found) or before
    return ends


def ends_step_by_step(
    causal: CausalProgram, weights: list[Array], passed: Passed, inputs: list[Array], traces: Traces
) -> Traces:
    """All that is carried after the chunk, by the program's own equations; nothing where no trace is asked for."""
    if not jax.tree.leaves(traces):
        return causal.stored(dict.fromkeys(traces))

    def one(now: Traces, given: Any) -> tuple[Traces, None]:
        step = causal.model.one_of_many(weights, *given)
        context = Context(causal.program, causal.model, step, None, causal.functions)
        values = evaluate(context, causal.early, {}, now)
        return {name: causal.kept(name, values[name]) for name in now}, None

    wide = causal.carried.wide(traces)
    return causal.stored(lax.scan(one, wide, (passed.before, inputs, passed.costly))[0])
