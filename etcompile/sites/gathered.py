"""Weights that meet a smaller array element by element: synapses, each of which reads the value of the unit that sends.

Of y[s] = w[s] x[pre[s]] the presynaptic value is x, with a number for each unit and not for each synapse. What is filtered is
filtered there, and gathered where it is used.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax

from etcompile.frontend.jaxpr import Aval, Constant, Graph, Operand, Operation, bind
from etcompile.ir.header import Site
from etcompile.sites.operation import Array, Presynaptic, WeightOperation, WeightUse

__all__ = ["Gathered", "known_zero"]

_IN_BOUNDS = lax.GatherScatterMode.PROMISE_IN_BOUNDS

#: Operations that only move elements, or repeat them.
_MOVES = frozenset({"gather", "broadcast_in_dim", "reshape", "squeeze", "transpose", "rev", "slice"})
#: Operations of single elements that often stand behind a gather: what they do can be done before it.
_POINTWISE = frozenset(
    {"convert_element_type", "stop_gradient", "copy", "neg", "mul", "gt", "ge", "lt", "le", "eq", "ne", "not"}
)


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where an array of y's size comes from: a smaller variable, of which ``pointwise`` is done and then ``moves``."""

    variable: int
    pointwise: tuple[Operation, ...]
    moves: tuple[Operation, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Gathered(WeightOperation):
    """y = w * (x, its elements moved and repeated at constant places); the factor has the shape of x.

    ``negated``: the other operand selects where w does *not* count.
    """

    name = "gathered"
    by_element = True

    origin: _Origin | None = None
    negated: bool = False

    @classmethod
    def recognise(cls, use: WeightUse) -> bool:
        other = _other(use)
        return other is not None and _origin(use.graph, other) is not None

    @classmethod
    def at(cls, use: WeightUse, params: tuple[str, ...]) -> Gathered:
        other = _other(use)
        assert other is not None
        origin = _origin(use.graph, other)
        assert origin is not None
        found = WeightOperation.at(use, params)
        reads = (use.graph.aval(origin.variable),)
        negated = use.name == "select_n" and use.operand == 1
        return cls(params, found.weight, found.y, use.operation, use.operand, reads, origin, negated)

    @property
    def shared(self) -> tuple[tuple[int, int], ...]:
        return tuple((axis, axis) for axis in range(len(self.weight.shape)))

    @staticmethod
    def factor_shape(site: Site) -> tuple[int, ...]:
        return site.presynaptic[0]

    def presynaptic(self, env: dict[int, Array]) -> Presynaptic:
        assert self.origin is not None
        return (env[self.origin.variable],)

    def factor(self, x: Presynaptic) -> Array:
        assert self.origin is not None
        value = _run(self.origin.pointwise, x[0])
        return (jnp.logical_not(value) if self.negated else value).astype(self.y.dtype)

    def logical(self, factor: Array) -> Array:
        assert self.origin is not None
        return _run(self.origin.moves, factor)

    def apply(self, weight: Array, x: Presynaptic) -> Array:
        return self.respond(weight, x)

    def respond(self, v: Array, x: Presynaptic | Array) -> Array:
        return (v * self.logical(self.factor(x) if isinstance(x, tuple) else x)).astype(self.y.dtype)

    def pullback(self, x: Presynaptic | Array, credit: Array) -> Array:
        moved = self.logical(self.factor(x) if isinstance(x, tuple) else x)
        return (moved * credit).astype(self.weight.dtype)


def _run(operations: tuple[Operation, ...], value: Array) -> Array:
    for operation in operations:
        values = [v.value if isinstance(v, Constant) else value for v in operation.inputs]
        (value,) = bind(operation, values)
    return value


def _other(use: WeightUse) -> Operand | None:
    """What the weight is multiplied by element by element; None where it is not."""
    if not _same_float(use):
        return None
    inputs = use.operation.inputs
    if use.name == "mul" or (use.name == "dot_general" and _by_element(use)):
        return inputs[1 - use.operand]
    if use.name == "select_n" and len(inputs) == 3 and use.operand > 0:
        selects = use.avals[0] == Aval(use.avals[1].shape, np.dtype(bool))
        return inputs[0] if selects and known_zero(use.graph, inputs[3 - use.operand]) else None
    return None


def _same_float(use: WeightUse) -> bool:
    """Whether weight and result are alike, and real; what only tells the host of a weight has no result."""
    if not use.operation.outputs:
        return False
    weight, y = use.avals[use.operand], use.graph.aval(use.operation.outputs[0])
    return weight == y and bool(jnp.issubdtype(y.dtype, jnp.floating))


def _by_element(use: WeightUse) -> bool:
    """Whether a ``dot_general`` is a product of elements: all axes are axes of its batch, in order."""
    contracted, batch = use.params["dimension_numbers"]
    every = tuple(range(len(use.avals[0].shape)))
    return not any(map(len, contracted)) and all(tuple(axes) == every for axes in batch)


def known_zero(graph: Graph, operand: Operand) -> bool:
    """Whether an operand is known to be zero."""
    if isinstance(operand, Constant):
        return not np.any(operand.value)
    number = graph.made_by.get(operand)
    made = None if number is None else graph.operations[number]
    return made is not None and made.name == "broadcast_in_dim" and known_zero(graph, made.inputs[0])


def _origin(graph: Graph, operand: Operand) -> _Origin | None:
    """The smallest array of which an operand is made by moves at constant places; None where it is none smaller."""
    if isinstance(operand, Constant):
        return None
    path: list[Operation] = []
    origin, steps = operand, 0
    while (behind := _behind(graph, operand)) is not None:
        operation, operand = behind
        path.append(operation)
        if graph.avals[operand].size < graph.avals[origin].size:
            origin, steps = operand, len(path)
    if not steps:
        return None
    first = path[:steps][::-1]
    pointwise = tuple(operation for operation in first if operation.name in _POINTWISE)
    return _Origin(origin, pointwise, tuple(operation for operation in first if operation.name in _MOVES))


def _behind(graph: Graph, variable: int) -> tuple[Operation, int] | None:
    """The operation that makes a variable of one other, if it moves elements or changes each by constants."""
    number = graph.made_by.get(variable)
    if number is None:
        return None
    operation = graph.operations[number]
    varying = [v for v in operation.inputs if not isinstance(v, Constant)]
    others = [v for v in operation.inputs if isinstance(v, Constant)]
    if len(varying) != 1 or isinstance(varying[0], Constant):
        return None
    moves = operation.name in _MOVES and operation.inputs[0] == varying[0] and _within_bounds(operation)
    pointwise = operation.name in _POINTWISE and all(v.aval.shape == () for v in others)
    return (operation, varying[0]) if moves or pointwise else None


def _within_bounds(operation: Operation) -> bool:
    return operation.params.get("mode", _IN_BOUNDS) == _IN_BOUNDS
