"""The whole analysis of a step model: hidden states, groups, sites, relations and cuts. A pure function of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from etcompile.analysis.constants import ConstantResponses, find_constant_responses
from etcompile.analysis.dependence import Dependence, dependence
from etcompile.analysis.grouping import find_groups
from etcompile.analysis.groups import HiddenGroup
from etcompile.analysis.hidden import StateRole, require_hidden, state_roles
from etcompile.analysis.layers import Layer, find_effects, find_layers
from etcompile.analysis.loop_weights import take_weights_out
from etcompile.analysis.relations import Relation
from etcompile.analysis.silence import find_silent
from etcompile.analysis.sites import (
    Site,
    SplitStep,
    refuse_parameters_in_while,
    separate_opaque_uses,
    split_step,
)
from etcompile.analysis.steep import may_be_steep
from etcompile.analysis.underivable import refuse_without_derivative
from etcompile.analysis.unfollowed import find_unfollowed, with_reasons
from etcompile.errors import ModelError
from etcompile.frontend.loops import Use
from etcompile.frontend.step_model import StepModel
from etcompile.ir.header import Cut, Effect

__all__ = ["Analysis", "analyse"]

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """Everything that the compiler knows about one step.

    Attributes
    ----------
    model : StepModel
    roles : tuple of StateRole
        One per state of the model.
    groups : tuple of HiddenGroup
    split : SplitStep
    relations : tuple of Relation
    cuts : tuple of Cut
    cut_at : tuple of Use
        The uses that the first cuts are about; the cuts behind them are at no use.
    uses_cut : mapping of int to mapping of Use to array
        Per hidden state, the operand uses where its local derivative stops.
    dependence : Dependence
        Which parameters and states every variable depends on.
    layers : tuple of Layer
        Layers of hidden states, the network last.
    effects : tuple of Effect
        Which sites reach which layers.
    constants : mapping of str to ConstantResponses
        Relations whose response is constant in time.
    """

    model: StepModel
    roles: tuple[StateRole, ...]
    groups: tuple[HiddenGroup, ...]
    split: SplitStep
    relations: tuple[Relation, ...]
    cuts: tuple[Cut, ...]
    cut_at: tuple[Use, ...]
    uses_cut: Mapping[int, Mapping[Use, Array]]
    dependence: Dependence
    layers: tuple[Layer, ...]
    effects: tuple[Effect, ...]
    constants: Mapping[str, ConstantResponses]

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.split.sites

    @property
    def exact(self) -> bool:
        """Whether nothing is cut: the gradient then equals backpropagation through time."""
        return not self.cuts

    @cached_property
    def _named(self) -> Mapping[type, Mapping[str, Any]]:
        parts = (self.layers, self.effects, self.groups, self.sites)
        kinds = (Layer, Effect, HiddenGroup, Site)
        return {kind: {part.name: part for part in found} for kind, found in zip(kinds, parts, strict=True)}

    def layer(self, name: str) -> Layer:
        return self._named[Layer][name]

    def effect(self, name: str) -> Effect:
        return self._named[Effect][name]

    def group(self, name: str) -> HiddenGroup:
        return self._named[HiddenGroup][name]

    def new_variables(self, group: HiddenGroup) -> set[int]:
        """Variables of the body that hold the group's new states."""
        return {self.model.new_state_vars[s] for s in group.states}

    @cached_property
    def silent(self) -> Mapping[str, str]:
        """Parameters and hidden states without a differentiable path to any output, and what ends it."""
        return find_silent(self.model, self.dependence, self.roles)

    @cached_property
    def steep(self) -> bool:
        """Whether derivatives by old hidden states may be infinite where the step is finite."""
        return may_be_steep(self.model, self.dependence, (s for g in self.groups for s in g.states))

    def site(self, name: str) -> Site:
        return self._named[Site][name]

    def state_name(self, k: int) -> str:
        return self.model.states[k].path


def analyse(model: StepModel, exclude: Sequence[str] = ()) -> Analysis:
    """Find hidden states, groups, sites, relations and cuts of a step."""
    model = take_weights_out(model, dependence(model.graph))
    model = separate_opaque_uses(model, dependence(model.graph))
    dep = dependence(model.graph)
    refuse_parameters_in_while(model, dep)
    refuse_without_derivative(model, dep)
    roles = state_roles(model, dep, exclude)
    unfollowed = find_unfollowed(model)
    roles = with_reasons(roles, unfollowed)
    require_trained(model, dep)
    require_hidden(model, roles)
    split = split_step(model, dep)
    parts = find_groups(model, split, dep, roles, unfollowed)
    groups, relations = parts.groups, parts.relations
    uses_cut = {k: influence.cuts for k, influence in parts.found.items()}
    layers = find_layers(model, groups, dep)
    effects = find_effects(model, split, layers)
    constants = find_constant_responses(model, split, groups, relations, uses_cut, dep)
    return Analysis(
        model, roles, groups, split, relations, parts.cuts, parts.cut_at, uses_cut, dep, layers, effects, constants
    )  # fmt: skip


def require_trained(model: StepModel, dep: Dependence) -> None:
    if not any(leaf.aval.differentiable for leaf in model.params):
        raise ModelError(
            f"{model.name} has no trainable parameter.",
            got=f"{len(model.params)} parameter arrays, none of them floating-point"
            if model.params
            else "no ParamState",
            expected="at least one floating-point ParamState (or leaf of params)",
            hint="keep weights in brainstate.ParamState; plain arrays are constants of the model.",
        )
