"""Convolutions as matrix products of patches: what XLA's own derivatives of them do too slowly on a CPU.

A convolution's kernel sees, at each place of its output, one patch of its input: y[n, s, o] = sum_k patch[n, s, k] kernel[k, o].
The gradient of the kernel is then one matrix product over batch and places. XLA takes the input for the kernel of a convolution
as large as the image instead, for which it has no fast kernel on a CPU. JAX's own ``conv_general_dilated_patches`` is a
convolution as well, with a kernel of ones and zeros: patches here are slices.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.frontend.jaxpr import Operation
from etcompile.precision import accumulator

__all__ = ["kernel_gradient", "patches"]

Array = Any

#: Steps whose patches are made at once, at most; so few that a cache may hold them until they are multiplied.
_TOGETHER = 8


def patches(operation: Operation, x: Array, kernel: tuple[int, ...]) -> Array:
    """What each place of the output sees of ``x``: ``(batch, *places, *kernel, channels)``."""
    p = operation.params
    lhs, strides, apart = p["dimension_numbers"].lhs_spec, p["window_strides"], p["rhs_dilation"]
    x = jnp.transpose(x, (lhs[0], *lhs[2:], lhs[1]))
    pads = [(low, high, d - 1) for (low, high), d in zip(p["padding"], p["lhs_dilation"], strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    places = [
        max(0, (n - (size - 1) * d - 1) // step + 1)
        for n, size, d, step in zip(x.shape[1:-1], kernel, apart, strides, strict=True)
    ]

    def seen_through(tap: tuple[int, ...]) -> Array:
        seen = x
        for axis, (k, d, n, step) in enumerate(zip(tap, apart, places, strides, strict=True), start=1):
            seen = lax.slice_in_dim(seen, k * d, k * d + max(0, (n - 1) * step + 1), step, axis)
        return seen

    taps = [seen_through(tap) for tap in itertools.product(*map(range, kernel))]
    return jnp.stack(taps, -2).reshape(x.shape[0], *places, *kernel, x.shape[-1])


def kernel_gradient(operation: Operation, x: Array, credit: Array, kernel: jax.ShapeDtypeStruct) -> Array:
    """Gradient of the kernel, summed over steps: ``x`` and ``credit`` of the output have a leading axis for them."""
    numbers, groups = operation.params["dimension_numbers"], operation.params["feature_group_count"]
    out, rhs = numbers.out_spec, numbers.rhs_spec
    sizes = tuple(kernel.shape[d] for d in rhs[2:])
    steps, per_group, each = x.shape[0], kernel.shape[rhs[1]], kernel.shape[rhs[0]] // groups
    wide = accumulator(credit.dtype)

    def some(x: Array, credit: Array) -> Array:
        seen = jax.vmap(lambda now: patches(operation, now, sizes))(x)
        seen = seen.reshape(-1, math.prod(sizes), groups, per_group)
        credit = jnp.transpose(credit, (0, *(1 + d for d in (out[0], *out[2:], out[1]))))
        credit = credit.reshape(-1, groups, each)
        return jnp.einsum("nkgi,ngo->kigo", seen, credit, preferred_element_type=wide)

    block = next(n for n in range(min(steps, _TOGETHER), 0, -1) if steps % n == 0)
    if block == steps:
        found = some(x, credit)
    else:
        blocks = tuple(v.reshape(steps // block, block, *v.shape[1:]) for v in (x, credit))
        zeros = jnp.zeros((math.prod(sizes), per_group, groups, each), wide)
        found = lax.scan(lambda total, now: (total + some(*now), None), zeros, blocks)[0]
    found = found.reshape(*sizes, per_group, groups * each)
    n = len(sizes)
    return jnp.transpose(found, [(n + 1, n, *range(n))[rhs.index(d)] for d in range(n + 2)]).astype(
        kernel.dtype
    )
