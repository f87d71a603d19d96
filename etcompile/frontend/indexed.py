"""Which places of an array an operation reads or writes, where some of its indices are only known when it runs.

A ring buffer is written at ``i % n`` and read at ``(i - d) % n``: along one axis any place may be meant, along the others it is
known, be it that whole rows are moved or that each neuron has a delay of its own, ``buf[(i - d) % n, arange(neurons)]``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from etcompile.frontend.jaxpr import Constant, Graph, Operand, Operation, is_traced

__all__ = ["INDEXED", "READS", "Indexed", "indexed", "known_indices", "moving_window", "small_operand"]

Array = Any

#: Operations that read a small array from places of a large one.
READS = frozenset({"dynamic_slice", "gather"})
#: Those that write a small array, by the number of that operand.
_SMALL = {
    "dynamic_update_slice": 1, "scatter": 2, "scatter-add": 2, "scatter-sub": 2, "scatter-mul": 2, "scatter-min": 2,
    "scatter-max": 2,
}  # fmt: skip
INDEXED = READS | frozenset(_SMALL)


@dataclasses.dataclass(frozen=True, eq=False)
class Indexed:
    """What is known of the places that an operation reads from its first operand, or writes there.

    Attributes
    ----------
    axes : tuple of int
        Axes of the large array along which any place may be meant; one place at a time.
    reduced : tuple of int
        Its shape with one place along each of these axes.
    places : array
        For each element of the small array its flat place in that shape; -1 where it has none.
    """

    axes: tuple[int, ...]
    reduced: tuple[int, ...]
    places: Array


def small_operand(operation: Operation) -> int | None:
    """Which operand of an operation of :data:`INDEXED` has what is written; None of those that read."""
    return _SMALL.get(operation.name)


def known_indices(operation: Operation) -> bool:
    """Whether all indices of an operation of :data:`INDEXED` are known."""
    if "dimension_numbers" in operation.params:
        indices = operation.inputs[1:2]
    else:
        indices = operation.inputs[1 if operation.name in READS else 2 :]
    return all(isinstance(v, Constant) and not is_traced(v.value) for v in indices)


def indexed(graph: Graph, operation: Operation) -> Indexed | None:
    """Places of an operation of :data:`INDEXED`; None where more than one may be meant along an axis, in a window that moves."""
    shape = graph.aval(operation.inputs[0]).shape
    starts, sizes = _starts_and_sizes(graph, operation)
    axes = _axes_of_indices(operation, len(shape))
    unknown = _unknown(shape, axes, starts, sizes)
    if any(sizes[axis] != 1 for axis in unknown):
        return None
    moving = tuple(sorted(unknown))
    reduced = tuple(1 if axis in moving else n for axis, n in enumerate(shape))
    places = np.arange(int(np.prod(reduced, dtype=np.int64)), dtype=np.int64).reshape(reduced)
    known = [
        np.zeros((), np.int64) if start is None else np.asarray(start, np.int64)
        for axis, start in zip(axes, starts, strict=True)
    ]
    if operation.name in ("dynamic_slice", "dynamic_update_slice"):
        for axis, (k, n, size) in enumerate(zip(known, reduced, sizes, strict=True)):
            start = min(max(int(k), 0), n - size)
            places = places.take(range(start, start + size), axis)
        return Indexed(moving, reduced, places)
    return Indexed(moving, reduced, _gathered(graph, operation, places, known, sizes))


def moving_window(graph: Graph, operation: Operation) -> tuple[int, int] | None:
    """The one axis along which an operation of :data:`INDEXED` is about several places, not known which; and how many."""
    shape = graph.aval(operation.inputs[0]).shape
    starts, sizes = _starts_and_sizes(graph, operation)
    unknown = _unknown(shape, _axes_of_indices(operation, len(shape)), starts, sizes)
    return (unknown[0], sizes[unknown[0]]) if len(unknown) == 1 and sizes[unknown[0]] > 1 else None


def _starts_and_sizes(graph: Graph, operation: Operation) -> tuple[list[Any], tuple[int, ...]]:
    """For each column of indices the start, None where it is not known; and the size of what is meant along each axis."""
    shape = graph.aval(operation.inputs[0]).shape
    small = _SMALL.get(operation.name)
    result = graph.aval(operation.outputs[0] if small is None else operation.inputs[small])
    if operation.name in ("dynamic_slice", "dynamic_update_slice"):
        return _starts(operation, shape, result.shape), result.shape
    return _columns(graph, operation.inputs[1]), _window(operation, shape, result.shape)


def _unknown(
    shape: Sequence[int], axes: Sequence[int], starts: Sequence[Any], sizes: Sequence[int]
) -> tuple[int, ...]:
    """The axes along which a part is meant that is not known."""
    return tuple(
        axis
        for axis, start in zip(axes, starts, strict=True)
        if start is None and shape[axis] > 1 and sizes[axis] != shape[axis]
    )


def _starts(operation: Operation, shape: Sequence[int], sizes: Sequence[int]) -> list[Any]:
    """The start along each axis; None where it is not known."""
    found: list[Any] = []
    for operand, n, size in zip(operation.inputs[-len(shape) :] if shape else (), shape, sizes, strict=True):
        known = isinstance(operand, Constant) and not is_traced(operand.value)
        found.append(0 if n == size else np.asarray(operand.value) if known else None)  # type: ignore[union-attr]
    return found


def _axes_of_indices(operation: Operation, rank: int) -> tuple[int, ...]:
    """Axes of the large array that indices are about, one for each column of them."""
    if operation.name in ("dynamic_slice", "dynamic_update_slice"):
        return tuple(range(rank))
    numbers = operation.params["dimension_numbers"]
    return tuple(
        numbers.start_index_map if operation.name == "gather" else numbers.scatter_dims_to_operand_dims
    )


def _columns(graph: Graph, indices: Operand) -> list[Any]:
    """Columns of indices: arrays; None for one that is not known."""
    aval = graph.aval(indices)
    width = aval.shape[-1]
    if isinstance(indices, Constant):
        if is_traced(indices.value):
            return [None] * width
        return [np.asarray(indices.value)[..., k] for k in range(width)]
    made = graph.made_by.get(indices)
    operation = None if made is None else graph.operations[made]
    last = len(aval.shape) - 1
    if operation is not None and operation.name == "concatenate" and operation.params["dimension"] == last:
        return list(itertools.chain(*(_columns(graph, v) for v in operation.inputs)))
    return [None] * width


def _window(operation: Operation, shape: Sequence[int], small: Sequence[int]) -> tuple[int, ...]:
    """Size of what is read or written at once along each axis of the large array."""
    if operation.name == "gather":
        return tuple(operation.params["slice_sizes"])
    numbers = operation.params["dimension_numbers"]
    single = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    sizes = iter(small[d] for d in numbers.update_window_dims)
    return tuple(1 if axis in single else next(sizes) for axis in range(len(shape)))


def _gathered(
    graph: Graph, operation: Operation, places: Array, columns: Sequence[Array], sizes: Sequence[int]
) -> Array:
    """Places by a gather at the indices that are known, zero standing for the others."""
    numbers = operation.params["dimension_numbers"]
    if operation.name != "gather":
        numbers = lax.GatherDimensionNumbers(
            offset_dims=numbers.update_window_dims,
            collapsed_slice_dims=numbers.inserted_window_dims,
            start_index_map=numbers.scatter_dims_to_operand_dims,
            operand_batching_dims=numbers.operand_batching_dims,
            start_indices_batching_dims=numbers.scatter_indices_batching_dims,
        )
    head = graph.aval(operation.inputs[1]).shape[:-1]
    indices = np.stack([np.broadcast_to(c, head) for c in columns], -1) if columns else np.zeros((*head, 0))
    mode = operation.params["mode"]
    clip = mode == lax.GatherScatterMode.CLIP
    with jax.ensure_compile_time_eval():
        found = lax.gather(
            np.asarray(places, np.int32), np.asarray(indices, np.int32), numbers, tuple(sizes),
            mode="clip" if clip else "fill", fill_value=-1,
        )  # fmt: skip
    return np.asarray(found, np.int64)
