"""Running without gradients: one step, a call of many steps, a sequence."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from etcompile.lowering.functions import Carry
from etcompile.runtime.calls import apply_apart, listed
from etcompile.runtime.checks import check_one, given_with, steps_of
from etcompile.runtime.executor import Executor
from etcompile.runtime.gradients import sequence_inputs
from etcompile.runtime.progress import in_pieces, piece_lengths
from etcompile.runtime.step_data import MultiStepData, has_multi_step, over_time, split, unwrap

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["called", "run_sequence"]


def called(run: Executor, inputs: tuple[Any, ...], target: Any, modulator: Any) -> Any:
    """Outputs of one step; of many where something is multi-step data."""
    plain = target is None and modulator is None and not (inputs and isinstance(inputs[0], MultiStepData))
    if plain and (again := run.again("apply", (inputs,))) is not None:
        return again[0]
    given = inputs, target, modulator
    if has_multi_step(given):
        return _many_steps(run, given)
    return _one_step(run, *unwrap(given))


def _one_step(run: Executor, inputs: tuple[Any, ...], target: Any, modulator: Any) -> Any:
    """Outputs of one step."""
    run.follow_environment()
    carry = run.carry()
    call = given_with(run.compiled.program, target, modulator)
    data = (run.with_environment(inputs), call) if call else (run.with_environment(inputs),)
    params, carry, data = run.placed(carry, data)
    fn, live = run.jit("apply", listed(apply_apart(run.functions), run.live)), run.live
    args = live.of_params(params), live.of_states(carry.states), carry.traces, *data
    (traces, states), out = run.call(fn, *args, given=inputs)
    run.commit(Carry(live.as_states(states), traces))
    return out


def _many_steps(run: Executor, args: tuple[Any, Any, Any]) -> Any:
    """Outputs of all steps of multi-step arguments ``(inputs, target, modulator)``, time on axis 0."""
    run.follow_environment()
    per_step, join = split(args)
    check_one(run.model, join(_one(per_step))[0])
    around = run.with_environment((), len(jax.tree.leaves(per_step)[0]))
    functions, program = run.functions, run.compiled.program

    def steps(params: Any, carry: Carry, args: tuple[Any, Any, Any], around: Any) -> tuple[Carry, Any]:
        # Split again: what is the same at every step must come in as an argument, not be baked in.
        xs, join = split(args)

        def body(carry: Carry, item: tuple[Any, Any]) -> tuple[Carry, Any]:
            x, now = item
            inputs, target, modulator = join(x)
            given = inputs if now == () else dataclasses.replace(now, given=inputs)
            return functions.apply(params, carry, given, given_with(program, target, modulator))

        return jax.lax.scan(body, carry, (xs, around))

    params, carry, _ = run.placed(run.carry(), ())
    args = jax.tree.map(
        lambda v: run.placement.put_batch(v, 1 if isinstance(v, MultiStepData) else 0),
        args,
        is_leaf=lambda v: isinstance(v, MultiStepData),
    )
    carry, out = run.call(run.jit("steps", steps), params, carry, args, around)
    run.commit(carry)
    return out


def _one(per_step: Any) -> Any:
    """Shapes of one step."""
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(jnp.shape(v)[1:], jnp.result_type(v)), per_step)


def run_sequence(run: Executor, xs: Any, progress: bool | Progress) -> Any:
    """Outputs of a sequence, time on axis 0."""
    inputs, _ = sequence_inputs(run, over_time(xs), ())
    functions, steps = run.functions, steps_of(inputs)
    plan = functions.forward_plan(steps)
    key = ("forward",) if plan is None else ("forward", plan.how.name, plan.size)

    def forward(inputs: Any) -> Any:
        params, carry, (placed,) = run.placed(run.carry(), (inputs,), time=1)
        fn = run.jit(key, lambda params, carry, xs: functions.scan(plan, params, carry, xs))
        outputs, carry = run.call(fn, params, carry, placed)
        run.commit(carry)
        return outputs

    if progress is False:
        return forward(inputs)
    lengths = piece_lengths(steps, 1 if plan is None else plan.size)
    return in_pieces(run, forward, (inputs,), lengths, progress, "steps", shown=None)
