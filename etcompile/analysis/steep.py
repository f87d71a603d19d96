"""Steps whose derivative by an old state may be infinite where the step itself is finite: a root at zero, a guarded quotient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from etcompile.analysis.dependence import Dependence
from etcompile.analysis.loops import everywhere
from etcompile.frontend.jaxpr import Operation, inner_programs
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
    """Whether one of these states reaches such an operation."""
    mask = 0
    for state in hidden:
        mask |= 1 << len(model.params) + state
    return any(
        there.on(operation.inputs[k], mask)
        for _, operation, there in everywhere(model.graph, dep)
        for k in _steep_operands(operation)
    )


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
