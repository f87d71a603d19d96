"""What the program's equations make of each step of a chunk: the values of all steps, but for traces and gradients.

The states of all steps come from a first pass that does nothing else. Derivatives are then taken for all steps at once, and
filters, which are recurrences of the size of states or presynaptic values, go over them from step to step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax import lax

from etcompile.ir.program import Ref
from etcompile.lowering.causal import Traces
from etcompile.lowering.evaluate import Context, evaluate
from etcompile.lowering.losses import LossValue, loss_and_cotangents
from etcompile.lowering.mapped import mapped
from etcompile.lowering.pushed import PushedTransition
from etcompile.lowering.schedules.base import Found, Loop, Run, Steps
from etcompile.lowering.schedules.chunk_losses import loss_by_params, results_of_steps, written_by_loss
from etcompile.lowering.schedules.chunk_program import ChunkProgram
from etcompile.lowering.schedules.first_pass import Passed
from etcompile.lowering.schedules.recurrence import value_key

__all__ = ["ChunkValues", "chunk_values", "filtered", "without_loss"]

Array = Any
Value = Any


@dataclasses.dataclass(frozen=True)
class ChunkValues:
    """A chunk before its credit: states, losses, and what the program's equations make of each step.

    Attributes
    ----------
    passed : Passed
    inputs : list of arrays
    loss : LossValue
    values : dict of str to value
        By :func:`value_key`, time on axis 0.
    filters : dict of str to value
        Those that are carried and no traces, after the chunk.
    own : dict of int to array
        Gradients by parameters that the loss reads itself.
    asked : tuple
        Derivatives of the losses by outputs and new states, for a loop that pulls all credits.
    """

    passed: Passed
    inputs: list[Array]
    loss: LossValue
    values: dict[str, Value]
    filters: dict[str, Value]
    own: dict[int, Array]
    asked: Any


def chunk_values(
    program: ChunkProgram, run: Run, loop: Loop, steps: Steps, traces: Traces, passed: Passed | None = None
) -> ChunkValues:
    """The values of some steps; ``traces`` are those of the loop, widened; ``passed`` their first pass, if it is known."""
    inputs = run.inputs(steps.inputs)
    if passed is None:
        passed = program.first_pass(run.weights, loop.states, inputs)  # h_0 ... h_C
    loss, values, own, asked = _at_all_steps(
        program, run, loop.carried, steps, passed, inputs
    )  # D_t, f_t, x_t, L_t, K_t
    values, filters = filtered(program, values, traces)
    return ChunkValues(passed, inputs, loss, _after_filters(program, values), filters, own, asked)


def without_loss(
    program: ChunkProgram, weights: list[Array], passed: Passed, inputs: list[Array]
) -> tuple[list[Array], dict[str, Value]]:
    """Outputs of all steps, and what needs neither the loss nor other steps."""
    causal = program.causal

    def at_step(
        old: list[Array], costly: dict[int, Array], x: list[Array]
    ) -> tuple[list[Array], dict[str, Value]]:
        step = causal.model.one_of_many(weights, old, x, costly)
        context = Context(causal.program, causal.model, step, None, causal.functions)
        return step.outputs, _written(evaluate(context, program.equations.alone, {}, {}))

    return mapped(at_step, passed.before, passed.costly, inputs)


def filtered(
    program: ChunkProgram, values: dict[str, Value], traces: Traces
) -> tuple[dict[str, Value], Traces]:
    """Values with those that are recurrences of the size of states or presynaptic values; and these after the chunk."""
    filters, alone = program.equations.filters, program.equations.alone
    carried = {e.name: traces[e.name] for e in (*filters, *alone) if e.name in program.carried}

    def one(before: Traces, now: dict[str, Value]) -> tuple[Traces, tuple[dict[str, Value], Traces]]:
        found = evaluate(program.context, filters, now, before)
        kept = {name: program.causal.kept(name, found[name]) for name in before}
        return kept, ({e.name: found[e.name] for e in filters}, before)

    if not carried and not filters:
        return values, {}
    end, (found, before) = lax.scan(one, carried, values)
    return {**values, **found, **{value_key(Ref(name, -1)): v for name, v in before.items()}}, end


def _at_all_steps(
    program: ChunkProgram, run: Run, carried: Any, steps: Steps, passed: Passed, inputs: list[Array]
) -> tuple[LossValue, dict[str, Value], dict[int, Array], Any]:
    """Losses, what needs nothing of other steps, gradients of parameters that the loss reads, and of what steps give it."""
    causal, reads = program.causal, run.loss.program
    seen = (passed.before, passed.costly, inputs)
    given = (steps.items, steps.moving)
    writes = bool(jax.tree.leaves(carried))
    made = results_of_steps(run, passed, inputs) if writes or reads.params else None
    before = carried
    if writes:
        carried, before = written_by_loss(run, carried, made, given)
    without_params = dataclasses.replace(reads, params=())
    pulled = program.pulled is not None
    equations = [*program.equations.alone, *(() if pulled else program.equations.signals)]

    def at_step(
        old: list[Array], costly: dict[int, Array], x: list[Array], given: Any, now: Any
    ) -> tuple[Found, dict[str, Value], Any]:
        step = causal.model.one_of_many(run.weights, old, x, costly)
        found, cotangents = loss_and_cotangents(
            run.of_step, without_params, step.outputs, step.new_states, run.params, now, given[0]
        )
        after = step.with_loss(cotangents.outputs, cotangents.states, run.call(*given))
        context = Context(causal.program, causal.model, step, after, causal.functions)
        asked = (cotangents.outputs, cotangents.states) if pulled else None
        return (found.value, found.aux), _written(evaluate(context, equations, {}, {})), asked

    (losses, aux), values, asked = mapped(at_step, *seen, given, before)
    own = loss_by_params(run, made, given, before) if reads.params else {}
    return LossValue(losses, aux, carried), values, own, asked


def _after_filters(program: ChunkProgram, values: dict[str, Value]) -> dict[str, Value]:
    """Values with those that need the loss and filters."""
    late = program.equations.late
    if not late:
        return values

    def after(now: dict[str, Value]) -> dict[str, Value]:
        keys = {name: value_key(Ref(name, -1)) for name in program.carried}
        previous = {name: now[key] for name, key in keys.items() if key in now}
        done = evaluate(program.context, late, now, previous)
        return {e.name: done[e.name] for e in late}

    return {**values, **mapped(after, values)}


def _written(values: dict[str, Value]) -> dict[str, Value]:
    """Values that can be kept for all steps: transitions that are not written down cannot."""
    return {name: v for name, v in values.items() if not isinstance(v, PushedTransition)}
