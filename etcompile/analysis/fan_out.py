"""Fan-out: one element of y reaches many positions of a group, while each position reads few elements of y.

The new state S = a S + k v^T reads one key and one value at each position, and a key reaches a whole row. Its influence is

    e[p, i] = D[p] e[p, i] + f[p] x[i],    f[p] = dh[p] / dy[m(p)]

with m the element of y that position p reads. Where a position reads several elements of one y, as of a fused projection,
these are put into classes of which each position reads one at most; each class is a relation of its own, and one derivative in
forward mode, by ones at its elements, gives all f of it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from typing import Any

import numpy as np

from etcompile.analysis.dependence import NO_DERIVATIVE, NO_REVERSE
from etcompile.analysis.groups import HiddenGroup
from etcompile.analysis.index_rules import ELEMENTWISE, NONE
from etcompile.analysis.influence import Influence
from etcompile.analysis.reads import REPEATING, Reads, Slots, compress, joins, reads_of
from etcompile.analysis.relations import FanOut, Relation, bounding_box
from etcompile.analysis.shared_states import cuts_toward, leading_to, operands_of
from etcompile.analysis.sites import Site, SplitStep
from etcompile.frontend.jaxpr import Constant, Graph
from etcompile.frontend.loops import Use
from etcompile.frontend.step_model import StepModel

__all__ = ["FannedOut", "find_fan_out"]

Array = Any

#: Classes of one y's elements beyond which it is cut instead: each has a trace of its own.
MOST_CLASSES = 16
#: Steps of the colouring that finds them.
_MOST_ROUNDS = 64


@dataclasses.dataclass(frozen=True, eq=False)
class FannedOut:
    """What was found.

    Attributes
    ----------
    relations : mapping of (site, group) to tuple of Relation
        Without names; they are about elements of y that have no part in the relation by single positions.
    losing : mapping of (site, group) to set of Use
        Where elements lose that do have part in it.
    reached : tuple of int
        Per variable of the body the sites whose y reaches it, as bits.
    sites : tuple of Site
    """

    relations: Mapping[tuple[str, str], tuple[Relation, ...]]
    losing: Mapping[tuple[str, str], AbstractSet[Use]]
    reached: Sequence[int]
    sites: Sequence[Site]

    def still_lost(self, group: str, graph: Graph, use: Use, params: Sequence[str]) -> list[str]:
        """Of parameters that reach a use which is cut for single positions those whose credit ends there all the same."""
        if not any(name == group for _, name in self.relations):
            return list(params)
        bits = 0
        for v in operands_of(graph, use):
            bits |= self.reached[v]
        lost = {
            path
            for k, site in enumerate(self.sites)
            if bits >> k & 1
            and ((site.name, group) not in self.relations or use in self.losing[site.name, group])
            for path in site.params
        }
        return [path for path in params if path in lost]

    def cuts(self, group: str) -> dict[Use, tuple[Array, tuple[str, ...]]]:
        """The uses on the way to a group that are cut, with the parameters that lose by it."""
        found: dict[Use, tuple[Array, tuple[str, ...]]] = {}
        for site in self.sites:
            for relation in self.relations.get((site.name, group), ())[:1]:
                assert relation.fan_out is not None
                for use, mask in relation.fan_out.cuts.items():
                    before, params = found.get(use, (False, ()))
                    found[use] = mask | before, tuple(dict.fromkeys((*params, *site.params)))
        return found


def find_fan_out(
    model: StepModel, split: SplitStep, groups: Sequence[HiddenGroup], found: Mapping[int, Influence]
) -> FannedOut:
    """Sites of which a group loses credit position by position, and keeps it if their elements may reach many."""
    search = _Search(model, split, groups, found)
    relations: dict[tuple[str, str], tuple[Relation, ...]] = {}
    losing: dict[tuple[str, str], AbstractSet[Use]] = {}
    for number, site in enumerate(split.sites):
        for group in groups if site.does.traced else ():
            if group.shared or search.loses(group, number):
                classes = search.classes(site, group)
                if classes:
                    relations[site.name, group.name] = classes
                    losing[site.name, group.name] = search.losing(site, group)
    return FannedOut(relations, losing, search.reached if relations else (), split.sites)


class _Search:
    """What sites lose on their way to groups; walked once for each site that does."""

    def __init__(
        self,
        model: StepModel,
        split: SplitStep,
        groups: Sequence[HiddenGroup],
        found: Mapping[int, Influence],
    ) -> None:
        self.model, self.split, self.found, self.groups = model, split, found, groups
        self._reads: dict[Any, Reads] = {}
        self._cut = {
            g.name: {v for s in g.states for use in found[s].cuts for v in operands_of(split.body, use)}
            for g in groups
        }

    @cached_property
    def reached(self) -> list[int]:
        """Per variable the sites whose y has a derivative there, as bits."""
        body, frozen = self.split.body, self.split.frozen
        bits = [0] * len(body.avals)
        for k, site in enumerate(self.split.sites):
            bits[site.y] |= 1 << k
        for number, operation in enumerate(body.operations):
            if operation.name in NO_DERIVATIVE | NO_REVERSE:
                continue
            together = 0
            for k, v in enumerate(operation.inputs):
                if not isinstance(v, Constant) and bits[v] and (number, k) not in frozen:
                    together |= bits[v]
            for v in operation.outputs if together else ():
                if body.avals[v].differentiable:
                    bits[v] |= together
        return bits

    @cached_property
    def _lost(self) -> dict[str, int]:
        found = {}
        for name, variables in self._cut.items():
            found[name] = 0
            for v in variables:
                found[name] |= self.reached[v]
        return found

    @cached_property
    def _arriving(self) -> dict[str, int]:
        """Per group the sites of whose y something may be read there, as bits: a bound that is found without arrays.

        What was not repeated before a sum over several elements joins different ones there.
        """
        body = self.split.body
        plain, repeated = [0] * len(body.avals), [0] * len(body.avals)
        for k, site in enumerate(self.split.sites):
            plain[site.y] |= 1 << k
        for operation in body.operations:
            if operation.name in NO_DERIVATIVE | NO_REVERSE:
                continue
            whole, wide = 0, 0
            for k, v in enumerate(operation.inputs):
                if not isinstance(v, Constant) and (plain[v] or repeated[v]):
                    whole |= 0 if joins(body, operation, k) else plain[v]
                    wide |= repeated[v]
            if operation.name in REPEATING:
                whole, wide = 0, wide | whole
            for v in operation.outputs if whole or wide else ():
                if body.avals[v].differentiable:
                    plain[v] |= whole
                    repeated[v] |= wide
        found = {}
        for group in self.groups:
            found[group.name] = 0
            for v in self._new([group]):
                found[group.name] |= 0 if isinstance(v, Constant) else plain[v] | repeated[v]
        return found

    def loses(self, group: HiddenGroup, site: int) -> bool:
        """Whether credit of a site's y is cut on its way to a group that it may reach in another way."""
        name = group.name
        return bool(self._cut[name]) and bool((self._lost[name] & self._arriving[name]) >> site & 1)

    def _new(self, groups: Sequence[HiddenGroup]) -> list[Any]:
        return [self.model.new_state_vars[s] for g in groups for s in g.states]

    @cached_property
    def _toward(self) -> set[int]:
        return leading_to(self.split.body, self._new(self.groups))

    def classes(self, site: Site, group: HiddenGroup) -> tuple[Relation, ...]:
        """Relations of those elements of y of which single positions keep nothing, one for each class."""
        shape = self.split.body.avals[site.y].shape
        kept = self._kept(site, group)
        if kept.size and kept.all():
            return ()
        reads = self._read(site, np.where(kept, NONE, np.arange(kept.size)).reshape(shape))
        states = [self.model.new_state_vars[s] for s in group.states]
        at = [_at_positions(group, k, reads.slots.get(v, ())) for k, v in enumerate(states)]
        colours = _classes(list(itertools.chain(*at)), kept.size) if any(at) else None
        if colours is None:
            return ()
        cuts = cuts_toward(self.split.body, reads, self._new([group]))
        numbers = range(int(colours.max(initial=NONE)) + 1)
        return tuple(_relation(site, group, at, (colours == c).reshape(shape), cuts) for c in numbers)

    def losing(self, site: Site, group: HiddenGroup) -> AbstractSet[Use]:
        """Uses where elements of y are cut of which single positions keep a part."""
        kept = self._kept(site, group)
        if not kept.any():
            return frozenset()
        body = self.split.body
        reads = self._read(site, np.where(kept, 0, NONE).reshape(body.avals[site.y].shape))
        opaque = cuts_toward(self.split.body, reads, self._new([group]))
        found = set()
        for s in group.states:
            for use, mask in self.found[s].cuts.items():
                of_operands = [a != NONE for v in operands_of(body, use) for a in reads.slots.get(v, ())]
                if opaque or any((a & mask if len(use) == 2 else a).any() for a in of_operands):
                    found.add(use)
        return found

    def _read(self, site: Site, numbers: Array) -> Reads:
        body, start = self.split.body, self._alike(site.y)
        key = start, numbers.tobytes()
        if key not in self._reads:
            self._reads[key] = reads_of(body, start, numbers, self._toward, self.split.frozen)
        return self._reads[key]

    def _alike(self, variable: int) -> int:
        """The last variable of which each element is read where that of the first is: terms of one sum are walked once."""
        body = self.split.body
        new = {self.model.new_state_vars[s] for g in self.groups for s in g.states}
        while variable not in new and len(readers := body.read_by.get(variable, ())) == 1:
            operation = body.operations[readers[0]]
            uses = {(readers[0], k) for k, v in enumerate(operation.inputs) if v == variable}
            if operation.name not in ELEMENTWISE - NO_DERIVATIVE or uses & self.split.frozen:
                break
            (result,) = operation.outputs
            if result not in self._toward or body.avals[result].shape != body.avals[variable].shape:
                break
            if not body.avals[result].differentiable:
                break
            variable = result
        return variable

    def _kept(self, site: Site, group: HiddenGroup) -> Array:
        """The elements of y of which single positions keep anything; with shared states, whose elements are at many, none."""
        kept = np.zeros(self.split.body.avals[site.y].size, bool)
        for s in () if group.shared else group.states:
            positions = self.found[s].positions.get(site.y)
            if positions is not None:
                kept |= positions.ravel() != NONE
        return kept


def _at_positions(group: HiddenGroup, k: int, slots: Slots) -> list[Array]:
    """What new state k reads, at each position of its group."""
    elements = group.elements(k)
    return [np.where(elements >= 0, a.ravel()[np.maximum(elements, 0)], NONE) for a in slots]


def _classes(reads: Sequence[Array], size: int) -> Array | None:
    """A number for each element of y, so that no position reads two of one number; -1 for those that none reads.

    None where too many would be needed.
    """
    slots, lost = compress(np.stack(reads))
    if lost.any():
        return None
    pairs = []
    for a, b in itertools.combinations(slots, 2):
        both = (a != NONE) & (b != NONE)
        pairs.append(np.stack([np.minimum(a[both], b[both]), np.maximum(a[both], b[both])]))
    low, high = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), np.int64)
    waiting = np.zeros(size, bool)
    for a in slots:
        waiting[a[a != NONE]] = True
    return _coloured(waiting, low, high)


def _coloured(waiting: Array, low: Array, high: Array) -> Array | None:
    """The first number that is free, in the order of the elements: of two in a pair the lower one chooses first."""
    number = np.full(waiting.shape, NONE, np.int64)
    taken = np.zeros(waiting.shape, np.int64)
    for _ in range(_MOST_ROUNDS):
        if not waiting.any():
            return number
        ready = waiting.copy()
        ready[high] = False
        free = ~taken[ready] & (taken[ready] + 1)
        number[ready] = np.log2(free).astype(np.int64)
        if number.max() >= MOST_CLASSES:
            return None
        waiting &= ~ready
        chosen = number[low] != NONE
        np.bitwise_or.at(taken, high[chosen], 1 << number[low[chosen]])
        low, high = low[~chosen], high[~chosen]
    return None


def _relation(
    site: Site, group: HiddenGroup, at: Sequence[Sequence[Array]], elements: Array, cuts: Mapping[Use, Array]
) -> Relation:
    """The relation of one class of elements: for each the positions that read it, in their order."""
    own = elements.ravel()
    of_state = []
    for slots in at:
        read = np.full(group.size, NONE, np.int64)
        for a in slots:
            read = np.where((a != NONE) & own[np.maximum(a, 0)], a, read)
        of_state.append(read)
    reads = np.max(of_state, axis=0)
    positions = np.flatnonzero(reads != NONE)
    positions = positions[np.argsort(reads[positions], kind="stable")]
    element = reads[positions]
    first = np.flatnonzero(np.diff(element, prepend=NONE))
    rank = np.arange(element.size) - np.repeat(first, np.diff(first, append=element.size))
    span = bounding_box(elements)
    size = int(rank.max(initial=0)) + 1
    sizes = tuple(stop - start for start, stop in span)
    place = np.unravel_index(element, elements.shape) if span else ()
    inside = tuple(p - start for p, (start, _) in zip(place, span, strict=True))
    position = np.full((*sizes, size), NONE, np.int64)
    position[(*inside, rank)] = positions
    if size == 1:
        position = position[..., 0]
    rows, masks = [], {}
    for k, read in enumerate(of_state):
        fits = (position != NONE) & (read[np.maximum(position, 0)] != NONE)
        if group.maps[k] is not None and size > 1 and k not in group.counted:
            fits = _once(fits, group.elements(k)[np.maximum(position, 0)])
        rows.append(bool(fits.any()))
        if rows[k] and not fits.all():
            masks[k] = fits
    return Relation(
        "", site.name, group.name, span, position, tuple(rows), masks, FanOut(size, elements, cuts)
    )


def _once(fits: Array, state: Array) -> Array:
    """Where several positions of one element of y stand for one element of a state, the first of them."""
    width = fits.shape[-1]
    owner = np.arange(fits.size) // width
    there = np.flatnonzero(fits.ravel())
    pairs = np.stack([owner[there], state.ravel()[there]])
    _, first = np.unique(pairs, axis=1, return_index=True)
    kept = np.zeros(fits.size, bool)
    kept[there[first]] = True
    return kept.reshape(fits.shape)
