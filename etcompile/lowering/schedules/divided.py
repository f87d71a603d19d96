"""Products of joined operands, divided: of ``concatenate([x, h]) @ W`` what x makes need not be in the loop that makes h.

    [x, h] @ W = x @ W[:n] + h @ W[n:]

The first product is made for all steps at once. The loop then reads fewer rows of the weight at every step, and joins nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from etcompile.frontend.jaxpr import Aval, Constant, Graph, Operand, Operation, variables
from etcompile.lowering.joined import JoinedOperand

__all__ = ["divided_products"]

#: Numbers of a weight that the loop need not read for one that it reads instead, from where on it gains.
_WORTH = 8
#: Bytes of them below which nothing is gained: the nearest cache has them anyway, and each part is one more kernel.
_SMALL = 1 << 13


def divided_products(graph: Graph, weights: Sequence[int], states: Sequence[int]) -> Graph:
    """The graph with such products divided where it pays; variables that it has in common with ``graph`` keep their numbers.

    ``weights`` and ``states`` are inputs of the graph: what is made of a state changes within the loop, and what is made of
    weights alone does not change at all.
    """
    changing, fixed = set(states), set(weights)
    avals, operations = list(graph.avals), []
    for operation in graph.operations:
        reads = set(variables(operation.inputs))
        if not changing.isdisjoint(reads):
            changing.update(operation.outputs)
        elif reads and reads <= fixed:
            fixed.update(operation.outputs)
        found = _Product.of(graph, operation, changing, fixed)
        operations += found.divided(avals) if found is not None and found.pays else [operation]
    return dataclasses.replace(graph, avals=tuple(avals), operations=tuple(operations))


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product of a joined operand with a weight.

    Attributes
    ----------
    operation : Operation
    joined : JoinedOperand
    changing : list of bool
        Whether a part of it changes within the loop.
    avals : sequence of Aval
        Of the graph.
    """

    operation: Operation
    joined: JoinedOperand
    changing: list[bool]
    avals: Sequence[Aval]

    @classmethod
    def of(cls, graph: Graph, operation: Operation, changing: set[int], fixed: set[int]) -> _Product | None:
        """The product, if some of what it joins changes within the loop and some does not, and the other operand is a weight."""
        for operand in (0, 1):
            joined = JoinedOperand.of(graph, operation, operand)
            if joined is None or operation.inputs[1 - operand] not in fixed:
                continue
            moves = [isinstance(v, int) and v in changing for v in joined.parts]
            if any(moves) and not all(moves):
                return cls(operation, joined, moves, graph.avals)
        return None

    @property
    def _weight(self) -> int:
        weight = self.operation.inputs[1 - self.joined.operand]
        assert isinstance(weight, int)
        return weight

    @property
    def pays(self) -> bool:
        """Whether the loop has much less to read: without most rows of the weight, and with what they make.

        Not in 16 bits, since each part of the sum would be rounded.
        """
        weight, result = self.avals[self._weight], self.avals[self.operation.outputs[0]]
        if np.dtype(result.dtype).itemsize < 4:
            return False
        lengths = [b - a for a, b in itertools.pairwise(self.joined.ends)]
        outside = sum(n for n, moves in zip(lengths, self.changing, strict=True) if not moves)
        width = weight.size // max(1, weight.shape[self.joined.axis])
        gained = outside * width
        large = gained * np.dtype(weight.dtype).itemsize >= _SMALL
        return large and 2 * outside >= self.joined.ends[-1] and gained >= _WORTH * result.size

    def divided(self, avals: list[Aval]) -> list[Operation]:
        """The operations in its place; new variables are added to ``avals``."""
        new, joined = _New(avals, self.operation.source), self.joined
        result = self.avals[self.operation.outputs[0]]
        products = []
        for moves in (False, True):
            parts = [k for k, changing in enumerate(self.changing) if changing == moves]
            operand = new.joined([joined.parts[k] for k in parts], joined.dimension)
            rows = [new.rows(self._weight, joined.axis, *joined.ends[k : k + 2]) for k in parts]
            pair = [operand, new.joined(rows, joined.axis)]
            inputs = pair if joined.operand == 0 else pair[::-1]
            products.append(new.made(self.operation.primitive, self.operation.params, inputs, result))
        total = Operation(lax.add_p, {}, tuple(products), self.operation.outputs, self.operation.source)
        return [*new.operations, total]


@dataclasses.dataclass
class _New:
    """Operations that are added to a graph, with the variables that they make."""

    avals: list[Aval]
    source: str
    operations: list[Operation] = dataclasses.field(default_factory=list)

    def made(self, primitive: Any, params: dict[str, Any], inputs: Sequence[Operand], aval: Aval) -> int:
        self.avals.append(aval)
        variable = len(self.avals) - 1
        self.operations.append(Operation(primitive, params, tuple(inputs), (variable,), self.source))
        return variable

    def rows(self, array: int, axis: int, start: int, stop: int) -> int:
        aval = self.avals[array]
        starts, stops = [0] * len(aval.shape), list(aval.shape)
        starts[axis], stops[axis] = start, stop
        params = {"start_indices": tuple(starts), "limit_indices": tuple(stops), "strides": None}
        shape = tuple(b - a for a, b in zip(starts, stops, strict=True))
        return self.made(lax.slice_p, params, [array], dataclasses.replace(aval, shape=shape))

    def joined(self, parts: Sequence[Operand], axis: int) -> Operand:
        if len(parts) == 1:
            return parts[0]
        avals = [v.aval if isinstance(v, Constant) else self.avals[v] for v in parts]
        shape = list(avals[0].shape)
        shape[axis] = sum(a.shape[axis] for a in avals)
        aval = dataclasses.replace(avals[0], shape=tuple(shape))
        return self.made(lax.concatenate_p, {"dimension": axis}, parts, aval)
