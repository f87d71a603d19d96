"""Windows of several slots of a buffer at a place that is only known when the step runs, slot by slot.

``dynamic_slice_in_dim(buffer, i, 3, axis)`` reads three slots, of which each may be any; three reads of one slot each say so in a
form that is followed (:mod:`etcompile.frontend.indexed`, :mod:`etcompile.frontend.ring_buffers`). Writes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from etcompile.frontend.indexed import INDEXED, READS, moving_window
from etcompile.frontend.jaxpr import Graph, Operand, Operation
from etcompile.frontend.replaced import with_replaced
from etcompile.frontend.state_forms import MOST_PARTS

__all__ = ["with_single_slots"]

Array = Any


def with_single_slots(graph: Graph, states: Sequence[int]) -> Graph:
    """``graph`` where windows of states that move along an axis of a few slots are read and written slot by slot."""
    buffers = set(states)
    found: dict[int, tuple[Sequence[Operand], Callable[..., Array]]] = {}
    for number, operation in enumerate(graph.operations):
        if operation.name not in INDEXED or operation.inputs[0] not in buffers:
            continue
        if operation.name not in READS:
            buffers.update(operation.outputs)
        fn = _slot_by_slot(graph, operation)
        if fn is not None:
            found[number] = operation.inputs, fn
    return with_replaced(graph, found)


def _slot_by_slot(graph: Graph, operation: Operation) -> Callable[..., Array] | None:
    """The operation on one slot after another; None where it is about one, or not about a window that moves."""
    window = moving_window(graph, operation)
    if window is None:
        return None
    axis, size = window
    count = graph.aval(operation.inputs[0]).shape[axis]
    if count > MOST_PARTS:
        return None
    if "dimension_numbers" not in operation.params:
        return _dynamic(operation, axis, size, count)
    modes = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    return _gathered(graph, operation, axis, size) if operation.params["mode"] in modes else None


def _dynamic(operation: Operation, axis: int, size: int, count: int) -> Callable[..., Array]:
    reads = operation.name in READS

    def fn(buffer: Array, *rest: Array) -> Array:
        starts = list(rest if reads else rest[1:])
        first = jnp.clip(starts[axis], 0, count - size)
        found = []
        for k in range(size):
            starts[axis] = first + k
            if reads:
                sizes = [1 if d == axis else n for d, n in enumerate(operation.params["slice_sizes"])]
                found.append(lax.dynamic_slice(buffer, starts, sizes))
            else:
                slot = lax.slice_in_dim(rest[0], k, k + 1, axis=axis)
                buffer = lax.dynamic_update_slice(buffer, slot, starts)
        return lax.concatenate(found, axis) if reads else buffer

    return fn


def _gathered(graph: Graph, operation: Operation, axis: int, size: int) -> Callable[..., Array] | None:
    params, reads = operation.params, operation.name in READS
    numbers = params["dimension_numbers"]
    if reads:
        single = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        of_windows, axes = numbers.offset_dims, numbers.start_index_map
    else:
        single = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
        of_windows, axes = numbers.update_window_dims, numbers.scatter_dims_to_operand_dims
    if any(d in single for d in axes if d != axis):
        return None  # what is left are windows of all there is, whose start is zero
    along = of_windows[sum(d not in single for d in range(axis))]
    column = np.array([d == axis for d in axes])
    count = graph.aval(operation.inputs[0]).shape[axis]

    def fn(buffer: Array, indices: Array, *updates: Array) -> Array:
        first = jnp.clip(indices, 0, count - size)
        found = []
        for k in range(size):
            here = jnp.where(column, first + k, 0)
            if reads:
                sizes = tuple(1 if d == axis else n for d, n in enumerate(params["slice_sizes"]))
                found.append(operation.primitive.bind(buffer, here, **{**params, "slice_sizes": sizes}))
            else:
                slot = lax.slice_in_dim(updates[0], k, k + 1, axis=along)
                buffer = operation.primitive.bind(buffer, here, slot, **params)
        return lax.concatenate(found, along) if reads else buffer

    return fn
