"""Ring buffers that feed back into a state, written out slot by slot.

Input that arrives after a delay is added at ``(i + d) % n`` of a buffer and taken from ``i % n`` by the neuron. Each place of the
buffer is then part of the neuron's own memory. A read becomes a choice among the slots, a write a choice for each slot between
what was there and what is new, and the slots are parts of a packed state (:mod:`etcompile.frontend.state_forms`).

Buffers that nothing of the same unit reads stay as they are: the analysis follows what is written at any place
(:mod:`etcompile.frontend.indexed`), in one array.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from etcompile.frontend.indexed import INDEXED, READS, Indexed, indexed, small_operand
from etcompile.frontend.jaxpr import Constant, Graph, GraphBuilder, Operand, Operation, simplified
from etcompile.frontend.state_forms import MOST_PARTS

__all__ = ["with_slots"]

Array = Any

#: What is written over what was there, added to it, or put together with it otherwise.
_COMBINED = {"scatter-mul": lax.mul, "scatter-min": lax.min, "scatter-max": lax.max}
_WRITES = frozenset({"dynamic_update_slice", "scatter", "scatter-add", *_COMBINED})
#: Behind these a value of one unit is no longer one of that unit.
_MIXING = frozenset({"dot_general", "conv_general_dilated", "stop_gradient", "sort", "cumsum"})


@dataclasses.dataclass(frozen=True, eq=False)
class _Ring:
    """A state and what it becomes within the step, by writes at places along one axis.

    Attributes
    ----------
    axis : int
    variables : set of int
        The old state and what each write makes of it.
    found : mapping of int to Indexed
        By number of an operation that reads or writes one of these at a running index.
    """

    axis: int
    variables: frozenset[int]
    found: Mapping[int, Indexed]


def with_slots(graph: Graph, n_outputs: int, states: Sequence[int]) -> Graph:
    """``graph`` with those ring buffers among its states written out that feed back into a state."""
    if not any(operation.name in INDEXED for operation in graph.operations):
        return graph
    rings = []
    for old, new in zip(states, graph.outputs[n_outputs:], strict=True):
        ring = _ring(graph, old, new)
        if ring is not None and _feeds_back(graph, ring, n_outputs):
            rings.append(ring)
    return _written_out(graph, rings) if rings else graph


def _ring(graph: Graph, old: int, new: Operand) -> _Ring | None:
    """What a state is as a ring buffer; None where it is indexed otherwise."""
    aval = graph.avals[old]
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return None
    variables, found, waiting = {old}, {}, [old]
    while waiting:
        v = waiting.pop()
        for number in graph.read_by.get(v, ()):
            operation = graph.operations[number]
            if operation.name not in INDEXED or operation.inputs[0] != v:
                continue  # it reads all slots, put side by side
            if operation.inputs.count(v) != 1:
                return None
            places = indexed(graph, operation)
            if places is None or len(places.axes) != 1 or not _plain(operation, places):
                return None
            found[number] = places
            if operation.name not in READS:
                variables.add(operation.outputs[0])
                waiting.append(operation.outputs[0])
    axes = {axis for places in found.values() for axis in places.axes}
    ends = [o for o in graph.outputs if not isinstance(o, Constant) and o in variables]
    if len(axes) != 1 or ends != [new] or new == old:
        return None
    (axis,) = axes
    if aval.shape[axis] > MOST_PARTS:
        return None
    return _Ring(axis, frozenset(variables), found)


def _plain(operation: Operation, places: Indexed) -> bool:
    """Whether a read takes every element from somewhere, and a write puts few into one column of slots."""
    if operation.name in READS:
        return bool((places.places >= 0).all())
    here = places.places[places.places >= 0]
    return operation.name in _WRITES and np.bincount(here).max(initial=0) <= MOST_PARTS


def _feeds_back(graph: Graph, ring: _Ring, n_outputs: int) -> bool:
    """Whether something that is read reaches a new state by no operation that mixes units."""
    new = {v for v in graph.outputs[n_outputs:] if not isinstance(v, Constant)}
    waiting = {
        v
        for number, operation in enumerate(graph.operations)
        if any(u in ring.variables for u in operation.inputs if not isinstance(u, Constant))
        and (number not in ring.found or operation.name in READS)
        for v in operation.outputs
    }
    for operation in graph.operations:
        moving = any(v in waiting for v in operation.inputs if not isinstance(v, Constant))
        if moving and operation.name not in _MIXING:
            waiting.update(v for v in operation.outputs if graph.avals[v].differentiable)
    return not waiting.isdisjoint(new)


# --- the graph again --------------------------------------------------------------------------------------------------


def _written_out(graph: Graph, rings: Sequence[_Ring]) -> Graph:
    builder = GraphBuilder()
    env: dict[int, Operand] = {v: builder.variable(graph.avals[v]) for v in graph.inputs}
    inputs: tuple[Any, ...] = tuple(env.values())
    of_variable = {v: ring for ring in rings for v in ring.variables}
    slots: dict[int, list[Operand]] = {}

    def slots_of(v: int, ring: _Ring) -> list[Operand]:
        if v not in slots:
            count = graph.avals[v].shape[ring.axis]
            slots[v] = builder.call(
                lambda a: [lax.slice_in_dim(a, k, k + 1, axis=ring.axis) for k in range(count)], [env[v]], "?"
            )
        return slots[v]

    for number, operation in enumerate(graph.operations):
        values = [v if isinstance(v, Constant) else env[v] for v in operation.inputs]
        base = operation.inputs[0] if operation.inputs else None
        ring = None if isinstance(base, Constant) or base is None else of_variable.get(base)
        if ring is None or number not in ring.found:
            results = builder.emit(
                operation.primitive,
                operation.params,
                values,
                [graph.avals[v] for v in operation.outputs],
                operation.source,
                operation.loop,
            )
            env.update(zip(operation.outputs, results, strict=True))
            continue
        assert isinstance(base, int)
        places = ring.found[number]
        old, (result,) = slots_of(base, ring), operation.outputs
        if operation.name in READS:
            fn = _read(operation, places, graph.avals[result].shape, len(old))
            (env[result],) = builder.call(fn, [*old, *values[1:]], operation.source)
        else:
            fn = _write(operation, places, len(old))
            slots[result] = builder.call(fn, [*old, *values[1:]], operation.source)
            axis = ring.axis
            (env[result],) = builder.call(
                lambda *p, axis=axis: [lax.concatenate(p, axis)], slots[result], operation.source
            )
    outputs = tuple(v if isinstance(v, Constant) else env[v] for v in graph.outputs)
    return simplified(Graph(tuple(builder.avals), inputs, tuple(builder.operations), outputs))


def _read(
    operation: Operation, places: Indexed, shape: tuple[int, ...], count: int
) -> Callable[..., list[Array]]:
    """A choice among slots. What is left out is -0, which added to a number leaves every bit of it."""

    def fn(*args: Array) -> list[Array]:
        slots, indices = args[:count], args[count:]
        which, inside = _which(operation, places, indices, shape, count)
        parts = [
            jnp.where(which == k, _taken(slot, places.places), -jnp.zeros((), slot.dtype))
            for k, slot in enumerate(slots)
        ]
        total = functools.reduce(operator.add, parts)
        if inside is not None:
            fill = operation.params.get("fill_value")
            fill = jnp.nan if fill is None else fill
            total = jnp.where(inside, total, jnp.asarray(fill, total.dtype))
        return [total]

    return fn


def _write(operation: Operation, places: Indexed, count: int) -> Callable[..., list[Array]]:
    """For each slot a choice between what was there and what is new."""
    rounds = list(_one_at_each_place(places))

    def fn(*args: Array) -> list[Array]:
        slots, rest = list(args[:count]), list(args[count:])
        update = rest.pop((small_operand(operation) or 1) - 1)
        which, _ = _which(operation, places, rest, update.shape, count)
        for where in rounds:
            new, here = _taken(update, where), _taken(jnp.broadcast_to(which, update.shape), where)
            here = here if (where >= 0).all() else jnp.where(where >= 0, here, -1)
            if operation.name == "scatter-add":
                nothing = -jnp.zeros((), update.dtype)
                slots = [slot + jnp.where(here == k, new, nothing) for k, slot in enumerate(slots)]
            else:
                combine = _COMBINED.get(operation.name, lambda _, new: new)
                slots = [jnp.where(here == k, combine(slot, new), slot) for k, slot in enumerate(slots)]
        return slots

    return fn


def _one_at_each_place(places: Indexed) -> Iterator[Array]:
    """Flat elements of what is written by the places where they go, -1 where none does; of several for one place each in turn."""
    small = places.places.ravel()
    waiting = np.flatnonzero(small >= 0)
    while waiting.size:
        first = np.unique(small[waiting], return_index=True)[1]
        where = np.full(int(np.prod(places.reduced, dtype=np.int64)), -1)
        where[small[waiting[first]]] = waiting[first]
        yield where.reshape(places.reduced)
        waiting = np.delete(waiting, first)


def _which(
    operation: Operation, places: Indexed, indices: Sequence[Array], shape: tuple[int, ...], count: int
) -> tuple[Array, Array | None]:
    """The slot that each element of the small array is about, and whether there is one; None where there always is."""
    (axis,) = places.axes
    if "dimension_numbers" not in operation.params:  # starts are clipped
        return jnp.clip(indices[axis], 0, count - 1), None
    numbers = operation.params["dimension_numbers"]
    if operation.name == "gather":
        column, window = numbers.start_index_map.index(axis), numbers.offset_dims
    else:
        column, window = numbers.scatter_dims_to_operand_dims.index(axis), numbers.update_window_dims
    found = indices[0][..., column]
    found = found.reshape([n if d not in window else 1 for d, n in enumerate(shape)])
    found = jnp.broadcast_to(found, shape)
    if operation.params["mode"] in (lax.GatherScatterMode.FILL_OR_DROP, None):
        return found, (found >= 0) & (found < count)
    return jnp.clip(found, 0, count - 1), None


def _taken(value: Array, places: Array) -> Array:
    """Elements of an array by their flat places; zero stands for those that have none."""
    if places.size == value.size and (places.ravel() == np.arange(value.size)).all():
        return value.reshape(places.shape)
    return value.reshape(-1)[np.maximum(places, 0)]
