"""braintrace, on the model made of its own layers: step by step, in windows, and with an update at every step."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import optax
from models import Data, loss_fn
from run import Run, update_rate

__all__ = ["learner", "sequence", "twin", "updates"]

#: Untyped: these take and return any tree.
transform: Any = brainstate.transform

Array = jax.Array
Model = brainstate.nn.Module

#: The options by which braintrace's rules are the same as ours.
OPTIONS: dict[str, dict[str, Any]] = {
    "d_rtrl": {},
    "pp_prop": {"decay_or_rank": 0.9},
    "e_prop": {"kappa_filter_decay": 0.9, "feedback": "random"},
}


def twin(data: Data) -> Model:
    """The model made of braintrace's own layers."""
    return data.model(_braintrace().nn)


def learner(data: Data, rule: str, model: Model, window: int = 1) -> Any:
    """The online learner of braintrace, of a model made of its layers; for windows of steps if they are longer than one."""
    braintrace = _braintrace()
    algorithm = {"d_rtrl": braintrace.D_RTRL, "pp_prop": braintrace.pp_prop, "e_prop": braintrace.EProp}[rule]
    options = dict(OPTIONS[rule])
    if options.get("feedback") == "random":
        options["random_feedback_key"] = jax.random.key(0)
    if window > 1:
        options["vjp_method"] = "multi-step"
    return braintrace.compile(model, algorithm, data.example, batch_size=data.batch, **options)


def sequence(data: Data, rule: str, model: Model, window: int = 1) -> Run:
    """Losses and summed gradients over a sequence, by braintrace's own driver: step by step, or in windows of so many steps."""
    found, steps_of = learner(data, rule, model, window), _braintrace().MultiStepData

    def step(x: Array, y: Array) -> Array:
        return loss_fn(found(x), y) if window == 1 else jax.vmap(loss_fn)(found(steps_of(x)), y)

    @transform.jit
    def run(xs: Array, ys: Array) -> tuple[Array, Any]:
        grads, losses = found.etrace_grad(
            xs,
            ys,
            step_fn=step,
            chunk_size=window if window > 1 else None,
            reduction="sum",
            loss_output="per_step",
            return_value=True,
        )
        return losses, {".".join(map(str, path)): g for path, g in grads.items()}

    return Run(run, run.lower)


def updates(learner: Any) -> Callable[[Array, Array], Any]:
    """A sequence with a weight update at every step; losses."""
    params = learner.param_states
    optimizer = optax.sgd(update_rate)
    memory = brainstate.ShortTermState(optimizer.init({path: s.value for path, s in params.items()}))

    def one(x: Array, y: Array) -> Array:
        gradient = transform.grad(lambda: loss_fn(learner(x), y), params, return_value=True)
        grads, loss = gradient()
        values = {path: s.value for path, s in params.items()}
        changes: Any
        changes, memory.value = optimizer.update(dict(grads), memory.value, values)
        for path, state in params.items():
            state.value = jax.tree.map(jnp.add, values[path], changes[path])
        return loss

    return transform.jit(lambda xs, ys: transform.for_loop(one, xs, ys))


def _braintrace() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("braintrace")
