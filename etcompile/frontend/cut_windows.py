"""Slices of pieces that were put together, as pieces that are put together of slices.

A window over the last inputs is often ``window = concatenate([old, new])`` with ``window[1:]`` as the new state, or a roll and
what is left of it. The state is then read as a whole, though each of its elements moves to one place. With the slice on the
pieces it is seen to be taken apart (:mod:`etcompile.frontend.state_forms`). Where no state is among the pieces, nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from jax import lax

from etcompile.frontend.jaxpr import Graph, Operand, Operation
from etcompile.frontend.replaced import with_replaced
from etcompile.frontend.state_forms import MOST_PARTS

__all__ = ["with_cut_windows"]

Array = Any
#: Variable, start and stop along the axis.
_Piece = tuple[Operand, int, int]


def with_cut_windows(graph: Graph, states: Sequence[int]) -> Graph:
    """``graph`` where slices of what a state was put together with are put together of slices."""
    found: dict[int, tuple[list[Operand], Callable[..., Array]]] = {}
    of = set(states)
    for number, operation in enumerate(graph.operations):
        place = _along_one_axis(graph, operation)
        if place is None:
            continue
        axis, start, stop = place
        base = operation.inputs[0]
        pieces = _pieces(graph, base, axis, start, stop)
        if pieces == [(base, start, stop)] or len(pieces) > MOST_PARTS:
            continue
        if any(v in of for v, _, _ in pieces):
            found[number] = [v for v, _, _ in pieces], partial(_put_together, pieces, axis)
    return with_replaced(graph, found)


def _put_together(pieces: Sequence[_Piece], axis: int, *values: Array) -> Array:
    parts = [
        v if (start, stop) == (0, v.shape[axis]) else lax.slice_in_dim(v, start, stop, axis=axis)
        for v, (_, start, stop) in zip(values, pieces, strict=True)
    ]
    return lax.concatenate(parts, axis) if len(parts) > 1 else parts[0]


def _along_one_axis(graph: Graph, operation: Operation) -> tuple[int, int, int] | None:
    """Axis, start and stop of a slice that takes all of the other axes."""
    if operation.name != "slice" or set(operation.params["strides"] or (1,)) != {1}:
        return None
    shape = graph.aval(operation.inputs[0]).shape
    bounds = list(zip(operation.params["start_indices"], operation.params["limit_indices"], strict=True))
    cut = [d for d, n in enumerate(shape) if bounds[d] != (0, n)]
    return (cut[0], *bounds[cut[0]]) if len(cut) == 1 else None


def _pieces(graph: Graph, operand: Operand, axis: int, start: int, stop: int) -> list[_Piece]:
    """What a part of a variable is put together of along an axis."""
    made = graph.made_by.get(operand) if isinstance(operand, int) else None
    operation = None if made is None else graph.operations[made]
    if operation is not None and operation.name == "concatenate" and operation.params["dimension"] == axis:
        ends = np.cumsum([0, *(graph.aval(v).shape[axis] for v in operation.inputs)]).tolist()
        return [
            piece
            for v, first, last in zip(operation.inputs, ends, ends[1:], strict=False)
            if max(start, first) < min(stop, last)
            for piece in _pieces(graph, v, axis, max(start, first) - first, min(stop, last) - first)
        ]
    if (
        operation is not None
        and (place := _along_one_axis(graph, operation)) is not None
        and place[0] == axis
    ):
        return _pieces(graph, operation.inputs[0], axis, start + place[1], stop + place[1])
    return [(operand, start, stop)]
