"""Operations on known values, done by numpy.

JAX compiles a program for each of them, which takes longer than all else that is done with a constant. Here are those with one
right result: elements are moved, whole numbers and truth values are computed with, and floating-point numbers are where
IEEE 754 says how to round. What is rounded as the device likes, such as exponentials and long sums, is left to JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["LIMIT", "folded"]

#: More numbers than this are left to JAX where they stay on the device.
LIMIT = 1 << 16

_Moved = Callable[[dict[str, Any], list[np.ndarray]], "np.ndarray | list[np.ndarray]"]

_MOVED: dict[str, _Moved] = {
    "broadcast_in_dim": lambda p, v: _broadcast(v[0], p["shape"], p["broadcast_dimensions"]),
    "reshape": lambda p, v: v[0].reshape(p["new_sizes"]),
    "squeeze": lambda p, v: v[0].squeeze(tuple(p["dimensions"])),
    "transpose": lambda p, v: v[0].transpose(p["permutation"]),
    "rev": lambda p, v: np.flip(v[0], tuple(p["dimensions"])),
    "concatenate": lambda p, v: np.concatenate(v, axis=p["dimension"]),
    "slice": lambda p, v: v[0][_slices(p["start_indices"], p["limit_indices"], p["strides"])],
    "split": lambda p, v: np.split(v[0], np.cumsum(p["sizes"])[:-1], axis=p["axis"]),
    "unstack": lambda p, v: list(np.moveaxis(v[0], p["axis"], 0)),
    "pad": lambda p, v: _padded(v[0], v[1], p["padding_config"]),
}  # fmt: skip
_COMPUTED: dict[str, Callable[..., Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
    "add_any": np.add, "neg": np.negative,
}  # fmt: skip
#: Those whose floating-point results are the same everywhere.
_ROUNDED: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "add_any": np.add, "neg": np.negative,
}  # fmt: skip


def folded(
    name: str, params: dict[str, Any], values: Sequence[Any], avals: Sequence[Any], limit: int | None = LIMIT
) -> list[np.ndarray] | None:
    """The results of an operation on known values; None where it is none of these.

    So it is where a result has more elements than ``limit``.

    >>> from etcompile.frontend.jaxpr import Aval
    >>> folded("mul", {}, [np.float32(3), np.float32(0.5)], [Aval((), np.dtype("float32"))])
    [array(1.5, dtype=float32)]
    """
    if limit is not None and any(aval.size > limit for aval in avals):
        return None
    if not avals or not _plain(params, values, avals[0].dtype):
        return None
    arrays = [np.asarray(v) for v in values]
    found = _moved_or_computed(name, params, arrays, avals[0])
    if found is None or [f.shape for f in found] != [aval.shape for aval in avals]:
        return None
    return [np.array(f, aval.dtype) for f, aval in zip(found, avals, strict=True)]


def _moved_or_computed(
    name: str, params: dict[str, Any], arrays: list[np.ndarray], aval: Any
) -> list[np.ndarray] | None:
    whole, dtype = all(v.dtype.kind in "iub" for v in arrays), np.dtype(aval.dtype)
    if name == "iota" and dtype.kind in "iu":
        shape = tuple(params["shape"])
        along = [-1 if d == params["dimension"] else 1 for d in range(len(shape))]
        return [np.broadcast_to(np.arange(shape[params["dimension"]]).reshape(along), shape)]
    if name in _MOVED:
        found = _MOVED[name](params, arrays)
        return found if isinstance(found, list) else [found]
    if name == "select_n" and len(arrays) == 3 and arrays[0].dtype == bool:
        return [np.where(arrays[0], arrays[2], arrays[1])]
    if name == "convert_element_type" and ((whole and dtype.kind in "iubf") or _is_float(arrays[0], dtype)):
        return arrays
    if whole and name in _COMPUTED:
        with np.errstate(over="ignore"):
            return [_COMPUTED[name](*map(np.atleast_1d, arrays)).reshape(aval.shape)]
    if name in _ROUNDED and all(_is_float(v, dtype) for v in arrays):
        with np.errstate(all="ignore"):
            result = _ROUNDED[name](*map(np.atleast_1d, arrays)).reshape(aval.shape)
        if not any(map(_has_subnormal, (*arrays, result))):
            return [result]
    return None


def _is_float(value: np.ndarray, dtype: np.dtype) -> bool:
    """Whether numpy computes with these floating-point numbers in this precision, as devices do."""
    return value.dtype == dtype and dtype in (np.float32, np.float64)


def _has_subnormal(value: np.ndarray) -> bool:
    """Whether there are numbers so small that some devices make them zero."""
    size = np.abs(value)
    return bool(((size > 0) & (size < np.finfo(value.dtype).tiny)).any())


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


def _slices(starts: Sequence[int], ends: Sequence[int], strides: Sequence[int] | None) -> tuple[slice, ...]:
    return tuple(map(slice, starts, ends, strides or (1,) * len(starts)))


def _padded(value: np.ndarray, filling: np.ndarray, config: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Elements with ``filling`` around and between; what is padded by less than nothing is taken away."""
    spread = [(n - 1) * inside + n if n else 0 for n, (_, _, inside) in zip(value.shape, config, strict=True)]
    sizes = [n + max(low, 0) + max(high, 0) for n, (low, high, _) in zip(spread, config, strict=True)]
    result = np.full(sizes, filling, value.dtype)
    at = [
        slice(max(low, 0), max(low, 0) + n, 1 + inside)
        for n, (low, _, inside) in zip(spread, config, strict=True)
    ]
    result[tuple(at)] = value
    kept = [slice(max(-low, 0), n - max(-high, 0)) for n, (low, high, _) in zip(sizes, config, strict=True)]
    return result[tuple(kept)]
