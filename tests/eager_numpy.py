"""Operations outside of any `jax.jit`, run by numpy in place of a compiled program for each of them and each shape.

Tests draw, stack and compare small arrays. JAX compiles a program for every operation and shape it meets: tens of
milliseconds each, where numpy takes less than one. What a user or the package gives to `jax.jit` is not touched: this is about
functions of JAX's own that are called with arrays.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import pjit
from numpy_evaluation import TABLE, by_jax, evaluate, operations

__all__ = ["run_eager_operations_by_numpy"]

_JAX = str(Path(jax.__file__).parent)
#: Who calls the same operation on the same shapes more often is better served by a compiled one,
_OFTEN = 50
#: if that gives the same to the last bit, so that results do not depend on what ran before.
_EXACT = frozenset(
    [
        "add", "and", "argmax", "argmin", "broadcast_in_dim", "ceil", "concatenate", "convert_element_type", "copy", "div",
        "dynamic_slice", "dynamic_update_slice", "eq", "expand_dims", "floor", "gather", "ge", "gt", "iota", "is_finite", "le",
        "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pad", "reduce_and", "reduce_max", "reduce_min", "reduce_or",
        "reshape", "rev", "select_n", "sign", "slice", "split", "squeeze", "stack", "stage", "sub", "transpose", "unstack", "xor",
    ]
)  # fmt: skip
#: Of random keys, which are no numbers: JAX runs these as programs of operations that are.
_OF_KEYS = frozenset(["random_bits", "random_split", "random_fold_in", "random_wrap", "random_unwrap"])


def run_eager_operations_by_numpy() -> None:
    """From now on, JAX's own operations on arrays are run by numpy, where it knows them."""
    pjit._pjit_call_impl_python = _Eager(pjit._pjit_call_impl_python)


class _LeftToJax(Exception):
    """What an operation of the table says of the numbers that it meets."""


class _Eager:
    """In place of the function that compiles and runs what is jitted, where no trace is under way."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.left: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __call__(self, *arguments: Any, **params: Any) -> Any:
        closed = params["jaxpr"]
        if not all(map(_is_plain, arguments)) or not self._takes(closed):
            return self.compiled(*arguments, **params)
        values = [_value(v, a.dtype) for v, a in zip(arguments, closed.in_avals, strict=True)]
        try:
            with np.errstate(all="ignore"):
                found = evaluate(closed.jaxpr, closed.consts, values, _leave)
        except _LeftToJax:
            return self.compiled(*arguments, **params)
        # Nothing may share its memory with an array that could be donated.
        found = [v if isinstance(v, jax.Array) else jax.device_put(v, may_alias=False) for v in found]
        return found, None, None, []

    def _takes(self, closed: Any) -> bool:
        if closed not in self.left:
            self.left[closed] = _calls(closed)
        self.left[closed] -= 1
        return self.left[closed] >= 0 and not jax.config.jax_debug_nans


def _leave(eqn: Any, values: list[Any]) -> list[Any]:
    if eqn.primitive.name not in _OF_KEYS:
        raise _LeftToJax
    return by_jax(eqn, values)


def _value(value: Any, dtype: Any) -> Any:
    return value if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else np.asarray(value, dtype)


def _is_plain(value: Any) -> bool:
    """Whether a value lies where all lie that nobody has placed."""
    if isinstance(value, jax.Array):
        return not value.committed
    return isinstance(value, (np.ndarray, np.generic, int, float, complex))


def _calls(closed: Any) -> float:
    """How often numpy may run it: a function of JAX itself, without loops, whose operations numpy knows."""
    source = closed.jaxpr.debug_info.func_filename
    names = set(operations(closed.jaxpr))
    weak = any(getattr(a, "weak_type", True) for a in closed.out_avals)
    if source is None or not source.startswith(_JAX) or weak or not names <= TABLE | _OF_KEYS:
        return 0
    return _OFTEN if names <= _EXACT else np.inf
