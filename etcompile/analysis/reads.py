"""Reads: of which elements of a site's result each element of each variable is made, and where that ends.

:mod:`etcompile.analysis.influence` asks backwards which one position an element reaches. Where one element reaches many, as a
key does that multiplies all values, the question is asked forwards: the walk goes from y to the new states, and each element of
a variable carries the few elements of y that it reads. Where a sum joins different ones, that use is cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from etcompile.analysis.dependence import NO_DERIVATIVE, NO_REVERSE
from etcompile.analysis.index_rules import ELEMENTWISE, MANY, MOVES, NONE, collapse, scatter_join
from etcompile.analysis.influence import through_operation
from etcompile.frontend.indexed import INDEXED, READS, indexed, known_indices, small_operand
from etcompile.frontend.jaxpr import Constant, Graph, Operation, without_derivative
from etcompile.frontend.loops import Use
from etcompile.frontend.walks import ForwardWalk

__all__ = ["MOST_READS", "REPEATING", "Reads", "Slots", "compress", "joins", "reads_of"]

Array = Any
#: Per element the elements of y that it reads: arrays of one shape, NONE where there is none, no element twice.
Slots = tuple[Array, ...]

#: Elements of one y that an element may read: key, value and gates of a fused projection, pairs of a rotation.
MOST_READS = 8


#: Operations by which an element may come to several places.
REPEATING = frozenset({"broadcast_in_dim", "tile", "dot_general"}) | INDEXED
_OVER_AXES = frozenset({"reduce_sum", "reduce_max", "reduce_min", "reduce_prod"})


def joins(graph: Graph, operation: Operation, operand: int) -> bool:
    """Whether each result is made of several elements of an operand, all of those along some axes."""
    shape = graph.aval(operation.inputs[operand]).shape
    if operation.name == "dot_general":
        axes = operation.params["dimension_numbers"][0][operand]
    elif operation.name in _OVER_AXES:
        axes = operation.params["axes"]
    else:
        return operation.name == "conv_general_dilated"
    return any(shape[axis] > 1 for axis in axes)


@dataclasses.dataclass(frozen=True, eq=False)
class Reads:
    """What reads the elements of one variable, y of a site.

    Attributes
    ----------
    slots : mapping of int to tuple of arrays
        For each variable that reads any, the flat elements of y that each of its elements reads.
    cuts : mapping of Use to array
        Elements of an operand at which a use is cut.
    """

    slots: Mapping[int, Slots]
    cuts: Mapping[Use, Array]


def reads_of(
    graph: Graph, source: int, numbers: Array, toward: AbstractSet[int], frozen: AbstractSet[Use]
) -> Reads:
    """Walk ``graph`` forwards from a variable, on the way to variables in ``toward`` alone.

    ``numbers`` are those that its elements are called by; NONE for those that are not asked about.
    """
    slots: dict[int, Slots] = {source: (numbers,)}
    cuts: dict[Use, Array] = {}
    walk = ForwardWalk(graph, [source])
    for number in walk:
        operation = graph.operations[number]
        results = [
            k for k, v in enumerate(operation.outputs) if v in toward and graph.avals[v].differentiable
        ]
        given = {
            k: slots[v]
            for k, v in enumerate(operation.inputs)
            if not isinstance(v, Constant)
            and v in slots
            and graph.avals[v].differentiable
            and (number, k) not in frozen
        }
        if not (results and given) or _passes_none(operation):
            continue
        found, lost = _through(graph, operation, given)
        cuts.update({(number, k): mask for k, mask in lost.items()})
        for k in results:
            if found[k] and operation.outputs[k] != source:
                slots[operation.outputs[k]] = found[k]
                walk.add(operation.outputs[k])
    return Reads(slots, cuts)


def compress(stack: Array) -> tuple[Slots, Array]:
    """Slots from reads along a first axis, each once; and where there are too many, which are left out."""
    ordered = -np.sort(-stack, axis=0)
    ordered[1:][ordered[1:] == ordered[:-1]] = NONE
    ordered = -np.sort(-ordered, axis=0)
    number = (ordered != NONE).sum(axis=0)
    lost = number > MOST_READS
    ordered = ordered[: min(int(number.max(initial=0)), MOST_READS)]
    if lost.any():
        ordered = np.where(lost, NONE, ordered)
    return tuple(a for a in ordered if (a != NONE).any()), lost


def _passes_none(operation: Operation) -> bool:
    return operation.name in NO_DERIVATIVE | NO_REVERSE or without_derivative(operation)


def _through(
    graph: Graph, operation: Operation, given: Mapping[int, Slots]
) -> tuple[list[Slots], dict[int, Array]]:
    """What each result of an operation reads, given what its operands read; and the elements that are cut, by operand."""
    if operation.name in ELEMENTWISE:
        shape = graph.avals[operation.outputs[0]].shape
        slots, lost = _union([np.broadcast_to(a, shape) for found in given.values() for a in found])
        return [slots], {
            k: _at_operand(lost, graph.aval(operation.inputs[k]).shape) for k in given if lost.any()
        }
    made: list[list[Array]] = [[] for _ in operation.outputs]
    cut: dict[int, Array] = {}
    for k, slots in given.items():
        for a in slots:
            found, lost = _moved(graph, operation, k, a)
            if lost is not None and lost.any():
                cut[k] = lost | cut.get(k, False)
            for results, result in zip(made, found, strict=True):
                if result is not None and (result != NONE).any():
                    results.append(result)
    results, crowded = zip(*[_union(found) if found else ((), None) for found in made], strict=True)
    if any(lost is not None and lost.any() for lost in crowded):
        return [() for _ in made], {k: np.ones(graph.aval(operation.inputs[k]).shape, bool) for k in given}
    return list(results), cut


def _union(arrays: Sequence[Array]) -> tuple[Slots, Array]:
    first = arrays[0]
    if all(a is first for a in arrays[1:]):
        return (first,), np.zeros((), bool)
    return compress(np.stack(arrays))


def _at_operand(lost: Array, shape: tuple[int, ...]) -> Array:
    return lost if lost.shape == shape else np.broadcast_to(lost.any(), shape)


def _moved(
    graph: Graph, operation: Operation, operand: int, reads: Array
) -> tuple[list[Array | None], Array | None]:
    """What results read through one operand that reads one element each; and its elements that are cut."""
    if operation.name in MOVES:
        return [MOVES[operation.name](operation, reads) if operand == 0 else None], None
    if operation.name in _RULES:
        return _RULES[operation.name](graph, operation, operand, reads)
    return _by_influence(graph, operation, operand, reads)


def _by_influence(
    graph: Graph, operation: Operation, operand: int, reads: Array
) -> tuple[list[Array | None], Array | None]:
    """The same for any operation of which each element of the operand reaches one element of the results at most."""
    sizes = [graph.avals[v].size for v in operation.outputs]
    starts = np.cumsum([0, *sizes])
    places = [
        np.arange(start, start + size).reshape(graph.avals[v].shape)
        if graph.avals[v].differentiable
        else None
        for v, start, size in zip(operation.outputs, starts, sizes, strict=False)
    ]
    reached = through_operation(graph, operation, operand, places)
    if reached is None:
        return [None] * len(sizes), None
    lost = (reached == MANY) & (reads != NONE)
    here = (reached >= 0) & (reads != NONE)
    of_result = np.full(starts[-1], NONE, np.int64)
    of_result[reached[here]] = reads[here]
    crowded = np.zeros(starts[-1], bool)
    crowded[reached[here][of_result[reached[here]] != reads[here]]] = True
    of_result[crowded] = NONE
    lost = lost | (here & crowded[np.maximum(reached, 0)])
    parts = np.split(of_result, starts[1:-1])
    return [a.reshape(graph.avals[v].shape) for a, v in zip(parts, operation.outputs, strict=True)], lost


# --- operations by which one element reaches many ---------------------------------------------------------------------


def _broadcast_in_dim(
    graph: Graph, operation: Operation, operand: int, reads: Array
) -> tuple[list[Array | None], Array | None]:
    shape, dims = operation.params["shape"], operation.params["broadcast_dimensions"]
    if operand != 0:
        return [None], None
    ones = [1] * len(shape)
    for size, d in zip(reads.shape, dims, strict=True):
        ones[d] = size
    return [np.broadcast_to(reads.reshape(ones), shape)], None


def _concatenate(
    graph: Graph, operation: Operation, operand: int, reads: Array
) -> tuple[list[Array | None], Array | None]:
    parts = [np.full(graph.aval(v).shape, NONE, np.int64) for v in operation.inputs]
    parts[operand] = reads
    return [np.concatenate(parts, operation.params["dimension"])], None


def _split(
    graph: Graph, operation: Operation, operand: int, reads: Array
) -> tuple[list[Array | None], Array | None]:
    ends = np.cumsum(operation.params["sizes"])[:-1]
    return list(np.split(reads, ends, operation.params["axis"])), None


def _dot_general(
    graph: Graph, operation: Operation, operand: int, reads: Array
) -> tuple[list[Array | None], Array | None]:
    """An outer product repeats the elements of both; a sum over different elements of y ends what is read."""
    contracted, batch = operation.params["dimension_numbers"]
    other = graph.aval(operation.inputs[1 - operand]).shape
    mine = [d for d in range(reads.ndim) if d not in contracted[operand] and d not in batch[operand]]
    theirs = [
        d for d in range(len(other)) if d not in contracted[1 - operand] and d not in batch[1 - operand]
    ]
    order = [*batch[operand], *mine, *contracted[operand]]
    kept = len(order) - len(contracted[operand])
    joined = collapse(np.transpose(reads, order), tuple(range(kept, len(order))))
    lost = np.broadcast_to((joined == MANY).reshape(*joined.shape, *(1,) * len(contracted[operand])),
                           [reads.shape[d] for d in order])  # fmt: skip
    joined = np.where(joined == MANY, NONE, joined)
    head, ones = joined.shape[: len(batch[operand])], (1,) * len(theirs)
    rest = joined.shape[len(batch[operand]) :]
    spread = joined.reshape(*head, *ones, *rest) if operand else joined.reshape(*head, *rest, *ones)
    result = np.broadcast_to(spread, graph.avals[operation.outputs[0]].shape)
    return [result], np.transpose(lost, np.argsort(order)) & (reads != NONE)


def _at_places(
    graph: Graph, operation: Operation, operand: int, reads: Array
) -> tuple[list[Array | None], Array | None]:
    """Where places are known when the step runs, what is written may be at any of them; what was there may be there still."""
    if operation.name not in READS:
        if known_indices(operation):
            return _by_influence(graph, operation, operand, reads)
        if operand == 0:
            return [reads], None
    found = indexed(graph, operation)
    if operand not in (0, small_operand(operation)) or found is None:
        return [None], reads != NONE
    if operand == 0:
        of_places = collapse(reads, found.axes).ravel()
        lost = np.broadcast_to((of_places == MANY).reshape(found.reduced), reads.shape) & (reads != NONE)
        taken = np.where(found.places >= 0, of_places[np.maximum(found.places, 0)], NONE)
        return [np.where(taken == MANY, NONE, taken)], lost
    at = scatter_join(found.places, reads, int(np.prod(found.reduced, dtype=np.int64)))
    lost = (at[np.maximum(found.places, 0)] == MANY) & (reads != NONE)
    placed = np.where(at == MANY, NONE, at).reshape(found.reduced)
    return [np.broadcast_to(placed, graph.avals[operation.outputs[0]].shape)], lost


_RULES = {
    **dict.fromkeys(INDEXED, _at_places),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "split": _split,
    "dot_general": _dot_general,
}
