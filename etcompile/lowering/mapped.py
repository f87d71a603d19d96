"""A function over many entries: at once, or in turn where JAX cannot batch something in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

__all__ = ["mapped"]


def mapped(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn`` over the leading axes of ``args``; ``fn`` may be traced more than once.

    A primitive may have no batching rule, or one for some operands only; JAX says so when it meets it.
    """
    try:
        return jax.vmap(fn)(*args)
    except NotImplementedError:
        return lax.map(lambda given: fn(*given), args)
