"""What etcompile is held against: backpropagation through time on the same model, and braintrace on its twin."""

from __future__ import annotations

import importlib.util
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

__all__ = [
    "bptt",
    "braintrace_updates",
    "forward",
    "forward_flops",
    "has_braintrace",
    "learner",
    "learner_sequence",
    "twin",
]

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


# -- backpropagation through time -------------------------------------------------------------------------------------


def bptt(data: Data, model: Model) -> Run:
    """``jax.grad`` of a ``lax.scan`` over the ordinary model's step."""
    step = _PureStep(data, model)

    def run(params: dict[str, Array], hidden: list[Array], xs: Array, ys: Array) -> tuple[Array, Any]:
        def total(params: dict[str, Array]) -> tuple[Array, Array]:
            def body(hidden: list[Array], item: tuple[Array, Array]) -> tuple[list[Array], Array]:
                x, y = item
                hidden, out = step(params, hidden, x)
                return hidden, loss_fn(out, y)

            losses = jax.lax.scan(body, hidden, (xs, ys))[1]
            return losses.sum(), losses

        (_, losses), grads = jax.value_and_grad(total, has_aux=True)(params)
        return losses, grads

    return step.started(run)


def forward(data: Data, model: Model) -> Run:
    """The losses of a ``lax.scan`` over the ordinary model's step: what every gradient takes at the least."""
    step = _PureStep(data, model)

    def run(params: dict[str, Array], hidden: list[Array], xs: Array, ys: Array) -> tuple[Array, Any]:
        def body(hidden: list[Array], item: tuple[Array, Array]) -> tuple[list[Array], Array]:
            hidden, out = step(params, hidden, item[0])
            return hidden, loss_fn(out, item[1])

        return jax.lax.scan(body, hidden, (xs, ys))[1], {}

    return step.started(run)


def forward_flops(data: Data, model: Model) -> float:
    """Operations of one step forward, as XLA counts them."""
    step = _PureStep(data, model)
    analysis = jax.jit(step).lower(step.params, step.hidden, data.example).compile().cost_analysis()
    return float((analysis or {}).get("flops", 0.0))


class _PureStep:
    """One step of a brainstate model as a pure function ``(params, hidden, x) -> (hidden, out)``."""

    def __init__(self, data: Data, model: Model) -> None:
        brainstate.nn.init_all_states(model, batch_size=data.batch)
        self._function = transform.StatefulFunction(model.update)
        self._function.make_jaxpr(data.example)
        states = self._function.get_states(data.example)
        all_states: Any = model.states()
        paths = {id(s): ".".join(map(str, path)) for path, s in all_states.items()}
        self._names = [paths[id(s)] if isinstance(s, brainstate.ParamState) else None for s in states]
        self.params = {n: s.value for n, s in zip(self._names, states, strict=True) if n is not None}
        self.hidden = [s.value for n, s in zip(self._names, states, strict=True) if n is None]

    def started(self, run: Callable[..., tuple[Array, Any]]) -> Run:
        """``run(params, hidden, xs, ys)`` from the model's own values."""
        jitted = jax.jit(run)
        return Run(
            lambda xs, ys: jitted(self.params, self.hidden, xs, ys),
            lambda xs, ys: jitted.lower(self.params, self.hidden, xs, ys),
        )

    def __call__(self, params: dict[str, Array], hidden: list[Array], x: Array) -> tuple[list[Array], Array]:
        rest = iter(hidden)
        values = [next(rest) if n is None else params[n] for n in self._names]
        new, out = self._function.jaxpr_call(values, x)
        return [v for n, v in zip(self._names, new, strict=True) if n is None], out


# -- braintrace -------------------------------------------------------------------------------------------------------


def has_braintrace() -> bool:
    """Whether braintrace is installed."""
    return importlib.util.find_spec("braintrace") is not None


def twin(data: Data) -> Model:
    """The model made of braintrace's own layers."""
    return data.model(_braintrace().nn)


def learner(data: Data, rule: str, model: Model) -> Any:
    """The online learner of braintrace, of a model made of its layers."""
    braintrace = _braintrace()
    algorithm = {"d_rtrl": braintrace.D_RTRL, "pp_prop": braintrace.pp_prop, "e_prop": braintrace.EProp}[rule]
    options = dict(OPTIONS[rule])
    if options.get("feedback") == "random":
        options["random_feedback_key"] = jax.random.key(0)
    return braintrace.compile(model, algorithm, data.example, batch_size=data.batch, **options)


def learner_sequence(learner: Any) -> Run:
    """Losses and summed gradients over a sequence, by braintrace's own driver."""

    def step(x: Array, y: Array) -> Array:
        return loss_fn(learner(x), y)

    @transform.jit
    def run(xs: Array, ys: Array) -> tuple[Array, Any]:
        grads, losses = learner.etrace_grad(
            xs, ys, step_fn=step, reduction="sum", loss_output="per_step", return_value=True
        )
        return losses, {".".join(map(str, path)): g for path, g in grads.items()}

    return Run(run, run.lower)


def braintrace_updates(learner: Any) -> Callable[[Array, Array], Any]:
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
