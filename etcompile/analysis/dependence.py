"""Which parameters, states and inputs every variable depends on, and which of them with a derivative.

Dependence is kept as bit sets in plain integers, one bit per graph input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from etcompile.frontend.jaxpr import Constant, Graph, Operand, Operation
from etcompile.frontend.loops import Loop

__all__ = ["NO_DERIVATIVE", "NO_REVERSE", "Dependence", "dependence", "dependence_given"]

#: Primitives that pass no derivative, whatever the dtype of their result.
NO_DERIVATIVE = {"stop_gradient", "argmax", "argmin", "sign", "floor", "ceil", "round", "is_finite"}
#: Primitives with a forward derivative only: no rule passes credit back through them, and a cut says so.
NO_REVERSE = {"while"}


@dataclasses.dataclass(frozen=True, eq=False)
class Dependence:
    """Bit sets per variable: ``value`` for any dependence, ``derivative`` for those with a derivative.

    ``inside`` has, by the first result of each loop, those of the variables of its body.
    """

    value: tuple[int, ...]
    derivative: tuple[int, ...]
    inside: Mapping[int, Dependence] = dataclasses.field(default_factory=dict)

    def on(self, operand: Operand, mask: int) -> bool:
        return not isinstance(operand, Constant) and bool(self.derivative[operand] & mask)


def dependence(graph: Graph, *, through: frozenset[str] = frozenset()) -> Dependence:
    """Dependence of every variable; operations named in ``through`` count as if they passed a derivative."""
    bits = [1 << bit for bit in range(len(graph.inputs))]
    moving = [b if graph.avals[v].differentiable else 0 for b, v in zip(bits, graph.inputs, strict=True)]
    return dependence_given(graph, bits, moving, through)


def dependence_given(
    graph: Graph, bits: Sequence[int], moving: Sequence[int], through: frozenset[str] = frozenset()
) -> Dependence:
    """What the variables depend on, given what the inputs depend on, at all and with a derivative."""
    value = [0] * len(graph.avals)
    derivative = [0] * len(graph.avals)
    inside: dict[int, Dependence] = {}
    for variable, b, m in zip(graph.inputs, bits, moving, strict=True):
        value[variable], derivative[variable] = b, m
    for operation in graph.operations:
        if operation.loop is not None:
            found = _of_loop(operation, operation.loop, value, derivative, through)
            inside[operation.outputs[0]] = found
            everything = 0  # to have one of its results the whole loop has to run
            for v in operation.inputs:
                everything |= 0 if isinstance(v, Constant) else value[v]
            for v, result in zip(operation.outputs, operation.loop.body.outputs, strict=True):
                assert isinstance(result, int)
                value[v], derivative[v] = everything, found.derivative[result]
            continue
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
    return Dependence(tuple(value), tuple(derivative), inside)


def _of_loop(
    operation: Operation, loop: Loop, value: Sequence[int], derivative: Sequence[int], through: frozenset[str]
) -> Dependence:
    """What the variables of a loop's body depend on in any round."""
    inputs = operation.inputs[: loop.operands]
    bits = [0 if isinstance(v, Constant) else value[v] for v in inputs]
    moving = [0 if isinstance(v, Constant) else derivative[v] for v in inputs]
    while True:
        found = dependence_given(loop.body, bits, moving, through)
        before = (*bits, *moving)
        for k, result in enumerate(loop.body.outputs[: loop.carried], loop.constants):
            assert isinstance(result, int)
            bits[k] |= found.value[result]
            moving[k] |= found.derivative[result]
        if (*bits, *moving) == before:
            return found
