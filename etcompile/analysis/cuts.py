"""Cuts in words: where credit ends, and what is lost there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from etcompile.analysis.dependence import Dependence
from etcompile.analysis.fan_out import FannedOut
from etcompile.analysis.groups import HiddenGroup, Link
from etcompile.analysis.hidden import StateRole
from etcompile.analysis.influence import Influence
from etcompile.analysis.loops import ROUNDS_LIMIT, located
from etcompile.analysis.sites import Site
from etcompile.analysis.unfollowed import Unfollowed
from etcompile.frontend.jaxpr import Graph
from etcompile.frontend.loops import Use
from etcompile.frontend.step_model import StepModel
from etcompile.ir.header import Cut
from etcompile.paths import natural_key

__all__ = ["find_cuts"]

Array = Any

_WEIGHTS = {"dot_general", "conv_general_dilated"}
_SHARED = {"broadcast_in_dim", "reduce_sum", "reduce_max", "cumsum", "sort", "reduce_window_sum"}


def find_cuts(
    model: StepModel,
    body: Graph,
    dep: Dependence,
    roles: Sequence[StateRole],
    groups: Sequence[HiddenGroup],
    found: Mapping[int, Influence],
    fanned: FannedOut,
    misplaced: Sequence[Link],
    misfits: Sequence[tuple[Site, HiddenGroup]],
    unfollowed: Sequence[Unfollowed],
) -> tuple[tuple[Cut, ...], tuple[Use, ...]]:
    """Where credit ends, group by group, and then for every rule; and the uses that the first of the cuts are about."""
    names = {s: g.name for g in groups for s in g.states}
    inside = [at for g in groups for at in _inside(model, body, dep, g, names, found, fanned)]
    cuts = itertools.chain(
        (fields for _, fields in inside),
        (_misplaced(model, body, names, link) for link in misplaced),
        (_misfit(site, group) for site, group in misfits),
        (_excluded(role) for role in roles if role.excluded),
        (_loop(model, loop) for loop in unfollowed),
    )
    return tuple(Cut(f"c{k}", **fields) for k, fields in enumerate(cuts)), tuple(use for use, _ in inside)


def _inside(
    model: StepModel,
    body: Graph,
    dep: Dependence,
    group: HiddenGroup,
    names: Mapping[int, str],
    found: Mapping[int, Influence],
    fanned: FannedOut,
) -> Iterator[tuple[Use, dict[str, Any]]]:
    """Where local derivatives of a group's states end."""
    merged: dict[Use, Array] = {}
    for s in group.states:
        for use, mask in found[s].cuts.items():
            merged[use] = mask | merged.get(use, False)
    forwards = fanned.cuts(group.name)
    shared = {(group.states[j], group.states[k]) for k, j in group.shared}
    for use in sorted({*merged, *forwards}):
        operation, _, bits = located(body, dep, use)
        ending = [s for s in group.states if use in found[s].cuts]
        states = [
            j
            for j in names
            if bits >> (len(model.params) + j) & 1 and any((j, s) not in shared for s in ending)
        ]
        reaching = [leaf.path for j, leaf in enumerate(model.params) if bits >> j & 1]
        mask, losing = forwards.get(use, (False, ()))
        lost = {*losing, *(fanned.still_lost(group.name, body, use, reaching) if use in merged else ())}
        params = [path for path in reaching if path in lost]
        if (fanned.relations or shared) and not (states or params):
            continue
        share = float(np.mean(mask | merged.get(use, False)))
        yield (
            use,
            dict(
                group=group.name,
                primitive=operation.name,
                source=operation.source,
                origins=tuple([model.states[j].path for j in states] + params),
                meaning=_meaning(operation.name, group.name, {names[j] for j in states}, params),
                part="all"
                if share == 1.0
                else f"{100 * share:.0f} % of {np.size(mask | merged.get(use, False))} elements",
            ),
        )


def _misplaced(model: StepModel, body: Graph, names: Mapping[int, str], link: Link) -> dict[str, Any]:
    origin, target = model.states[link.origin].path, model.states[link.target].path
    return dict(
        group=names[link.target],
        primitive="positions",
        source=_computed_at(body, model.new_state_vars[link.target]),
        origins=(origin,),
        meaning=f"{origin} moves to another position of {target}: its memory ends after one step",
    )


def _misfit(site: Site, group: HiddenGroup) -> dict[str, Any]:
    return dict(
        group=group.name,
        primitive=site.record.primitive,
        source=site.record.source,
        origins=site.params,
        meaning="part of the weight's effect reaches another position than the group's: it counts within the step only",
    )


def _excluded(role: StateRole) -> dict[str, Any]:
    return dict(
        group="",
        primitive="exclude",
        source="?",
        origins=(role.path,),
        meaning="left out by exclude=: credit through this state ends after one step",
    )


def _loop(model: StepModel, loop: Unfollowed) -> dict[str, Any]:
    return dict(
        group="",
        primitive=loop.primitive,
        source=loop.source,
        origins=tuple(model.states[k].path for k in loop.states),
        meaning="a while loop has no reverse derivative: whatever the rule, no credit passes it; "
        "a loop of fixed length (lax.scan, lax.fori_loop) is followed",
    )


def _meaning(primitive: str, group: str, origin_groups: set[str], params: Sequence[str]) -> str:
    """What a cut loses, in words: for the group's own states, for those of other groups, and for parameters."""
    weights = primitive in _WEIGHTS
    how = (
        "weights"
        if weights
        else f"a loop whose rounds reach different positions, or go on differing after {ROUNDS_LIMIT} of them"
        if primitive == "scan"
        else "a derivative of its own, over several units or not linear in what comes back"
        if primitive == "custom_vjp_call"
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
