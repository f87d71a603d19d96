"""In which precision sums are taken, and that numbers of two precisions may meet in them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

__all__ = ["accumulator", "promoting"]

_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")


def accumulator(dtype: Any) -> Any:
    """Sums of 16-bit numbers are taken in float32."""
    return jnp.float32 if jnp.dtype(dtype).itemsize == 2 and jnp.issubdtype(dtype, jnp.floating) else dtype


def promoting(fn: Callable[_Given, _Found]) -> Callable[_Given, _Found]:
    """``fn``, whose arithmetic may mix float types though the user's may not (``jax_numpy_dtype_promotion="strict"``).

    Model and loss are traced before, under the user's own setting.
    """

    @functools.wraps(fn)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Found:
        with jax.numpy_dtype_promotion("standard"):
            return fn(*args, **kwargs)

    return run
