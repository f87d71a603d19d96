"""Products with a matrix, or with one for each of a batch: y = x @ W, and whatever ``dot_general`` does."""

from __future__ import annotations

from functools import cached_property

import jax.numpy as jnp

from etcompile.sites.operation import Array, Product, WeightUse

__all__ = ["Matrix"]

Axes = tuple[int, ...]


class Matrix(Product):
    """The factor is x itself."""

    name = "dot_general"

    @classmethod
    def recognise(cls, use: WeightUse) -> bool:
        return use.name == "dot_general"

    @cached_property
    def _axes(self) -> tuple[Axes, Axes, Axes]:
        """Axes of the weight: those of the batch, free ones, contracted ones."""
        assert self.operation is not None
        contracted, batch = (pair[self.operand] for pair in self.operation.params["dimension_numbers"])
        free = tuple(d for d in range(len(self.weight.shape)) if d not in contracted and d not in batch)
        return tuple(batch), free, tuple(contracted)

    @property
    def shared(self) -> tuple[tuple[int, int], ...]:
        batch, free, _ = self._axes
        first = len(batch) if self.operand == 0 else len(self.y.shape) - len(free)
        of_y = (*range(len(batch)), *range(first, first + len(free)))
        return tuple(zip(of_y, (*batch, *free), strict=True))

    @property
    def contracted_axes(self) -> Axes:
        return self._axes[2]

    @property
    def matrix_axes(self) -> tuple[Axes, Axes] | None:
        batch, free, contracted = self._axes
        return None if batch else (free, contracted)

    def logical(self, factor: Array) -> Array:
        assert self.operation is not None
        other = 1 - self.operand
        contracted, batch = (pair[other] for pair in self.operation.params["dimension_numbers"])
        free = [d for d in range(factor.ndim) if d not in contracted and d not in batch]
        moved = jnp.transpose(factor, [*batch, *free, *contracted])
        n_batch, n_free = len(batch), len(free)
        head, middle = moved.shape[:n_batch], moved.shape[n_batch : n_batch + n_free]
        tail = moved.shape[n_batch + n_free :]
        ones = (1,) * len(self._axes[1])
        shape = (*head, *middle, *ones, *tail) if other == 0 else (*head, *ones, *middle, *tail)
        return moved.reshape(shape).astype(self.y.dtype)
