"""Which axis of an array numbers the examples, and which the units of the hidden group that it belongs to.

The units of a group lie along one axis of its positions. Everything else follows by labels: each element of a state, of a
site's result or of a weight carries the number of its unit; where that number changes along a single axis, it is the one.
A parameter takes the labels of the effective weights that are made of it, pulled back through the expressions that make them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from etcompile.analysis.groups import HiddenGroup
from etcompile.analysis.index_rules import MANY, NONE, join
from etcompile.analysis.influence import through_operation
from etcompile.frontend.jaxpr import Constant

if TYPE_CHECKING:
    from etcompile.lowering.derivatives import LoweredModel

__all__ = ["Axes", "ModelAxes"]

Array = Any


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axis of the examples and that of the units; None where an array has no such axis."""

    examples: int | None = None
    units: int | None = None


class ModelAxes:
    """The axes of everything in a model.

    Parameters
    ----------
    model : LoweredModel
    parts : int
        Among several axes that could be that of the units, one that this number divides is taken.
    """

    def __init__(self, model: LoweredModel, parts: int = 1) -> None:
        self.model = model
        analysis = model.analysis
        self.groups = {g.name: self._of_group(g, parts) for g in analysis.groups}
        self.relations = {r.name: self._of_relation(r.name) for r in analysis.relations}
        self.weights = {s.name: self._of_weight(s.name) for s in analysis.sites}
        self.states = tuple(self._of_state(k) for k in range(len(analysis.model.states)))
        self.params = self._of_params()

    def leading(self, shape: tuple[int, ...]) -> Axes:
        """Axes of an input, an output or a value per example: the examples come first."""
        return Axes(0 if shape and shape[0] == self.model.examples else None)

    def _of_group(self, group: HiddenGroup, parts: int) -> Axes:
        analysis, along = self.model.analysis, self.model.batch.along
        leads = any(
            found is None
            and analysis.model.states[s].aval.shape == group.shape
            and analysis.model.state_vars[s] in along
            for s, found in zip(group.states, group.maps, strict=True)
        )
        examples = 0 if leads else None
        votes: Counter[int] = Counter()
        for r in analysis.relations:
            if r.group != group.name:
                continue
            geometry = self.model.traces[r.name]
            for axis in range(len(group.shape)):
                moving = _axis_along(_numbers(group.shape, axis, r.position))
                if axis != examples and moving in geometry.kept:
                    votes[axis] += int(np.prod(geometry.contracted, dtype=np.int64))
        open_axes = [a for a in range(len(group.shape)) if a != examples]
        if not open_axes:
            return Axes(examples)
        best = max(open_axes, key=lambda a: (votes[a] > 0 and group.shape[a] % parts == 0, votes[a], a))
        return Axes(examples, best)

    def _of_state(self, k: int) -> Axes:
        analysis = self.model.analysis
        shape = analysis.model.states[k].aval.shape
        for group in analysis.groups:
            if k not in group.states:
                continue
            elements = group.elements(group.states.index(k))
            position = np.full(int(np.prod(shape, dtype=np.int64)), NONE, np.int64)
            valid = np.flatnonzero(elements >= 0)
            position[elements[valid]] = valid
            return self._by_positions(group, position.reshape(shape))
        return self.leading(shape)

    def _of_relation(self, name: str) -> Axes:
        relation = self.model.traces[name].relation
        return self._by_positions(self.model.analysis.group(relation.group), relation.position)

    def _by_positions(self, group: HiddenGroup, position: Array) -> Axes:
        """Axes of an array whose elements belong to positions of a group."""
        of_group = self.groups[group.name]
        found = [
            None if axis is None else _axis_along(_numbers(group.shape, axis, position))
            for axis in (of_group.examples, of_group.units)
        ]
        return Axes(*found)

    def _of_weight(self, name: str) -> Axes:
        """Of an effective weight: its output axis, by the group that it reaches, or the last one."""
        geometry = self.model.sites[name]
        to_weight = geometry.weight_axes
        of_relations = [r.name for r in self.model.analysis.relations if r.site == name]
        for relation in of_relations:
            axes = self.relations[relation]
            if axes.units in geometry.kept:
                examples = geometry.kept.index(axes.examples) if axes.examples in geometry.kept else None
                return Axes(
                    None if examples is None else to_weight[examples],
                    to_weight[geometry.kept.index(axes.units)],
                )
        return Axes() if of_relations or not geometry.kept else Axes(None, to_weight[len(geometry.kept) - 1])

    def _of_params(self) -> tuple[Axes, ...]:
        analysis = self.model.analysis
        graph = analysis.split.hoisted
        labels: dict[int, Array] = {}
        for site in analysis.sites:
            axes, shape = self.weights[site.name], graph.avals[site.weight].shape
            if axes.units is None:
                found = np.broadcast_to(np.int64(MANY), shape)
            else:
                found = _numbers(shape, axes.units, np.arange(int(np.prod(shape))).reshape(shape))
            labels[site.weight] = found if site.weight not in labels else join(labels[site.weight], found)
        for operation in reversed(graph.operations):
            results = [labels.get(v) for v in operation.outputs]
            if all(r is None for r in results):
                continue
            for k, v in enumerate(operation.inputs):
                if isinstance(v, Constant) or not graph.avals[v].differentiable:
                    continue
                found = through_operation(graph, operation, k, results)
                if found is not None:
                    labels[v] = found if v not in labels else join(labels[v], found)
        return tuple(
            Axes(None, _axis_along(labels[v])) if v in labels else Axes() for v in analysis.model.param_vars
        )


def _numbers(shape: tuple[int, ...], axis: int, position: Array) -> Array:
    """The index along an axis of the elements at flat positions."""
    found = np.unravel_index(np.maximum(position, 0), shape)[axis]
    return np.where(position >= 0, found, NONE)


def _axis_along(labels: Array) -> int | None:
    """The one axis along which labels change, or None."""
    if (labels == MANY).any() or not (labels != NONE).any():
        return None
    highest = np.where(labels == NONE, np.iinfo(np.int64).max, labels)
    moving = [
        axis
        for axis in range(labels.ndim)
        if (labels.max(axis) > highest.min(axis)).any()  # two different labels, neither of them NONE
    ]
    return moving[0] if len(moving) == 1 else None
