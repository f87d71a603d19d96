"""Whether a model has the ``State`` objects and the plain attributes that it had at the last call, asked at little cost."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from typing import Any

from etcompile.frontend.jaxpr import configuration, in_transformation, looks_into_results
from etcompile.frontend.module import are_followed, recording
from etcompile.frontend.state_values import PlainValues
from etcompile.runtime.changed_attributes import PlainAttributes
from etcompile.runtime.compilations import Compilations
from etcompile.runtime.model_states import ModelAccess

__all__ = ["LookedUp"]

#: Ends a list of entries.
_END = object()

_entries_of = itertools.chain.from_iterable

_VALUE_OF = operator.itemgetter("_value")


class LookedUp:
    """A live model as it is now, to be held against what it is at later calls.

    All that lies between the model and its ``State`` objects, and its plain attributes, are entries of some dicts and lists. As
    long as these are the same objects, which one pass in C tells, nothing has to be looked up; where one is another, it is.

    Parameters
    ----------
    live : ModelAccess
    compilations : Compilations
    states : PlainValues
        ``State`` objects of the model, and others.
    """

    def __init__(self, live: ModelAccess, compilations: Compilations, states: PlainValues) -> None:
        self._live = live
        self._compilations, self._compilation = compilations, compilations.now
        self._holders, self._configured = live.holders, configuration()
        self._states, self._unheard, self._held = states, states.unheard, states.held
        self._told = _Entries(states.hooks)
        self._attributes: PlainAttributes | None = None  # to which the entries belong
        self._entries = self._told

    @staticmethod
    def in_full(compilations: Compilations) -> bool:
        """Whether every call has to be made in full: somebody follows the states, or what runs is no function of them alone."""
        compiled = compilations.now.compiled
        on_mesh = compiled.causal.placement.mesh is not None
        followed = in_transformation() or recording() or looks_into_results()
        return followed or compiled.functions.asks_host or on_mesh

    def of_now(self) -> bool:
        """Whether it is about what runs now, and the ``State`` objects that were looked up the last time are those of then."""
        same = self._compilation is self._compilations.now and self._holders is self._live.holders
        return same and configuration() == self._configured

    def values(self) -> list[Any] | None:
        """The values of the states, if nobody follows these and they are the objects of then; else None.

        What changed of plain attributes is said. It is one function, since to call one takes as long as what most lines ask.
        """
        if are_followed() or any(self._unheard) or configuration() != self._configured:
            return None
        if self._compilation is not self._compilations.now or self._holders is not self._live.holders:
            return None
        entries = self._entries
        if self._attributes is not self._compilations.attributes or not all(
            map(operator.is_, _entries_of(entries.now), entries.then)
        ):
            if not self._looked_up_again():
                return None
        return list(map(_VALUE_OF, self._held))

    def _looked_up_again(self) -> bool:
        """Whether they are the objects of then, where some entry may be another one."""
        if not (self._live.as_looked_up() and self.of_now() and self._told.same()):
            return False
        attributes, looked_through = self._compilations.attributes, self._live.looked_through()
        attributes.say_what_changed()
        self._attributes = None
        if looked_through is not None:  # else there is more to ask than entries
            self._attributes = attributes
            self._entries = _Entries((*attributes.containers, *looked_through, *self._states.hooks))
        return True


class _Entries:
    """Whether some dicts and lists hold the objects that they held.

    Where an entry has gone, the last one, which nobody else holds, lies in another place.
    """

    def __init__(self, containers: Iterable[dict | list]) -> None:
        followed = {id(one): one for one in containers}.values()
        views = (c.values() if isinstance(c, dict) else c for c in followed)
        self.now: list[Any] = [*views, (_END,)]
        self.then = list(_entries_of(self.now))

    def same(self) -> bool:
        """Whether it is so."""
        return all(map(operator.is_, _entries_of(self.now), self.then))
