"""Operations whose derivative is a surrogate: that of the function which they compute is zero wherever there is one.

A spike is the most common: 1 where the membrane is above threshold, with the derivative of a smooth function. A rounding whose
derivative is taken to be one is another. Functions with a derivative of their own for other reasons (relu, log-sum-exp) are none.
"""

from __future__ import annotations

from collections.abc import Mapping

from etcompile.analysis.dependence import Dependence, dependence
from etcompile.frontend.jaxpr import Constant, Graph, Operation, flatten_jaxpr, function_name, inner_jaxpr

__all__ = ["surrogates"]

_OWN_DERIVATIVE = ("custom_jvp_call", "custom_vjp_call")
#: A value and its derivative, as a primitive of another library declares them.
_DECLARED = "declared_derivative"
#: A spike whose primitive could not be looked into.
_SPIKE = "heaviside_surrogate_gradient"


def surrogates(graph: Graph) -> Mapping[int, str]:
    """By first result, the operations of a graph that have a surrogate derivative, each with the name of its function."""
    # Values of declared derivatives stand behind a stop_gradient, which says nothing of the function.
    found = dependence(graph, through=frozenset(["stop_gradient"]))
    return {
        operation.outputs[0]: function_name(operation) if operation.name in _OWN_DERIVATIVE else "spike"
        for operation in graph.operations
        if _is_surrogate(operation, found)
    }


def _is_surrogate(operation: Operation, found: Dependence) -> bool:
    if operation.name in _OWN_DERIVATIVE:
        return _is_flat(operation)
    return operation.name == _SPIKE or (operation.name == _DECLARED and not found.on(operation.inputs[0], -1))


def _is_flat(operation: Operation) -> bool:
    """Whether what an operation computes follows its operands, and its derivative, the surrogate apart, is zero."""
    closed = inner_jaxpr(operation.params)
    if closed is None:
        return False
    inner = flatten_jaxpr(closed)
    found = dependence(inner)
    results = [v for v in inner.outputs if not isinstance(v, Constant)]
    return any(found.value[v] for v in results) and not any(found.derivative[v] for v in results)
