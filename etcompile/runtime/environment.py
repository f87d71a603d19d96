"""What a step does where ``brainstate.environ`` changed: another compilation, and its traces."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import brainstate
import jax
import jax.numpy as jnp

from etcompile.errors import EnvironmentWarning
from etcompile.frontend.jaxpr import in_transformation
from etcompile.frontend.user_code import warn
from etcompile.ir.program import TraceProgram
from etcompile.runtime.trace_state import TraceState

__all__ = ["carried_alike", "completed", "give_up_traces", "warn_of_many"]

_NOTHING = nullcontext()

#: So many compilations of one step are worth a word.
_MANY = 8


def completed(values: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """The environment with these values for entries that it lacks."""
    if not values:
        return _NOTHING
    now = brainstate.environ.all()
    missing = {name: value for name, value in values.items() if name not in now}
    return brainstate.environ.context(**missing) if missing else _NOTHING


def carried_alike(before: TraceProgram, after: TraceProgram) -> bool:
    """Whether what one program carries is what the other does: each trace by its type, weight and group."""
    return _carried(before) == _carried(after)


def _carried(program: TraceProgram) -> Any:
    types = [(name, str(program.equation(name).type)) for name in program.carried]
    return types, (program.header.groups, program.header.relations)


def give_up_traces(name: str, before: TraceState, after: TraceState) -> None:
    """Start with zero traces, and say so where there were others."""
    moved = in_transformation() or (before.allocated and _any(before.value))
    for state in {id(v): v for v in (before, after)}.values():
        if in_transformation():
            state.value = state.zeros()
        else:
            state.release()
    if moved:
        warn(
            f"{name!r} in brainstate.environ changed within a sequence, and the program for its new value has other traces: they "
            "start from zero, so gradients leave out the steps before. Call step.reset() where a new sequence starts.",
            EnvironmentWarning,
        )


def _any(traces: Any) -> bool:
    return any(bool(jnp.any(v != 0)) for v in jax.tree.leaves(traces))


def warn_of_many(name: str, made: int) -> None:
    """Say that an entry changes so often that compiling takes the time."""
    if made == _MANY:
        warn(
            f"this step was compiled {_MANY} times, the last time since {name!r} in brainstate.environ changed. Give a value "
            f"that changes often as an array, and it becomes an input: brainstate.environ.context({name}=jnp.asarray(...)).",
            EnvironmentWarning,
        )
