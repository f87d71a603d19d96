"""What a step does where ``brainstate.environ`` changed: another compilation, and its traces."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import brainstate
import jax
import jax.numpy as jnp

from etcompile.errors import EnvironmentWarning, UnsupportedError
from etcompile.frontend.jaxpr import in_transformation
from etcompile.frontend.user_code import warn
from etcompile.ir.program import TraceProgram
from etcompile.runtime.trace_state import TraceState

__all__ = ["carried_alike", "completed", "give_up_traces", "require_wide_numbers", "warn_of_many"]

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


def require_wide_numbers(name: str, wide: str | None) -> None:
    """Raise where JAX makes no numbers of 64 bits now, and a step has some: what is computed beside them would not fit them.

    ``wide`` is the dtype of such numbers in a step that was compiled where there were any.
    """
    if wide is None or jnp.result_type(float).itemsize == 8:
        return
    raise UnsupportedError(
        f"{name} was compiled for numbers of 64 bits, and JAX makes none now.",
        got=f"jax_enable_x64 is False, and the model has {wide}",
        expected="jax_enable_x64 True, as when the model was compiled",
        hint="set it once, before the model is made, and compile again where it changes; "
        "brainstate.environ.context(precision=32) changes it too.",
    )


def _carried(program: TraceProgram) -> Any:
    types = [(name, str(program.equation(name).type)) for name in program.carried]
    return types, (program.header.groups, program.header.relations)


def give_up_traces(name: str, before: TraceState, after: TraceState) -> None:
    """Start with zero traces, and say so where there were others."""
    moved = in_transformation() or (not before.empty and _any(before.value))
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
