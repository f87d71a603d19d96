"""Hidden-to-weight relations: which part of a site's result reaches which positions of which group."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from etcompile.analysis.groups import HiddenGroup
from etcompile.analysis.index_rules import NONE
from etcompile.frontend.loops import Use

__all__ = ["FanOut", "Relation", "bounding_box", "relate"]

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class FanOut:
    """How y reaches a group where its elements may reach many positions each, and each position reads one element.

    Attributes
    ----------
    size : int
        Positions for each element of y, at most.
    elements : array of bool
        The elements of y that the relation is about: of these each position reads one at most.
    cuts : mapping of Use to array
        Elements at which uses between y and the group are cut.
    """

    size: int
    elements: Array
    cuts: Mapping[Use, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Relation:
    """A site and a group that its result reaches, each element through one position; with ``fan_out`` through many.

    Attributes
    ----------
    name : str
    site, group : str
    span : tuple of (int, int)
        Start and stop per axis of the part of y that reaches the group; the trace covers this part only.
    position : array
        Flat position of the group for each element of the span (-1: none), with a last axis for many.
    rows : tuple of bool
        Which states of the group the result reaches within the step.
    masks : mapping of int to array
        Per such state, the elements of ``position`` that count, where not all do.
    fan_out : FanOut or None
    """

    name: str
    site: str
    group: str
    span: tuple[tuple[int, int], ...]
    position: Array
    rows: tuple[bool, ...]
    masks: Mapping[int, Array]
    fan_out: FanOut | None = None

    @property
    def fan(self) -> tuple[int, ...]:
        """The axis behind those of the span, over the positions that an element of y reaches; nothing where it is one."""
        return (self.fan_out.size,) if self.fan_out is not None and self.fan_out.size > 1 else ()

    @property
    def shape(self) -> tuple[int, ...]:
        return (*(stop - start for start, stop in self.span), *self.fan)

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
    span = bounding_box(position != NONE)
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


def bounding_box(mask: Array) -> tuple[tuple[int, int], ...]:
    """Start and stop per axis of what a mask covers."""
    box = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append((int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)
