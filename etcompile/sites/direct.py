"""Weights that are used element by element: biases, decays, the values of a sparse matrix. The weight itself is y."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax

from etcompile.ir.header import Site
from etcompile.precision import accumulator
from etcompile.sites.operation import Array, Presynaptic, Span, WeightOperation, WeightUse

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
        """The sum over steps of :meth:`pullback`, as a product with a number for each step.

        XLA's CPU compiler puts a sum over the leading axis into one kernel with all that is made for it and for other sums,
        which may take many times as long as its parts (JAX 0.12: a sum of padded products, and two sums of one array).
        """
        numbers = jnp.ones(len(credit), credit.dtype) if isinstance(x, tuple) else x
        wide = accumulator(jnp.result_type(numbers, credit))
        found = jnp.einsum(
            "t,t...->...", numbers, credit, precision=lax.Precision.HIGHEST, preferred_element_type=wide
        )
        return found.astype(self.weight.dtype)

    def narrowed(self, span: Span) -> Direct:
        shape = tuple(stop - start for start, stop in span)
        return dataclasses.replace(
            self,
            weight=dataclasses.replace(self.weight, shape=shape),
            y=dataclasses.replace(self.y, shape=shape),
        )
