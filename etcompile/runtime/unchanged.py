"""Calls that find all as the last one left it: what they ask in place of looking at everything.

A call in full follows ``brainstate.environ``, looks up the model's ``State`` objects, holds their shapes against what was
compiled, and asks who else wrote them. Of all that nothing is new if every object on the way is the one that was there the last
time. That is asked for here, for many objects in one pass that runs in C: in a training loop it is what every call but the first
finds.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from etcompile.frontend.state_values import PlainValues
from etcompile.runtime.compilations import Compilation, Compilations
from etcompile.runtime.foreign_writes import ForeignWrites
from etcompile.runtime.looked_up import LookedUp
from etcompile.runtime.model_states import ModelAccess

__all__ = ["Unchanged"]


class Unchanged:
    """Where parameters, states and traces lie as long as nobody but the step touches them, and whether that is so.

    Parameters
    ----------
    live : ModelAccess
    compilations : Compilations
    writes : ForeignWrites

    Attributes
    ----------
    compilation : Compilation
        The one that the last call ran.
    """

    def __init__(self, live: ModelAccess, compilations: Compilations, writes: ForeignWrites) -> None:
        self.compilation: Compilation = compilations.now
        self._live = live
        self._compilations = compilations
        self._writes = writes
        self._reads_environment = self.compilation.functions.model.environment.reads
        params, states = live.param_states.values(), live.state_objects.values()
        self._params = len(params)
        self._values = PlainValues((*params, *states), range(len(params), len(params) + len(states)))
        self._looked_up = LookedUp(live, compilations, self._values)

    @classmethod
    def of(cls, live: ModelAccess, compilations: Compilations, writes: ForeignWrites) -> Unchanged | None:
        """For a model as a call leaves it; None where every call has to be made in full."""
        if LookedUp.in_full(compilations) or not writes.alone_on(
            (*live.param_states.values(), *live.state_objects.values())
        ):
            return None
        new = cls(live, compilations, writes)
        return new if new._values.plain else None

    def of_now(self) -> bool:
        """Whether it is about what runs now and the ``State`` objects of the last call."""
        return self._looked_up.of_now()

    def again(self, key: Hashable, data: tuple[Any, ...]) -> list[Any] | None:
        """What the jitted function under a key gives beside the carry, which is left in the model.

        None unless all but these data and the parameters' numbers is as the last call left it. It is one function, since
        a call of one takes as long as what most of these lines ask. What the jitted function raises comes out; it has then given
        nothing away, unless it was stopped from outside.
        """
        fn, held = self.compilation.jitted.get(key), self.compilation.traces
        if fn is None or (values := self._looked_up.values()) is None or (traces := held.alone()) is None:
            return None
        states = values[self._params :]
        if not self._writes.undisturbed(states):
            return None
        if self._reads_environment:
            if self._compilations.differs():
                return None
            data = self._compilations.with_environment(data[0]), *data[1:]
        (traces, states), *found = fn.again(values[: self._params], states, traces, *data)
        self._values.write(states)
        held.put(traces)
        self._writes.left_again(states)
        return found
