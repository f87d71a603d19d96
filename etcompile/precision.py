"""In which precision sums are taken."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

__all__ = ["accumulator"]


def accumulator(dtype: Any) -> Any:
    """Sums of 16-bit numbers are taken in float32."""
    return jnp.float32 if jnp.dtype(dtype).itemsize == 2 and jnp.issubdtype(dtype, jnp.floating) else dtype
