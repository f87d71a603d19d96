"""The pure functions that a step jits: what runs, and what a cost is told of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from etcompile.lowering.functions import Call, Carry, Item, StepFunctions, Sums
from etcompile.lowering.losses import Loss
from etcompile.lowering.schedules.base import Plan

__all__ = ["DONATED", "apart", "one_step", "sequence"]

#: Which argument of a function made by :func:`apart` is given away: the traces.
DONATED = 2


def apart(whole: Callable) -> Callable:
    """A function of the carry as one of states and traces, so that the traces may be given away."""
    return lambda p, s, t, n, i, y, c: whole(p, Carry(s, t), n, i, y, c)


def one_step(functions: StepFunctions) -> Callable:
    """``(params, carry, loss, inputs, items, call) -> (found, grads, carry)`` of one step."""
    return lambda p, s, n, i, y, c: functions.value_and_grad(n, p, s, i, y, c)


def sequence(functions: StepFunctions, plan: Plan) -> Callable:
    """The same over a sequence; may go on from sums of gradients."""

    def whole(p: Any, s: Carry, n: Loss, i: Any, y: Item, c: Call, sums: Sums | None = None) -> Any:
        return functions.sequence(plan, n, p, s, i, y, c, sums)

    return whole
