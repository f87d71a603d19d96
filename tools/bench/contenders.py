"""Contenders made ready for the clock: first runs, their gradients, and the fastest of the settings that one may choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from clock import best, timed
from models import Data
from run import Run
from settings import Settings

__all__ = ["Contender", "Ready", "distances", "ready", "reason", "warm_up"]

#: Timed runs by which the fastest setting of a contender is found.
_TRIALS = 2


@dataclass(frozen=True)
class Contender:
    """Who runs over a sequence of so many steps: how it is made, for each size of window if there is a choice."""

    who: str
    steps: int
    makers: Mapping[int | None, Callable[[], Run]]


@dataclass(frozen=True)
class Ready:
    """A contender that has run: what the page says of it, and what is timed; nothing to time if it failed."""

    entry: dict[str, Any]
    run: Callable[[], Any] | None = None
    gradients: dict[str, Any] = field(default_factory=dict)


def ready(
    contender: Contender, data: Data, settings: Settings, reset: Callable[[], None] = lambda: None
) -> Ready:
    """The contender after its first runs, with the gradients from the initial states; its fastest window; or why it failed."""
    xs, ys = data.sequence(contender.steps)
    name = {"who": contender.who, "steps": contender.steps}
    found: dict[int | None, Ready] = {}
    tried: dict[int | None, float] = {}
    failed: dict[str, str] = {}
    for window, make in contender.makers.items():
        try:
            run = make()
            reset()
            first, (losses, grads) = timed(lambda run=run: run(xs, ys))
            warm_up(lambda run=run: run(xs, ys), settings)
            if len(contender.makers) > 1:
                tried[window] = best(lambda run=run: run(xs, ys), _TRIALS) / contender.steps
        except Exception as error:
            failed[str(window)] = reason(error)
            continue
        zero = [k for k, g in grads.items() if not any(bool(jnp.any(v)) for v in jax.tree.leaves(g))]
        entry = {**name, "first": first, "loss": float(jnp.mean(losses)), "zero": zero}
        if window is not None:
            entry["window"] = window
        found[window] = Ready(entry, lambda run=run: run(xs, ys), grads)
    if not found:
        return Ready({**name, "error": "; ".join(dict.fromkeys(failed.values()))})
    fastest = min(found, key=lambda window: tried.get(window, math.inf))
    chosen = found[fastest]
    more = {"tried": {str(k): 1e3 * v for k, v in tried.items()}} if tried else {}
    more |= {"failed": failed} if failed else {}
    return Ready({**chosen.entry, **more}, chosen.run, chosen.gradients)


def warm_up(run: Callable[[], Any], settings: Settings) -> None:
    """The runs after the first that are not timed."""
    for _ in range(settings.warm_up - 1):
        jax.block_until_ready(run())


def distances(gradients: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, float | None]:
    """For each weight, how far its gradient is from another, relative to that; None if the other is zero and it is not."""

    def one(name: str) -> float | None:
        a, b = (
            jnp.concatenate([jnp.ravel(v) for v in jax.tree.leaves(g[name])]) for g in (gradients, others)
        )
        off, size = float(jnp.linalg.norm(a - b)), float(jnp.linalg.norm(b))
        return off / size if size else None if off else 0.0

    return {name: one(name) for name in gradients}


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
