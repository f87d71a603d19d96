"""Steps whose derivative by an old state may be infinite where the step itself is finite: a root at zero, a guarded quotient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

from etcompile.analysis.dependence import Dependence
from etcompile.analysis.loops import everywhere
from etcompile.frontend.jaxpr import Graph, Operand, Operation, inner_programs
from etcompile.frontend.step_model import StepModel

__all__ = ["STEEP_ELEMENTS", "may_be_steep"]

#: Operations on elements with a pole in the derivative, by the operand that comes near it.
STEEP_ELEMENTS: Mapping[str, int] = {
    "sqrt": 0,
    "rsqrt": 0,
    "cbrt": 0,
    "pow": 0,
    "log": 0,
    "log1p": 0,
    "acos": 0,
    "asin": 0,
    "acosh": 0,
    "atanh": 0,
    "erf_inv": 0,
    "div": 1,
}
#: The same of operations that mix elements.
_STEEP = {**STEEP_ELEMENTS, **dict.fromkeys(("cholesky", "eigh", "svd", "qr"), 0)}


def may_be_steep(model: StepModel, dep: Dependence, hidden: Iterable[int]) -> bool:
    """Whether one of these states, as the step finds it, reaches such an operation on the way to a new state or to an output.

    What lies between a new state and an output has a derivative by the new state alone, as it has in backpropagation.
    """
    hidden = list(hidden)
    graph, new = model.graph, {model.new_state_vars[s] for s in hidden}
    mask = sum(1 << len(model.params) + s for s in hidden)
    old, before = {model.state_vars[s] for s in hidden}, _before(graph, new)
    for number, operation in enumerate(graph.operations):
        reads_old = not old.isdisjoint(map(_variable, operation.inputs))
        if (reads_old or number in before) and _is_steep(operation, dep, mask):
            return True
        if reads_old:
            old.update(v for v in operation.outputs if v not in new)
    return False


def _before(graph: Graph, new: Set[int]) -> Set[int]:
    """Numbers of the operations that one of these variables is made of."""
    needed, found = set(new), set()
    for number in range(len(graph.operations) - 1, -1, -1):
        operation = graph.operations[number]
        if needed.intersection(operation.outputs):
            found.add(number)
            needed.update(v for v in operation.inputs if isinstance(v, int))
    return found


def _variable(operand: Operand) -> int:
    return operand if isinstance(operand, int) else -1


def _is_steep(operation: Operation, dep: Dependence, mask: int) -> bool:
    """Whether an operation, or one in the body of a loop, has its pole where what depends on the mask comes."""
    if any(dep.on(operation.inputs[k], mask) for k in _steep_operands(operation)):
        return True
    if operation.loop is None:
        return False
    inside = everywhere(operation.loop.body, dep.inside[operation.outputs[0]])
    return any(there.on(o.inputs[k], mask) for _, o, there in inside for k in _steep_operands(o))


def _steep_operands(operation: Operation) -> list[int]:
    if operation.name in _STEEP:
        return [_STEEP[operation.name]]
    inside = any(map(_steep_inside, inner_programs(operation.params)))
    return list(range(len(operation.inputs))) if inside else []


def _steep_inside(program: Any) -> bool:
    return any(
        eqn.primitive.name in _STEEP or any(map(_steep_inside, inner_programs(eqn.params)))
        for eqn in getattr(program, "jaxpr", program).eqns
    )
