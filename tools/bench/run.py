"""What every contender is to the clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

__all__ = ["Run", "update_rate"]

#: Learning rate of the updates at every step: small, so that the networks stay alive however long they run.
update_rate = 1e-4


@dataclass(frozen=True)
class Run:
    """``(inputs, targets) -> (losses, gradients)``, and the same lowered for XLA to tell what memory it takes."""

    call: Callable[[jax.Array, jax.Array], tuple[Any, Any]]
    lower: Callable[[jax.Array, jax.Array], Any]

    def __call__(self, xs: jax.Array, ys: jax.Array) -> tuple[Any, Any]:
        return self.call(xs, ys)
