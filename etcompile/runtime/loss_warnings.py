"""What a gradient leaves out of a user's loss, said once, when the loss is traced."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from etcompile.analysis.loss_memory import remembered_with_derivative
from etcompile.errors import EtcompileWarning
from etcompile.frontend.loss import TracedLoss
from etcompile.ir.ops import OPS
from etcompile.ir.program import Ref, TraceProgram

__all__ = ["say_what_ends_within_the_step", "say_what_is_carried_without_credit"]


def say_what_ends_within_the_step(program: TraceProgram, states: Sequence[str]) -> None:
    """Warn where a loss reads states, and weights take their learning signal from the outputs or a modulator alone."""
    if not states or program.window is not None:
        return
    deaf = []
    for gradient in program.gradients:
        signals = {OPS[op].signal for op in _ops_within_the_step(program, gradient.value)}
        if "given" in signals and not signals & {"new", "start"}:
            deaf.extend(program.header.site(gradient.site).params)
    if deaf:
        params = list(dict.fromkeys(deaf))
        named = ", ".join(params[:4]) + (f" and {len(params) - 4} more" if len(params) > 4 else "")
        warnings.warn(
            f"the loss reads {', '.join(states)}, and {program.name} has a learning signal of its own for {named}, made of the "
            "outputs or given with the call: what the loss says of states counts within the step only. Rules such as d_rtrl and "
            "e_prop follow it.",
            EtcompileWarning,
            stacklevel=2,
        )


def _ops_within_the_step(program: TraceProgram, value: Ref) -> frozenset[str]:
    """Operations that a value is made of in this step."""
    made_by = {e.name: e for e in program.equations}
    found: dict[str, str] = {}
    wanted = [value]
    while wanted:
        ref = wanted.pop()
        if ref.delay == 0 and ref.name in made_by and ref.name not in found:
            equation = made_by[ref.name]
            found[ref.name] = equation.op
            wanted.extend(equation.refs)
    return frozenset(found.values())


def say_what_is_carried_without_credit(
    program: TraceProgram, traced: TracedLoss, own: Sequence[bool]
) -> None:
    """Warn where a loss keeps, in states of its own, values that the model has a derivative by, and reads them at later steps.

    ``own`` says of each state that it reads whether it is one of the model's. A gradient made at its step has no derivative by
    what the loss kept at earlier ones; backpropagation in windows has.
    """
    if program.window is not None:
        return
    kept = remembered_with_derivative(traced, own)
    if kept:
        shapes = ", ".join(f"{type(s).__name__} of shape {_shape(s)}" for s in kept)
        warnings.warn(
            f"the loss keeps values of the model in a state of its own ({shapes}) and reads it later: credit ends there. "
            "The gradient is by what each step adds, not by what earlier steps left. To say that this is meant, keep "
            "jax.lax.stop_gradient of the value; for the whole gradient keep it in a state of the model, in update().",
            EtcompileWarning,
            stacklevel=2,
        )


def _shape(state: Any) -> str:
    return " and ".join(str(jnp.shape(v)) for v in jax.tree.leaves(state.value))
