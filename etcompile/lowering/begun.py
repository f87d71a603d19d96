"""Traces of zero stay zero: an infinite derivative by a state that no weight has reached yet says nothing of any weight.

At the first step after a reset h_{t-1} is the initial state, a constant. Where the step takes a root or a norm of it, D is
infinite or no number; times a trace of zeros it would be no number ever after, where backpropagation through time never asks for
it. So what meets zeros alone is zero. Only where a factor is not finite a trace is looked at, since it is large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["once_begun", "times"]

Array = Any


def once_begun(values: Any, traces: Any, begun: Callable[[Any], Array] | None = None) -> Any:
    """``values`` that meet traces, or are made of them: zero in the place of what is not finite where these are zero.

    ``begun`` says of the traces where they are not, in the shape of each value; None: together.
    """
    if not jax.tree.leaves(values) or not jax.tree.leaves(traces):
        return values
    where = begun or _anywhere

    def guarded(values: Any) -> Any:
        begun = where(traces)
        return jax.tree.map(lambda v: jnp.where(begun | jnp.isfinite(v), v, jnp.zeros((), v.dtype)), values)

    finite = jnp.stack([jnp.all(jnp.isfinite(v)) for v in jax.tree.leaves(values)]).all()
    return lax.cond(finite, lambda values: values, guarded, values)


def times(factor: Array, value: Array) -> Array:
    """Their product, zero where the factor is, whatever the value: linear in it, and the transpose is of the same kind."""
    return factor * jnp.where(factor == 0, jnp.zeros((), value.dtype), value)


def _anywhere(traces: Any) -> Array:
    return jnp.stack([jnp.any(v != 0) for v in jax.tree.leaves(traces)]).any()
