"""States of which one axis is two: values side by side for each unit, in one array without an axis of their own.

``s[..., ::2]`` and ``s[..., 1::2]``, or ``s.reshape(n, 2)[:, 0]``, read such a state. In the graph it then has both axes, so
that it is found to be packed along one of them as any other state is (:mod:`etcompile.frontend.state_forms`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from jax import lax

from etcompile.frontend.jaxpr import Aval, Constant, Graph, GraphBuilder, Operand, Operation

__all__ = ["view_of", "with_views"]

Array = Any
Shape = tuple[int, ...]


def view_of(graph: Graph, old: int) -> Shape | None:
    """The one shape in which a state is read that divides one of its axes; None where there is none, or several."""
    if not graph.avals[old].differentiable or old in graph.outputs:
        return None
    reads = [graph.operations[n] for n in graph.read_by.get(old, ())]
    views = {_view(operation, graph.avals[old].shape) for operation in reads} - {None}
    return views.pop() if len(views) == 1 else None


def _view(operation: Operation, shape: Shape) -> Shape | None:
    """The shape by which an operation reads a state of this one, an axis divided in two."""
    if operation.name == "reshape":
        view = tuple(operation.params["new_sizes"])
        axis = _divided(shape, view)
        return view if axis is not None and 1 not in view[axis : axis + 2] else None
    turn = _turn(operation, shape)
    if turn is None:
        return None
    axis, _, stride = turn
    return (*shape[:axis], shape[axis] // stride, stride, *shape[axis + 1 :])


def _turn(operation: Operation, shape: Shape) -> tuple[int, int, int] | None:
    """Axis, start and stride of a slice that takes every so-manieth element, from one of the first to the last such."""
    strides = operation.params["strides"] if operation.name == "slice" else None
    axes = [axis for axis, stride in enumerate(strides or ()) if stride != 1]
    if len(axes) != 1:
        return None
    (axis,) = axes
    start, stop, stride = (
        operation.params[key][axis] for key in ("start_indices", "limit_indices", "strides")
    )
    whole = shape[axis] % stride == 0 and start < stride and stop > shape[axis] - stride + start
    return (axis, start, stride) if whole and _whole_beside(operation, shape, axis) else None


def _whole_beside(operation: Operation, shape: Shape, axis: int) -> bool:
    """Whether a slice takes all of the other axes."""
    bounds = zip(operation.params["start_indices"], operation.params["limit_indices"], strict=True)
    return all(d == axis or (0, n) == b for d, (n, b) in enumerate(zip(shape, bounds, strict=True)))


def _part(operation: Operation, shape: Shape, view: Shape) -> tuple[int, int, int] | None:
    """Axis, start and stop in a view of what a slice takes of a state: a turn, or whole entries of the first of the two axes."""
    axis = _divided(shape, view)
    if operation.name != "slice" or axis is None:
        return None
    if (turn := _turn(operation, shape)) is not None:
        _, start, _ = turn
        return (axis + 1, start, start + 1) if _view(operation, shape) == view else None
    if set(operation.params["strides"] or (1,)) != {1} or not _whole_beside(operation, shape, axis):
        return None
    start, stop = (operation.params[key][axis] for key in ("start_indices", "limit_indices"))
    inner = view[axis + 1]
    return (axis, start // inner, stop // inner) if start % inner == stop % inner == 0 else None


def _divided(shape: Shape, view: Shape) -> int | None:
    """The axis that is two in a view; None where more is changed."""
    if len(view) != len(shape) + 1:
        return None
    axis = next((d for d, (a, b) in enumerate(zip(shape, view, strict=False)) if a != b), None)
    if axis is None or view[axis + 2 :] != shape[axis + 1 :]:
        return None
    return axis if math.prod(view[axis : axis + 2]) == shape[axis] else None


def with_views(graph: Graph, first: int, n_outputs: int, views: Sequence[Shape | None]) -> Graph:
    """``graph`` with the states from input number ``first`` on in these shapes, where one is given."""
    builder = GraphBuilder()
    env: dict[int, Operand] = {}
    viewed: dict[int, Shape] = {}
    inputs = []
    for k, v in enumerate(graph.inputs):
        view = views[k - first] if first <= k < first + len(views) else None
        aval = graph.avals[v]
        inputs.append(builder.variable(aval if view is None else Aval(view, aval.dtype)))
        env[v] = inputs[-1]
        if view is not None:
            viewed[v] = view
    for operation in graph.operations:
        source = operation.inputs[0] if operation.inputs else None
        read = (
            _read(graph, operation, viewed[source]) if isinstance(source, int) and source in viewed else None
        )
        if read is not None and isinstance(source, int):
            (env[operation.outputs[0]],) = builder.call(
                lambda v, r=read: [r(v)], [env[source]], operation.source
            )
            continue
        operands = [v if isinstance(v, Constant) else env[v] for v in operation.inputs]
        for k, v in enumerate(operation.inputs):
            if isinstance(v, int) and v in viewed:  # who reads all of it reads the state as it is
                own = graph.avals[v].shape
                (operands[k],) = builder.call(
                    lambda u, own=own: [lax.reshape(u, own)], [env[v]], operation.source
                )
        avals = [graph.avals[v] for v in operation.outputs]
        results = builder.emit(
            operation.primitive, operation.params, operands, avals, operation.source, operation.loop
        )
        env.update(zip(operation.outputs, results, strict=True))
    outputs: list[Operand] = [v if isinstance(v, Constant) else env[v] for v in graph.outputs]
    for k, view in enumerate(views, n_outputs):
        if view is not None:
            outputs[k] = _written(builder, graph, graph.outputs[k], outputs[k], env, view)
    return Graph(tuple(builder.avals), tuple(inputs), tuple(builder.operations), tuple(outputs))


def _read(graph: Graph, operation: Operation, view: Shape) -> Callable[[Array], Array] | None:
    """How an operation that takes a state apart takes apart its view; None for any other."""
    (operand, *_), (result, *_) = operation.inputs, operation.outputs
    own, shape = graph.aval(operand).shape, graph.avals[result].shape
    if operation.name == "reshape":
        return (lambda v: v) if shape == view else None
    found = _part(operation, own, view)
    if found is None:
        return None
    axis, start, stop = found
    return lambda v: lax.reshape(lax.slice_in_dim(v, start, stop, axis=axis), shape)


def _written(
    builder: GraphBuilder, graph: Graph, new: Operand, value: Operand, env: dict[int, Operand], view: Shape
) -> Operand:
    """A new state in its view: what was given another shape last, before that, or the state reshaped."""
    made = graph.made_by.get(new) if isinstance(new, int) else None
    if made is not None and graph.operations[made].name == "reshape":
        (before,) = graph.operations[made].inputs
        if graph.aval(before).shape == view:
            return before if isinstance(before, Constant) else env[before]
    return builder.call(lambda v: [lax.reshape(v, view)], [value], "?")[0]
