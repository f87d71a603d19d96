"""Values of many ``State`` objects at once, read and written at little cost where nobody follows it.

``State.value`` tells transformations and hooks of every read and write, and looks for them each time. A call of a step reads all
parameters and states, so where there is nobody to tell, it is asked for once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import brainstate

from etcompile.frontend.jaxpr import in_transformation
from etcompile.frontend.module import recording

__all__ = ["PlainValues", "read_values", "write_values"]

#: What subclasses may replace.
_VALUE = brainstate.State.value

#: What they may replace of reading and writing beside.
_PARTS = ("value", "_read_value", "_write_value", "_setattr", "__setattr__", "check_if_deleted")

#: Kinds of hooks that a read or a write tells.
_HOOKS = ("read", "write_before", "write_after")


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


class PlainValues:
    """Where brainstate keeps the values of some ``State`` objects, for who takes them from there, and who follows these.

    Whoever follows them when this is made goes on being told nothing: the maker has to know that it is himself, and to see before
    each use that nobody else does.

    Parameters
    ----------
    states : sequence of State
    written : iterable of int
        Places of those that are also written.
    known : tuple of type
        Kinds of states with a ``value`` of their own, of which the maker knows that it lies where it always does.

    Attributes
    ----------
    plain : bool
        Whether brainstate keeps all of them in the way that this knows; without, nothing here may be used.
    hooks : list of list
        Those who are told of reads and writes, where there is anybody; a state keeps these lists as long as it lives.
    unheard : list of list
        Such lists in which there is nobody.
    held : list of dict
        Where the values lie, under ``"_value"``.
    """

    def __init__(self, states: Sequence[Any], written: Iterable[int], known: tuple[type, ...] = ()) -> None:
        self.held = [vars(s) for s in states]
        self._written = [(k, self.held[place]) for k, place in enumerate(written)]
        lists = [getattr(s.hooks, "_get_hook_list", None) for s in states]
        self.plain = all(_is_plain(s, known) for s in states) and None not in lists
        hooks = [of(kind) for of in lists if of is not None for kind in _HOOKS]
        self.hooks, self.unheard = [h for h in hooks if h], [h for h in hooks if not h]

    def write(self, values: Sequence[Any]) -> None:
        """Put in other values of those that are written, right after the values were read."""
        for k, held in self._written:
            held["_value"] = values[k]


def _is_plain(state: Any, known: tuple[type, ...]) -> bool:
    """Whether ``value`` of a state is what lies in its dict under ``_value``."""
    kind, held = type(state), vars(state)
    parts = _PARTS[1:] if kind in known else _PARTS
    own = all(getattr(kind, part, None) is getattr(brainstate.State, part, None) for part in parts)
    return own and "_value" in held
