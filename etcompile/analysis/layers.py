"""Layers: hidden states that feed each other from step to step, by any path, recurrent weights included.

A layer is a strongly connected component of hidden groups under "the old states of one reach the new states of the
other". All hidden states together are the network, a layer for rules that follow every path. An *effect* joins a site
to a layer whose new states its y reaches without passing the new states of another layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from etcompile.analysis.components import strongly_connected_components
from etcompile.analysis.dependence import NO_DERIVATIVE, NO_REVERSE, Dependence
from etcompile.analysis.groups import HiddenGroup
from etcompile.analysis.sites import SplitStep
from etcompile.frontend.jaxpr import Constant, short_dtype
from etcompile.frontend.step_model import StepModel
from etcompile.ir import header as ir

__all__ = ["NETWORK", "Layer", "find_effects", "find_layers"]

#: Name of the layer of all hidden states.
NETWORK = "network"


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """What programs say of a layer, and its hidden states by number."""

    record: ir.Layer
    states: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.record.name


def find_layers(model: StepModel, groups: Sequence[HiddenGroup], dep: Dependence) -> tuple[Layer, ...]:
    """The layers in the order of their first group, and last the network."""
    first = len(model.params)
    reaches = [0] * len(groups)
    for k, group in enumerate(groups):
        for s in group.states:
            new = model.new_state_vars[s]
            if not isinstance(new, Constant):
                reaches[k] |= dep.derivative[new]
    order = list(range(len(groups)))
    edges = [
        (j, k) for k in order for j in order if any(reaches[k] >> (first + s) & 1 for s in groups[j].states)
    ]
    components = strongly_connected_components(order, edges)
    layers = [_layer(model, f"l{n}", [groups[k] for k in found]) for n, found in enumerate(components)]
    return (*layers, _layer(model, NETWORK, groups))


def _layer(model: StepModel, name: str, groups: Sequence[HiddenGroup]) -> Layer:
    states = tuple(s for g in groups for s in g.states)
    avals = [model.states[s].aval for s in states]
    dtype = short_dtype(jnp.result_type(*[a.dtype for a in avals]))
    return Layer(ir.Layer(name, tuple(g.name for g in groups), sum(a.size for a in avals), dtype), states)


def find_effects(model: StepModel, split: SplitStep, layers: Sequence[Layer]) -> tuple[ir.Effect, ...]:
    """Which sites reach which layers."""
    body = split.body
    all_new = {model.new_state_vars[s] for s in layers[-1].states}
    effects = []
    for layer in layers:
        own = {model.new_state_vars[s] for s in layer.states}
        others = all_new - own
        for site in split.sites:
            reached = {site.y}
            for operation in body.operations:
                if operation.name not in NO_DERIVATIVE | NO_REVERSE and any(
                    v in reached and v not in others for v in operation.inputs if not isinstance(v, Constant)
                ):
                    reached |= {v for v in operation.outputs if body.avals[v].differentiable}
            if reached & own:
                effects.append(ir.Effect(f"j{len(effects)}", site.name, layer.name))
    return tuple(effects)
