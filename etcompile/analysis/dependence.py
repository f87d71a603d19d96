"""Which parameters, states and inputs every variable depends on, and which of them with a derivative.

Dependence is kept as bit sets in plain integers, one bit per graph input.
"""

from __future__ import annotations

import dataclasses

from etcompile.frontend.jaxpr import Constant, Graph, Operand

__all__ = ["NO_DERIVATIVE", "NO_REVERSE", "Dependence", "dependence"]

#: Primitives that pass no derivative, whatever the dtype of their result.
NO_DERIVATIVE = {"stop_gradient", "argmax", "argmin", "sign", "floor", "ceil", "round", "is_finite"}
#: Primitives with a forward derivative only: no rule passes credit back through them, and a cut says so.
NO_REVERSE = {"while"}


@dataclasses.dataclass(frozen=True, eq=False)
class Dependence:
    """Bit sets per variable: ``value`` for any dependence, ``derivative`` for those with a derivative."""

    value: tuple[int, ...]
    derivative: tuple[int, ...]

    def on(self, operand: Operand, mask: int) -> bool:
        return not isinstance(operand, Constant) and bool(self.derivative[operand] & mask)


def dependence(graph: Graph, *, through: frozenset[str] = frozenset()) -> Dependence:
    """Dependence of every variable; operations named in ``through`` count as if they passed a derivative."""
    value = [0] * len(graph.avals)
    derivative = [0] * len(graph.avals)
    for bit, variable in enumerate(graph.inputs):
        value[variable] = 1 << bit
        derivative[variable] = (1 << bit) if graph.avals[variable].differentiable else 0
    for operation in graph.operations:
        variables = [v for v in operation.inputs if not isinstance(v, Constant)]
        all_values = 0
        all_derivatives = 0
        for v in variables:
            all_values |= value[v]
            all_derivatives |= derivative[v]
        for v in operation.outputs:
            value[v] = all_values
            if graph.avals[v].differentiable and operation.name not in (NO_DERIVATIVE | NO_REVERSE) - through:
                derivative[v] = all_derivatives
    return Dependence(tuple(value), tuple(derivative))
