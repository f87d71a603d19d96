"""etcompile as a user calls it: a sequence with its gradient, and a weight update at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brainstate
import jax
import optax
from models import Data, loss_fn
from run import Run, update_rate

import etcompile

__all__ = ["compiled", "sequence", "single", "updates"]

OPTIONS: dict[str, dict[str, Any]] = {
    "d_rtrl": {},
    "pp_prop": {"decay": 0.9},
    "e_prop": {"kappa": 0.9, "feedback": "random"},
}


def compiled(data: Data, rule: str, model: brainstate.nn.Module) -> etcompile.Step:
    return etcompile.compile(model, data.example, algo=rule, batch_size=data.batch, **OPTIONS[rule])


def sequence(step: etcompile.Step, chunk: int | str = "auto") -> Run:
    """Losses and summed gradients over a sequence."""
    run = step.scan_value_and_grad(loss_fn, chunk=chunk)
    jit: Any = brainstate.transform.jit
    return Run(run, lambda xs, ys: jit(run).lower(xs, ys))


def single(step: etcompile.Step) -> Callable[[jax.Array, jax.Array], Any]:
    """The gradient of the first step of a sequence."""
    run = step.value_and_grad(loss_fn)
    return lambda xs, ys: run(xs[0], ys[0])


def updates(step: etcompile.Step) -> Callable[[jax.Array, jax.Array], Any]:
    """A sequence with a weight update at every step; losses."""
    return step.learn(loss_fn, optax.sgd(update_rate))
