"""etcompile as a user calls it: a sequence with its gradient, and a weight update at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brainstate
import jax
import optax
from models import Data, loss_fn
from results import CALLS
from run import Run, update_rate

import etcompile

__all__ = ["calls", "compiled", "sequence", "single", "updates"]

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


def calls(step: etcompile.Step, x: jax.Array, y: jax.Array) -> dict[str, Callable[[], Any]]:
    """One step as a user calls it, and the same work in a bare jitted function of the same arguments."""
    gradient = step.value_and_grad(loss_fn)
    params, carries = step.params, {name: step.init_carry() for name in CALLS.values()}
    apply = jax.jit(step.apply)

    @jax.jit
    def bare(params: Any, carry: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, Any]:
        def loss(params: Any) -> tuple[Any, Any]:
            after, out = step.apply(params, carry, x)
            return loss_fn(out, y), after

        (value, after), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return after, value, grads

    def bare_step() -> Any:
        carries[forward], out = apply(params, carries[forward], x)
        return out

    def bare_gradient() -> Any:
        carries[with_loss], *found = bare(params, carries[with_loss], x, y)
        return found

    forward, with_loss = CALLS.values()
    ours = (lambda: step(x), lambda: gradient(x, y))
    return dict(zip(CALLS, ours, strict=True)) | {forward: bare_step, with_loss: bare_gradient}
