"""Embeddings: whole rows of a table, taken by number."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.ir.header import Site
from etcompile.sites.operation import Array, LinearOperation, Presynaptic, WeightUse

__all__ = ["Embedding"]


class Embedding(LinearOperation):
    """The factor holds one-hot rows, in which y is linear as in a matrix product."""

    name = "embedding"

    @classmethod
    def recognise(cls, use: WeightUse) -> bool:
        if use.name != "gather" or use.operand != 0:
            return False
        d = use.params["dimension_numbers"]
        return (
            tuple(d.collapsed_slice_dims) == (0,)
            and tuple(d.start_index_map) == (0,)
            and not d.operand_batching_dims
            and tuple(use.params["slice_sizes"]) == (1, *use.avals[0].shape[1:])
        )

    @property
    def shared(self) -> tuple[tuple[int, int], ...]:
        n_y, n = len(self.y.shape), len(self.weight.shape)
        return tuple((n_y - n + axis, axis) for axis in range(1, n))

    @staticmethod
    def factor_shape(site: Site) -> tuple[int, ...]:
        return (*site.presynaptic[0][:-1], site.weight[0])

    def factor(self, x: Presynaptic) -> Array:
        assert self.operation is not None
        rows, numbers = self.weight.shape[0], x[0][..., 0]
        if (
            self.operation.params["mode"] == lax.GatherScatterMode.CLIP
        ):  # a number beyond the table is its last row
            numbers = jnp.clip(numbers, 0, rows - 1)
        return jax.nn.one_hot(numbers, rows, dtype=self.y.dtype)

    def logical(self, factor: Array) -> Array:
        return factor.reshape(*factor.shape[:-1], *(1,) * (len(self.weight.shape) - 1), self.weight.shape[0])

    def respond(self, v: Array, x: Presynaptic | Array) -> Array:
        if isinstance(x, tuple):
            return super().respond(v, x)
        return jnp.tensordot(x, v, axes=([x.ndim - 1], [0])).astype(self.y.dtype)

    def pullback(self, x: Presynaptic | Array, credit: Array) -> Array:
        if isinstance(x, tuple):
            return super().pullback(x, credit)
        rows = list(range(x.ndim - 1))
        return jnp.tensordot(x, credit, axes=(rows, rows)).astype(self.weight.dtype)
