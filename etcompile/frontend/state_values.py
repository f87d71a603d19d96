"""Values of many ``State`` objects at once, read and written at little cost where nobody follows it.

``State.value`` tells transformations and hooks of every read and write, and looks for them each time. A call of a step reads all
parameters and states, so where there is nobody to tell, it is asked for once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import brainstate

from etcompile.frontend.jaxpr import in_transformation
from etcompile.frontend.module import recording

__all__ = ["read_values", "write_values"]

#: What subclasses may replace.
_VALUE = brainstate.State.value


def read_values(states: Iterable[Any]) -> list[Any]:
    """The values of ``State`` objects."""
    if recording() or brainstate.has_state_hooks():
        return [s.value for s in states]
    return [
        s.value if type(s).value is not _VALUE or (s.has_hooks() and s.has_hooks("read")) else s._read_value()
        for s in states
    ]


def write_values(states: Iterable[Any], values: Iterable[Any]) -> None:
    """Put values into ``State`` objects."""
    told = recording() or in_transformation() or brainstate.has_state_hooks()
    for state, value in zip(states, values, strict=True):
        # brainstate notes the first write of a state, which is left to it.
        if told or not state._been_writen or type(state).value is not _VALUE or _is_hooked(state):
            state.value = value
        else:
            state._write_value(value)


def _is_hooked(state: Any) -> bool:
    return state.has_hooks() and (state.has_hooks("write_before") or state.has_hooks("write_after"))
