"""Any operation with one result: its Jacobian by automatic differentiation, with an entry for each y and each weight."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from etcompile.frontend.jaxpr import Aval, read
from etcompile.sites.operation import Array, Presynaptic, WeightOperation, WeightUse

__all__ = ["Generic"]


class Generic(WeightOperation):
    """The operation may not be linear in the weight, so the presynaptic value holds the weight too, as the last entry."""

    name = "generic"
    closed = False

    @classmethod
    def recognise(cls, use: WeightUse) -> bool:
        results = use.operation.outputs
        return [v for v in results if use.graph.avals[v].differentiable] == [results[0]]

    @property
    def shared(self) -> tuple[tuple[int, int], ...]:
        return ()

    @property
    def reads(self) -> tuple[Aval, ...]:
        return (*self.others, self.weight)

    def presynaptic(self, env: dict[int, Array]) -> Presynaptic:
        assert self.operation is not None
        return (*super().presynaptic(env), read(env, self.operation.inputs[self.operand]))

    def by_step(self, x: Presynaptic) -> tuple[Presynaptic, Callable[[Presynaptic], Presynaptic]]:
        *others, weights = x
        return tuple(others), lambda now: (*now, weights[0])

    def factor(self, x: Presynaptic) -> Array:
        """dy/dw, ``[y, weight]``."""
        if self.too_large:
            raise self.cannot_store("write the operation as a matmul or convolution.")
        *others, weight = x

        def fn(w: Array) -> Array:
            return self.apply(w, tuple(others))

        try:
            return jax.jacrev(fn)(weight)
        except NotImplementedError:  # as in `mapped`
            y, pull = jax.vjp(fn, weight)
            rows = jax.lax.map(pull, jnp.eye(y.size, dtype=y.dtype).reshape(y.size, *y.shape))[0]
            return rows.reshape(*y.shape, *weight.shape)

    def respond(self, v: Array, x: Presynaptic | Array) -> Array:
        factor = self.factor(x) if isinstance(x, tuple) else x
        return jnp.tensordot(factor, v, axes=v.ndim).astype(self.y.dtype)

    def pullback(self, x: Presynaptic | Array, credit: Array) -> Array:
        if not isinstance(x, tuple):
            over_y = list(range(credit.ndim))
            return jnp.tensordot(credit, x, axes=(over_y, over_y)).astype(self.weight.dtype)
        *others, weight = x
        return jax.vjp(lambda w: self.apply(w, tuple(others)), weight)[1](credit.astype(self.y.dtype))[0]

    def _pulled_at_once(self, x: Presynaptic | Array, credit: Array) -> Array:
        if not isinstance(x, tuple):
            return super()._pulled_at_once(x, credit)
        *others, weights = x
        forward = jax.vmap(lambda w, now: self.apply(w, now), in_axes=(None, 0))
        pull = jax.vjp(lambda w: forward(w, tuple(others)), weights[0])[1]
        return pull(credit.astype(self.y.dtype))[0]
