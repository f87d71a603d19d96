"""Axes of a few elements along which a step joins a state with itself: pairs that a computed matrix turns, compartments.

``einsum("bnk,nkj->bnj", s, rotation(angle))`` reads a state as a whole, and each of its elements reaches all of its pair. The
elements along such an axis belong to one unit, as they do where a step reads them one by one, and become its parts
(:mod:`etcompile.frontend.state_forms`). A matrix of which every entry is trained is none of these: it is recurrent weights, which
spread credit however few the units are, and what a rule says of them holds.

The axis is found by following the axes of each state forwards: it is one along which elements come together on their way to a new
state while all other axes stay apart. What goes on from such a state element by element to another one, a filter of it for one,
makes that state one of parts as well.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import jax.numpy as jnp

from etcompile.frontend.jaxpr import Constant, Graph, Operation
from etcompile.frontend.state_forms import MOST_PARTS, StateForm
from etcompile.frontend.walks import ForwardWalk

__all__ = ["with_joined_axes"]

Shape = tuple[int, ...]

#: Elements that come together by anything but constants: a unit has a trace row for each, and a large axis is of many units.
MOST_JOINED = 4
#: No axis of the state.
_NEW = -1
#: Results of one shape with an operand, of which an element is not about the same place.
_MIXING = frozenset(
    """cholesky conv_general_dilated cumlogsumexp cummax cummin cumprod cumsum dynamic_update_slice eigh fft gather
    lu reduce_window_max reduce_window_sum rev scan scatter scatter-add scatter-max scatter-min scatter-mul
    sort stop_gradient triangular_solve while""".split()  # noqa: SIM905
)
_REDUCTIONS = frozenset(("argmax", "argmin", "reduce_max", "reduce_min", "reduce_prod", "reduce_sum"))
_ALONG_AN_AXIS = frozenset(("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"))

#: Rounds of a loop after which what it carries on has what it will have.
_ROUNDS = 3

#: A state by its place among the states, and one of its axes.
_Axis = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class _Track:
    """What a variable has of one state.

    Attributes
    ----------
    axes : tuple of int
        Which axis of the state each of its own is.
    joined : frozenset of int
        Axes of the state along which elements came together.
    bounds : frozenset of (int, int)
        Axes along which it was taken apart in a few large parts, and places at which these begin or end.
    apart : bool
        Whether a parameter has an entry of its own for each place along the state's first axis, which then numbers no examples.
    """

    axes: Shape
    joined: frozenset[int] = frozenset()
    bounds: frozenset[tuple[int, int]] = frozenset()
    apart: bool = False

    def moved(
        self,
        axes: Sequence[int],
        joined: frozenset[int] = frozenset(),
        bounds: frozenset[tuple[int, int]] = frozenset(),
        apart: bool = False,
    ) -> _Track:
        return _Track(tuple(axes), self.joined | joined, self.bounds | bounds, self.apart or apart)

    def with_other(self, other: _Track) -> _Track:
        pairs = zip(self.axes, other.axes, strict=True)
        axes = [a if a == b or b == _NEW else b if a == _NEW else _NEW for a, b in pairs]
        return self.moved(axes, other.joined, other.bounds, other.apart)


#: What a variable has of each state, by its place among the states.
_Tracks = Mapping[int, _Track]


def with_joined_axes(
    graph: Graph, n_params: int, n_outputs: int, forms: Sequence[StateForm]
) -> tuple[StateForm, ...]:
    """The forms of a graph's states, with those divided that are joined along an axis, or go on from one that is divided."""
    states = graph.inputs[n_params : n_params + len(forms)]
    new = graph.outputs[n_outputs:]
    leading = {graph.avals[v].shape[:1] for v in graph.inputs[n_params + len(forms) :]}
    shapes = [graph.avals[v].shape for v in states]
    numbers = [
        k
        for k, v in enumerate(states)
        if jnp.issubdtype(graph.avals[v].dtype, jnp.floating)
        and len(shapes[k]) > 1
        and v not in graph.outputs
    ]
    if not _worth_it(numbers, shapes, forms):
        return tuple(forms)
    links: list[tuple[_Axis, _Axis]] = []
    joined: set[_Axis] = set()
    taken_apart: dict[_Axis, set[int]] = collections.defaultdict(set)
    start = {states[k]: {k: _Track(tuple(range(len(shapes[k]))))} for k in numbers}
    params = set(graph.inputs[:n_params])
    tracks = _followed(graph, start, _Matrices(params, params))
    for end in numbers:
        v = new[end]
        for k, track in tracks.get(v, {}).items() if not isinstance(v, Constant) else ():
            for axis in _kept(track, shapes[k]):
                examples = shapes[k][:1] in leading and not track.apart
                taken_apart[k, axis] |= {b for a, b in track.bounds if a == axis}
                unit = axis in track.joined and (axis or not examples) and len(shapes[k]) > 1 + examples
                joined |= {(k, axis)} if unit else set()
                links += [((k, axis), (end, d)) for d, of in enumerate(track.axes) if of == axis]
                links += [((k, axis), (end, d)) for d in _made(track, shapes[end]) if unit]
    found = list(forms)
    for nodes in _connected({*joined, *itertools.chain(*links)}, links):
        equal = math.gcd(*(b for node in nodes for b in taken_apart.get(node, ())))
        given = {b for k, axis in nodes if forms[k].bounds and forms[k].axis == axis for b in forms[k].bounds}
        for k, axis in nodes:
            size = shapes[k][axis]
            width = 1 if nodes & joined else math.gcd(equal, *given) if equal else size
            own = tuple(range(0, size + 1, width)) if width < size else tuple(sorted(given)) or (size,)
            fits = own[-1] == size and 3 <= len(own) <= MOST_PARTS + 1
            if fits and k in numbers and (not found[k].bounds or found[k].axis == axis):
                found[k] = StateForm(axis=axis, bounds=own)
    return tuple(found)


def _worth_it(numbers: Sequence[int], shapes: Sequence[Shape], forms: Sequence[StateForm]) -> bool:
    """Whether a state has an axis that may be of parts, or another one of its shape is of parts: most models have neither."""
    divided = {shapes[k] for k in numbers if forms[k].bounds}
    return any(
        not forms[k].bounds
        and (shapes[k] in divided or any(1 < n <= MOST_PARTS for n in shapes[k][1:] or shapes[k]))
        for k in numbers
    )


def _kept(track: _Track, shape: Shape) -> Iterator[int]:
    """The axes of a state of this shape without which all others are there in what has come of it."""
    there = [axis for axis, n in enumerate(shape) if n > 1 and axis not in track.axes]
    for axis, n in enumerate(shape):
        if n > 1 and not set(there) - {axis} and (axis in track.joined or axis in track.axes):
            yield axis


def _made(track: _Track, shape: Shape) -> Iterator[int]:
    """The small axes of a new state that are none of the old one's, as where a product with a matrix has joined one."""
    return (d for d, of in enumerate(track.axes) if of == _NEW and 1 < shape[d] <= MOST_JOINED)


def _connected(nodes: set[_Axis], links: Sequence[tuple[_Axis, _Axis]]) -> list[set[_Axis]]:
    parts = {node: {node} for node in nodes}
    for a, b in links:
        if parts[a] is not parts[b]:
            parts[a] |= parts[b]
            for node in parts[b]:
                parts[node] = parts[a]
    return [part for node, part in parts.items() if node == min(part)]


# --- following axes ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Matrices:
    """Variables that parameters alone make.

    Attributes
    ----------
    fixed : set of int
        All of them.
    trained : set of int
        Those of which each entry is one of a parameter, or made of one and of few others: weights, transformed or not.
        Of a matrix that is put together of a few angles it is not.
    """

    fixed: AbstractSet[Any]
    trained: AbstractSet[Any]

    def within(self, graph: Graph) -> _Matrices:
        """With what the operations of a graph make of these."""
        fixed, trained = set(self.fixed), set(self.trained)
        for operation in graph.operations:
            moving = [v for v in operation.inputs if not isinstance(v, Constant)]
            if not moving or any(v not in fixed for v in moving):
                continue
            fixed.update(operation.outputs)
            entries = max((graph.avals[v].size for v in moving if v in trained), default=0)
            trained.update(v for v in operation.outputs if graph.avals[v].size <= entries)
        return _Matrices(fixed, trained)

    def given(self, operation: Operation, variables: Sequence[int]) -> _Matrices:
        """Those of them that are operands, as the variables that stand for these inside of a loop."""
        pairs = list(zip(variables, operation.inputs, strict=False))
        return _Matrices(
            {v for v, operand in pairs if operand in self.fixed},
            {v for v, operand in pairs if operand in self.trained},
        )


def _followed(graph: Graph, start: Mapping[int, _Tracks], known: _Matrices) -> Mapping[int, _Tracks]:
    """By variable what it has of each state, where some are known to have something."""
    found: dict[int, _Tracks] = dict(start)
    matrices = known.within(graph)
    walk = ForwardWalk(graph, start)
    for number in walk:
        operation = graph.operations[number]
        if operation.loop is not None:
            results = _through_rounds(operation, found, matrices)
        else:
            results = {v: _through(graph, operation, v, found, matrices) for v in operation.outputs}
        for result, tracks in results.items():
            if tracks and graph.avals[result].differentiable:
                found[result] = tracks
                walk.add(result)
    return found


def _through(
    graph: Graph, operation: Operation, result: int, found: Mapping[Any, _Tracks], matrices: _Matrices
) -> _Tracks:
    """What a result of an operation has of each state."""
    rule = _rule(operation)
    tracks: dict[int, _Track] = {}
    for k, operand in enumerate(operation.inputs if rule is not None else ()):
        for state, track in found.get(operand, {}).items():
            moved = rule(graph, operation, k, track, result) if rule is not None else None
            if moved is None:
                continue
            if operation.name == "dot_general" and (other := operation.inputs[1 - k]) in matrices.fixed:
                if other in matrices.trained:
                    continue
                moved = moved.moved(moved.axes, apart=_each_its_own(operation, k, track))
            tracks[state] = moved if state not in tracks else tracks[state].with_other(moved)
    return tracks


def _through_rounds(
    operation: Operation, found: Mapping[Any, _Tracks], matrices: _Matrices
) -> dict[int, _Tracks]:
    """What a loop carries on has after a few rounds; what has an entry for each round is not followed."""
    loop = operation.loop
    assert loop is not None
    body, first = loop.body, loop.constants
    carried = body.inputs[first : first + loop.carried]
    start = {
        v: found[operand]
        for v, operand in zip(body.inputs[:first], operation.inputs, strict=False)
        if operand in found
    }
    tracks = {
        k: found[operand]
        for k, operand in enumerate(operation.inputs[first:][: loop.carried])
        if operand in found
    }
    same = matrices.given(operation, body.inputs[:first])
    for _ in range(_ROUNDS):
        inside = _followed(body, start | {carried[k]: t for k, t in tracks.items()}, same)
        for k, v in enumerate(body.outputs[: loop.carried]):
            more = {} if isinstance(v, Constant) else inside.get(v, {})
            if more:
                before = tracks.get(k, {})
                tracks[k] = {
                    **before,
                    **{s: t.with_other(before[s]) if s in before else t for s, t in more.items()},
                }
    return {operation.outputs[k]: t for k, t in tracks.items()}


def _each_its_own(operation: Operation, operand: int, track: _Track) -> bool:
    contracted, batch = operation.params["dimension_numbers"]
    return any(track.axes[d] == 0 for d in (*batch[operand], *contracted[operand]))


_Rule = Callable[[Graph, Operation, int, _Track, int], "_Track | None"]


def _rule(operation: Operation) -> _Rule | None:
    if operation.name in _REDUCTIONS:
        return _reduced
    rule = _RULES.get(operation.name)
    if rule is None and operation.name in _ALONG_AN_AXIS:
        return _along
    return _in_place if rule is None and operation.name not in _MIXING else rule


def _joins(
    graph: Graph, operation: Operation, operand: int, track: _Track, axes: Sequence[int], most: int
) -> frozenset[int] | None:
    """Which axis comes together where an operand's own axes do; None where one is too large, or several do."""
    shape = graph.aval(operation.inputs[operand]).shape
    mine = {(track.axes[d], shape[d]) for d in axes if track.axes[d] != _NEW and shape[d] > 1}
    taken_apart = {axis for axis, _ in track.bounds}
    if len(mine) > 1 or any(size > most or axis in taken_apart for axis, size in mine):
        return None
    return frozenset(axis for axis, _ in mine)


def _in_place(graph: Graph, operation: Operation, operand: int, track: _Track, result: int) -> _Track | None:
    """Operations element by element, those of other libraries among them."""
    same = graph.avals[result].shape == graph.aval(operation.inputs[operand]).shape
    return track if same else None


def _reduced(graph: Graph, operation: Operation, operand: int, track: _Track, result: int) -> _Track | None:
    axes = operation.params["axes"]
    joined = _joins(graph, operation, operand, track, axes, MOST_JOINED)
    kept = [a for d, a in enumerate(track.axes) if d not in axes]
    return None if joined is None else track.moved(kept, joined)


def _along(graph: Graph, operation: Operation, operand: int, track: _Track, result: int) -> _Track | None:
    joined = _joins(graph, operation, operand, track, [operation.params["axis"]], MOST_JOINED)
    return None if joined is None else track.moved(track.axes, joined)


def _dot(graph: Graph, operation: Operation, operand: int, track: _Track, result: int) -> _Track | None:
    contracted, batch = operation.params["dimension_numbers"]
    other = 1 - operand
    most = MOST_PARTS if isinstance(operation.inputs[other], Constant) else MOST_JOINED
    joined = _joins(graph, operation, operand, track, contracted[operand], most)
    if joined is None:
        return None
    free = [a for d, a in enumerate(track.axes) if d not in contracted[operand] and d not in batch[operand]]
    fresh = len(graph.avals[result].shape) - len(free) - len(batch[operand])
    new = [_NEW] * fresh
    return track.moved(
        [*[track.axes[d] for d in batch[operand]], *(free + new if operand == 0 else new + free)], joined
    )


def _broadcast(graph: Graph, operation: Operation, operand: int, track: _Track, result: int) -> _Track | None:
    axes = [_NEW] * len(graph.avals[result].shape)
    shape = graph.aval(operation.inputs[operand]).shape
    for d, place in enumerate(operation.params["broadcast_dimensions"] if operand == 0 else ()):
        axes[place] = track.axes[d] if shape[d] == graph.avals[result].shape[place] else _NEW
    return track.moved(axes)


def _reshaped(graph: Graph, operation: Operation, operand: int, track: _Track, result: int) -> _Track | None:
    """Axes of one element come and go; where others change, units are not looked for."""
    before, after = graph.aval(operation.inputs[operand]).shape, graph.avals[result].shape
    if [n for n in before if n > 1] != [n for n in after if n > 1]:
        return None
    large = iter([a for a, n in zip(track.axes, before, strict=True) if n > 1])
    return track.moved([next(large) if n > 1 else _NEW for n in after])


def _transposed(
    graph: Graph, operation: Operation, operand: int, track: _Track, result: int
) -> _Track | None:
    return track.moved([track.axes[d] for d in operation.params["permutation"]])


def _sliced(graph: Graph, operation: Operation, operand: int, track: _Track, result: int) -> _Track | None:
    before, after = graph.aval(operation.inputs[operand]).shape, graph.avals[result].shape
    cut = [d for d, (n, m) in enumerate(zip(before, after, strict=True)) if n != m]
    joined = _joins(graph, operation, operand, track, cut, MOST_JOINED)
    if joined is not None:
        return track.moved([_NEW if d in cut else a for d, a in enumerate(track.axes)], joined)
    if len(cut) != 1:
        return None
    (d,) = cut
    if operation.name == "slice":
        start, stop = (operation.params[key][d] for key in ("start_indices", "limit_indices"))
    else:
        stop = sum(operation.params["sizes"][: operation.outputs.index(result) + 1])
        start = stop - after[d]
    width = math.gcd(start, stop, before[d])
    if stop - start != after[d] or before[d] // width > MOST_JOINED:
        return None
    places = range(0, before[d] + 1, width)
    return track.moved(track.axes, bounds=frozenset((track.axes[d], b) for b in places))


def _unstacked(graph: Graph, operation: Operation, operand: int, track: _Track, result: int) -> _Track | None:
    axis = operation.params["axis"]
    joined = _joins(graph, operation, operand, track, [axis], MOST_JOINED)
    return None if joined is None else track.moved([a for d, a in enumerate(track.axes) if d != axis], joined)


def _stacked(graph: Graph, operation: Operation, operand: int, track: _Track, result: int) -> _Track | None:
    axis = operation.params["axis"]
    return track.moved([*track.axes[:axis], _NEW, *track.axes[axis:]])


def _put_together(
    graph: Graph, operation: Operation, operand: int, track: _Track, result: int
) -> _Track | None:
    """Pieces of parts of one size stay such, wherever they are put."""
    d = operation.params["dimension"]
    axis = track.axes[d]
    width = math.gcd(*(b for a, b in track.bounds if a == axis))
    stays = width > 0 and all(graph.aval(v).shape[d] % width == 0 for v in operation.inputs)
    return track.moved([(axis if stays else _NEW) if k == d else a for k, a in enumerate(track.axes)])


def _reversed(graph: Graph, operation: Operation, operand: int, track: _Track, result: int) -> _Track | None:
    joined = _joins(graph, operation, operand, track, operation.params["dimensions"], MOST_JOINED)
    return None if joined is None else track.moved(track.axes, joined)


_RULES: dict[str, _Rule] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _put_together,
    "dot_general": _dot,
    "reshape": _reshaped,
    "rev": _reversed,
    "slice": _sliced,
    "split": _sliced,
    "squeeze": _reshaped,
    "stack": _stacked,
    "transpose": _transposed,
    "unstack": _unstacked,
}
