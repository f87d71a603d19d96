"""Weights that are used element by element: biases, decays, the values of a sparse matrix. The weight itself is y."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from etcompile.ir.header import Site
from etcompile.sites.operation import Array, Presynaptic, WeightOperation, WeightUse

__all__ = ["Direct"]


class Direct(WeightOperation):
    """Every use is element-wise or only moves elements; there is no presynaptic value, and the factor is one."""

    name = "direct"
    weight_is_y = True
    by_element = True

    @classmethod
    def recognise(cls, use: WeightUse) -> bool:
        return not use.spreads

    @property
    def shared(self) -> tuple[tuple[int, int], ...]:
        return tuple((axis, axis) for axis in range(len(self.weight.shape)))

    @staticmethod
    def factor_shape(site: Site) -> tuple[int, ...]:
        return ()

    def factor(self, x: Presynaptic) -> Array:
        return jnp.ones((), self.y.dtype)

    def logical(self, factor: Array) -> Array:
        return factor.reshape((1,) * len(self.y.shape))

    def respond(self, v: Array, x: Presynaptic | Array) -> Array:
        return v if isinstance(x, tuple) else (x * v).astype(self.y.dtype)

    def pullback(self, x: Presynaptic | Array, credit: Array) -> Array:
        return (credit if isinstance(x, tuple) else x * credit).astype(self.weight.dtype)

    def pullback_of_steps(self, x: Presynaptic | Array, credit: Array) -> Array:
        if jax.tree.leaves(x):
            return super().pullback_of_steps(x, credit)
        return jnp.sum(credit, axis=0).astype(self.weight.dtype)
