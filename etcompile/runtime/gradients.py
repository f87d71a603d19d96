"""Losses and gradients of one step and of a sequence, as the executor runs them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from etcompile.errors import EtcompileWarning, OptionError
from etcompile.frontend.user_code import warn
from etcompile.lowering.functions import Carry
from etcompile.lowering.losses import LossValue, as_loss_value
from etcompile.lowering.schedules.base import Plan
from etcompile.runtime.calls import DONATED, apart, listed, one_step, sequence
from etcompile.runtime.checks import as_inputs, check_sequence, given_with, stacked_steps, steps_of
from etcompile.runtime.executor import Executor
from etcompile.runtime.later_traces import alone
from etcompile.runtime.losses import BoundLoss, JoinedLoss, LossFunction, check_mask, join_loss
from etcompile.runtime.progress import gradients_in_pieces
from etcompile.runtime.step_data import (
    MultiStepData,
    arrays_alone,
    has_multi_step,
    over_time,
    repeated,
    unwrap,
)

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = [
    "bound_loss",
    "called_with_gradients",
    "environment_of",
    "environments",
    "joined_loss",
    "sequence_gradients",
    "sequence_inputs",
    "step_gradients",
]

#: What a model takes from the environment, and what a loss does.
Environments = tuple[tuple[Any, ...], tuple[Any, ...]]


def called_with_gradients(
    run: Executor,
    loss: LossFunction,
    x: Any,
    targets: tuple[Any, ...],
    modulator: Any,
    mask: Any,
) -> tuple[LossValue, Any]:
    """All that the loss of one step gives, and its gradients; of many steps where something is multi-step data."""
    plain = modulator is None and mask is None and not isinstance(x, MultiStepData)
    if plain and (joined := loss.unchanged()) is not None:
        again = _again(run, joined.step_key, joined, x, targets, time=0)
        if again is not None:
            return again
    given = (x, targets, modulator, mask)
    if has_multi_step(given):
        return sequence_gradients(run, loss, *repeated(given))
    return step_gradients(run, loss, *unwrap(given))


def step_gradients(
    run: Executor,
    loss: LossFunction,
    x: Any,
    targets: tuple[Any, ...],
    modulator: Any,
    mask: Any,
) -> tuple[LossValue, Any]:
    """All that the loss of one step gives, and its gradients; the step is taken."""
    run.follow_environment()
    given, mask = as_inputs(run.model, x), check_mask(mask, None)
    inputs = run.with_environment(given)
    carry = run.carry(give_away=True)
    joined = joined_loss(run, loss, targets, mask, None)
    bound = _bound(run, joined, None)
    data = inputs, bound.item(targets, mask, 0), given_with(run.compiled.program, None, modulator)
    return _advanced(run, joined.step_key, one_step(run.functions), bound, carry, data, time=0, given=given)


def _again(
    run: Executor, key: Hashable, joined: JoinedLoss, x: Any, targets: tuple[Any, ...], time: int
) -> tuple[LossValue, Any] | None:
    """What the jitted function under a key gives; None where more than data and parameters changed since the last call."""
    if joined.program.asks_host:
        return None
    if time and (joined.environment.inputs or run.model.environment.reads):  # these differ from step to step
        return None
    bound = joined.always or joined.now(None)
    inputs = (x,) if joined.one_input else x
    found = run.again(key, (inputs, bound.read, bound.item(targets, None, time), {}))
    if found is None:
        return None
    of_loss, grads = found
    if bound.written:
        bound.write(of_loss[-1])
    return as_loss_value(of_loss), grads


def sequence_gradients(
    run: Executor,
    loss: LossFunction,
    xs: Any,
    targets: tuple[Any, ...],
    modulator: Any = None,
    mask: Any = None,
    *,
    chunk: int | str | None = None,
    reduction: str = "sum",
    progress: bool | Progress = False,
) -> tuple[LossValue, Any]:
    """All that the losses of a sequence give, and the summed gradients; time is axis 0."""
    alone = modulator is None and mask is None and progress is False
    again = _sequence_again(run, loss, xs, targets) if alone and arrays_alone((xs, targets)) else None
    if again is None:
        found, grads = _sequence(run, loss, xs, targets, modulator, mask, chunk, progress)
    else:
        found, grads = again
    if reduction == "mean":
        steps = len(found.value)
        count = steps if mask is None else jnp.maximum(jnp.sum(check_mask(mask, steps)), 1)
        grads = jax.tree.map(lambda g: (g / count).astype(g.dtype), grads)
    return found, grads


def _sequence(
    run: Executor,
    loss: LossFunction,
    xs: Any,
    targets: tuple[Any, ...],
    modulator: Any,
    mask: Any,
    chunk: int | str | None,
    progress: bool | Progress,
) -> tuple[LossValue, Any]:
    """As :func:`sequence_gradients`, of a sum."""
    program = run.compiled.program
    if modulator is not None and program.window is not None:
        raise OptionError(
            f"{program.name} runs in windows, which read no modulator.",
            got="modulator=...",
            expected="no modulator",
        )
    xs, targets, mask = over_time((xs, targets, mask))
    inputs, targets = sequence_inputs(run, xs, targets)
    steps = steps_of(inputs)
    mask = check_mask(mask, steps)
    later = alone(run, inputs, steps, chunk) if progress is False and modulator is None else None
    carry = run.carry(give_away=True) if later is None else later.carry
    joined = joined_loss(run, loss, targets, mask, steps)
    bound = _bound(run, joined, steps)
    data = inputs, bound.item(targets, mask, 1), given_with(program, None, modulator)
    if later is not None and not bound.loss.program.effects:
        key, whole = ("alone", bound.loss.program, later.plan), sequence(later.functions, later.plan)
        return _advanced(run, key, whole, bound, carry, data, time=1, make_traces=later.traces_of(inputs))
    carry = carry if later is None else run.carry(give_away=True)
    plan = _plan(run, steps, chunk, ordered=bool(bound.loss.program.effects))
    key, whole = ("sequence", bound.loss.program, plan), sequence(run.functions, plan)
    if progress is not False:
        together = plan.together(steps)
        return gradients_in_pieces(run, key, whole, together, bound.loss, data, progress, bound.write)
    loss.keep_sequence(steps, joined, key)
    return _advanced(run, key, whole, bound, carry, data, time=1)


def _sequence_again(
    run: Executor, loss: LossFunction, xs: Any, targets: tuple[Any, ...]
) -> tuple[LossValue, Any] | None:
    """As :func:`_sequence`, where nothing but data and parameters changed since the last call; else None."""
    joined, first = loss.unchanged(), next(iter(jax.tree.leaves(xs)), None)
    if joined is None or not (shape := getattr(first, "shape", ())):
        return None
    if (key := loss.sequence(shape[0], joined)) is None:
        return None
    return _again(run, key, joined, xs, targets, time=1)


def _advanced(
    run: Executor,
    key: Any,
    whole: Callable,
    bound: BoundLoss,
    carry: Any,
    data: tuple[Any, ...],
    time: int,
    given: Any = None,
    make_traces: Callable[[], Any] | None = None,
) -> tuple[LossValue, Any]:
    """What ``whole(params, carry, loss, *data)`` gives, jitted; its carry is committed, and what the loss writes.

    ``make_traces`` makes the traces that the sequence leaves, where ``whole`` does not.
    """
    donated = () if run.asks_host(bound.loss.program) else (DONATED,)
    loss, live = bound.loss, run.live
    fn = run.jit(key, listed(apart(whole, loss.program), live), donate=donated)
    params, carry, data = run.placed(carry, data, time)
    inputs, *items = data
    of_model = live.of_params(params), live.of_states(carry.states), carry.traces
    args = *of_model, inputs, bound.read, *items
    (traces, states), (value, aux, carried), grads = run.call(fn, *args, loss=loss, given=given)
    run.commit(Carry(live.as_states(states), traces), make_traces)
    bound.write(carried)
    return LossValue(value, aux, carried), grads


def _plan(run: Executor, steps: int, chunk: int | str | None, ordered: bool) -> Plan:
    """How a sequence is run; what there is to say of it is said."""
    plan = run.functions.plan(run.compiled.schedule, steps, chunk, ordered)
    if caution := plan.how.caution(plan.together(steps), steps):
        warn(caution, EtcompileWarning)
    return plan


# -- what a loss and a sequence take ----------------------------------------------------------------------------------


def sequence_inputs(run: Executor, xs: Any, targets: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The inputs of a sequence, checked and joined with the environment of each step, and its targets."""
    xs, targets = stacked_steps(run.model, xs, targets)
    run.follow_environment()
    inputs = as_inputs(run.model, xs)
    check_sequence(run.model, inputs, targets)
    return run.with_environment(inputs, steps_of(inputs)), targets


def joined_loss(run: Executor, loss: LossFunction, targets: Any, mask: Any, steps: int | None) -> JoinedLoss:
    """A loss function as it is traced for the compilation and the environment as they are.

    With ``steps`` it is one over so many steps: axis 0 of ``targets`` and ``mask`` is time.
    """
    with run.compilations.completed():
        return join_loss(run.live, run.compilation, loss, targets, mask, steps)


def bound_loss(run: Executor, loss: LossFunction, targets: Any, mask: Any, steps: int | None) -> BoundLoss:
    """A loss function for a call over ``steps`` steps, or of one, with what it reads as it is now."""
    return _bound(run, joined_loss(run, loss, targets, mask, steps), steps)


def _bound(run: Executor, joined: JoinedLoss, steps: int | None) -> BoundLoss:
    with run.compilations.completed():
        return joined.now(steps)


def environments(run: Executor, joined: JoinedLoss, steps: int) -> Environments:
    """What the model and a loss take from ``brainstate.environ`` at each of ``steps`` steps, time on axis 0."""
    with run.compilations.completed():
        return run.model.environment.values(steps), joined.environment.values(steps)


@contextmanager
def environment_of(run: Executor, joined: JoinedLoss, arrays: Environments) -> Iterator[None]:
    """The environment of some steps of a sequence, from their share of :func:`environments`."""
    of_model, of_loss = arrays
    with run.model.environment.around(of_model), joined.environment.around(of_loss):
        yield
