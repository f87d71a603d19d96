"""The pure functions that a step jits, one per way of running: what runs, and what a cost is told of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from etcompile.lowering.functions import Call, Carry, Item, StepFunctions, Sums
from etcompile.lowering.losses import Loss

__all__ = ["DONATED", "apart", "one_step", "sequence", "windows"]

#: Which argument of a function made by :func:`apart` is given away: the traces.
DONATED = 2


def apart(whole: Callable) -> Callable:
    """A function of the carry as one of states and traces, so that the traces may be given away."""
    return lambda p, s, t, n, i, y, c: whole(p, Carry(s, t), n, i, y, c)


def one_step(functions: StepFunctions) -> Callable:
    """``(params, carry, loss, inputs, items, call) -> (found, grads, carry)`` of one step."""
    return lambda p, s, n, i, y, c: functions.value_and_grad(n, p, s, i, y, c)


def sequence(functions: StepFunctions, size: int) -> Callable:
    """The same over a sequence, ``size`` steps at once; may go on from sums of gradients."""

    def whole(p: Any, s: Carry, n: Loss, i: Any, y: Item, c: Call, sums: Sums | None = None) -> Any:
        if size == 1 and not functions.causal.too_large:
            return functions.scan_value_and_grad(n, p, s, i, y, c, sums)
        return functions.chunks_value_and_grad(n, size, p, s, i, y, c, sums)

    return whole


def windows(functions: StepFunctions, window: int) -> Callable:
    """The same over a sequence in windows of backpropagation; 0: one window."""

    def whole(p: Any, s: Carry, n: Loss, i: Any, y: Item, c: Call, sums: Sums | None = None) -> Any:
        return functions.windows_value_and_grad(n, window, p, s, i, y, sums)

    return whole
