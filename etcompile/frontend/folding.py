"""Operations on constant indices, done by numpy.

JAX compiles a program for each of them, which takes longer than all else that is done with a constant. Integers and truth values
alone: these are the same numbers. Floating-point numbers are moved, and not computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["folded"]

#: More numbers than this are left to JAX, on the device.
_LIMIT = 1 << 16

_MOVED: dict[str, Callable[[dict[str, Any], list[np.ndarray]], np.ndarray]] = {
    "broadcast_in_dim": lambda p, v: _broadcast(v[0], p["shape"], p["broadcast_dimensions"]),
    "reshape": lambda p, v: v[0].reshape(p["new_sizes"]),
    "squeeze": lambda p, v: v[0].squeeze(tuple(p["dimensions"])),
    "transpose": lambda p, v: v[0].transpose(p["permutation"]),
    "rev": lambda p, v: np.flip(v[0], tuple(p["dimensions"])),
    "concatenate": lambda p, v: np.concatenate(v, axis=p["dimension"]),
}
_COMPUTED: dict[str, Callable[..., Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
}  # fmt: skip


def folded(
    name: str, params: dict[str, Any], values: Sequence[Any], avals: Sequence[Any]
) -> np.ndarray | None:
    """The result of an operation on constants; None where it is not one of these."""
    if len(avals) != 1 or avals[0].size > _LIMIT or not _plain(params, values, avals[0].dtype):
        return None
    (aval,) = avals
    arrays = [np.asarray(v) for v in values]
    whole = all(v.dtype.kind in "iub" for v in arrays)
    if name == "iota" and np.dtype(aval.dtype).kind in "iu":
        shape = tuple(params["shape"])
        along = [-1 if d == params["dimension"] else 1 for d in range(len(shape))]
        found = np.broadcast_to(np.arange(shape[params["dimension"]]).reshape(along), shape)
    elif name in _MOVED:
        found = _MOVED[name](params, arrays)
    elif whole and name in _COMPUTED:
        with np.errstate(over="ignore"):
            found = _COMPUTED[name](*map(np.atleast_1d, arrays)).reshape(aval.shape)
    elif whole and name == "select_n" and len(arrays) == 3 and arrays[0].dtype == bool:
        found = np.where(arrays[0], arrays[2], arrays[1])
    elif whole and name == "convert_element_type" and np.dtype(aval.dtype).kind in "iub":
        (found,) = arrays
    else:
        return None
    if found.shape != aval.shape:
        return None
    return np.array(found, aval.dtype)


def _plain(params: dict[str, Any], values: Sequence[Any], dtype: Any) -> bool:
    """Whether there is no more to it than numbers: no keys, no place on several devices."""
    if any(params.get(key) is not None for key in ("sharding", "out_sharding")):
        return False
    dtypes = [dtype, *(v.dtype for v in values if hasattr(v, "dtype"))]
    return not any(jnp.issubdtype(d, jax.dtypes.extended) for d in dtypes) and not any(
        (isinstance(v, jax.Array) and not v.is_fully_addressable) for v in values
    )


def _broadcast(value: np.ndarray, shape: Sequence[int], dims: Sequence[int]) -> np.ndarray:
    grown = [1] * len(shape)
    for d, n in zip(dims, value.shape, strict=True):
        grown[d] = n
    return np.broadcast_to(value.reshape(grown), shape)
