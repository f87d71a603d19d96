"""The whole analysis of a step model: hidden states, groups, sites, relations and cuts. A pure function of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from etcompile.analysis.constants import ConstantResponses, find_constant_responses
from etcompile.analysis.dependence import Dependence, dependence
from etcompile.analysis.groups import HiddenGroup, Link, align, consistent
from etcompile.analysis.hidden import StateRole, require_hidden, state_roles
from etcompile.analysis.index_rules import NONE
from etcompile.analysis.influence import Influence, influence_on
from etcompile.analysis.layers import Effect, Layer, find_effects, find_layers
from etcompile.analysis.loop_weights import take_weights_out
from etcompile.analysis.loops import ROUNDS_LIMIT, located
from etcompile.analysis.relations import Relation, relate
from etcompile.analysis.silence import find_silent
from etcompile.analysis.sites import (
    Site,
    SplitStep,
    refuse_parameters_in_while,
    separate_opaque_uses,
    split_step,
)
from etcompile.analysis.underivable import refuse_without_derivative
from etcompile.analysis.unfollowed import Unfollowed, find_unfollowed, with_reasons
from etcompile.errors import ModelError
from etcompile.frontend.jaxpr import Graph
from etcompile.frontend.loops import Use
from etcompile.frontend.step_model import StepModel
from etcompile.graph import connected_components
from etcompile.ir.header import Cut
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
    uses_cut : mapping of int to mapping of Use to array
        Per hidden state, the operand uses where its local derivative stops.
    dependence : Dependence
        Which parameters and states every variable depends on.
    """

    model: StepModel
    roles: tuple[StateRole, ...]
    groups: tuple[HiddenGroup, ...]
    split: SplitStep
    relations: tuple[Relation, ...]
    cuts: tuple[Cut, ...]
    uses_cut: Mapping[int, Mapping[Use, Array]]
    dependence: Dependence

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.split.sites

    @property
    def exact(self) -> bool:
        """Whether nothing is cut: the gradient then equals backpropagation through time."""
        return not self.cuts

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Layers of hidden states, the network last."""
        return find_layers(self)

    @cached_property
    def effects(self) -> tuple[Effect, ...]:
        """Which sites reach which layers."""
        return find_effects(self, self.layers)

    @cached_property
    def constants(self) -> Mapping[str, ConstantResponses]:
        """Relations whose response is constant in time."""
        return find_constant_responses(self)

    def layer(self, name: str) -> Layer:
        return next(x for x in self.layers if x.name == name)

    def effect(self, name: str) -> Effect:
        return next(x for x in self.effects if x.name == name)

    def group(self, name: str) -> HiddenGroup:
        return next(g for g in self.groups if g.name == name)

    def new_variables(self, group: HiddenGroup) -> set[int]:
        """Variables of the body that hold the group's new states."""
        return {self.model.new_state_vars[s] for s in group.states}

    @cached_property
    def silent(self) -> Mapping[str, str]:
        """Parameters and hidden states without a differentiable path to any output, and what ends it."""
        return find_silent(self.model, self.dependence, self.roles)

    def site(self, name: str) -> Site:
        return next(s for s in self.sites if s.name == name)

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
    shapes = {k: model.states[k].aval.shape for k in hidden}
    components = connected_components(hidden, [(link.origin, link.target) for link in links])
    components = sorted(components, key=lambda found: min(natural_key(model.states[s].path) for s in found))
    groups, misplaced = [], []
    for members in components:
        for maps in align(members, shapes, [x for x in links if x.origin in members and x.target in members]):
            group, moved = _group(f"g{len(groups)}", maps, shapes, links)
            groups.append(group)
            misplaced += moved
    relations, misfits = _relations(split, groups, found)
    cuts = _cuts(model, split.body, dep, roles, groups, found, misplaced, misfits, unfollowed)
    uses_cut = {k: influence.cuts for k, influence in found.items()}
    return Analysis(model, roles, tuple(groups), split, tuple(relations), cuts, uses_cut, dep)


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
    keep = (
        {model.state_vars[k] for k in hidden}
        | {model.new_state_vars[k] for k in hidden}
        | {s.y for s in split.sites}
    )
    result = {}
    for k in hidden:
        aval = model.states[k].aval
        seed = np.arange(aval.size).reshape(aval.shape)
        result[k] = influence_on(split.body, {model.new_state_vars[k]: seed}, active, keep, split.frozen)
    return result


def _links(model: StepModel, found: Mapping[int, Influence], hidden: Sequence[int]) -> list[Link]:
    links = []
    for k in hidden:
        for j in hidden:
            old = found[k].positions.get(model.state_vars[j])
            if old is not None and (old != NONE).any():
                links.append(Link(j, k, old, within_step=False))
            new = found[k].positions.get(model.new_state_vars[j]) if j != k else None
            if new is not None and (new != NONE).any():
                links.append(Link(j, k, new, within_step=True))
    return links


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
    split: SplitStep, groups: Sequence[HiddenGroup], found: Mapping[int, Influence]
) -> tuple[list[Relation], list[tuple[Site, HiddenGroup]]]:
    relations, misfits = [], []
    for site in split.sites:
        if not site.does.traced:
            continue
        for group in groups:
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


# ----------------------------------------------------------------------------------------------------------------
# cuts in words

_WEIGHTS = {"dot_general", "conv_general_dilated"}
_SHARED = {"broadcast_in_dim", "reduce_sum", "reduce_max", "cumsum", "sort", "reduce_window_sum"}


def _cuts(
    model: StepModel,
    body: Graph,
    dep: Dependence,
    roles: Sequence[StateRole],
    groups: Sequence[HiddenGroup],
    found: Mapping[int, Influence],
    misplaced: Sequence[Link],
    misfits: Sequence[tuple[Site, HiddenGroup]],
    unfollowed: Sequence[Unfollowed],
) -> tuple[Cut, ...]:
    n = len(model.params)
    cuts: list[Cut] = []
    names = {s: g.name for g in groups for s in g.states}

    def add(**fields: Any) -> None:
        cuts.append(Cut(f"c{len(cuts)}", **fields))

    for group in groups:
        merged: dict[Use, Array] = {}
        for s in group.states:
            for use, mask in found[s].cuts.items():
                merged[use] = mask | merged.get(use, False)
        for use, mask in sorted(merged.items(), key=lambda item: item[0]):
            operation, _, bits = located(body, dep, use)
            states = [j for j in names if bits >> (n + j) & 1]
            params = [leaf.path for j, leaf in enumerate(model.params) if bits >> j & 1]
            share = float(mask.mean())
            add(
                group=group.name,
                primitive=operation.name,
                source=operation.source,
                origins=tuple([model.states[j].path for j in states] + params),
                meaning=_meaning(operation.name, group.name, {names[j] for j in states}, params),
                part="all" if share == 1.0 else f"{100 * share:.0f} % of {mask.size} elements",
            )
    for link in misplaced:
        add(
            group=names[link.target],
            primitive="positions",
            source=_computed_at(body, model.new_state_vars[link.target]),
            origins=(model.states[link.origin].path,),
            meaning=f"{model.states[link.origin].path} moves to another position of {model.states[link.target].path}: "
            "its memory ends after one step",
        )
    for site, group in misfits:
        add(
            group=group.name,
            primitive=site.record.primitive,
            source=site.record.source,
            origins=site.params,
            meaning="part of the weight's effect reaches another position than the group's: it counts within the step only",
        )
    for role in roles:
        if role.excluded:
            add(
                group="",
                primitive="exclude",
                source="?",
                origins=(role.path,),
                meaning="left out by exclude=: credit through this state ends after one step",
            )
    for loop in unfollowed:
        add(
            group="",
            primitive=loop.primitive,
            source=loop.source,
            origins=tuple(model.states[k].path for k in loop.states),
            meaning="a while loop has no reverse derivative: whatever the rule, no credit passes it; "
            "a loop of fixed length (lax.scan, lax.fori_loop) is followed",
        )
    return tuple(cuts)


def _meaning(primitive: str, group: str, origin_groups: set[str], params: Sequence[str]) -> str:
    """What a cut loses, in words: for the group's own states, for those of other groups, and for parameters."""
    weights = primitive in _WEIGHTS
    how = (
        "weights"
        if weights
        else f"a loop whose rounds reach different positions, or go on differing after {ROUNDS_LIMIT} of them"
        if primitive == "scan"
        else "a value shared by several units"
        if primitive in _SHARED
        else "an operation over several units"
    )
    losses = []
    if group in origin_groups:
        own = "recurrent weights" if weights else f"recurrence through {how}"
        losses.append(
            f"{own}: credit through them ends after one step"
            if weights
            else f"{own}: its credit ends after one step"
        )
    others = sorted(origin_groups - {group}, key=natural_key)
    if others:
        losses.append(
            f"{', '.join(others)} reaches {group} through {how}: within the step only, no memory of it in {group}"
        )
    if params:
        losses.append(
            f"{', '.join(params)} reaches {group} through {how}: this part of its credit counts within the step only"
        )
    return "; ".join(losses)


def _computed_at(body: Graph, variable: Any) -> str:
    for operation in body.operations:
        if variable in operation.outputs:
            return operation.source
    return "?"
