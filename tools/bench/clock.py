"""Interleaved, repeated timing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from settings import Settings

__all__ = ["interleaved", "timed"]


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a run until its result is there, and the result."""
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - start, result


def interleaved(runs: Mapping[Any, Callable[[], Any]], settings: Settings) -> dict[Any, list[float]]:
    """Seconds of each run, taken in turns, so that what else the machine does meets all alike.

    All must have run before. Each takes part until it has used its seconds, and at least ``settings.least`` times.
    """
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(settings.rounds):
        for name, run in runs.items():
            if len(times[name]) < settings.least or sum(times[name]) < settings.seconds:
                times[name].append(timed(run)[0])
    return times
