"""What a loop makes of its constants alone is made once, before it, as the compiler behind jax has it."""

from __future__ import annotations

import dataclasses

from etcompile.cost.graph import Graph, Loop, Node

__all__ = ["made_before_loops"]


def made_before_loops(graph: Graph) -> Graph:
    """The graph with what is the same at each trip of a loop before that loop; of what is cheap only what leads to that."""
    sizes, nodes = list(graph.sizes), []
    for node in graph.nodes:
        if node.loop is None:
            nodes.append(node)
            continue
        loop = dataclasses.replace(node.loop, bodies=tuple(map(made_before_loops, node.loop.bodies)))
        if not loop.choice:
            node, before = _parted(node, loop, sizes)
            nodes += before
            loop = node.loop
        nodes.append(dataclasses.replace(node, loop=loop))
    return dataclasses.replace(graph, sizes=tuple(sizes), nodes=tuple(nodes))


def _parted(node: Node, loop: Loop, sizes: list[int]) -> tuple[Node, list[Node]]:
    """A loop without what does not change in it, and that as nodes to run before; their values are added to ``sizes``."""
    (body,) = loop.bodies
    moved = _moved(body, loop.consts)
    if not moved:
        return dataclasses.replace(node, loop=loop), []
    outside = dict(zip(body.inputs[: loop.consts], node.inputs, strict=False))
    before = []

    def there(v: int) -> int:
        if v not in outside:
            outside[v] = len(sizes)
            sizes.append(body.sizes[v])
        return outside[v]

    for n in moved:
        inputs, outputs = tuple(map(there, n.inputs)), tuple(map(there, n.outputs))
        before.append(dataclasses.replace(n, inputs=inputs, outputs=outputs))
    made, kept = {v for n in moved for v in n.outputs}, [n for n in body.nodes if n not in moved]
    read = {v for n in kept for v in n.inputs} | set(body.outputs)
    more = tuple(v for v in sorted(made) if v in read)
    at = loop.consts
    inputs = (*body.inputs[:at], *more, *body.inputs[at:])
    body = dataclasses.replace(body, inputs=inputs, nodes=tuple(kept))
    operands = (*node.inputs[:at], *map(there, more), *node.inputs[at:])
    loop = dataclasses.replace(loop, bodies=(body,), consts=at + len(more))
    size = (*node.read[:at], *(body.sizes[v] for v in more), *node.read[at:])
    return dataclasses.replace(node, inputs=operands, read=size, loop=loop), before


def _moved(body: Graph, consts: int) -> list[Node]:
    """Nodes of the body that read nothing but what stays, where one of them is worth the memory, or leads to one that is."""
    changing = set(body.inputs[consts:])
    fixed = []
    for n in body.nodes:
        if n.loop is not None or changing.intersection(n.inputs):
            changing.update(n.outputs)
        else:
            fixed.append(n)
    needed: set[int] = set()
    found = []
    for n in reversed(fixed):
        if n.expensive or n.kind != "light" or needed.intersection(n.outputs):
            needed.update(n.inputs)
            found.append(n)
    return found[::-1]
