"""Hidden groups: hidden states that feed each other position by position, and how their positions correspond."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from etcompile.analysis.index_rules import NONE

__all__ = ["HiddenGroup", "Link", "align"]

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Link:
    """Local influence of one hidden state on another.

    ``positions`` has the shape of state ``origin`` and holds the element of state ``target`` that each element reaches.
    ``within_step`` tells a new value from an old one.
    """

    origin: int
    target: int
    positions: Array
    within_step: bool


@dataclasses.dataclass(frozen=True, eq=False)
class HiddenGroup:
    """Hidden states that feed each other position by position.

    Attributes
    ----------
    name : str
    states : tuple of int
        Numbers of the states in the step model.
    shape : tuple of int
        Shape of the group's positions.
    maps : tuple of (array or None)
        Per state, the flat element at each position (-1: none); None where positions and elements are the same.
    pattern : tuple of tuple of bool
        ``pattern[k][j]``: whether the old state j reaches the new state k.
    masks : mapping
        ``masks[k, j]``: positions at which that entry of the transition counts, where not all do.
    shared : set of (int, int)
        Entries (k, j) of the transition of which many positions read the same element of state j.
    counted : mapping of int to array
        In a group with such entries, per state whose elements are at many positions the ones at which they are counted.
    pushed : bool
        The elements of a unit are at positions of their own (:mod:`etcompile.analysis.large_units`): the transition has a block
        for each unit, which is not written down but pushed through the step.
    """

    name: str
    states: tuple[int, ...]
    shape: tuple[int, ...]
    maps: tuple[Array | None, ...]
    pattern: tuple[tuple[bool, ...], ...]
    masks: Mapping[tuple[int, int], Array]
    shared: frozenset[tuple[int, int]] = frozenset()
    counted: Mapping[int, Array] = dataclasses.field(default_factory=dict)
    pushed: bool = False

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def elements(self, k: int) -> Array:
        """Flat element of state number k of the group at each flat position."""
        found = self.maps[k]
        return np.arange(self.size) if found is None else found


#: Gives one of the waiting states its positions by those that others have: (state, elements), or None.
Place = Callable[[Mapping[int, Array], Sequence[int]], tuple[int, Array] | None]


def align(
    members: Sequence[int],
    shapes: Mapping[int, tuple[int, ...]],
    links: Sequence[Link],
    others: Sequence[Place] = (),
) -> list[dict[int, Array | None]]:
    """Give the states of a connected component common positions; states that cannot share them start a group of their own.

    ``others`` are asked where no link gives a state its positions. Returns one mapping per group, from state number to its flat
    element at each position (None: the identity).
    """
    waiting = list(members)
    groups: list[dict[int, Array | None]] = []
    while waiting:
        root = max(waiting, key=lambda s: (int(np.prod(shapes[s])), -s))
        size = int(np.prod(shapes[root]))
        maps: dict[int, Array] = {root: np.arange(size)}
        waiting.remove(root)
        grown = True
        while grown:
            grown = False
            for link in links:
                state, found = _extend(maps, link, waiting, shapes)
                if state is not None and found is not None:
                    maps[state] = found
                    waiting.remove(state)
                    grown = True
            for place in others if not grown else ():
                placed = place(maps, waiting)
                if placed is not None and _covers(placed[1], shapes[placed[0]]):
                    maps[placed[0]] = placed[1]
                    waiting.remove(placed[0])
                    grown = True
        identity = np.arange(size)
        groups.append({
            s: None if m.shape == identity.shape and int(np.prod(shapes[s])) == size and (m == identity).all() else m
            for s, m in sorted(maps.items())
        })  # fmt: skip
    return groups


def _extend(
    maps: Mapping[int, Array], link: Link, waiting: Sequence[int], shapes: Mapping[int, tuple[int, ...]]
) -> tuple[int | None, Array | None]:
    """Positions of a state not placed yet, through one link to a state that is."""
    positions = link.positions.ravel()
    if link.origin in maps and link.target in waiting:
        state, origin = link.target, maps[link.origin]
        found = np.where(origin >= 0, positions[origin], NONE)
    elif link.target in maps and link.origin in waiting:
        state = link.origin
        valid = np.flatnonzero(positions != NONE)
        if np.unique(positions[valid]).size != valid.size:
            return None, None  # several units feed one: no common positions
        inverse = np.full(int(np.prod(shapes[link.target])), NONE)
        inverse[positions[valid]] = valid
        target = maps[link.target]
        found = np.where(target >= 0, inverse[target], NONE)
    else:
        return None, None
    return (state, found) if _covers(found, shapes[state]) else (None, None)


def _covers(elements: Array, shape: tuple[int, ...]) -> bool:
    """Whether every element of a state has its place."""
    return np.unique(elements[elements >= 0]).size == int(np.prod(shape))


def consistent(link: Link, origin: Array, target: Array) -> tuple[Array, bool]:
    """Where a link stays at its position, and whether any of it moves elsewhere."""
    positions = link.positions.ravel()
    reached = np.where(origin >= 0, positions[np.maximum(origin, 0)], NONE)
    stays = (reached != NONE) & (reached == target)
    kept = np.unique(origin[stays]).size
    return stays, kept < int((positions != NONE).sum())
