"""Interleaved, repeated timing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from settings import Settings

__all__ = ["best", "interleaved", "shortest", "timed"]

#: One that has taken so many times its seconds is measured no more, however few its runs.
_ENOUGH = 3


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a run until its result is there, and the result."""
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - start, result


def best(run: Callable[[], Any], runs: int) -> float:
    """The shortest time of so many runs after a first: what can be done if nothing disturbs it."""
    timed(run)
    return min(timed(run)[0] for _ in range(runs))


def interleaved(runs: Mapping[Any, Callable[[], Any]], settings: Settings) -> dict[Any, list[float]]:
    """Seconds of each run, taken in turns, so that what else the machine does meets all alike.

    All must have run before. Each takes part until it has used its seconds, and ``settings.least`` times unless that takes long.
    """
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(settings.rounds):
        for name, run in runs.items():
            limit = settings.seconds * (_ENOUGH if len(times[name]) < settings.least else 1)
            if sum(times[name]) < limit:
                times[name].append(timed(run)[0])
    return times


def shortest(runs: Mapping[Any, Callable[[Any], Any]], given: Any, rounds: int) -> dict[Any, float]:
    """The shortest of the times of each with ``given``, in seconds; they run in turns, and once before, which compiles."""

    def once() -> dict[Any, float]:
        return {k: timed(lambda run=run: run(given))[0] for k, run in runs.items()}

    once()
    times = [once() for _ in range(rounds)]
    return {k: min(found[k] for found in times) for k in runs}
