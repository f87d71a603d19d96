"""How a state of the model stands in the graph: as it is, as real and imaginary part, or as the parts that it holds side by side.

A state is *packed* along an axis where its old value is read part by part along it: ``state[..., 0]``, ``state[..., 1]``,
``jnp.split(state, 2, -1)``, the slots of a shift register, a rotation by a constant matrix. Its parts then are states of their
own, so that what one part does to another is found as for any two states. Where it is read as a whole too, by a weight or by the
output, it is packed if its new value is put together of parts along the same axis, or turned, or if it has an axis for its parts
alone (:mod:`etcompile.frontend.viewed_states`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from etcompile.frontend.jaxpr import Aval, Constant, Graph, Operand, Operation, bind

__all__ = ["MOST_PARTS", "StateForm", "join_states", "put_together", "split_states", "state_form"]

Array = Any

#: Parts beyond which a state stays in one: each pair of them has an entry in the transition of a unit.
MOST_PARTS = 32
#: Elements of an axis over which a constant matrix is a rotation of a unit's own values, and no connection between units.
_MOST_TURNED = 2
#: Which operand of an operation that sets elements of its first one has their new values.
_UPDATES = {"scatter": 2, "dynamic_update_slice": 1}


@dataclasses.dataclass(frozen=True)
class StateForm:
    """The arrays by which one state stands in the graph.

    Attributes
    ----------
    complex : bool
        Whether these are its real and its imaginary part.
    axis : int
        Along which it is divided otherwise.
    bounds : tuple of int
        Where its parts begin along the axis, and where the last one ends; nothing for a state that stands as it is.
    own, view : tuple of int, optional
        The state's shape, and that in which it is divided, where one axis is two there
        (:mod:`etcompile.frontend.viewed_states`).
    """

    complex: bool = False
    axis: int = 0
    bounds: tuple[int, ...] = ()
    own: tuple[int, ...] = ()
    view: tuple[int, ...] = ()

    @property
    def parts(self) -> int:
        return 2 if self.complex else max(len(self.bounds) - 1, 1)

    def names(self, path: str) -> list[str]:
        if self.complex:
            return [f"{path}.re", f"{path}.im"]
        return [f"{path}.{k}" for k in range(self.parts)] if self.bounds else [path]

    def avals(self, aval: Aval) -> list[Aval]:
        if self.complex:
            return [Aval(aval.shape, jnp.finfo(aval.dtype).dtype)] * 2
        aval = Aval(self.view, aval.dtype) if self.view else aval
        if not self.bounds:
            return [aval]
        widths = np.diff(self.bounds).tolist()
        before, after = aval.shape[: self.axis], aval.shape[self.axis + 1 :]
        return [Aval((*before, width, *after), aval.dtype) for width in widths]

    def split(self, value: Array) -> list[Array]:
        if self.complex:
            return [jnp.real(value), jnp.imag(value)]
        value = lax.reshape(value, self.view) if self.view else value
        if not self.bounds:
            return [value]
        return [
            lax.slice_in_dim(value, start, stop, axis=self.axis)
            for start, stop in itertools.pairwise(self.bounds)
        ]

    def join(self, parts: Sequence[Array]) -> Array:
        if self.complex:
            return lax.complex(*parts)
        whole = lax.concatenate(list(parts), self.axis) if self.bounds else parts[0]
        return lax.reshape(whole, self.own) if self.view else whole


def split_states(leaves: Sequence[Array], forms: Sequence[StateForm]) -> list[Array]:
    """Arrays of the graph from states of the model."""
    return [part for leaf, form in zip(leaves, forms, strict=True) for part in form.split(leaf)]


def join_states(parts: Sequence[Array], forms: Sequence[StateForm]) -> list[Array]:
    """States of the model from arrays of the graph."""
    it = iter(parts)
    return [form.join(list(itertools.islice(it, form.parts))) for form in forms]


def state_form(graph: Graph, old: int, new: Operand, viewed: bool = False) -> StateForm:
    """How a state should stand in a graph that takes it as variable ``old`` and gives it as ``new``.

    ``viewed``: it has an axis there that it was given for its parts.
    """
    aval = graph.avals[old]
    if jnp.issubdtype(aval.dtype, jnp.complexfloating):
        return StateForm(complex=True)
    if not aval.differentiable or old in graph.outputs:
        return StateForm()
    operations = [graph.operations[n] for n in graph.read_by.get(old, ())]
    reads = [_read(graph, operation, old) for operation in operations]
    axes = {axis for axis, _ in reads if axis is not None}
    if len(axes) != 1:
        return StateForm()
    (axis,) = axes
    turned = any(o.name == "dot_general" and _rotated(o, old, aval.shape) for o in operations)
    divided = viewed or turned or _assembled(graph, new, axis)
    if any(found is None for found, _ in reads) and not divided:
        return StateForm()
    size = aval.shape[axis]
    bounds = _closed(graph, old, new, axis, {0, size, *(b for _, found in reads for b in found)})
    if not 3 <= len(bounds) <= MOST_PARTS + 1:
        return StateForm()
    return StateForm(axis=axis, bounds=tuple(sorted(bounds)))


def _assembled(graph: Graph, new: Operand, axis: int) -> bool:
    """Whether a new state is put together of pieces along an axis: its old value is packed, who reads it as a whole or not."""
    return len(list(_pieces(graph, new, axis))) > 1


def _read(graph: Graph, operation: Operation, old: int) -> tuple[int | None, tuple[int, ...]]:
    """The one axis along which an operation takes a state apart, and where; None for any other use."""
    shape = graph.avals[old].shape
    nothing = None, ()
    if operation.inputs.count(old) != 1:
        return nothing
    params = operation.params
    if operation.name == "slice" and set(params["strides"] or (1,)) == {1}:
        starts, stops = params["start_indices"], params["limit_indices"]
        cut = [d for d, size in enumerate(shape) if (starts[d], stops[d]) != (0, size)]
        return (cut[0], (starts[cut[0]], stops[cut[0]])) if len(cut) == 1 else nothing
    if operation.name == "split":
        return params["axis"], tuple(np.cumsum(params["sizes"]).tolist())
    if operation.name == "unstack":
        return params["axis"], tuple(range(shape[params["axis"]]))
    if operation.name == "dot_general":
        return _rotated(operation, old, shape) or nothing
    if operation.name in _UPDATES and operation.inputs[0] == old:
        return _set_in(graph, operation) or nothing
    return nothing


def _set_in(graph: Graph, operation: Operation) -> tuple[int, tuple[int, ...]] | None:
    """The axis along which parts are set to something else, at constant places, and where these begin and end."""
    values: list[Any] = [v.value if isinstance(v, Constant) else None for v in operation.inputs]
    update, shape = _UPDATES[operation.name], graph.aval(operation.inputs[0]).shape
    if any(v is None for k, v in enumerate(values) if k not in (0, update)):
        return None
    with jax.ensure_compile_time_eval():
        values[0], values[update] = jnp.zeros(shape), jnp.ones(graph.aval(operation.inputs[update]).shape)
        here = np.asarray(bind(operation, values)[0]) != 0
    for axis in range(len(shape)):
        others = tuple(d for d in range(len(shape)) if d != axis)
        lines = here.all(others)
        if lines.any() and not lines.all() and (lines == here.any(others)).all():
            return axis, tuple((np.flatnonzero(np.diff(lines, prepend=False, append=False))).tolist())
    return None


def _rotated(operation: Operation, old: int, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]] | None:
    """A product with a constant matrix over one axis of a few elements."""
    contracted, batch = operation.params["dimension_numbers"]
    mine = operation.inputs.index(old)
    if not isinstance(operation.inputs[1 - mine], Constant) or len(contracted[mine]) != 1 or batch[mine]:
        return None
    axis = contracted[mine][0]
    return (axis, tuple(range(shape[axis]))) if shape[axis] <= _MOST_TURNED else None


def _closed(graph: Graph, old: int, new: Operand, axis: int, bounds: set[int]) -> set[int]:
    """Bounds with those of what the new state is put together of; where parts move along the axis, from both sides."""
    moves = []
    for start, stop, operand in _pieces(graph, new, axis):
        bounds |= {start, stop}
        made = graph.made_by.get(operand) if isinstance(operand, int) else None
        operation = None if made is None else graph.operations[made]
        if operation is not None and operation.name == "slice" and operation.inputs[0] == old:
            moves.append((start, stop, operation.params["start_indices"][axis] - start))
    size = graph.avals[old].shape[axis]
    while len(bounds) <= min(size, MOST_PARTS) + 1:
        more = {b + shift for start, stop, shift in moves for b in bounds if start <= b <= stop}
        more |= {b - shift for start, stop, shift in moves for b in bounds if start <= b - shift <= stop}
        if more <= bounds:
            break
        bounds = bounds | more
    return bounds


def _pieces(graph: Graph, new: Operand, axis: int) -> Iterator[tuple[int, int, Operand]]:
    """What a new state is put together of along an axis, with what is set in it afterwards."""
    while isinstance(new, int) and new in graph.made_by:
        operation = graph.operations[graph.made_by[new]]
        if operation.name in _UPDATES:
            where = _set_in(graph, operation)
            if where is not None and where[0] == axis and len(where[1]) == 2:
                yield (*where[1], operation.inputs[_UPDATES[operation.name]])
        elif operation.name not in ("copy", "copy_p", "name"):
            yield from put_together(graph, operation, axis)
            return
        new = operation.inputs[0]


def put_together(graph: Graph, operation: Operation, axis: int) -> Iterator[tuple[int, int, Operand]]:
    """Start, stop and operand of each piece, where an operation puts pieces side by side along an axis."""
    if operation.name == "concatenate" and operation.params["dimension"] == axis:
        ends = np.cumsum([graph.aval(v).shape[axis] for v in operation.inputs]).tolist()
        yield from zip([0, *ends[:-1]], ends, operation.inputs, strict=True)
    if operation.name == "stack" and operation.params["axis"] == axis:
        yield from ((k, k + 1, v) for k, v in enumerate(operation.inputs))
