"""Pullbacks of the commonest operations, written down.

They are what ``jax.vjp`` makes of these operations. It traces each operation once more, several times over, and a step has
hundreds of them; here the cotangents of the operands are given at once, from the values that are there. What is not in the table,
or has parameters out of the ordinary, is left to ``jax.vjp``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from etcompile.frontend.jaxpr import Operation

__all__ = ["written_pullback"]

Array = Any
#: ``(parameters, operands, result, cotangent, number of an operand) -> its cotangent``.
_Rule = Callable[[dict[str, Any], Sequence[Array], Array, Array, int], Array]


def written_pullback(
    operation: Operation, operands: Sequence[Array], results: Sequence[Array], moving: Sequence[int]
) -> Callable[[Sequence[Array | None]], tuple[Array, ...]] | None:
    """From cotangents of an operation's results to those of its ``moving`` operands; None where it has to be traced."""
    rule = _RULES.get(operation.name)
    if rule is None or operation.loop is not None or not _ordinary(operation, operands, results, moving):
        return None
    params, (result,) = operation.params, results

    def pullback(found: Sequence[Array | None]) -> tuple[Array, ...]:
        (cotangent,) = found
        return tuple(rule(params, operands, result, cotangent, k) for k in moving)

    return pullback


def _ordinary(
    operation: Operation, operands: Sequence[Array], results: Sequence[Array], moving: Sequence[int]
) -> bool:
    """Whether the table's rule holds: real numbers of one dtype, on one device, in the usual arrangement."""
    params, name = operation.params, operation.name
    if len(results) != 1 or any(params.get(key) is not None for key in ("sharding", "out_sharding")):
        return False
    dtypes = {results[0].dtype, *(operands[k].dtype for k in moving)}
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return False
    if name == "convert_element_type":
        return True
    if len(dtypes) != 1:
        return False
    shape = results[0].shape
    if name in _ALIKE and any(operands[k].shape != shape for k in moving):
        return False
    if name == "select_n":
        return 0 not in moving and len(operands) == 3 and operands[0].dtype == jnp.bool_
    if name == "div":
        return tuple(moving) == (0,)
    if name == "slice":
        return params["strides"] is None or set(params["strides"]) == {1}
    if name == "dot_general":
        wanted = params["preferred_element_type"]
        return all(v.dtype == results[0].dtype for v in operands) and wanted in (None, results[0].dtype)
    return True


#: Operations whose moving operands have the shape of the result.
_ALIKE = frozenset(
    {"add", "add_any", "sub", "neg", "mul", "div", "select_n", "tanh", "logistic", "exp", "copy"}
)


def _broadcast(params: dict[str, Any], operands: Sequence[Array], result: Array, c: Array, k: int) -> Array:
    shape, dims = operands[0].shape, params["broadcast_dimensions"]
    grown = [d for d, n in zip(dims, shape, strict=True) if n == 1 and result.shape[d] != 1]
    summed = [d for d in range(c.ndim) if d not in dims or d in grown]
    return lax.reshape(lax.reduce_sum(c, tuple(summed)) if summed else c, shape)


def _sum(params: dict[str, Any], operands: Sequence[Array], result: Array, c: Array, k: int) -> Array:
    shape, axes = operands[0].shape, params["axes"]
    return lax.broadcast_in_dim(c, shape, tuple(d for d in range(len(shape)) if d not in axes))


def _select(params: dict[str, Any], operands: Sequence[Array], result: Array, c: Array, k: int) -> Array:
    zeros = lax.full_like(c, 0)
    return lax.select_n(operands[0], *((c, zeros) if k == 1 else (zeros, c)))


def _part(params: dict[str, Any], operands: Sequence[Array], result: Array, c: Array, k: int) -> Array:
    axis = params["dimension"]
    start = sum(v.shape[axis] for v in operands[:k])
    return lax.slice_in_dim(c, start, start + operands[k].shape[axis], axis=axis)


def _padded(params: dict[str, Any], operands: Sequence[Array], result: Array, c: Array, k: int) -> Array:
    ends = zip(operands[0].shape, params["limit_indices"], strict=True)
    around = [(a, n - b, 0) for a, (n, b) in zip(params["start_indices"], ends, strict=True)]
    return lax.pad(c, jnp.zeros((), c.dtype), around)


def _product(params: dict[str, Any], operands: Sequence[Array], result: Array, c: Array, k: int) -> Array:
    """The product of the cotangent with the other operand, over the axes of the result that are its own."""
    contracted, batched = ([tuple(map(int, d)) for d in pair] for pair in params["dimension_numbers"])
    mine, other, x, y = k, 1 - k, operands[k], operands[1 - k]
    x_free = [d for d in range(x.ndim) if d not in contracted[mine] + batched[mine]]
    y_free = [d for d in range(y.ndim) if d not in contracted[other] + batched[other]]
    batch = len(batched[0])
    first = batch + (len(x_free) if mine == 0 else 0)
    c_of_y = tuple(range(first, first + len(y_free)))
    found = lax.dot_general(
        c,
        y,
        ((c_of_y, tuple(y_free)), (tuple(range(batch)), batched[other])),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    in_order = [contracted[mine][j] for j in np.argsort(contracted[other])]
    return lax.transpose(found, tuple(int(j) for j in np.argsort([*batched[mine], *x_free, *in_order])))


_RULES: dict[str, _Rule] = {
    "add": lambda p, v, r, c, k: c,
    "add_any": lambda p, v, r, c, k: c,
    "copy": lambda p, v, r, c, k: c,
    "sub": lambda p, v, r, c, k: c if k == 0 else lax.neg(c),
    "neg": lambda p, v, r, c, k: lax.neg(c),
    "mul": lambda p, v, r, c, k: lax.mul(c, v[1 - k]),
    "div": lambda p, v, r, c, k: lax.div(c, v[1]),
    "exp": lambda p, v, r, c, k: lax.mul(c, r),
    "tanh": lambda p, v, r, c, k: lax.mul(lax.add(c, lax.mul(c, r)), lax.sub(lax.full_like(r, 1), r)),
    "logistic": lambda p, v, r, c, k: lax.mul(c, lax.mul(r, lax.sub(lax.full_like(r, 1), r))),
    "convert_element_type": lambda p, v, r, c, k: lax.convert_element_type(c, v[0].dtype),
    "reshape": lambda p, v, r, c, k: lax.reshape(c, v[0].shape),
    "squeeze": lambda p, v, r, c, k: lax.reshape(c, v[0].shape),
    "transpose": lambda p, v, r, c, k: lax.transpose(c, tuple(int(j) for j in np.argsort(p["permutation"]))),
    "broadcast_in_dim": _broadcast,
    "reduce_sum": _sum,
    "select_n": _select,
    "concatenate": _part,
    "slice": _padded,
    "dot_general": _product,
}
