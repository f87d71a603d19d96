"""Operands that JAX does not differentiate by: said when a model is compiled, or where a derivative is made after all.

A primitive may have a derivative by some of its operands only, or for some of its parameters. JAX tells when it is asked, so
it is asked here for shapes alone, once for each operation that credit passes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

from etcompile.analysis.analysis import Analysis
from etcompile.analysis.dependence import NO_DERIVATIVE, NO_REVERSE, Dependence
from etcompile.errors import UnsupportedError
from etcompile.frontend.jaxpr import (
    Aval,
    Constant,
    Graph,
    Operand,
    Operation,
    bind,
    silenced,
    without_derivative,
)
from etcompile.lowering.transposes import written_pullback

__all__ = ["REFUSALS", "refusal", "refuse_operands"]

#: How rules of jax's own primitives refuse.
REFUSALS = (NotImplementedError, ValueError)


def refusal(operation: Operation, error: Exception) -> UnsupportedError:
    """What is said where JAX refuses an operand."""
    return UnsupportedError(
        f"credit would have to pass {operation.name}, which JAX does not differentiate here.",
        where=operation.source,
        got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else operation.name}",
        expected="an operation with a derivative by every operand that credit passes",
        hint="give it a derivative with jax.custom_vjp; or, if no credit shall pass, apply it to jax.lax.stop_gradient(value).",
    )


def refuse_operands(analysis: Analysis) -> None:
    """Raise :class:`UnsupportedError` where credit would have to pass an operand that JAX does not differentiate by.

    Credit is that of trained parameters and of hidden states; it ends in outputs and in new hidden states. Of
    derivatives that others wrote JAX is not asked: what these refuse is said where it is met.
    """
    model, graph = analysis.model, analysis.model.graph
    hidden = [k for k, role in enumerate(analysis.roles) if role.hidden]
    reached = (1 << len(model.params)) - 1
    for k in hidden:
        reached |= 1 << (len(model.params) + k)
    _refuse_in(
        graph,
        analysis.dependence,
        reached,
        [*model.output_vars, *(model.new_state_vars[k] for k in hidden)],
    )


def _refuse_in(graph: Graph, dep: Dependence, reached: int, results: Sequence[Operand]) -> None:
    """The same for credit of what is ``reached`` that ends in ``results``, in a step or in one round of a loop."""
    needed = {v for v in results if not isinstance(v, Constant)}
    for operation in reversed(graph.operations):
        if operation.name in NO_DERIVATIVE | NO_REVERSE or not needed.intersection(operation.outputs):
            continue
        needed.update(v for v in operation.inputs if not isinstance(v, Constant))
        moving = tuple(k for k, v in enumerate(operation.inputs) if dep.on(v, reached))
        if not moving or not any(graph.avals[v].differentiable for v in operation.outputs):
            continue
        if operation.loop is not None:
            body = operation.loop.body
            _refuse_in(body, dep.inside[operation.outputs[0]], reached, body.outputs)
        elif _has_rules(operation):
            operands = [graph.aval(v) for v in operation.inputs]
            error = _asked(operation, operands, [graph.avals[v] for v in operation.outputs], moving)
            if error is not None:
                raise refusal(operation, error)


def _has_rules(operation: Operation) -> bool:
    """Whether the derivative is that of one primitive, as JAX has it."""
    return not (operation.name.startswith("custom_") or without_derivative(operation))


def _asked(
    operation: Operation, operands: Sequence[Aval], results: Sequence[Aval], moving: tuple[int, ...]
) -> Exception | None:
    """What JAX says where it is asked for a derivative, or None where it has one."""
    if written_pullback(operation, operands, results, moving) is not None:
        return None
    return _refused(_Question(operation, tuple(operands), moving))


class _Question:
    """An operation and the operands that move; equal to another one to which JAX gives the same answer."""

    def __init__(self, operation: Operation, operands: tuple[Aval, ...], moving: tuple[int, ...]) -> None:
        self.operation, self.operands, self.moving = operation, operands, moving
        self._key = operation.name, str(operation.params), operands, moving

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Question) and self._key == other._key


@functools.lru_cache(maxsize=1024)
def _refused(question: _Question) -> Exception | None:
    operation, moving = silenced(question.operation), question.moving

    def pulled(*values: Any) -> Any:
        def fn(*moved: Any) -> list[Any]:
            args = list(values)
            for k, v in zip(moving, moved, strict=True):
                args[k] = v
            return [r for r in bind(operation, args) if jax.numpy.issubdtype(r.dtype, jax.numpy.inexact)]

        found, pull = jax.vjp(fn, *(values[k] for k in moving))
        return pull(found)

    try:
        jax.eval_shape(pulled, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in question.operands))
    except REFUSALS as error:
        return error.with_traceback(None)
    return None
