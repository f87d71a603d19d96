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
    bits = [sum(1 << (first + s) for s in group.states) for group in groups]
    edges = [(j, k) for k in order for j in order if reaches[k] & bits[j]]
    components = strongly_connected_components(order, edges)
    layers = [_layer(model, f"l{n}", [groups[k] for k in found]) for n, found in enumerate(components)]
    return (*layers, _layer(model, NETWORK, groups))


def _layer(model: StepModel, name: str, groups: Sequence[HiddenGroup]) -> Layer:
    states = tuple(s for g in groups for s in g.states)
    avals = [model.states[s].aval for s in states]
    dtype = short_dtype(jnp.result_type(*[a.dtype for a in avals]))
    return Layer(ir.Layer(name, tuple(g.name for g in groups), sum(a.size for a in avals), dtype), states)


def find_effects(model: StepModel, split: SplitStep, layers: Sequence[Layer]) -> tuple[ir.Effect, ...]:
    """Which sites reach which layers: those whose y meets a new state of the layer before one of another layer.

    One pass for all sites, a bit for each.
    """
    body, new_states = split.body, model.new_state_vars
    all_new = {new_states[s] for s in layers[-1].states}
    reached: dict[int, int] = {}
    for bit, site in enumerate(split.sites):
        reached[site.y] = reached.get(site.y, 0) | 1 << bit
    for operation in body.operations:
        if operation.name in NO_DERIVATIVE | NO_REVERSE:
            continue
        found = 0
        for v in operation.inputs:
            if not isinstance(v, Constant) and v not in all_new:
                found |= reached.get(v, 0)
        if found:
            for v in operation.outputs:
                if body.avals[v].differentiable:
                    reached[v] = reached.get(v, 0) | found
    # A layer's own new states lead on to others of it, but the layer was reached before.
    effects = []
    for layer in layers:
        bits = 0
        for s in layer.states:
            bits |= reached.get(new_states[s], 0)
        for bit, site in enumerate(split.sites):
            if bits >> bit & 1:
                effects.append(ir.Effect(f"j{len(effects)}", site.name, layer.name))
    return tuple(effects)
