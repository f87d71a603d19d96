"""The pure functions that a step jits: what runs, and what a cost is told of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from etcompile.lowering.functions import Call, Carry, Item, StepFunctions, Sums
from etcompile.lowering.losses import Loss, LossProgram
from etcompile.lowering.schedules.base import Plan

__all__ = ["DONATED", "apart", "apply_apart", "one_step", "sequence"]

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
    """``(params, states, traces, inputs, call) -> ((traces, states), outputs)`` of one step."""

    def fn(p: Any, s: Any, t: Any, i: Any, c: Call) -> Any:
        carry, outputs = functions.apply(p, Carry(s, t), i, c)
        return (carry.traces, carry.states), outputs

    return fn


def one_step(functions: StepFunctions) -> Callable:
    """``(params, carry, loss, inputs, items, call) -> (found, grads, carry)`` of one step."""
    return lambda p, s, n, i, y, c: functions.value_and_grad(n, p, s, i, y, c)


def sequence(functions: StepFunctions, plan: Plan) -> Callable:
    """The same over a sequence; may go on from sums of gradients."""

    def whole(p: Any, s: Carry, n: Loss, i: Any, y: Item, c: Call, sums: Sums | None = None) -> Any:
        return functions.sequence(plan, n, p, s, i, y, c, sums)

    return whole
