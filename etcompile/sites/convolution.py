"""Convolutions: the kernel meets a patch of x at each place of y."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.sites.operation import Array, Presynaptic, Product, WeightUse
from etcompile.sites.patches import kernel_gradient, patches

__all__ = ["Convolution"]


class Convolution(Product):
    """The factor is x itself; a trace multiplies by its patches."""

    name = "conv"

    @classmethod
    def recognise(cls, use: WeightUse) -> bool:
        return (
            use.name == "conv_general_dilated" and use.operand == 1 and use.params["batch_group_count"] == 1
        )

    @property
    def _numbers(self) -> Any:
        assert self.operation is not None
        return self.operation.params["dimension_numbers"]

    @property
    def shared(self) -> tuple[tuple[int, int], ...]:
        return ((self._numbers.out_spec[1], self._numbers.rhs_spec[0]),)

    @property
    def contracted_axes(self) -> tuple[int, ...]:
        return tuple(self._numbers.rhs_spec[1:])

    def logical(self, factor: Array) -> Array:
        assert self.operation is not None
        numbers, groups = self._numbers, self.operation.params["feature_group_count"]
        rhs, weight = numbers.rhs_spec, self.weight.shape
        seen = patches(self.operation, factor, tuple(weight[d] for d in rhs[2:]))
        n = len(rhs) - 2
        batch, places, kernel = seen.shape[0], seen.shape[1 : 1 + n], seen.shape[1 + n : -1]
        split = seen.reshape(batch, *places, *kernel, groups, -1)
        wide = jnp.repeat(split, weight[rhs[0]] // groups, axis=-2) if groups > 1 else split
        # y's own order (batch, output channel, places), then the contracted axes (channel, kernel)
        mine = (0, 1 + 2 * n, *range(1, 1 + n))
        y_order = [mine[k] for k in np.argsort(numbers.out_spec)]
        logical = jnp.transpose(wide, [*y_order, 2 + 2 * n, *range(1 + n, 1 + 2 * n)])
        return logical.astype(self.y.dtype)

    def pullback(self, x: Presynaptic | Array, credit: Array) -> Array:
        if not _by_patches():
            return super().pullback(x, credit)
        (operand,) = x if isinstance(x, tuple) else self.presynaptic_of(x)
        return self._pull_patches(operand[None], credit[None])

    def pullback_of_steps(self, x: Presynaptic | Array, credit: Array) -> Array:
        if not _by_patches():
            return super().pullback_of_steps(x, credit)
        (operand,) = x if isinstance(x, tuple) else self.presynaptic_of(x)
        return self._pull_patches(operand, credit)

    def _pull_patches(self, x: Array, credit: Array) -> Array:
        """:meth:`pullback_of_steps` as a product of patches."""
        assert self.operation is not None
        kernel = jax.ShapeDtypeStruct(self.weight.shape, self.weight.dtype)
        return kernel_gradient(self.operation, x, credit.astype(self.y.dtype), kernel)


def _by_patches() -> bool:
    return jax.default_backend() == "cpu"
