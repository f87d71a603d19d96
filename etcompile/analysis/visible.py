"""What a hidden group shows to the rest of the network: the values that a readout or another layer reads of it.

A rule with a learning signal of its own (random feedback, target projection, a modulator) says what each *unit* should do:
spike more, or have a larger activity. That credit belongs to the value which others read, such as a spike, and reaches the
unit's hidden states through the unit's own derivative of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from etcompile.analysis.analysis import Analysis
from etcompile.analysis.groups import HiddenGroup
from etcompile.analysis.index_rules import NONE
from etcompile.analysis.influence import influence_on, spreads
from etcompile.frontend.jaxpr import Constant, Graph
from etcompile.frontend.loops import Use

__all__ = ["Visible", "visible_of"]

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Visible:
    """One value that a group shows.

    Attributes
    ----------
    variable : int
    position : array
        Flat position of the group for each element of the variable (-1: none).
    cuts : mapping of Use to array
        Uses on the way back to the group's states at which the local derivative stops.
    readers : tuple of int
        Numbers of the operations that spread the value.
    of_new : bool
        Whether it depends on the group's new states, and not on its old ones alone.
    """

    variable: int
    position: Array
    cuts: Mapping[Use, Array]
    readers: tuple[int, ...]
    of_new: bool


def visible_of(analysis: Analysis, group: HiddenGroup) -> tuple[Visible, ...]:
    """Values aligned with the group's positions that an operation spreads on its way to the outputs, or that are outputs."""
    body, frozen = analysis.split.body, analysis.split.frozen
    new = analysis.new_variables(group)
    own = new | {analysis.model.state_vars[s] for s in group.states}
    reached = _reached(body, own)
    active = [v in reached for v in range(len(body.avals))]
    found = []
    for variable, readers in _readers(analysis, new, reached).items():
        aval = body.avals[variable]
        seed = np.arange(aval.size).reshape(aval.shape)
        influence = influence_on(body, {variable: seed}, active, own, frozen)
        position, of_new = _positions(analysis, group, influence.positions, aval.size)
        if (position >= 0).any():
            where = position.reshape(aval.shape)
            found.append(Visible(variable, where, influence.cuts, tuple(readers), of_new))
    return tuple(found)


def _reached(body: Graph, start: set[int]) -> set[int]:
    """Variables that depend on `start` and have a derivative, and `start` itself."""
    reached = set(start)
    for operation in body.operations:
        if any(v in reached for v in operation.inputs):
            reached |= {v for v in operation.outputs if body.avals[v].differentiable}
    return reached


def _readers(analysis: Analysis, new: set[int], reached: set[int]) -> dict[int, list[int]]:
    """Outputs, and values that an operation on the way to one spreads, each with the numbers of such operations.

    What lies behind the group's new states is not on the way.
    """
    body, frozen = analysis.split.body, analysis.split.frozen
    live = {v for v in analysis.model.output_vars if not isinstance(v, Constant)}
    readers: dict[int, list[int]] = {v: [] for v in live if v in reached}
    on_the_way = []
    for number, operation in reversed(list(enumerate(body.operations))):
        if any(v in live and v not in new for v in operation.outputs):
            live |= {v for v in operation.inputs if not isinstance(v, Constant)}
            on_the_way.append((number, operation))
    for number, operation in reversed(on_the_way):
        for k, v in enumerate(operation.inputs):
            if v in reached and (number, k) not in frozen and spreads(body, operation, k):
                assert isinstance(v, int)
                readers.setdefault(v, []).append(number)
    return readers


def _positions(
    analysis: Analysis, group: HiddenGroup, influenced: Mapping[int, Array], size: int
) -> tuple[Array, bool]:
    """The position of the group at each element of a value, given which element each state reaches; whether new states do."""
    model, new, of_new = analysis.model, analysis.new_variables(group), False
    position = np.full(size, NONE, np.int64)
    for k, s in enumerate(group.states):
        own = group.elements(k).ravel()
        for v in (model.new_state_vars[s], model.state_vars[s]):
            if v in influenced:
                elements = np.where(own >= 0, influenced[v].ravel()[np.maximum(own, 0)], NONE)
                where = np.flatnonzero(elements >= 0)
                position[elements[where]] = where
                of_new |= v in new and where.size > 0
    return position, of_new
