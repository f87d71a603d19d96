"""What a trace program says about its model: groups, sites, relations and cuts, as plain printable records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from etcompile.errors import ProgramError

__all__ = [
    "SITE_KINDS",
    "Cut",
    "Effect",
    "Group",
    "Header",
    "Layer",
    "Relation",
    "Response",
    "Site",
    "SiteKind",
    "name_of",
]

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """Hidden states that feed each other position by position.

    ``states`` holds (path, dtype) pairs; ``pattern[k][j]`` tells whether old state j reaches new state k locally;
    ``bypass`` the old states that reach a result without passing the group's new states.
    """

    name: str
    states: tuple[tuple[str, str], ...]
    shape: Shape
    dtype: str
    pattern: tuple[tuple[bool, ...], ...]
    bypass: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Site:
    """One place where an effective weight meets data.

    ``contracted`` are the weight axes that the operation sums over, which a trace keeps beside y's own axes; None where
    no trace is possible. ``hoisted`` tells whether the weight is computed once per call instead of once per step.
    """

    name: str
    kind: str
    params: tuple[str, ...]
    primitive: str
    source: str
    weight: Shape
    y: Shape
    dtype: str
    contracted: Shape | None
    presynaptic: tuple[Shape, ...]
    hoisted: bool = False

    @property
    def closed(self) -> bool:
        """Whether what the weight does to y has a closed form, so that no Jacobian is taken by autodiff."""
        return self._of_kind.closed

    @property
    def factor(self) -> Shape:
        """Shape of the presynaptic value as one array in which y is linear."""
        return self._of_kind.factor_shape(self)

    @property
    def _of_kind(self) -> type[SiteKind]:
        if self.kind not in SITE_KINDS:
            raise ProgramError(
                f"site {self.name} is a weight operation {self.kind!r}, which is not registered.",
                expected="one of " + ", ".join(SITE_KINDS),
                hint="import the module that registers it with etcompile.weight_operation.",
            )
        return SITE_KINDS[self.kind]


class SiteKind:
    """What programs know of a kind of sites: each weight operation is a subclass."""

    closed: ClassVar[bool] = True

    @staticmethod
    def factor_shape(site: Site) -> Shape:
        """Shape of a factor where it is stored."""
        raise NotImplementedError


#: By name. A program names the kinds of its sites, as it names functions of ``map``; :mod:`etcompile.sites` defines them.
SITE_KINDS: dict[str, type[SiteKind]] = {}


@dataclasses.dataclass(frozen=True)
class Response:
    """How a group answers to some elements of y, the same at every step and for all values of states and parameters.

    ``inject`` is f, up to a factor for each element; ``decay`` is D, or None where D is not constant. Single entries of both may
    be None.
    """

    inject: tuple[float | None, ...]
    decay: tuple[tuple[float | None, ...], ...] | None


@dataclasses.dataclass(frozen=True)
class Relation:
    """A site and a group that its result reaches, one position per element, inside ``span`` of y.

    ``fan`` is the number of positions where an element of y reaches many, as an axis behind those of the span; else nothing.
    ``whole`` tells that all credit of y within a step comes through the group's new states, and as f says: q = L f.
    ``constant`` holds the different responses of its elements where f is constant in time, else nothing. ``filtered`` counts
    the numbers of the trace in whose place filtered presynaptic values are carried, one for each of ``decays``; 0: the
    trace is kept.
    """

    name: str
    site: str
    group: str
    span: tuple[tuple[int, int], ...]
    rows: tuple[bool, ...]
    constant: tuple[Response, ...] = ()
    filtered: int = 0
    decays: int = 0
    whole: bool = False
    fan: Shape = ()

    @property
    def shape(self) -> Shape:
        return (*(stop - start for start, stop in self.span), *self.fan)


#: What ends credit for rules that follow all paths too: a state left out, and a loop without a reverse derivative.
_FOR_EVERY_RULE = ("exclude", "while")


@dataclasses.dataclass(frozen=True)
class Cut:
    """A place where credit ends: where the local Jacobians stop, or, for every rule, where nothing can be followed.

    Attributes
    ----------
    name : str
    group : str
        Group whose trace loses the credit; empty where every rule loses it.
    primitive : str
        Operation that spreads the value over several units; ``"positions"`` where a value moves to another unit's
        position, ``"exclude"`` for a state left out, ``"while"`` for a loop without a reverse derivative.
    source : str
        ``file:line`` in the user's model.
    origins : tuple of str
        Hidden states and parameters whose later influence is lost.
    meaning : str
        What is lost, in words.
    part : str
        ``"all"``, or the share of the operand's elements that is cut.
    """

    name: str
    group: str
    primitive: str
    source: str
    origins: tuple[str, ...]
    meaning: str
    part: str = "all"

    @property
    def for_every_rule(self) -> bool:
        """Whether credit ends here whatever the rule; the other cuts are those of rules that read local Jacobians."""
        return self.primitive in _FOR_EVERY_RULE


@dataclasses.dataclass(frozen=True)
class Layer:
    """Groups whose states feed each other from step to step by any path; ``network`` is all of them.

    ``size`` counts the elements of its states.
    """

    name: str
    groups: tuple[str, ...]
    size: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class Effect:
    """A site whose y reaches the new states of a layer by any path within the step."""

    name: str
    site: str
    layer: str


@dataclasses.dataclass(frozen=True)
class Header:
    """Everything a program knows of its model.

    Layers and effects are there for rules that use them; a finished program holds those that it uses.
    """

    model: str
    groups: tuple[Group, ...]
    sites: tuple[Site, ...]
    relations: tuple[Relation, ...]
    cuts: tuple[Cut, ...]
    layers: tuple[Layer, ...] = ()
    effects: tuple[Effect, ...] = ()

    @cached_property
    def _named(self) -> Mapping[type, Mapping[str, Any]]:
        parts = (self.layers, self.effects, self.groups, self.sites, self.relations)
        kinds = (Layer, Effect, Group, Site, Relation)
        return {kind: {x.name: x for x in reversed(found)} for kind, found in zip(kinds, parts, strict=True)}

    @cached_property
    def _by_site(self) -> Mapping[str, tuple[Relation, ...]]:
        found: dict[str, tuple[Relation, ...]] = {}
        for relation in self.relations:
            found[relation.site] = (*found.get(relation.site, ()), relation)
        return found

    def layer(self, name: str) -> Layer:
        return self._named[Layer][name]

    def effect(self, name: str) -> Effect:
        return self._named[Effect][name]

    def group(self, name: str) -> Group:
        return self._named[Group][name]

    def site(self, name: str) -> Site:
        return self._named[Site][name]

    def relation(self, name: str) -> Relation:
        return self._named[Relation][name]

    def relations_of(self, site: str) -> tuple[Relation, ...]:
        return self._by_site.get(site, ())


def name_of(of: Group | Site | Relation | Layer | Effect | str) -> str:
    """The name of a record; a name as it is."""
    return of if isinstance(of, str) else of.name
