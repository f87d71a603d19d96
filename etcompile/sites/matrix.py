"""Products with a matrix, or with one for each of a batch: y = x @ W, and whatever ``dot_general`` does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property

import jax.numpy as jnp

from etcompile.sites.operation import Array, Presynaptic, Product, Span, WeightUse

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

    def narrowed(self, span: Span) -> Matrix | None:
        sizes, weight = [stop - start for start, stop in span], list(self.weight.shape)
        batch = len(self._axes[0])
        for of_y, of_weight in self.shared[batch:]:
            weight[of_weight] = sizes[of_y]
        cut = [
            of_y for of_y, n in enumerate(self.y.shape) if of_y not in self.kept[batch:] and sizes[of_y] < n
        ]
        if cut:
            return None
        return dataclasses.replace(
            self,
            weight=dataclasses.replace(self.weight, shape=tuple(weight)),
            y=dataclasses.replace(self.y, shape=tuple(sizes)),
        )

    def _pulled_at_once(self, x: Presynaptic | Array, credit: Array) -> Array:
        # One product of matrices as they lie in memory: what linear_transpose makes of it turns the credit around first.
        assert self.operation is not None
        params = self.operation.params
        if params.get("out_sharding") is not None:
            return super()._pulled_at_once(x, credit)
        (factor,) = x if isinstance(x, tuple) else self.presynaptic_of(x)
        of_factor, of_y = self._labels
        own = len(self.weight.shape)
        summed = [label for label in of_factor if label >= own]
        operands = [_folded(factor, of_factor, summed), _folded(credit.astype(self.y.dtype), of_y, summed)]
        batch, _, contracted = self._axes
        if next((a for a in range(own) if a not in batch), None) not in contracted:
            operands.reverse()
        return jnp.einsum(
            *(part for operand in operands for part in operand),
            list(range(own)),
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        ).astype(self.weight.dtype)

    @cached_property
    def _labels(self) -> tuple[list[int], list[int]]:
        """Axes of the factor and of y, one for steps in front: those of the weight by number, others by numbers behind."""
        assert self.operation is not None
        own = len(self.weight.shape)
        steps, first = own, own + 1
        (contracted, batch), (of_batch, free, of_contracted) = (
            [pair[1 - self.operand] for pair in self.operation.params["dimension_numbers"]],
            self._axes,
        )
        known = {
            **dict(zip(batch, of_batch, strict=True)),
            **dict(zip(contracted, of_contracted, strict=True)),
        }
        labels = [known.get(axis, first + axis) for axis in range(len(self.others[0].shape))]
        alone = [label for label in labels if label >= first]
        halves = (list(free), alone) if self.operand == 0 else (alone, list(free))
        return [steps, *labels], [steps, *of_batch, *halves[0], *halves[1]]


def _folded(value: Array, labels: Sequence[int], summed: Sequence[int]) -> tuple[Array, list[int]]:
    """An array with the summed axes as one in front, and its labels then."""
    left = [label for label in labels if label not in summed]
    moved = jnp.transpose(value, [labels.index(label) for label in (*summed, *left)])
    shape = moved.shape[len(summed) :]
    return moved.reshape(math.prod(moved.shape[: len(summed)]), *shape), [summed[0], *left]
