"""The pure functions that a step jits: what runs, and what a cost is told of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from etcompile.lowering.functions import Call, Carry, Item, StepFunctions, Sums
from etcompile.lowering.losses import Loss, LossProgram
from etcompile.lowering.schedules.base import Plan
from etcompile.runtime.model_states import ModelAccess

__all__ = ["DONATED", "apart", "apply_apart", "listed", "one_step", "sequence"]

#: Which argument of a function made by :func:`apart` may be given away: the traces.
DONATED = 2


def apart(whole: Callable, loss: LossProgram) -> Callable:
    """A function of plain trees: ``(params, states, traces, inputs, read by the loss, items, call)``.

    It gives ``(traces, states), (value, aux, carried), gradients``. Traces come first, since jax writes the first result that has
    the shape of what it is given away where that was: a gradient may have the shape of its trace. Classes of one's own in
    the place of tuples would cost a call as much as a small step takes.
    """

    def fn(p: Any, s: Any, t: Any, i: Any, read: tuple[Any, Any], y: Item, c: Call) -> Any:
        found, gradients, carry = whole(p, Carry(s, t), Loss(loss, *read), i, y, c)
        return (carry.traces, carry.states), (found.value, found.aux, found.carried), gradients

    return fn


def apply_apart(functions: StepFunctions) -> Callable:
    """``(params, states, traces, inputs, call) -> ((traces, states), outputs)`` of one step; an empty call may be left out."""

    def fn(p: Any, s: Any, t: Any, i: Any, c: Call | None = None) -> Any:
        carry, outputs = functions.apply(p, Carry(s, t), i, c)
        return (carry.traces, carry.states), outputs

    return fn


def listed(fn: Callable, live: ModelAccess) -> Callable:
    """What :func:`apart` and :func:`apply_apart` give, of values in the order of the model's ``State`` objects.

    Parameters and states come and go as lists, since JAX takes dicts apart at every call, and puts them together again.
    """

    def run(params: list[Any], states: list[Any], *rest: Any) -> Any:
        (traces, after), *found = fn(live.as_params(params), live.as_states(states), *rest)
        return (traces, live.of_states(after)), *found

    return run


def one_step(functions: StepFunctions) -> Callable:
    """``(params, carry, loss, inputs, items, call) -> (found, grads, carry)`` of one step."""
    return lambda p, s, n, i, y, c: functions.value_and_grad(n, p, s, i, y, c)


def sequence(functions: StepFunctions, plan: Plan) -> Callable:
    """The same over a sequence; may go on from sums of gradients."""

    def whole(p: Any, s: Carry, n: Loss, i: Any, y: Item, c: Call, sums: Sums | None = None) -> Any:
        return functions.sequence(plan, n, p, s, i, y, c, sums)

    return whole
