"""Hidden states into groups, and the results of sites related to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from etcompile.analysis.components import connected_components
from etcompile.analysis.cuts import find_cuts
from etcompile.analysis.dependence import Dependence
from etcompile.analysis.fan_out import FannedOut, find_fan_out
from etcompile.analysis.groups import HiddenGroup, Link, align, consistent
from etcompile.analysis.hidden import StateRole
from etcompile.analysis.index_rules import NONE
from etcompile.analysis.influence import Influence, influence_on
from etcompile.analysis.large_units import LargeUnits, find_large_units, of_weights
from etcompile.analysis.relations import Relation, relate
from etcompile.analysis.shared_states import SharedLink, find_shared, with_shared
from etcompile.analysis.sites import Site, SplitStep
from etcompile.analysis.unfollowed import Unfollowed
from etcompile.frontend.joined_axes import MOST_JOINED
from etcompile.frontend.loops import Use
from etcompile.frontend.step_model import StepModel
from etcompile.ir.header import Cut
from etcompile.paths import natural_key

__all__ = ["Grouped", "find_groups"]

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Grouped:
    """What was found.

    Attributes
    ----------
    found : mapping of int to Influence
        Per hidden state the influence on it.
    groups : tuple of HiddenGroup
    relations : tuple of Relation
    cuts : tuple of Cut
    cut_at : tuple of Use
        The uses that the first cuts are about.
    joined : sequence of (int, int)
        Pairs of states of which one reaches the other, position by position or unit by unit.
    """

    found: Mapping[int, Influence]
    groups: tuple[HiddenGroup, ...]
    relations: tuple[Relation, ...]
    cuts: tuple[Cut, ...]
    cut_at: tuple[Use, ...]
    joined: Sequence[tuple[int, int]]


def find_groups(
    model: StepModel,
    split: SplitStep,
    dep: Dependence,
    roles: Sequence[StateRole],
    unfollowed: Sequence[Unfollowed],
) -> Grouped:
    """Groups position by position; where these are cut, of units of many elements if less is cut then."""
    hidden = tuple(k for k, role in enumerate(roles) if role.hidden)
    walk = _Walks(model, split, dep, hidden)

    def grouped(found: Mapping[int, Influence], large: Sequence[LargeUnits]) -> Grouped:
        links = _links(model, found, hidden)
        single = tuple(k for k in hidden if not any(k in units.units for units in large))
        shared = find_shared(model, split, dep, single, found)
        groups, misplaced, unfit = _find_groups(model, hidden, links, shared, large)
        while unfit:
            shared = [link for link in shared if link not in unfit]
            groups, misplaced, unfit = _find_groups(model, hidden, links, shared, large)
        fanned = find_fan_out(model, split, [g for g in groups if not g.pushed], found)
        relations, misfits = _relations(split, groups, found, fanned, large)
        cuts, cut_at = find_cuts(
            model, split.body, dep, roles, groups, found, fanned, misplaced, misfits, unfollowed
        )
        joined = [(link.origin, link.target) for link in (*links, *shared)]
        return Grouped(found, tuple(groups), tuple(relations), cuts, cut_at, joined)

    parts = grouped({k: walk(k) for k in hidden}, ())
    large: list[LargeUnits] = []
    for members in _cut_otherwise(split, parts, hidden):
        if any(s in units.units for units in large for s in members):
            continue
        for units in _larger(walk, parts, members):
            trial = grouped({**parts.found, **units.influences}, [*large, units])
            if _lost(trial) <= _lost(parts) and _amount(trial) < _amount(parts):
                parts = trial
                large.append(units)
                break
    return parts


def _lost(parts: Grouped) -> set[str]:
    """Parameters and states that lose credit."""
    return {path for cut in parts.cuts for path in cut.origins}


def _amount(parts: Grouped) -> tuple[int, int]:
    """How much is lost, and in how many places: layers below are cut at their weights in any case."""
    return len(_lost(parts)), len(parts.cuts)


def _cut_otherwise(split: SplitStep, parts: Grouped, hidden: Sequence[int]) -> list[list[int]]:
    """Components of states of which one is cut elsewhere than at weights."""
    at_weights = {site.operation for site in split.sites}
    places = [*parts.cut_at, *(None for _ in parts.cuts[len(parts.cut_at) :])]
    named = {
        cut.group
        for cut, use in zip(parts.cuts, places, strict=True)
        if use is None or use[0] not in at_weights
    }
    cut = {s for group in parts.groups if group.name in named for s in group.states}
    found = [sorted(members) for members in connected_components(hidden, parts.joined)]
    return [members for members in found if not cut.isdisjoint(members)]


def _larger(walk: _Walks, parts: Grouped, members: Sequence[int]) -> Iterator[LargeUnits]:
    """Ways to see these states, and those that reach them then, as units of many elements."""
    if not any(n > MOST_JOINED for s in members for n in walk.model.states[s].aval.shape):
        return
    cut = of_weights(walk.split)
    wider: set[int] = set()
    for units in find_large_units(
        walk.model, walk.split, members, lambda s, seed: walk(s, seed, cut), walk.links
    ):
        joined = [(link.origin, link.target) for link in walk.links({**parts.found, **units.influences})]
        whole = next(c for c in connected_components(walk.hidden, joined) if members[0] in c)
        if set(whole) <= set(members):
            yield units
        else:
            wider.update(whole)
    if wider:
        yield from _larger(walk, parts, sorted({*members, *wider}))


class _Walks:
    """Walks backwards from new hidden states."""

    def __init__(self, model: StepModel, split: SplitStep, dep: Dependence, hidden: Sequence[int]) -> None:
        mask = (1 << len(model.params)) - 1
        for k in hidden:
            mask |= 1 << (len(model.params) + k)
        self.model, self.split, self.hidden = model, split, hidden
        self._active = [bool(d & mask) for d in dep.derivative]
        states, new_states = model.state_vars, model.new_state_vars
        self._keep = (
            {states[k] for k in hidden} | {new_states[k] for k in hidden} | {s.y for s in split.sites}
        )

    def __call__(
        self, k: int, seed: Array | None = None, cut: Mapping[Use, Array] | None = None
    ) -> Influence:
        """Influence on state k, its elements numbered in their order or by ``seed``; ``cut`` as of :func:`influence_on`."""
        aval = self.model.states[k].aval
        seed = np.arange(aval.size).reshape(aval.shape) if seed is None else seed
        new = self.model.new_state_vars[k]
        return influence_on(
            self.split.body, {new: seed}, self._active, self._keep, self.split.frozen, cut, aval.size
        )

    def links(self, found: Mapping[int, Influence]) -> list[Link]:
        return _links(self.model, found, tuple(found))


def _links(model: StepModel, found: Mapping[int, Influence], hidden: Sequence[int]) -> list[Link]:
    links = []
    states, new_states = model.state_vars, model.new_state_vars
    state_of = {
        v: k for variables in (states, new_states) for k in hidden if isinstance(v := variables[k], int)
    }
    for k in found:
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
    model: StepModel,
    hidden: Sequence[int],
    links: Sequence[Link],
    shared: Sequence[SharedLink],
    large: Sequence[LargeUnits],
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
        units = next((units for units in large if members[0] in units.units), None)
        if units is not None:
            groups.append(units.group(f"g{len(groups)}", model))
            continue
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
    split: SplitStep,
    groups: Sequence[HiddenGroup],
    found: Mapping[int, Influence],
    fanned: FannedOut,
    large: Sequence[LargeUnits],
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
            if group.pushed:
                units = next(units for units in large if group.states[0] in units.units)
                for r in units.relations(site, group) or ():
                    relations.append(dataclasses.replace(r, name=f"r{len(relations)}"))
                continue
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
