"""Operations of one primitive, from shapes alone, counted the way XLA counts them.

An element-wise operation is one operation per element of its result; those that a processor computes by a series
(``exp``, ``tanh``, ...) are counted apart, as transcendentals. Moving numbers costs no operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from etcompile.analysis.index_rules import ELEMENTWISE

__all__ = ["ALIASES", "EXPENSIVE", "MOVES", "ONE_BY_ONE", "REDUCTIONS", "TRANSCENDENTAL", "operations"]

#: Results share the memory of their operand, or are removed by the compiler.
ALIASES = frozenset(
    """copy copy_p stop_gradient optimization_barrier name sharding_constraint layout_constraint device_put pvary
    pcast reduce_precision random_wrap random_unwrap""".split()  # noqa: SIM905
)

#: Counted as transcendentals.
TRANSCENDENTAL = frozenset(
    """acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma erf erf_inv erfc exp exp2
    expm1 lgamma log log1p log2 logistic pow rsqrt sin sinh sqrt tan tanh igamma igammac polygamma zeta
    regularized_incomplete_beta""".split()  # noqa: SIM905
)

#: An element of the result needs one element of each operand.
ONE_BY_ONE = ELEMENTWISE | {"clamp", "bitcast_convert_type"}

#: Not computed twice to save memory.
EXPENSIVE = TRANSCENDENTAL | {"div", "rem"}

#: Move elements, and can be part of what reads them.
MOVES = frozenset(
    """broadcast_in_dim iota slice pad rev transpose split dynamic_slice gather tile
    real imag complex""".split()  # noqa: SIM905
)

REDUCTIONS = frozenset(
    """reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin
    reduce""".split()  # noqa: SIM905
)

#: Whole operations per element of the result (cumulative sums by a tree, random bits by rounds of a cipher).
_PER_ELEMENT = {
    "cumsum": 2, "cumprod": 2, "cummax": 2, "cummin": 2, "cumlogsumexp": 4, "threefry2x32": 60, "random_bits": 60,
}  # fmt: skip


def operations(
    name: str, params: dict[str, Any], inputs: Sequence[Any], outputs: Sequence[Any]
) -> tuple[int, int]:
    """Operations and transcendentals of one application; ``inputs`` and ``outputs`` have shapes."""
    out = math.prod(outputs[0].shape) if outputs else 0
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        return 2 * out * math.prod(inputs[0].shape[d] for d in contract), 0
    if name == "conv_general_dilated":
        return _convolution(params, inputs[0].shape, inputs[1].shape, outputs[0].shape), 0
    if name == "logistic":  # 1 / (1 + exp(-x))
        return 3 * out, out
    if name == "integer_pow":
        y = abs(int(params["y"]))
        return out * (max(0, y.bit_length() - 1 + y.bit_count() - 1) + (params["y"] < 0)), 0
    if name in TRANSCENDENTAL:
        return 0, out
    if name in ONE_BY_ONE:
        return out, 0
    if name in REDUCTIONS:
        return max(0, math.prod(inputs[0].shape) - out), 0
    if name.startswith("reduce_window"):
        return out * max(0, math.prod(params["window_dimensions"]) - 1), 0
    if name.startswith("scatter") and name not in ("scatter", "scatter_sub"):
        return math.prod(inputs[-1].shape), 0
    if name == "sort":
        return out * max(1, math.ceil(math.log2(max(2, inputs[0].shape[params["dimension"]])))), 0
    if name in MOVES or name in ("concatenate", "scatter", "dynamic_update_slice"):
        return 0, 0
    return out * _PER_ELEMENT.get(name, 1), 0


def _convolution(params: dict[str, Any], lhs: Sequence[int], rhs: Sequence[int], out: Sequence[int]) -> int:
    """Two per product of a convolution; products with padding are not computed."""
    left, right, result = params["dimension_numbers"]
    count = 1
    for axis in range(2, len(lhs)):
        k = axis - 2
        low, _ = params["padding"][k]
        count *= _valid(
            size=lhs[left[axis]],
            kernel=rhs[right[axis]],
            results=out[result[axis]],
            stride=params["window_strides"][k],
            low=low,
            spread=params["lhs_dilation"][k],
            dilation=params["rhs_dilation"][k],
        )
    features = rhs[right[1]] * rhs[right[0]]  # inputs of a group times outputs
    return 2 * count * features * lhs[left[0]] // max(1, params["batch_group_count"])


def _valid(size: int, kernel: int, results: int, stride: int, low: int, spread: int, dilation: int) -> int:
    """Pairs of a result and a kernel element along one axis that meet an element of the operand."""
    at = np.arange(results)[:, None] * stride + np.arange(kernel)[None, :] * dilation - low
    inside = (at >= 0) & (at < (size - 1) * spread + 1) & (at % spread == 0)
    return int(inside.sum())
