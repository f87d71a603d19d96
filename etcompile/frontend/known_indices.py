"""Gathers and scatters at constant indices that lie within their operand: nothing needs to look at each of them at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

__all__ = ["with_known_indices"]

_IN_BOUNDS = lax.GatherScatterMode.PROMISE_IN_BOUNDS


def with_known_indices(
    name: str, params: dict[str, Any], shapes: Sequence[tuple[int, ...]], indices: Any
) -> dict[str, Any]:
    """Parameters of a gather or scatter with the promise that its indices are in bounds, where these are; else as they are.

    Parameters
    ----------
    name : str
        Of the primitive.
    params : dict
    shapes : sequence of tuple of int
        Of the operands: what is read or written, the indices and, of a scatter, the updates.
    indices : array
        Known when the model is compiled.
    """
    if params.get("mode") in (None, _IN_BOUNDS) or not np.size(indices):
        return params
    numbers, operand = params["dimension_numbers"], shapes[0]
    if name == "gather":
        axes, window = numbers.start_index_map, params["slice_sizes"]
    else:
        axes = numbers.scatter_dims_to_operand_dims
        skipped = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
        sizes = iter(shapes[2][a] for a in numbers.update_window_dims)
        window = [1 if axis in skipped else next(sizes) for axis in range(len(operand))]
    found = np.asarray(indices).reshape(-1, len(axes))
    most = np.array([operand[a] - window[a] for a in axes])
    return {**params, "mode": _IN_BOUNDS} if (found >= 0).all() and (found <= most).all() else params
