"""Layers: hidden states that feed each other from step to step, by any path, recurrent weights included.

A layer is a strongly connected component of hidden groups under "the old states of one reach the new states of the
other". All hidden states together are the network, a layer for rules that follow every path. An *effect* joins a site
to a layer whose new states its y reaches without passing the new states of another layer.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from etcompile.analysis.dependence import NO_DERIVATIVE, NO_REVERSE
from etcompile.frontend.jaxpr import Constant
from etcompile.graph import strongly_connected_components

if TYPE_CHECKING:
    from etcompile.analysis.analysis import Analysis

__all__ = ["NETWORK", "Effect", "Layer", "find_effects", "find_layers"]

#: Name of the layer of all hidden states.
NETWORK = "network"


@dataclasses.dataclass(frozen=True)
class Layer:
    """Hidden states by number, and the groups that they form."""

    name: str
    states: tuple[int, ...]
    groups: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Effect:
    """A site whose y reaches the new states of a layer."""

    name: str
    site: str
    layer: str


def find_layers(analysis: Analysis) -> tuple[Layer, ...]:
    """The layers in the order of their first group, and last the network."""
    first = len(analysis.model.params)
    reaches = {g.name: 0 for g in analysis.groups}
    for group in analysis.groups:
        for s in group.states:
            new = analysis.model.new_state_vars[s]
            if not isinstance(new, Constant):
                reaches[group.name] |= analysis.dependence.derivative[new]
    order = list(range(len(analysis.groups)))
    edges = [
        (j, k)
        for k in order
        for j in order
        if any(reaches[analysis.groups[k].name] >> (first + s) & 1 for s in analysis.groups[j].states)
    ]
    layers = []
    for members in strongly_connected_components(order, edges):
        groups = [analysis.groups[k] for k in members]
        states = tuple(s for g in groups for s in g.states)
        layers.append(Layer(f"l{len(layers)}", states, tuple(g.name for g in groups)))
    everything = tuple(s for g in analysis.groups for s in g.states)
    return (*layers, Layer(NETWORK, everything, tuple(g.name for g in analysis.groups)))


def find_effects(analysis: Analysis, layers: tuple[Layer, ...]) -> tuple[Effect, ...]:
    body, model = analysis.split.body, analysis.model
    all_new = {model.new_state_vars[s] for g in analysis.groups for s in g.states}
    effects = []
    for layer in layers:
        own = {model.new_state_vars[s] for s in layer.states}
        others = all_new - own
        for site in analysis.sites:
            reached = {site.y}
            for operation in body.operations:
                if operation.name not in NO_DERIVATIVE | NO_REVERSE and any(
                    v in reached and v not in others for v in operation.inputs if not isinstance(v, Constant)
                ):
                    reached |= {v for v in operation.outputs if body.avals[v].differentiable}
            if reached & own:
                effects.append(Effect(f"j{len(effects)}", site.name, layer.name))
    return tuple(effects)
