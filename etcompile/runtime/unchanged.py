"""Calls that find all as the last one left it: what they ask in place of looking at everything.

A call in full follows ``brainstate.environ``, looks up the model's ``State`` objects, holds their shapes against what was
compiled, and asks who else wrote them. Of all that nothing is new if every object on the way is the one that was there the last
time. That is asked for here, for many objects in one pass that runs in C: in a training loop it is what every call but the first
finds.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import brainstate

from etcompile.frontend.jaxpr import in_transformation
from etcompile.frontend.module import recording
from etcompile.frontend.state_values import PlainValues
from etcompile.runtime.changed_attributes import PlainAttributes
from etcompile.runtime.compilations import Compilation, Compilations
from etcompile.runtime.foreign_writes import ForeignWrites
from etcompile.runtime.model_states import ModelAccess

__all__ = ["Unchanged"]

_has_global_hooks = brainstate.has_state_hooks

#: Ends a list of entries.
_END = object()


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
        self._holders = live.holders
        self._reads_environment = self.compilation.functions.model.environment.reads
        self._values = PlainValues(live.param_states.values(), live.state_objects.values())
        self._entries: _SameEntries | None = None

    @classmethod
    def of(cls, live: ModelAccess, compilations: Compilations, writes: ForeignWrites) -> Unchanged | None:
        """For a model as a call leaves it; None where every call has to be made in full."""
        now = compilations.now
        if in_transformation() or recording() or now.functions.asks_host:
            return None
        if now.compiled.causal.placement.mesh is not None:
            return None
        if not writes.alone_on((*live.param_states.values(), *live.state_objects.values())):
            return None
        new = cls(live, compilations, writes)
        return new if new._values.plain else None

    def of_now(self) -> bool:
        """Whether it is about what runs now and the ``State`` objects of the last call."""
        return self.compilation is self._compilations.now and self._holders is self._live.holders

    def carry(self) -> tuple[list[Any], list[Any], Any] | None:
        """Values of parameters and states, and traces; None unless all but parameters' numbers is as the last call left it."""
        if in_transformation() or recording() or _has_global_hooks():
            return None
        if self.compilation is not self._compilations.now or not self._as_looked_up():
            return None
        traces, values = self.compilation.traces.alone(), self._values.read()
        if traces is None or values is None:
            return None
        if not self._writes.undisturbed(values[1]) or (
            self._reads_environment and self._compilations.differs()
        ):
            return None
        return *values, traces

    def _as_looked_up(self) -> bool:
        """Whether the ``State`` objects are those of the last call; what changed of plain attributes is said."""
        attributes, entries = self._compilations.attributes, self._entries
        if entries is not None and self._holders is self._live.holders and entries.same(attributes):
            return True
        if not self._live.as_looked_up() or self._holders is not self._live.holders:
            return False
        attributes.say_what_changed()
        self._entries = _SameEntries.of(attributes, self._live.looked_through())
        return True

    def with_environment(self, inputs: Any) -> Any:
        """Inputs of one step with what it takes from ``brainstate.environ``."""
        return self._compilations.with_environment(inputs) if self._reads_environment else inputs

    def leave(self, values: list[Any], traces: Any) -> None:
        """Values of states, and traces, after a call that began with :meth:`carry`."""
        self._values.write(values)
        self.compilation.traces.put(traces)
        self._writes.left_again(values)


class _SameEntries:
    """Whether all that lies between a model and its ``State`` objects, and its plain attributes, are the objects of before."""

    def __init__(self, attributes: PlainAttributes, containers: list[Any]) -> None:
        self._attributes = attributes
        views = (c.values() if isinstance(c, dict) else c for c in containers)
        self._entries: list[Any] = [*views, (_END,)]
        self._then = list(itertools.chain.from_iterable(self._entries))

    @classmethod
    def of(cls, attributes: PlainAttributes, looked_through: list[Any] | None) -> _SameEntries | None:
        """None where not all of it is the entries of dicts and lists."""
        if looked_through is None:
            return None
        followed = {id(one): one for one in (*attributes.containers, *looked_through)}
        return cls(attributes, list(followed.values()))

    def same(self, attributes: PlainAttributes) -> bool:
        """Whether it is so; where an entry has gone, the last one, which nobody else holds, lies in another place."""
        now = itertools.chain.from_iterable(self._entries)
        return attributes is self._attributes and all(map(operator.is_, now, self._then))
