"""Operands of products that join several arrays: ``concatenate([x, h]) @ W`` is ``x @ W[:n] + h @ W[n:]``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Set
from typing import Any

import numpy as np
from jax import lax

from etcompile.frontend.jaxpr import Graph, Operand, Operation
from etcompile.lowering.transposes import written_pullback

__all__ = ["JoinedOperand", "pullback_to_parts"]

Array = Any


@dataclasses.dataclass(frozen=True)
class JoinedOperand:
    """A product's operand that is made by joining arrays along an axis over which the product sums.

    Attributes
    ----------
    operand : int
        Which of its operands that is.
    variable, joining : int
        The operand, and the number of the operation that makes it.
    parts : tuple of int or Constant
        What it joins.
    dimension, axis : int
        The axis along which, and that of the other operand which meets it.
    ends : tuple of int
        Where along it a part begins, and the last one ends.
    """

    operand: int
    variable: int
    joining: int
    parts: tuple[Operand, ...]
    dimension: int
    axis: int
    ends: tuple[int, ...]

    @classmethod
    def of(cls, graph: Graph, operation: Operation, operand: int) -> JoinedOperand | None:
        """The operand, if the operation is a product and it is so made."""
        if operation.name != "dot_general":
            return None
        variable = operation.inputs[operand]
        if not isinstance(variable, int) or variable not in graph.made_by:
            return None
        joining = graph.operations[graph.made_by[variable]]
        contracted, _ = operation.params["dimension_numbers"]
        if joining.name != "concatenate" or joining.params["dimension"] not in contracted[operand]:
            return None
        dimension = joining.params["dimension"]
        axis = int(contracted[1 - operand][list(contracted[operand]).index(dimension)])
        sizes = [graph.aval(v).shape[dimension] for v in joining.inputs]
        ends = (0, *np.cumsum(sizes).tolist())
        return cls(operand, variable, graph.made_by[variable], joining.inputs, dimension, axis, ends)

    def asked_for(self, reach: Set[int]) -> tuple[int, ...]:
        """Numbers of the parts that are among these variables."""
        return tuple(k for k, v in enumerate(self.parts) if isinstance(v, int) and v in reach)


def pullback_to_parts(
    operation: Operation, joined: JoinedOperand, asked: tuple[int, ...], operands: list[Array], result: Array
) -> Callable[[Array], list[tuple[int, Array]]] | None:
    """From a cotangent of a product to those of some parts of an operand; None where it has to be traced."""
    k, other = joined.operand, 1 - joined.operand

    def rows(value: Array, axis: int) -> Array:
        found = [lax.slice_in_dim(value, *joined.ends[p : p + 2], axis=axis) for p in asked]
        return found[0] if len(found) == 1 else lax.concatenate(found, axis)

    narrow = list(operands)
    narrow[k], narrow[other] = rows(operands[k], joined.dimension), rows(operands[other], joined.axis)
    pull = written_pullback(operation, narrow, [result], (k,))
    if pull is None:
        return None

    def pullback(cotangent: Array) -> list[tuple[int, Array]]:
        (found,) = pull([cotangent])
        cotangents, start = [], 0
        for p in asked:
            variable, stop = joined.parts[p], start + joined.ends[p + 1] - joined.ends[p]
            assert isinstance(variable, int)
            part = found if len(asked) == 1 else lax.slice_in_dim(found, start, stop, axis=joined.dimension)
            cotangents.append((variable, part))
            start = stop
        return cotangents

    return pullback
