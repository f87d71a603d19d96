"""What hidden groups show during a step, measured: firing rates of spiking units, sizes of activities of others."""

from __future__ import annotations

import dataclasses
import posixpath
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from etcompile.analysis.analysis import Analysis
from etcompile.analysis.groups import HiddenGroup
from etcompile.frontend.jaxpr import Graph, needed_operations, variables
from etcompile.lowering.derivatives import LoweredModel

__all__ = ["Activity"]

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Activity:
    """The part of a step that makes what groups show, to be run beside it.

    Attributes
    ----------
    groups : tuple of str
        Names for people: the path of the group's state, or what the paths of several begin with.
    graph : Graph
        ``(params, states, inputs) -> (what the groups show, the new states)``.
    shows : tuple of tuple of int
        Per group the numbers of the graph's results that it shows.
    """

    groups: tuple[str, ...]
    graph: Graph
    shows: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: LoweredModel) -> Activity:
        """That of a compiled step. A group that shows nothing is measured by its states."""
        analysis = model.analysis
        step = analysis.model
        seen = [_shown(model, group) for group in analysis.groups]
        results = tuple(dict.fromkeys(v for shown in seen for v in shown))
        new = step.new_state_vars
        outputs = (*results, *new)
        needed = needed_operations(step.graph.operations, outputs)
        graph = dataclasses.replace(step.graph, operations=needed, outputs=outputs)
        names = [_name(analysis, group) for group in analysis.groups]
        return cls(tuple(names), graph, tuple(tuple(results.index(v) for v in shown) for shown in seen))

    def measure(self, leaves: Sequence[Array]) -> tuple[dict[str, Array], list[Array]]:
        """Of one step from the leaves of parameters, states and inputs: measures by group, ``[values shown, 2]``; new states.

        A measure is the mean of the absolute value over units and examples, and the share of values that are 0 or 1.
        """
        found = self.graph.evaluate(*leaves, known={})
        count = len({k for shown in self.shows for k in shown})
        measures = [_measure(v) for v in found[:count]]
        by_group = {
            name: jnp.stack([measures[k] for k in shown])
            for name, shown in zip(self.groups, self.shows, strict=True)
        }
        return by_group, found[count:]


def _measure(value: Array) -> Array:
    size = jnp.abs(value).astype(jnp.float32)
    return jnp.stack([jnp.mean(size), jnp.mean(((size == 0) | (size == 1)).astype(jnp.float32))])


def _shown(model: LoweredModel, group: HiddenGroup) -> list[int]:
    """Variables that others read of a group: made of its new states, or of the old ones where the model reads these."""
    seen = model.visible(group.name)
    shown = [v.variable for v in seen if v.of_new] or [v.variable for v in seen]
    return shown or [v for k in group.states for v in variables([model.analysis.model.new_state_vars[k]])]


def _name(analysis: Analysis, group: HiddenGroup) -> str:
    paths = [analysis.model.states[k].path for k in group.states]
    if len(paths) == 1:
        return paths[0]
    within = posixpath.commonpath([path.replace(".", "/") for path in paths])
    return within.replace("/", ".") or "+".join(paths)
