"""Who writes a model's states beside the step: resets by brainstate's functions, another step, assignments by hand.

Traces hold derivatives of the states as the step left them. A write by somebody else does not change the traces, so it has to be
noticed: brainstate tells of every write of a state, also while a function is traced, and the frame that wrote tells which kind it
is. What a transformation writes when it ends is the outcome of writes that were seen while it was traced.
"""

from __future__ import annotations

import dataclasses
import operator
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from etcompile.errors import CarryError, ForeignWriteWarning
from etcompile.frontend.jaxpr import current_trace, is_traced

__all__ = ["ForeignWrites"]

#: Methods of brainstate's modules that start a sequence anew.
_RESETS = frozenset({"reset_state", "init_state", "reset_all_states", "init_all_states"})

#: Where writes of states pass through, without being who writes.
_PASSED = ("brainstate._state", __name__)

#: Functions of this package that write values which they take back, or put back what was there.
_UNDONE = frozenset({"trace_module", "abstract_states", "restore"})

#: What writes the outcome of a traced function.
_ENDS = ("brainstate.transform", "brainstate._state")


class ForeignWrites:
    """The writes of a step's states by others since its traces were last theirs.

    Parameters
    ----------
    clear : callable
        Makes the traces zero, here and now: inside of a transformation as a part of what is traced.
    cleared : callable
        Whether nobody has written the traces since: a compiled function may, without a line of Python.
    """

    def __init__(self, clear: Callable[[], None], cleared: Callable[[], bool]) -> None:
        self._name = ""
        self._clear = clear
        self._cleared = cleared
        self._watched: dict[int, _Watched] = {}
        self._reset: set[str] = set()
        self._other_step = False
        self._quiet = 0
        self._left: tuple[list[Any], Any] | None = None
        self._bare = False  # the values of the states are their leaves
        self._fresh: weakref.ref | None = current_trace()

    @property
    def fresh(self) -> bool:
        """Whether no step ran since the traces were made zero, in what is traced now: they hold no credit."""
        return self._fresh is not None and self._fresh() is current_trace()() and self._cleared()

    def copied(self, other: ForeignWrites) -> None:
        """Be as fresh as another."""
        self._fresh = other._fresh

    def own(self) -> AbstractContextManager[None]:
        """Meanwhile writes are the step's own."""
        return _Own(self)

    def _hush(self, more: int) -> None:
        """Notice nothing as long as anybody wants so; brainstate then has no hook of this step's to call."""
        self._quiet += more
        for watched in self._watched.values():
            watched.hear(not self._quiet)

    def watch(self, name: str, states: dict[str, Any]) -> None:
        """Follow a model's ``State`` objects by path; an object that was not there before is a state made anew."""
        self._name = name
        for path, state in states.items():
            known = self._watched.get(id(state))
            if known is not None and known.state() is state:
                continue
            if any(other.path == path for other in self._watched.values()):
                self._watched = {k: v for k, v in self._watched.items() if v.path != path}
                if not self.fresh:
                    self._reset.add(path)
            handle = state.register_hook("write_after", _Notice(self), enabled=not self._quiet)
            self._watched[id(state)] = _Watched(weakref.ref(state), path, handle)
        if self._reset:
            self._all_reset()

    def settled(self) -> None:
        """States and traces belong together again: after a reset."""
        self._reset.clear()
        self._other_step, self._left, self._fresh = False, None, current_trace()

    def left(self, states: Any) -> None:
        """The step leaves these states."""
        self._fresh = None
        leaves, tree = jax.tree.flatten(states)
        self._left = None if any(map(is_traced, leaves)) else (leaves, tree)
        self._bare = isinstance(states, dict) and all(map(jax.tree_util.treedef_is_leaf, tree.children()))

    def as_left(self, leaves: Sequence[Any], tree: Any) -> bool:
        """Whether these are the very arrays that the step left."""
        return self._left is not None and tree == self._left[1] and not _differ(leaves, self._left[0])

    def left_again(self, values: list[Any]) -> None:
        """The step leaves other arrays in states of the structure that it left before."""
        if self._left is not None:
            self._left = values if self._bare else jax.tree.leaves(values), self._left[1]

    def undisturbed(self, values: list[Any]) -> bool:
        """Whether these hold the very arrays that the step left, and nobody else has written since."""
        if self._left is None or self._reset or self._other_step:
            return False
        return not _differ(values if self._bare else jax.tree.leaves(values), self._left[0])

    def alone_on(self, states: Iterable[Any]) -> bool:
        """Whether nobody else follows these ``State`` objects."""
        callbacks = (hook.callback for state in states for hook in state.list_hooks())
        return all(isinstance(c, _Notice) and c.writes() in (self, None) for c in callbacks)

    def check(self, leaves: Sequence[Any], through: bool) -> None:
        """Raise :class:`CarryError` where the traces do not belong to the states.

        ``through``: they went through a transformation since the step left them, so that other arrays mean nothing.
        """
        if self._reset:
            path, others = sorted(self._reset)[0], self._paths() - self._reset
            raise CarryError(
                f"state {path} of {self._name} was reset, but not {', '.join(sorted(others))}.",
                got="traces that hold what earlier steps left in all of them",
                expected="a reset of all states, or of none",
                hint="step.reset() starts all of them anew, brainstate.nn.reset_all_states(model) does so as well.",
            )
        moved = self._left is not None and not through and self._moved(leaves) and self._shares()
        if (self._other_step or moved) and not self.fresh:
            raise CarryError(
                f"another step compiled from the same {self._name} has moved its states since the last call of this one.",
                got="traces of this step that hold derivatives of other states",
                expected="one step at a time from a reset on",
                hint="call step.reset() before changing over, or compile a copy: copy.deepcopy(model).",
            )

    def _moved(self, leaves: Sequence[Any]) -> bool:
        then = self._left[0] if self._left else ()
        return len(leaves) == len(then) and _differ(leaves, then) and not any(map(is_traced, leaves))

    def _shares(self) -> bool:
        """Whether another step lives on one of the states."""
        mine = [watched.state() for watched in self._watched.values()]
        return any(w is not self for state in mine if state is not None for w in _watching(state))

    def _noticed(self, state: Any, traced: bool) -> None:
        watched = self._watched.get(id(state))
        if watched is None or watched.state() is not state or self.fresh:
            return
        path = watched.path
        writer = _writer(sys._getframe(2))
        if writer is None or _module(writer).startswith(_ENDS):
            return
        ours = [f.f_code.co_name for f in _outwards(writer) if _module(f).startswith("etcompile.")]
        if ours:
            self._other_step |= not _UNDONE.intersection(ours)
        elif any(f.f_code.co_name in _RESETS for f in _outwards(writer)):
            self._reset.add(path)
            self._all_reset()
        elif not traced:  # while a function is traced, its writes may come to nothing
            warnings.warn(
                f"state {path} of {self._name} was assigned at {_place(writer)}, outside of the step: the traces stay, as if its "
                "value had been shifted by a constant. step.reset() starts a new sequence.",
                ForeignWriteWarning,
                stacklevel=2,
            )

    def _all_reset(self) -> None:
        if self._reset >= self._paths():
            self._clear()
            self.settled()

    def _paths(self) -> set[str]:
        return {watched.path for watched in self._watched.values()}


class _Own:
    """While it lasts a step notices no writes; made at every call, so it is no generator."""

    def __init__(self, writes: ForeignWrites) -> None:
        self._writes = writes

    def __enter__(self) -> None:
        self._writes._hush(1)

    def __exit__(self, *_: object) -> None:
        self._writes._hush(-1)


@dataclasses.dataclass(frozen=True, eq=False)
class _Watched:
    """A state that is followed, and the hook that tells of its writes."""

    state: weakref.ref
    path: str
    handle: Any

    def hear(self, heard: bool) -> None:
        """Whether writes shall be told of; a state that is gone is not written."""
        if self.state() is not None:
            (self.handle.enable if heard else self.handle.disable)()


class _Notice:
    """What brainstate calls after a write; it keeps no step alive."""

    def __init__(self, writes: ForeignWrites) -> None:
        self.writes = weakref.ref(writes)

    def __call__(self, context: Any) -> None:
        writes = self.writes()
        if writes is None:
            return
        state = context.state
        if state is not None:
            writes._noticed(state, any(is_traced(v) for v in jax.tree.leaves(context.value)))


def _differ(now: Sequence[Any], then: Sequence[Any]) -> bool:
    return len(now) != len(then) or not all(map(operator.is_, now, then))


def _watching(state: Any) -> list[ForeignWrites]:
    """Everybody alive who follows a state."""
    callbacks = (hook.callback for hook in state.list_hooks("write_after"))
    found = (c.writes() for c in callbacks if isinstance(c, _Notice))
    return [w for w in found if w is not None]


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


def _writer(frame: FrameType) -> FrameType | None:
    """The frame that wrote: the first one outside of the machinery, or the end of a transformation."""
    for f in _outwards(frame):
        if f.f_code.co_name.startswith("assign_state_vals") or not _module(f).startswith(_PASSED):
            return f
    return None


def _place(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
