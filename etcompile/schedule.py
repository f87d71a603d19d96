"""How a rule's equations are computed, apart from what they are: chunks, memory, precision, devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from etcompile.errors import OptionError

__all__ = ["Schedule", "as_schedule"]

#: Bytes that what is stacked over a chunk's steps may take, unless the schedule says otherwise.
MEMORY = 256 << 20


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the equations of a learning rule are computed; the gradient is the same for all, to the precision chosen.

    Parameters
    ----------
    chunk : int or "auto"
        Steps that ``scan_value_and_grad`` handles together. ``"auto"``: as many as pay off within ``memory``. 1: step by step.
    memory : int
        Bytes that may be used beside parameters, states, traces, inputs and outputs, for ``chunk="auto"``.
    trace_dtype : dtype, optional
        What traces are stored in between steps (in chunks: between chunks), ``"bfloat16"`` or ``"float16"`` say. They are
        computed in the model's precision, and rounded when they are stored; sums are taken in float32 at least. None: as
        the model. A trace that is no wider keeps its own dtype; one with filtered inputs in its place has nothing to narrow.

    Raises
    ------
    OptionError
        For values that make no sense; by ``compile`` for a ``trace_dtype`` wider than the model's traces.

    Examples
    --------
    >>> import etcompile
    >>> etcompile.Schedule(chunk=50).chunk
    50
    """

    chunk: int | str = "auto"
    memory: int = MEMORY
    trace_dtype: Any = None

    def __post_init__(self) -> None:
        check_chunk(self.chunk)
        if isinstance(self.memory, bool) or not isinstance(self.memory, int) or self.memory < 1:
            raise OptionError("memory must be a positive number of bytes.", got=f"memory={self.memory!r}")
        if self.trace_dtype is not None:
            _check_floating(self.trace_dtype)


def _check_floating(dtype: Any) -> None:
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise OptionError(
            "trace_dtype must be a floating-point dtype.",
            got=f"trace_dtype={dtype!r}",
            expected="'bfloat16', 'float16', 'float32', ..., or None: as the model",
        )


def check_chunk(chunk: Any) -> None:
    """Raise :class:`OptionError` unless ``chunk`` is a positive integer or ``"auto"``."""
    if chunk != "auto" and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise OptionError("chunk must be a positive integer, or 'auto'.", got=f"chunk={chunk!r}")


def as_schedule(schedule: Any) -> Schedule:
    """What ``compile(schedule=...)`` was given as a :class:`Schedule`."""
    if schedule is None:
        return Schedule()
    if isinstance(schedule, str) and schedule == "causal":
        return Schedule(chunk=1)
    if isinstance(schedule, Schedule):
        return schedule
    raise OptionError(
        "there is no such schedule.",
        got=f"schedule={schedule!r}",
        expected="None, 'causal' or etcompile.Schedule(...)",
    )
