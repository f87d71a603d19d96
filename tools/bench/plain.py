"""The ordinary model under ``lax.scan``: forward alone, and backpropagation through time, also with its memory bounded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import brainstate
import jax
from models import Data, loss_fn
from run import Run

__all__ = ["PureStep", "block_of", "bptt", "checkpointed", "forward"]

#: Untyped: these take and return any tree.
transform: Any = brainstate.transform

Array = jax.Array
Model = brainstate.nn.Module
Params = dict[str, Any]


class PureStep:
    """One step of a brainstate model as a pure function ``(params, hidden, x) -> (hidden, out)``."""

    def __init__(self, data: Data, model: Model) -> None:
        brainstate.nn.init_all_states(model, batch_size=data.batch)
        self._function = transform.StatefulFunction(model.update)
        self._function.make_jaxpr(data.example)
        states = self._function.get_states(data.example)
        all_states: Any = model.states()
        paths = {id(s): ".".join(map(str, path)) for path, s in all_states.items()}
        self._names = [paths[id(s)] if isinstance(s, brainstate.ParamState) else None for s in states]
        self.params: Params = {n: s.value for n, s in zip(self._names, states, strict=True) if n is not None}
        self.hidden = [s.value for n, s in zip(self._names, states, strict=True) if n is None]

    def started(self, run: Callable[..., tuple[Array, Any]]) -> Run:
        """``run(params, hidden, xs, ys)`` from the model's own values."""
        jitted = jax.jit(run)
        return Run(
            lambda xs, ys: jitted(self.params, self.hidden, xs, ys),
            lambda xs, ys: jitted.lower(self.params, self.hidden, xs, ys),
        )

    def __call__(self, params: Params, hidden: list[Array], x: Array) -> tuple[list[Array], Array]:
        rest = iter(hidden)
        values = [next(rest) if n is None else params[n] for n in self._names]
        new, out = self._function.jaxpr_call(values, x)
        return [v for n, v in zip(self._names, new, strict=True) if n is None], out

    def losses(self, params: Params, hidden: list[Array], xs: Array, ys: Array) -> tuple[list[Array], Array]:
        """The hidden states after a sequence, and the loss of every step."""

        def body(hidden: list[Array], item: tuple[Array, Array]) -> tuple[list[Array], Array]:
            hidden, out = self(params, hidden, item[0])
            return hidden, loss_fn(out, item[1])

        return jax.lax.scan(body, hidden, (xs, ys))


def forward(data: Data, model: Model) -> Run:
    """The losses alone: what every gradient takes at the least."""
    step = PureStep(data, model)
    return step.started(lambda *given: (step.losses(*given)[1], {}))


def bptt(data: Data, model: Model) -> Run:
    """``jax.grad`` of a ``lax.scan`` over the ordinary model's step."""
    step = PureStep(data, model)
    return step.started(_gradient(lambda *given: step.losses(*given)[1]))


def checkpointed(data: Data, model: Model) -> Run:
    """The same in blocks of steps under ``jax.checkpoint``: their first states are kept, and the rest is computed once more."""
    step = PureStep(data, model)
    block = jax.checkpoint(step.losses)

    def losses(params: Params, hidden: list[Array], xs: Array, ys: Array) -> Array:
        size = block_of(len(xs))
        parts = [v.reshape(-1, size, *v.shape[1:]) for v in (xs, ys)]
        return jax.lax.scan(lambda h, part: block(params, h, *part), hidden, parts)[1].reshape(-1)

    return step.started(_gradient(losses))


def block_of(steps: int) -> int:
    """The largest divisor of a number of steps up to its square root: least memory for blocks of one size."""
    return max(k for k in range(1, math.isqrt(steps) + 1) if steps % k == 0)


def _gradient(losses: Callable[..., Array]) -> Callable[..., tuple[Array, Any]]:
    """Losses and summed gradients of ``losses(params, hidden, xs, ys)``."""

    def run(params: Params, *given: Any) -> tuple[Array, Any]:
        def total(params: Params) -> tuple[Array, Array]:
            found = losses(params, *given)
            return found.sum(), found

        (_, found), grads = jax.value_and_grad(total, has_aux=True)(params)
        return found, grads

    return run
