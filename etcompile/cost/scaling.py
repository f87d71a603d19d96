"""From the costs at two batch sizes to those at any other.

Examples are independent, so every size and every count of operations is a constant and a multiple of the batch size. Two
traces of the same program at two small batch sizes therefore tell the numbers at a batch size that no machine could hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from etcompile.cost.cost import Measured
from etcompile.cost.graph import Graph, Node

__all__ = ["scaled"]


def scaled(first: Measured, second: Measured, sizes: tuple[int, int], batch: int) -> Measured | None:
    """The function at ``batch`` from what it is at two batch sizes; None where it is not the same program at both."""
    if first.given != second.given:
        return None

    def line(a: int, b: int) -> int:
        return a + (b - a) * (batch - sizes[0]) // (sizes[1] - sizes[0])

    graph = _graph(first.graph, second.graph, line)
    return (
        None if graph is None else Measured(graph, first.given, line(first.trace_bytes, second.trace_bytes))
    )


def _graph(a: Graph, b: Graph, line: Callable[[int, int], int]) -> Graph | None:
    if (a.inputs, a.constants, a.outputs) != (b.inputs, b.constants, b.outputs):
        return None
    if len(a.sizes) != len(b.sizes) or len(a.nodes) != len(b.nodes):
        return None
    nodes = []
    for one, other in zip(a.nodes, b.nodes, strict=True):
        node = _node(one, other, line)
        if node is None:
            return None
        nodes.append(node)
    return dataclasses.replace(a, sizes=_each(a.sizes, b.sizes, line), nodes=tuple(nodes))


def _node(a: Node, b: Node, line: Callable[[int, int], int]) -> Node | None:
    moving = {"read": (), "flops": 0, "transcendentals": 0, "loop": None}
    if dataclasses.replace(a, **moving) != dataclasses.replace(b, **moving) or len(a.read) != len(b.read):
        return None
    loop = None
    if a.loop is not None and b.loop is not None:
        if dataclasses.replace(a.loop, bodies=()) != dataclasses.replace(b.loop, bodies=()):
            return None
        pairs = zip(a.loop.bodies, b.loop.bodies, strict=True)
        bodies = [body for body in (_graph(x, y, line) for x, y in pairs) if body is not None]
        if len(bodies) != len(a.loop.bodies):
            return None
        loop = dataclasses.replace(a.loop, bodies=tuple(bodies))
    elif a.loop is not b.loop:
        return None
    return dataclasses.replace(
        a,
        read=_each(a.read, b.read, line),
        flops=line(a.flops, b.flops),
        transcendentals=line(a.transcendentals, b.transcendentals),
        loop=loop,
    )


def _each(a: Sequence[int], b: Sequence[int], line: Callable[[int, int], int]) -> tuple[int, ...]:
    return tuple(line(x, y) for x, y in zip(a, b, strict=True))
