"""The least that a case takes: the products of its model, each timed by itself in the shape and the place where it is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
from clock import best
from models import Data
from plain import PureStep

__all__ = ["products"]

#: Operations that are timed; all else is taken to cost nothing.
_PRODUCTS = ("dot_general", "conv_general_dilated")
_RUNS = 5


def products(data: Data, model: brainstate.nn.Module, steps: int) -> dict[str, float]:
    """Seconds per step of a model's products of data and weights: within the loop over time, and as one over all steps.

    ``loop``: the forward product, on the rows of one step. ``time``: the weight's gradient, on the rows of all steps at once.
    """
    step = PureStep(data, model)
    jaxpr = jax.make_jaxpr(step)(step.params, step.hidden, data.example)
    found: Counter[Any] = Counter()
    examples = {}
    for eqn in _walk(jaxpr.jaxpr):
        if eqn.primitive.name in _PRODUCTS:
            key = (eqn.primitive.name, *(v.aval.shape for v in eqn.invars), str(eqn.params))
            found[key] += 1
            examples[key] = eqn
    spent = {"loop": 0.0, "time": 0.0}
    for key, count in found.items():
        loop, over_time = _timed(examples[key], steps)
        spent["loop"] += count * loop / steps
        spent["time"] += count * over_time / steps
    return spent


def _timed(eqn: Any, steps: int) -> tuple[float, float]:
    """Seconds of all steps of one product: one after the other, and the gradients of the weight, which is on the right."""
    x, w = (jnp.ones(v.aval.shape, v.aval.dtype) for v in eqn.invars)
    product = partial(eqn.primitive.bind, **eqn.params)
    xs = jnp.broadcast_to(x, (steps, *x.shape)) + 0.0

    @jax.jit
    def loop(xs: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda _, x: (None, product(x, w)), None, xs)[1]

    @jax.jit
    def over_time(xs: jax.Array, w: jax.Array, credit: jax.Array) -> Any:
        return jax.vjp(lambda w: jax.vmap(product, (0, None))(xs, w), w)[1](credit)

    credit = loop(xs, w)
    return best(lambda: loop(xs, w), _RUNS), best(lambda: over_time(xs, w, credit), _RUNS)


def _walk(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner programs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _walk(inner)
