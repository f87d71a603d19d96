"""Whether a map of cotangents is linear: a backward rule of the user's own may clip what comes back, and then has no Jacobian."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from etcompile.analysis.index_rules import ELEMENTWISE
from etcompile.frontend.jaxpr import Constant, Graph, Operation

__all__ = ["linear"]

#: Operations on elements that are linear in all operands together.
_LINEAR = frozenset(
    """add add_any sub neg convert_element_type copy copy_p real imag complex conj name reduce_precision pvary pcast device_put
    sharding_constraint layout_constraint declared_derivative stop_gradient select_n""".split()  # noqa: SIM905
)
#: Operations that are products: linear in one operand at a time.
_PRODUCTS = frozenset({"mul", "dot_general", "conv_general_dilated"})
#: Other operations that are linear in nothing.
_NEVER = frozenset(
    """reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin sort top_k cummax cummin cumprod cumlogsumexp
    reduce_window_max reduce_window_min""".split()  # noqa: SIM905
)


def linear(graph: Graph, sources: AbstractSet[int]) -> bool:
    """Whether nothing in ``graph`` shows that its results are not linear in the variables ``sources``."""
    moving = set(sources)
    for operation in graph.operations:
        moved = [k for k, v in enumerate(operation.inputs) if not isinstance(v, Constant) and v in moving]
        if not moved or _asks_for_numbers(operation):
            continue
        if _nonlinear(operation, graph, moved):
            return False
        moving.update(operation.outputs)
    return True


def _nonlinear(operation: Operation, graph: Graph, moved: Sequence[int]) -> bool:
    """Whether an operation makes a real number of ``moved`` operands, and not as a linear one does."""
    if not any(graph.avals[v].differentiable for v in operation.outputs):
        return False
    if any(not graph.aval(operation.inputs[k]).differentiable for k in moved):
        return True  # chosen by what comes back
    if operation.name in _PRODUCTS:
        return len(moved) > 1
    if operation.name == "div":
        return 1 in moved
    return operation.name in _NEVER or (operation.name in ELEMENTWISE and operation.name not in _LINEAR)


def _asks_for_numbers(operation: Operation) -> bool:
    """Whether it asks which elements are numbers at all, as guards against NaN do: of numbers it depends on none."""
    first, *rest = operation.inputs
    return operation.name == "is_finite" or (operation.name in ("ne", "eq") and rest == [first])
