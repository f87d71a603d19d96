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
from etcompile.frontend.jaxpr import Constant
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
    body, model = analysis.split.body, analysis.model
    new = analysis.new_variables(group)
    old = {model.state_vars[s] for s in group.states}
    outputs = {v for v in model.output_vars if not isinstance(v, Constant)}
    live = set(outputs)
    for operation in reversed(body.operations):
        if any(v in live and v not in new for v in operation.outputs):
            live |= {v for v in operation.inputs if not isinstance(v, Constant)}
    reached = new | old
    for operation in body.operations:
        if any(v in reached for v in operation.inputs if not isinstance(v, Constant)):
            reached |= {v for v in operation.outputs if body.avals[v].differentiable}
    frozen = analysis.split.frozen
    readers: dict[int, list[int]] = {v: [] for v in outputs if v in reached}
    for number, operation in enumerate(body.operations):
        if not any(v in live and v not in new for v in operation.outputs):
            continue
        for k, v in enumerate(operation.inputs):
            if not isinstance(v, Constant) and v in reached and v in live and (number, k) not in frozen:
                if spreads(body, operation, k):
                    readers.setdefault(v, []).append(number)
    found = []
    for variable, numbers in readers.items():
        aval = body.avals[variable]
        seed = np.arange(aval.size).reshape(aval.shape)
        active = [v in reached for v in range(len(body.avals))]
        influence = influence_on(body, {variable: seed}, active, new | old, frozen)
        position = np.full(aval.size, NONE, np.int64)
        of_new = False
        for k, s in enumerate(group.states):
            for v in (model.new_state_vars[s], model.state_vars[s]):
                if v in influence.positions:
                    elements = influence.positions[v].ravel()[np.maximum(group.elements(k), 0)].ravel()
                    elements = np.where(group.elements(k).ravel() >= 0, elements, NONE)
                    where = np.flatnonzero(elements >= 0)
                    position[elements[where]] = where
                    of_new |= v in new and where.size > 0
        if (position >= 0).any():
            position = position.reshape(aval.shape)
            found.append(Visible(variable, position, influence.cuts, tuple(numbers), of_new))
    return tuple(found)
