"""The whole analysis of a step model: hidden states, groups, sites, relations and cuts. A pure function of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from etcompile.analysis.components import connected_components
from etcompile.analysis.constants import ConstantResponses, find_constant_responses
from etcompile.analysis.cuts import find_cuts
from etcompile.analysis.dependence import Dependence, dependence
from etcompile.analysis.fan_out import FannedOut, find_fan_out
from etcompile.analysis.groups import HiddenGroup, Link, align, consistent
from etcompile.analysis.hidden import StateRole, require_hidden, state_roles
from etcompile.analysis.index_rules import NONE
from etcompile.analysis.influence import Influence, influence_on
from etcompile.analysis.layers import Layer, find_effects, find_layers
from etcompile.analysis.loop_weights import take_weights_out
from etcompile.analysis.relations import Relation, relate
from etcompile.analysis.shared_states import SharedLink, find_shared, with_shared
from etcompile.analysis.silence import find_silent
from etcompile.analysis.sites import (
    Site,
    SplitStep,
    refuse_parameters_in_while,
    separate_opaque_uses,
    split_step,
)
from etcompile.analysis.underivable import refuse_without_derivative
from etcompile.analysis.unfollowed import find_unfollowed, with_reasons
from etcompile.errors import ModelError
from etcompile.frontend.loops import Use
from etcompile.frontend.step_model import StepModel
from etcompile.ir.header import Cut, Effect
from etcompile.paths import natural_key

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
    hidden = tuple(k for k, role in enumerate(roles) if role.hidden)
    found = _influences(model, split, dep, hidden)
    links = _links(model, found, hidden)
    shared = find_shared(model, split, dep, hidden, found)
    groups, misplaced, unfit = _find_groups(model, hidden, links, shared)
    while unfit:
        shared = [link for link in shared if link not in unfit]
        groups, misplaced, unfit = _find_groups(model, hidden, links, shared)
    fanned = find_fan_out(model, split, groups, found)
    relations, misfits = _relations(split, groups, found, fanned)
    cuts, cut_at = find_cuts(
        model, split.body, dep, roles, groups, found, fanned, misplaced, misfits, unfollowed
    )
    uses_cut = {k: influence.cuts for k, influence in found.items()}
    layers = find_layers(model, groups, dep)
    effects = find_effects(model, split, layers)
    constants = find_constant_responses(model, split, groups, relations, uses_cut, dep)
    return Analysis(
        model, roles, tuple(groups), split, tuple(relations), cuts, cut_at, uses_cut, dep, layers, effects, constants
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


def _influences(
    model: StepModel, split: SplitStep, dep: Dependence, hidden: Sequence[int]
) -> dict[int, Influence]:
    mask = (1 << len(model.params)) - 1
    for k in hidden:
        mask |= 1 << (len(model.params) + k)
    active = [bool(d & mask) for d in dep.derivative]
    states, new_states = model.state_vars, model.new_state_vars
    keep = {states[k] for k in hidden} | {new_states[k] for k in hidden} | {s.y for s in split.sites}
    result = {}
    for k in hidden:
        aval = model.states[k].aval
        seed = np.arange(aval.size).reshape(aval.shape)
        result[k] = influence_on(split.body, {new_states[k]: seed}, active, keep, split.frozen)
    return result


def _links(model: StepModel, found: Mapping[int, Influence], hidden: Sequence[int]) -> list[Link]:
    links = []
    states, new_states = model.state_vars, model.new_state_vars
    state_of = {
        v: k for variables in (states, new_states) for k in hidden if isinstance(v := variables[k], int)
    }
    for k in hidden:
        positions = found[k].positions
        for j in sorted({state_of[v] for v in positions if v in state_of}):
            old = positions.get(states[j])
            if old is not None and (old != NONE).any():
                links.append(Link(j, k, old, within_step=False))
            new = positions.get(new_states[j]) if j != k else None
            if new is not None and (new != NONE).any():
                links.append(Link(j, k, new, within_step=True))
    return links


def _find_groups(
    model: StepModel, hidden: Sequence[int], links: Sequence[Link], shared: Sequence[SharedLink]
) -> tuple[list[HiddenGroup], list[Link], list[SharedLink]]:
    """Groups of states that links join; links that move a state to other positions; and shared links that do not fit."""
    shapes = {k: model.states[k].aval.shape for k in hidden}
    components = connected_components(hidden, [(link.origin, link.target) for link in (*links, *shared)])
    components = sorted(components, key=lambda found: min(natural_key(model.states[s].path) for s in found))
    groups: list[HiddenGroup] = []
    misplaced: list[Link] = []
    unfit: list[SharedLink] = []
    into: dict[int, list[Link]] = {k: [] for k in hidden}  # links by target, in their order
    for link in links:
        into[link.target].append(link)
    for members in components:
        here = [link for k in sorted(members) for link in into[k]]  # by target, as all links are
        places = [link.place for link in shared if link.target in members]
        for maps in align(members, shapes, [x for x in here if x.origin in members], places):
            group, moved = _group(f"g{len(groups)}", maps, shapes, here)
            if places:
                group, misfits = with_shared(group, shared, here)
                unfit += misfits
            groups.append(group)
            misplaced += moved
    return groups, misplaced, unfit


def _group(
    name: str, maps: Mapping[int, Array | None], shapes: Mapping[int, tuple[int, ...]], links: Sequence[Link]
) -> tuple[HiddenGroup, list[Link]]:
    states = tuple(maps)
    root = next(s for s in sorted(states, key=lambda s: -int(np.prod(shapes[s]))) if maps[s] is None)
    size = int(np.prod(shapes[root]))
    elements = {s: np.arange(size) if m is None else m for s, m in maps.items()}
    pattern = [[False] * len(states) for _ in states]
    masks: dict[tuple[int, int], Array] = {}
    moved = []
    for link in links:
        inside = link.origin in maps and link.target in maps
        if not inside:
            if link.target in maps:
                moved.append(link)
            continue
        stays, moves = consistent(link, elements[link.origin], elements[link.target])
        if moves:
            moved.append(link)
        if link.within_step:
            continue
        k, j = states.index(link.target), states.index(link.origin)
        pattern[k][j] = bool(stays.any())
        reaches = link.positions.ravel()[np.maximum(elements[link.origin], 0)] != NONE
        if pattern[k][j] and (stays != (reaches & (elements[link.origin] >= 0))).any():
            masks[k, j] = stays.reshape(shapes[root])
    group = HiddenGroup(name, states, shapes[root], tuple(maps.values()), tuple(map(tuple, pattern)), masks)
    return group, moved


def _relations(
    split: SplitStep, groups: Sequence[HiddenGroup], found: Mapping[int, Influence], fanned: FannedOut
) -> tuple[list[Relation], list[tuple[Site, HiddenGroup]]]:
    relations: list[Relation] = []
    misfits: list[tuple[Site, HiddenGroup]] = []
    reaching: dict[int, dict[str, HiddenGroup]] = {}  # groups that a variable reaches, in their order
    for group in groups:
        for s in group.states:
            for v in found[s].positions:
                reaching.setdefault(v, {})[group.name] = group
    for site in split.sites:
        if not site.does.traced:
            continue
        single = reaching.get(site.y, {})
        for group in groups if fanned.relations else single.values():
            for r in fanned.relations.get((site.name, group.name), ()):
                relations.append(dataclasses.replace(r, name=f"r{len(relations)}"))
            if group.shared:
                if group.name in single and (site.name, group.name) not in fanned.relations:
                    misfits.append((site, group))
                continue
            influence = {
                k: found[s].positions[site.y]
                for k, s in enumerate(group.states)
                if site.y in found[s].positions
            }
            related = relate(f"r{len(relations)}", site.name, group, influence)
            if related is None:
                continue
            if related[0] is not None:
                relations.append(related[0])
            if related[1]:
                misfits.append((site, group))
    return relations, misfits
