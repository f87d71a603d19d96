"""Elements of arrays at places that are known when a model is compiled."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["added_at", "as_places", "columns_taken", "taken"]

Array = Any

_IN_BOUNDS = lax.GatherScatterMode.PROMISE_IN_BOUNDS
_NUMBERS = lax.GatherDimensionNumbers(offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,))


def as_places(indices: np.ndarray, count: int) -> np.ndarray:
    """Places among ``count``, as the functions below take them: each a row of one index."""
    narrow = indices.astype(np.int32) if count <= np.iinfo(np.int32).max else indices
    return narrow[..., None]


def taken(values: Array, places: np.ndarray) -> Array:
    """Elements at ``places`` of the flat array, all of which are there: no index is looked at twice."""
    return lax.gather(values.reshape(-1), places, _NUMBERS, (1,), mode=_IN_BOUNDS)


def added_at(values: Array, places: np.ndarray, size: int) -> Array:
    """A flat array of ``size`` elements, each value added at its place; -1: it has none."""
    flat = places.ravel()
    if flat.size == size and (flat == np.arange(size)).all():
        return values.reshape(-1)
    there = np.flatnonzero(flat >= 0)
    return jnp.zeros(size, values.dtype).at[flat[there]].add(taken(values, as_places(there, values.size)))


def columns_taken(values: Array, places: np.ndarray) -> Array:
    """Elements at these places of the last axis."""
    last = values.ndim - 1
    numbers = lax.GatherDimensionNumbers(tuple(range(last)), (last,), (last,))
    sizes = (*values.shape[:-1], 1)
    return lax.gather(values, places, numbers, sizes, mode=_IN_BOUNDS)
