"""What tests share within a process: results that many ask for, forgotten when the process holds too much."""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

__all__ = ["forget_if_much", "shared"]

_CACHES: list[Any] = []

#: Compiled functions hold maps of memory, of which Linux gives a process 65,530.
_MAPS = 20_000
#: Tests between two looks at them: a look takes milliseconds.
_OFTEN = 10
_TESTS = itertools.count(1)


def shared(fn: Callable) -> Callable:
    """Compute once for each set of arguments."""
    cached = functools.cache(fn)
    _CACHES.append(cached)
    return cached


def forget_if_much() -> None:
    """Forget all that is shared, and all compiled functions, where there are many; called after each test."""
    if next(_TESTS) % _OFTEN:
        return
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MAPS:
        for cache in _CACHES:
            cache.cache_clear()
        jax.clear_caches()
        gc.collect()
