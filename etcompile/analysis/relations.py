"""Hidden-to-weight relations: which part of a site's result reaches which positions of which group."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from etcompile.analysis.groups import HiddenGroup
from etcompile.analysis.index_rules import NONE

__all__ = ["Relation", "relate"]

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Relation:
    """A site and a group that its result reaches, each element through one position.

    Attributes
    ----------
    name : str
    site, group : str
    span : tuple of (int, int)
        Start and stop per axis of the part of y that reaches the group; the trace covers this part only.
    position : array
        Flat position of the group for each element of the span (-1: none).
    rows : tuple of bool
        Which states of the group the result reaches within the step.
    masks : mapping of int to array
        Per such state, the elements of the span that count, where not all do.
    """

    name: str
    site: str
    group: str
    span: tuple[tuple[int, int], ...]
    position: Array
    rows: tuple[bool, ...]
    masks: Mapping[int, Array]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.span)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, stop) for start, stop in self.span)


def relate(
    name: str, site: str, group: HiddenGroup, influence: Mapping[int, Array]
) -> tuple[Relation | None, bool] | None:
    """Relation of a site to a group, or None; and whether part of the influence does not fit the group's positions.

    ``influence`` maps the number of a state within the group to the element that each element of y reaches.
    """
    influence = {k: p for k, p in influence.items() if (p != NONE).any()}
    if not influence:
        return None
    shape = next(iter(influence.values())).shape
    position = np.full(shape, NONE, np.int64)
    order = sorted(influence, key=lambda k: (group.maps[k] is not None, k))
    for k in order:
        position = np.where(position == NONE, _to_position(group, k, influence[k]), position)
    span = _bounding_box(position != NONE)
    slices = tuple(slice(start, stop) for start, stop in span)
    inside = position[slices]
    rows, masks, misfit = [], {}, False
    for k in range(len(group.states)):
        if k not in influence:
            rows.append(False)
            continue
        elements = group.elements(k)
        reached = influence[k][slices]
        fits = (inside != NONE) & (reached == elements[np.maximum(inside, 0)])
        misfit |= bool(((influence[k] != NONE).sum()) > fits.sum())
        rows.append(bool(fits.any()))
        if (fits != (reached != NONE)).any():
            masks[k] = fits
    if not any(rows):
        return None, True
    return Relation(name, site, group.name, span, inside, tuple(rows), masks), misfit


def _to_position(group: HiddenGroup, k: int, elements: Array) -> Array:
    found = group.maps[k]
    if found is None:
        return elements
    first = np.full(int(max(found.max(), elements.max())) + 1, NONE, np.int64)
    valid = np.flatnonzero(found >= 0)[::-1]
    first[found[valid]] = valid
    return np.where(elements >= 0, first[np.maximum(elements, 0)], NONE)


def _bounding_box(mask: Array) -> tuple[tuple[int, int], ...]:
    box = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append((int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)
