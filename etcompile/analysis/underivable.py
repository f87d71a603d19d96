"""Operations that JAX cannot differentiate: credit that would have to pass one is refused."""

from __future__ import annotations

from etcompile.analysis.dependence import Dependence
from etcompile.analysis.loops import everywhere
from etcompile.errors import ModelError
from etcompile.frontend.jaxpr import Constant, Graph, Operation, asks_inside, without_derivative
from etcompile.frontend.step_model import StepModel

__all__ = ["refuse_without_derivative"]


def refuse_without_derivative(model: StepModel, dep: Dependence) -> None:
    """Raise :class:`ModelError` where credit of a trained parameter would have to pass an operation without a derivative."""
    graph = model.graph
    shadowed = [
        op
        for where, op, _ in everywhere(graph, dep)
        if (without_derivative(op) or asks_inside(op)) and _differentiable(where, op)
    ]
    if not shadowed:
        return
    reached = _trained(model, dep)
    for where, operation, there in everywhere(graph, dep):
        if where is not graph and operation in shadowed:  # in the rounds of a loop
            _refuse(model, operation, there, reached)
    needed = {v for v in (*model.output_vars, *model.new_state_vars) if not isinstance(v, Constant)}
    for operation in reversed(graph.operations):
        if not needed.intersection(v for v in operation.outputs if graph.avals[v].differentiable):
            continue
        if operation in shadowed:
            _refuse(model, operation, dep, reached)
        if operation.name != "stop_gradient":
            needed.update(v for v in operation.inputs if not isinstance(v, Constant))


def _refuse(model: StepModel, operation: Operation, dep: Dependence, reached: int) -> None:
    """Refuse an operation that what is trained reaches."""
    if not any(dep.on(v, reached) for v in operation.inputs):
        return
    names = [
        leaf.path
        for bit, leaf in enumerate((*model.params, *model.states))
        if reached >> bit & 1 and any(dep.on(v, 1 << bit) for v in operation.inputs)
    ]
    if asks_inside(operation):
        what = "asks the host for values inside of it: for a derivative they would be asked for again"
        expected = "effects that happen once per step"
        hint = (
            "call the host outside of the condition or loop; or apply jax.lax.stop_gradient to all that it reads; or use "
            "jax.pure_callback, which may be asked as often as needed."
        )
    else:
        what, expected = "has no derivative", "an operation that JAX can differentiate"
        hint = (
            "give it a derivative with jax.custom_jvp or jax.custom_vjp; or, if no credit shall pass, apply it to "
            "jax.lax.stop_gradient(value)."
        )
    raise ModelError(
        f"the credit of {', '.join(names[:3])} would have to pass {operation.name}, which {what}.",
        where=operation.source,
        got=f"{operation.name} of values that depend on trained parameters",
        expected=expected,
        hint=hint,
    )


def _differentiable(graph: Graph, operation: Operation) -> bool:
    return any(graph.avals[v].differentiable for v in operation.outputs)


def _trained(model: StepModel, dep: Dependence) -> int:
    """Bits of the trained parameters, and of the states that carry their credit from step to step."""
    found = (1 << len(model.params)) - 1
    while True:
        more = found
        for k, v in enumerate(model.new_state_vars):
            if dep.on(v, found):
                more |= 1 << (len(model.params) + k)
        if more == found:
            return found
        found = more
