"""Whether a model has the ``State`` objects and the plain attributes that it had at the last call, asked at little cost."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import brainstate

from etcompile.frontend.jaxpr import in_transformation
from etcompile.frontend.module import recording
from etcompile.runtime.changed_attributes import PlainAttributes
from etcompile.runtime.compilations import Compilations
from etcompile.runtime.model_states import ModelAccess

__all__ = ["LookedUp"]

#: Ends a list of entries.
_END = object()

_has_global_hooks = brainstate.has_state_hooks


class LookedUp:
    """A live model as it is now, to be held against what it is at later calls.

    All that lies between the model and its ``State`` objects, and its plain attributes, are entries of some dicts and lists. As
    long as these are the same objects, which one pass in C tells, nothing has to be looked up; where one is another, it is.

    Parameters
    ----------
    live : ModelAccess
    compilations : Compilations
    """

    def __init__(self, live: ModelAccess, compilations: Compilations) -> None:
        self._live = live
        self._compilations, self._compilation = compilations, compilations.now
        self._holders = live.holders
        self._entries: _Entries | None = None

    @staticmethod
    def in_full(compilations: Compilations) -> bool:
        """Whether every call has to be made in full: somebody follows the states, or what runs is no function of them alone."""
        compiled = compilations.now.compiled
        on_mesh = compiled.causal.placement.mesh is not None
        return in_transformation() or recording() or compiled.functions.asks_host or on_mesh

    def of_now(self) -> bool:
        """Whether it is about what runs now, and the ``State`` objects that were looked up the last time are those of then."""
        return self._compilation is self._compilations.now and self._holders is self._live.holders

    def same(self) -> bool:
        """Whether nobody follows the states, and they are the objects of then; what changed of plain attributes is said."""
        if in_transformation() or recording() or _has_global_hooks() or not self.of_now():
            return False
        attributes, entries = self._compilations.attributes, self._entries
        if entries is not None and entries.same(attributes):
            return True
        if not self._live.as_looked_up() or not self.of_now():
            return False
        attributes.say_what_changed()
        self._entries = _Entries.of(attributes, self._live.looked_through())
        return True


class _Entries:
    """Whether all that lies between a model and its ``State`` objects, and its plain attributes, are the objects of before."""

    def __init__(self, attributes: PlainAttributes, containers: list[Any]) -> None:
        self._attributes = attributes
        views = (c.values() if isinstance(c, dict) else c for c in containers)
        self._entries: list[Any] = [*views, (_END,)]
        self._then = list(itertools.chain.from_iterable(self._entries))

    @classmethod
    def of(cls, attributes: PlainAttributes, looked_through: list[Any] | None) -> _Entries | None:
        """None where not all of it is the entries of dicts and lists."""
        if looked_through is None:
            return None
        followed = {id(one): one for one in (*attributes.containers, *looked_through)}
        return cls(attributes, list(followed.values()))

    def same(self, attributes: PlainAttributes) -> bool:
        """Whether it is so; where an entry has gone, the last one, which nobody else holds, lies in another place."""
        now = itertools.chain.from_iterable(self._entries)
        return attributes is self._attributes and all(map(operator.is_, now, self._then))
