"""A graph with some of its operations written in another way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etcompile.frontend.jaxpr import Constant, Graph, GraphBuilder, Operand

__all__ = ["with_replaced"]


def with_replaced(
    graph: Graph, replaced: Mapping[int, tuple[Sequence[Operand], Callable[..., Any]]]
) -> Graph:
    """``graph`` where operations, by their numbers, are functions of these operands that give their one result."""
    if not replaced:
        return graph
    builder = GraphBuilder()
    inputs = tuple(builder.variable(graph.avals[v]) for v in graph.inputs)
    env: dict[int, Operand] = dict(zip(graph.inputs, inputs, strict=True))
    for number, operation in enumerate(graph.operations):
        operands, fn = replaced.get(number, (operation.inputs, None))
        values = [v if isinstance(v, Constant) else env[v] for v in operands]
        if fn is not None:
            results = builder.call(lambda *v, fn=fn: [fn(*v)], values, operation.source)
        else:
            avals = [graph.avals[v] for v in operation.outputs]
            results = builder.emit(
                operation.primitive, operation.params, values, avals, operation.source, operation.loop
            )
        env.update(zip(operation.outputs, results, strict=True))
    outputs = tuple(v if isinstance(v, Constant) else env[v] for v in graph.outputs)
    return Graph(tuple(builder.avals), inputs, tuple(builder.operations), outputs)
