"""Shared states: one element of a state is read by many elements of another, as a head's running maximum by its memory.

In the stabilised mLSTM, m' = max(f + m, i) stands in the gates of a whole matrix C. Each element of C reads one of m, so the
influence of a weight is exact with a row for m at every position of C, the same numbers at all positions that share an element:

    e_m[p] = D_mm[p] e_m[p] + f_m[p] x,    e_C[p] = D_CC[p] e_C[p] + D_Cm[p] e_m[p] + f_C[p] x

D_Cm is a derivative in forward mode, by ones at the old m. What a loss makes of m itself is counted at one of these positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from etcompile.analysis.dependence import Dependence
from etcompile.analysis.groups import HiddenGroup, Link
from etcompile.analysis.index_rules import NONE
from etcompile.analysis.influence import Influence
from etcompile.analysis.reads import Reads, reads_of
from etcompile.analysis.sites import SplitStep
from etcompile.frontend.jaxpr import Constant, Graph
from etcompile.frontend.loops import Use
from etcompile.frontend.step_model import StepModel

__all__ = ["SharedLink", "cuts_toward", "find_shared", "leading_to", "operands_of", "with_shared"]

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class SharedLink:
    """Local influence of an old state on a new one by which each element of ``target`` reads one of ``origin``.

    ``reads`` holds, for each flat element of the target, that of the origin.
    """

    origin: int
    target: int
    reads: Array

    @property
    def pair(self) -> tuple[int, int]:
        return self.origin, self.target

    def place(self, maps: Mapping[int, Array], waiting: Sequence[int]) -> tuple[int, Array] | None:
        """Positions of the one of the two states that has none yet, by those of the other."""
        if self.target in maps and self.origin in waiting:
            target = maps[self.target]
            return self.origin, np.where(target >= 0, self.reads[np.maximum(target, 0)], NONE)
        if self.origin in maps and self.target in waiting:
            return self.target, self._divided(maps[self.origin])
        return None

    def _divided(self, origin: Array) -> Array:
        """The elements of the target that read an element of the origin, in their order over its positions."""
        size = int(max(origin.max(), self.reads.max())) + 1
        there = np.flatnonzero(origin >= 0)
        positions = there[np.argsort(origin[there], kind="stable")]
        readers = np.argsort(self.reads, kind="stable")
        at, of = (np.bincount(v, minlength=size) for v in (origin[there], self.reads))
        rank = np.arange(positions.size) - np.repeat(np.cumsum(at) - at, at)
        element = origin[positions]
        place = np.minimum(
            (np.cumsum(of) - of)[element] + rank * of[element] // at[element], readers.size - 1
        )
        found = np.full(origin.shape, NONE, np.int64)
        found[positions] = np.where(of[element] > 0, readers[place], NONE)
        return found


def operands_of(body: Graph, use: Use) -> list[int]:
    """Variables at a use; of one inside of a loop all that the loop reads."""
    operation = body.operations[use[0]]
    operands = (operation.inputs[use[1]],) if len(use) == 2 else operation.inputs
    return [v for v in operands if not isinstance(v, Constant)]


def leading_to(body: Graph, variables: Iterable[Any]) -> set[int]:
    """Variables that others are made of, and these themselves."""
    found = {v for v in variables if not isinstance(v, Constant)}
    for operation in reversed(body.operations):
        if not found.isdisjoint(operation.outputs):
            found.update(v for v in operation.inputs if not isinstance(v, Constant))
    return found


def find_shared(
    model: StepModel,
    split: SplitStep,
    dep: Dependence,
    hidden: Sequence[int],
    found: Mapping[int, Influence],
) -> list[SharedLink]:
    """Links by which credit of a smaller old state is cut position by position, and kept if its elements may reach many."""
    readers = _readers(model, split, dep, hidden, found)
    if not readers:
        return []
    body, new = split.body, model.new_state_vars
    toward, links = leading_to(body, [new[k] for k in hidden]), []
    for j, larger in readers.items():
        aval = model.states[j].aval
        reads = reads_of(
            body, model.state_vars[j], np.arange(aval.size).reshape(aval.shape), toward, split.frozen
        )
        for k in larger:
            slots = reads.slots.get(new[k], ())
            if len(slots) == 1 and (slots[0] != NONE).all() and not cuts_toward(body, reads, [new[k]]):
                links.append(SharedLink(j, k, slots[0].ravel()))
    return links


def _readers(
    model: StepModel, split: SplitStep, dep: Dependence, hidden: Sequence[int], found: Mapping[int, Influence]
) -> dict[int, list[int]]:
    """The larger states on whose way an old state is cut, of which nothing is kept by single positions."""
    readers: dict[int, list[int]] = {}
    for k in hidden:
        bits = 0
        for use in found[k].cuts:
            for v in operands_of(split.body, use):
                bits |= dep.derivative[v]
        bits >>= len(model.params)
        for j in hidden if bits else ():
            if bits >> j & 1 and model.states[j].aval.size < model.states[k].aval.size:
                kept = found[k].positions.get(model.state_vars[j])
                if kept is None or (kept == NONE).all():
                    readers.setdefault(j, []).append(k)
    return readers


def cuts_toward(body: Graph, reads: Reads, variables: Iterable[Any]) -> dict[Use, Array]:
    """What reads have cut on the way to some variables."""
    if not reads.cuts:
        return {}
    toward = leading_to(body, variables)
    return {
        use: mask
        for use, mask in reads.cuts.items()
        if not toward.isdisjoint(body.operations[use[0]].outputs)
    }


def with_shared(
    group: HiddenGroup, shared: Sequence[SharedLink], links: Sequence[Link]
) -> tuple[HiddenGroup, list[SharedLink]]:
    """A group with its shared links; and those among them that do not fit its positions, which are to be left out.

    The elements of a shared state are at many positions each, with the same numbers. So what it feeds within positions has to
    be shared alike.
    """
    number = {s: n for n, s in enumerate(group.states)}
    inside = [link for link in shared if link.target in number and link.origin in number]
    misfits = [link for link in shared if (link.target in number) != (link.origin in number)]
    if not inside:
        return group, misfits
    for link in inside:
        origin, target = (group.elements(number[s]).ravel() for s in link.pair)
        if (target < 0).any() or (origin != link.reads[np.maximum(target, 0)]).any():
            misfits.append(link)
    for link in links:
        if link.origin in number and link.target in number and link.origin != link.target:
            origin, target = (group.elements(number[s]).ravel() for s in (link.origin, link.target))
            if not _alike(origin, target):
                return group, [*misfits, *inside]
    pattern = [list(row) for row in group.pattern]
    for link in inside:
        pattern[number[link.target]][number[link.origin]] = True
    counted = {}
    for n in number.values():
        elements = group.elements(n).ravel()
        first = np.zeros(elements.size, bool)
        first[np.unique(elements, return_index=True)[1]] = True
        if not first.all():
            counted[n] = (first & (elements >= 0)).reshape(group.shape)
    pairs = frozenset((number[link.target], number[link.origin]) for link in inside)
    made = dataclasses.replace(group, pattern=tuple(map(tuple, pattern)), shared=pairs, counted=counted)
    return made, misfits


def _alike(first: Array, second: Array) -> bool:
    """Whether two states divide the positions in the same way."""
    both = np.unique(np.stack([first, second]), axis=1).shape[1]
    return both == np.unique(first).size == np.unique(second).size
