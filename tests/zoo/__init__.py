"""Recurrent and spiking models that judge the compiler, each with an instrumented step written by hand.

`CASES` lists them; see `base` for what a case holds. The steps carry `cut` and `put` marks (see `oracles`).
"""

from . import brainpy_parts, cells, events, matrix_states, program, spiking, stock, structure, weights  # noqa: F401
from .base import BATCH, CASES, LENGTH, Built, Case, Function, functional

__all__ = ["BATCH", "CASES", "LENGTH", "Built", "Case", "Function", "by_name", "functional"]


def by_name(name: str) -> Case:
    """The case called `name`."""
    return next(c for c in CASES if c.name == name)
