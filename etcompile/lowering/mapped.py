"""A function over many entries: at once, or in turn where JAX cannot batch something in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

__all__ = ["mapped"]


def mapped(fn: Callable[..., Any], *args: Any, in_turn: Callable[..., Any] | None = None) -> Any:
    """``fn`` over the leading axes of ``args``; ``in_turn``, if given, is what stands for ``fn`` in a loop.

    A primitive may have no batching rule, or one for some operands only; JAX says so when it meets it.
    """
    try:
        return jax.vmap(fn)(*args)
    except NotImplementedError:
        return lax.map(lambda given: (in_turn or fn)(*given), args)
