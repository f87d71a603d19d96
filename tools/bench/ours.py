"""etcompile as a user calls it: a sequence with its gradient, and a weight update at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import brainstate
import jax
import optax
from models import Data, loss_fn
from results import CALLS
from run import Run, update_rate

import etcompile

__all__ = ["anew", "calls", "compiled", "sequence", "single", "updates"]

OPTIONS: dict[str, dict[str, Any]] = {
    "d_rtrl": {},
    "pp_prop": {"decay": 0.9},
    "e_prop": {"kappa": 0.9, "feedback": "random"},
}


def compiled(
    data: Data,
    rule: str,
    model: brainstate.nn.Module,
    keep_traces: bool | None = None,
    events: float | None = None,
    write_every: int | str = "auto",
) -> etcompile.Step:
    """The step, by default with traces that go from sequence to sequence where those of the benchmark's model do."""
    keep = data.spec.keep_traces if keep_traces is None else keep_traces
    schedule = etcompile.Schedule(keep_traces=keep, events=events, write_every=write_every)
    options = {"algo": rule, "batch_size": data.batch, "schedule": schedule, **OPTIONS[rule]}
    return etcompile.compile(model, data.example, **options)


def sequence(step: etcompile.Step, chunk: int | str = "auto") -> Run:
    """Losses and summed gradients over a sequence."""
    run = step.scan_value_and_grad(loss_fn, chunk=chunk)
    jit: Any = brainstate.transform.jit
    return Run(run, lambda xs, ys: jit(run).lower(xs, ys))


def anew(step: etcompile.Step) -> Run:
    """The same, from the initial states each time, as in a training loop; the reset is part of a run."""
    run = sequence(step)

    def call(xs: jax.Array, ys: jax.Array) -> Any:
        step.reset()
        return run(xs, ys)

    return Run(call, run.lower)


def single(step: etcompile.Step) -> Callable[[jax.Array, jax.Array], Any]:
    """The gradient of the first step of a sequence."""
    run = step.value_and_grad(loss_fn)
    return lambda xs, ys: run(xs[0], ys[0])


def updates(step: etcompile.Step) -> Callable[[jax.Array, jax.Array], Any]:
    """A sequence with a weight update at every step; losses."""
    return step.learn(loss_fn, optax.sgd(update_rate))


def calls(
    step: etcompile.Step, model: brainstate.nn.Module, x: jax.Array, y: jax.Array
) -> dict[str, Callable[[], Any]]:
    """One step as a user calls it, and beside it the model alone, and a bare jitted function.

    The model is another one of the kind, under brainstate's own `jit`; the function has the same work and arguments as the step.
    To learn is a sequence of one step, with its update.
    """
    xs, ys = x[None], y[None]
    gradient, learn = step.value_and_grad(loss_fn), updates(step)
    ours = dict(zip(CALLS, (lambda: step(x), lambda: gradient(x, y), lambda: learn(xs, ys)), strict=True))
    columns = zip(*CALLS.values(), strict=True)
    others = (_alone(model, x, y), _bare(step, x, y))
    beside = (dict(zip(names, found, strict=True)) for names, found in zip(columns, others, strict=True))
    return {**ours, **{who: call for found in beside for who, call in found.items()}}


def _alone(model: brainstate.nn.Module, x: jax.Array, y: jax.Array) -> tuple[Callable[[], Any], ...]:
    """The model without traces: one step, the gradient of one step, and that with an update."""
    transform: Any = brainstate.transform
    weights = cast(Any, model.states(brainstate.ParamState))
    optimizer = optax.sgd(update_rate)
    kept = brainstate.ShortTermState(optimizer.init({k: w.value for k, w in weights.items()}))

    def with_loss(x: jax.Array, y: jax.Array) -> Any:
        return transform.grad(lambda: loss_fn(model(x), y), weights, return_value=True)()

    def with_update(x: jax.Array, y: jax.Array) -> Any:
        grads, value = with_loss(x, y)
        params = {k: w.value for k, w in weights.items()}
        changes, kept.value = optimizer.update(dict(grads), kept.value, params)
        for k, new in cast(Any, optax.apply_updates(params, changes)).items():
            weights[k].value = new
        return value

    forward, gradient, update = map(transform.jit, (model, with_loss, with_update))
    return lambda: forward(x), lambda: gradient(x, y), lambda: update(x, y)


def _bare(step: etcompile.Step, x: jax.Array, y: jax.Array) -> tuple[Callable[[], Any], ...]:
    """The work of a step, of its gradient, and of that with an update, on arguments that the caller keeps."""
    params, apply, carries = step.params, jax.jit(step.apply), [step.init_carry() for _ in CALLS]
    optimizer = optax.sgd(update_rate)
    learned = [params, optimizer.init(params)]

    def with_loss(params: Any, carry: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, Any]:
        def loss(params: Any) -> tuple[Any, Any]:
            after, out = step.apply(params, carry, x)
            return loss_fn(out, y), after

        (value, after), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return after, value, grads

    @jax.jit
    def with_update(params: Any, kept: Any, carry: Any, x: jax.Array, y: jax.Array) -> tuple[Any, ...]:
        after, value, grads = with_loss(params, carry, x, y)
        changes, kept = optimizer.update(grads, kept, params)
        return optax.apply_updates(params, changes), kept, after, value

    jitted = jax.jit(with_loss)

    def forward() -> Any:
        carries[0], out = apply(params, carries[0], x)
        return out

    def gradient() -> Any:
        carries[1], *found = jitted(params, carries[1], x, y)
        return found

    def update() -> Any:
        *learned[:], carries[2], value = with_update(*learned, carries[2], x, y)
        return value

    return forward, gradient, update
