"""Calls of a learner that find all as its last call left it: what they ask in place of brainstate's own `jit`.

A learner's loop is compiled by brainstate, which at every call asks each state for its value, holds its shape against what was
compiled, and tells of every write. Where nobody follows the states, and they are the objects of the last call, the loop's pure
function can be called at once. For a sequence of one step, as a controller learns, this is most of the time of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from etcompile.frontend.state_values import PlainValues
from etcompile.runtime.compilations import Compilations
from etcompile.runtime.foreign_writes import ForeignWrites
from etcompile.runtime.jitted import Around
from etcompile.runtime.looked_up import LookedUp
from etcompile.runtime.losses import JoinedLoss, LossFunction
from etcompile.runtime.model_states import ModelAccess
from etcompile.runtime.trace_state import TraceState

__all__ = ["LearnedAgain"]


class LearnedAgain:
    """A loop of a learner as its last call left everything, to be run once more.

    Parameters
    ----------
    live : ModelAccess
    compilations : Compilations
    writes : ForeignWrites
        Has just been told of the states that the loop left.
    loop : Around
        The compiled loop.
    states : sequence of State
        What it reads and writes, in its order.
    written : sequence of bool
        Which of these it writes.
    joined : JoinedLoss
        The loss as it was traced.
    """

    def __init__(
        self,
        live: ModelAccess,
        compilations: Compilations,
        writes: ForeignWrites,
        loop: Around,
        states: Sequence[Any],
        written: Sequence[bool],
        joined: JoinedLoss,
    ) -> None:
        self._writes, self._loop, self._joined = writes, loop, joined
        self._written = [k for k, w in enumerate(written) if w]
        self._values = PlainValues(states, self._written, known=(TraceState,))
        self._looked_up = LookedUp(live, compilations, self._values)
        places = {id(s): k for k, s in enumerate(states)}
        self._of_model = [places.get(id(s), -1) for s in live.state_objects.values()]

    @classmethod
    def of(
        cls,
        live: ModelAccess,
        compilations: Compilations,
        writes: ForeignWrites,
        loop: Around,
        joined: JoinedLoss,
        args: tuple[Any, ...],
    ) -> LearnedAgain | None:
        """After a call of the loop with these arguments; None where every call has to be made in full."""
        if LookedUp.in_full(compilations) or joined.program.asks_host:
            return None
        if compilations.now.functions.model.environment.reads or joined.environment.reads:
            return None
        found = loop.states(*args)
        if found is None or not writes.alone_on(found[0]):
            return None
        new = cls(live, compilations, writes, loop, *found, joined)
        return new if new._values.plain and new._all_written() else None

    def _all_written(self) -> bool:
        """Whether the loop writes every state of the model."""
        return {*self._of_model} <= {*self._written}

    def __call__(self, loss: LossFunction, args: tuple[Any, ...]) -> Any | None:
        """What the loop gives, with all states put in; None, with all as it was, where the call has to be made in full."""
        values = self._looked_up.values()
        if values is None or loss.unchanged() is not self._joined:
            return None
        if not self._writes.undisturbed([values[k] for k in self._of_model]):
            return None
        try:
            after, found = self._loop.again(values, *args)
        except Exception:  # nothing was given away: the call in full says what it is
            return None
        self._values.write([after[k] for k in self._written])
        self._writes.left_again([after[k] for k in self._of_model])
        return found
