"""Units of many elements: a neuron with its delay line, whose slots and potential feed each other.

An axis of a state may belong to the unit: the slots of a ring buffer or of a shift register, the order of a memory. With one
number for all elements along it, the walk of :mod:`etcompile.analysis.influence` finds which *unit* each element reaches, and an
element that reaches several of one unit is not cut. A transition between such units has a block for each, which nobody writes
down: a trace is pushed through the step as a tangent of the states, so that a shift costs a move (``HiddenGroup.pushed``).

Positions of such a group are the elements of its largest state; other states stand at the first positions of their units. An
element of y acts in one unit and so has an entry for each of the unit's positions. Where a unit reads several elements of one y,
each of these is a class with a relation of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from etcompile.analysis.fan_out import MOST_CLASSES
from etcompile.analysis.groups import HiddenGroup, Link
from etcompile.analysis.index_rules import NONE
from etcompile.analysis.influence import Influence, spreads
from etcompile.analysis.relations import FanOut, Relation, bounding_box
from etcompile.analysis.sites import Site, SplitStep
from etcompile.frontend.jaxpr import Constant
from etcompile.frontend.loops import Use
from etcompile.frontend.step_model import StepModel

__all__ = ["LargeUnits", "find_large_units", "of_weights"]

Array = Any
#: The influence on one state, its elements having these numbers.
Walk = Callable[[int, Array], Influence]
#: Links among states, by the influence on each.
Links = Callable[[Mapping[int, Influence]], list[Link]]


@dataclasses.dataclass(frozen=True, eq=False)
class LargeUnits:
    """States whose elements form units of many.

    Attributes
    ----------
    root : int
        The largest state, whose elements are the positions.
    units : mapping of int to array
        Per state the unit of each element, in flat order.
    influences : mapping of int to Influence
        By units: a number stands for the unit that its element of the state belongs to.
    """

    root: int
    units: Mapping[int, Array]
    influences: Mapping[int, Influence]

    def group(self, name: str, model: StepModel) -> HiddenGroup:
        """The states as a group."""
        states = tuple(sorted(self.units))
        shape = model.states[self.root].aval.shape
        first, count = self._slots
        maps: list[Array | None] = []
        for s in states:
            rank = _rank(self.units[s])
            elements = np.full(self.units[self.root].size, NONE, np.int64)
            elements[first[self.units[s], rank]] = np.arange(rank.size)
            whole = rank.size == elements.size and (elements == np.arange(elements.size)).all()
            maps.append(None if whole else elements)
        old = [model.state_vars[s] for s in states]
        pattern = tuple(tuple(self._reaches(k, v) for v in old) for k in states)
        assert count > 1
        return HiddenGroup(name, states, shape, tuple(maps), pattern, {}, pushed=True)

    def relations(self, site: Site, group: HiddenGroup) -> tuple[Relation, ...] | None:
        """Those of a site to the group, one for each element of y that a unit reads; None where these are too many.

        Also None where an element of y acts in several units.
        """
        unit: Array | None = None
        for s in group.states:
            found = self.influences[s].positions.get(site.y)
            if found is None or not (found != NONE).any():
                continue
            own = np.where(found == NONE, NONE, self.units[s][np.maximum(found, 0)])
            if unit is not None and ((unit != NONE) & (own != NONE) & (unit != own)).any():
                return None
            unit = own if unit is None else np.where(own == NONE, unit, own)
        if unit is None:
            return ()
        rank = np.full(unit.size, NONE, np.int64)
        there = np.flatnonzero(unit.ravel() != NONE)
        rank[there] = _rank(unit.ravel()[there])
        first, count = self._slots
        if rank.max() >= min(MOST_CLASSES, count - 1):
            return None
        classes = [(rank == c).reshape(unit.shape) for c in range(int(rank.max()) + 1)]
        return tuple(self._relation(site, group, unit, elements, first, count) for elements in classes)

    def _relation(
        self, site: Site, group: HiddenGroup, unit: Array, elements: Array, first: Array, count: int
    ) -> Relation:
        span = bounding_box(elements)
        inside = tuple(slice(start, stop) for start, stop in span)
        positions = np.where(elements[inside][..., None], first[np.maximum(unit[inside], 0)], NONE)
        rows = []
        for s in group.states:
            found = self.influences[s].positions.get(site.y)
            rows.append(found is not None and bool(((found != NONE) & elements).any()))
        masks = (
            {}
            if (positions != NONE).all()
            else dict.fromkeys(np.flatnonzero(rows).tolist(), positions != NONE)
        )
        return Relation(
            "", site.name, group.name, span, positions, tuple(rows), masks, FanOut(count, elements, {})
        )

    @property
    def _slots(self) -> tuple[Array, int]:
        """Positions of each unit, and how many there are."""
        units = self.units[self.root]
        rank = _rank(units)
        first = np.zeros((int(units.max()) + 1, int(rank.max()) + 1), np.int64)
        first[units, rank] = np.arange(units.size)
        return first, first.shape[1]

    def _reaches(self, state: int, variable: int) -> bool:
        found = self.influences[state].positions.get(variable)
        return found is not None and bool((found != NONE).any())


def of_weights(split: SplitStep) -> dict[Use, Array]:
    """Uses of data at weight operations that spread it: they belong to no unit."""
    found: dict[Use, Array] = {}
    for site in split.sites:
        if site.operation < 0:
            continue
        operation = split.body.operations[site.operation]
        for k, v in enumerate(operation.inputs):
            if k != site.operand and not isinstance(v, Constant) and spreads(split.body, operation, k):
                found[site.operation, k] = np.ones(split.body.avals[v].shape, bool)
    return found


def find_large_units(
    model: StepModel,
    split: SplitStep,
    members: Sequence[int],
    walk: Walk,
    links: Links,
) -> Iterator[LargeUnits]:
    """Ways to see states that belong together as units of many elements; the caller takes one by which less is cut."""
    shapes = {s: model.states[s].aval.shape for s in members}
    sites = [site for site in split.sites if site.does.traced]
    if any(not np.issubdtype(model.states[s].aval.dtype, np.floating) for s in members):
        return
    root = max(members, key=lambda s: (int(np.prod(shapes[s])), -s))
    for axis in _axes(model, shapes, root):
        seeds = _seeds(shapes, root, axis)
        found = {s: walk(s, seeds[s]) for s in members}
        units = _units(root, seeds, links(found))
        if units is None or set(units) != set(members):
            continue
        large = LargeUnits(root, units, found)
        if max(int(_rank(u).max()) for u in units.values()) > int(_rank(units[root]).max()):
            continue
        group = large.group("", model)
        if all(large.relations(site, group) is not None for site in sites):
            yield large


def _axes(model: StepModel, shapes: Mapping[int, tuple[int, ...]], root: int) -> list[int]:
    """Axes of the largest state along which its elements may belong together, those first that no other state has."""
    shape = shapes[root]
    inputs = [leaf.aval.shape for leaf in model.inputs]
    led = {s[0] for s in inputs if s}
    examples = (
        len(shape) > 1 and led == {shape[0]} and all(s and s[0] == shape[0] for s in shapes.values())
    )  # axis 0 numbers examples
    others = {s for s in shapes.values() if len(s) == len(shape) - 1}
    found = [a for a, n in enumerate(shape) if n > 1 and not (examples and a == 0)]
    return sorted(found, key=lambda a: (shape[:a] + shape[a + 1 :] not in others, -shape[a]))


def _seeds(shapes: Mapping[int, tuple[int, ...]], root: int, axis: int) -> dict[int, Array]:
    """Per state a number for each element, one for all along the axis of its slots."""
    unit = shapes[root][:axis] + shapes[root][axis + 1 :]
    seeds = {}
    for s, shape in shapes.items():
        seed = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
        along = [a for a in range(len(shape)) if shape[:a] + shape[a + 1 :] == unit]
        if along:
            own = axis if axis in along else along[0]
            seed = np.broadcast_to(seed.take([0], own), shape)
        seeds[s] = seed
    return seeds


def _units(root: int, seeds: Mapping[int, Array], links: Sequence[Link]) -> dict[int, Array] | None:
    """The unit of each element of each state, by what reaches what; None where elements of several units meet."""
    numbers = {s: seed.ravel() for s, seed in seeds.items()}
    units = {root: np.unique(numbers[root], return_inverse=True)[1].ravel()}
    waiting = [link for link in links if link.origin in numbers and link.target in numbers]
    while waiting:
        left = []
        for link in waiting:
            positions = link.positions.ravel()
            there = np.flatnonzero(positions != NONE)
            reached = positions[there]
            if link.target in units:
                state, at, unit = link.origin, numbers[link.origin][there], units[link.target][reached]
            elif link.origin in units:
                state, at, unit = link.target, reached, units[link.origin][there]
            else:
                left.append(link)
                continue
            given = np.full(numbers[state].size, NONE, np.int64)
            given[at] = unit
            if (given[at] != unit).any():
                return None
            if state in units:
                if (units[state][at] != unit).any():
                    return None
                continue
            whole = given[numbers[state]]
            if (whole == NONE).any():
                left.append(link)
                continue
            units[state] = whole
        if len(left) == len(waiting):
            return None
        waiting = left
    return units


def _rank(units: Array) -> Array:
    """Which of the elements of its unit each one is, in flat order."""
    order = np.argsort(units, kind="stable")
    first = np.flatnonzero(np.diff(units[order], prepend=NONE))
    rank = np.empty(units.size, np.int64)
    rank[order] = np.arange(units.size) - np.repeat(first, np.diff(first, append=units.size))
    return rank
