"""Which operations run together: a graph as kernels that read and write memory.

The model of the compiler behind jax (XLA on processors, and close to it elsewhere): element-wise operations and those that
move elements become part of what reads them, computed again for each reader where that is cheap. A product, a
convolution, a loop and a concatenation read their operands from memory and write their results there. A reduction
takes in what leads to it. A buffer that is given away is written in place; where something else may still read
its old value, that is copied first.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping

from etcompile.cost.graph import Graph, Node
from etcompile.cost.operations import MOVES

__all__ = ["Kernel", "Kernels", "kernels"]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What runs as one.

    Attributes
    ----------
    node : Node
        Its last operation.
    reads : mapping of int to int
        Bytes read by value.
    flops, transcendentals : int
        Of all operations in it, those of an inner loop apart.
    in_place : tuple of int
        Values read element by element as the result is written, so that it may take their memory.
    """

    node: Node
    reads: Mapping[int, int]
    flops: int
    transcendentals: int
    in_place: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels of a graph in program order, and what it copies first.

    Attributes
    ----------
    kernels : tuple of Kernel
    sources : mapping of int to int
        Results that take the memory of an earlier value, with that value: an input given away, or what a loop made of it.
    copies : tuple of int
        Those of the earlier values that must be kept beside the result.
    """

    kernels: tuple[Kernel, ...]
    sources: Mapping[int, int]
    copies: tuple[int, ...]


def kernels(graph: Graph, given: Mapping[int, int]) -> Kernels:
    """Group the nodes of a graph; ``given`` maps numbers of inputs to those of the results that take their memory."""
    made = {v: n for n in graph.nodes for v in n.outputs if v >= 0}
    users: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for v in dict.fromkeys(node.inputs):
            users.setdefault(v, []).append(node)
    results = {v for v in graph.outputs if v is not None}
    stored = _stored(graph, made, users, results)
    found = []
    for node in graph.nodes:
        if any(v in stored for v in node.outputs) or node.kind in ("whole", "loop"):
            found.append(_kernel(node, graph, made, users, stored))
    sources = _sources(graph, found, given)
    return Kernels(tuple(_in_order(found)), sources, _copies(graph, found, sources))


def _stored(
    graph: Graph, made: Mapping[int, Node], users: Mapping[int, list[Node]], results: set[int]
) -> dict[int, bool]:
    """Values that are written to memory; and whether their light readers compute them again nevertheless."""
    stored: dict[int, bool] = dict.fromkeys((*graph.inputs, *graph.constants), False)
    #: Kernels that a light value is part of, by their last nodes; of two, more make no difference.
    homes: dict[int, set[int]] = {}

    def kernels_of(readers: list[Node]) -> set[int]:
        found: set[int] = set()
        for u in readers:
            v = u.outputs[0]
            if u.kind != "light" or v in stored:
                found.add(id(u))
            if u.kind == "light" and stored.get(v, True):  # part of what reads it
                found |= homes[v]
            if len(found) > 1:
                break
        return found

    for node in reversed(graph.nodes):
        for v in node.outputs:
            if v < 0:
                continue
            if node.kind in ("whole", "loop"):
                stored[v] = False
                continue
            readers = users.get(v, [])
            homes[v] = kernels_of(readers)
            hard = v in results or any(u.kind in ("whole", "loop") for u in readers)
            if hard:
                stored[v] = _cheap_again(graph, node, made)
                continue
            shared = len(readers) > 1 and any(_in_library(u, users, stored) for u in readers)
            again = node.expensive and (len(homes[v]) > 1 or any(u.spreads for u in readers))
            if shared or again:
                stored[v] = False
    return stored


def _cheap_again(graph: Graph, node: Node, made: Mapping[int, Node]) -> bool:
    """Whether computing a light value again costs no more memory traffic than reading it."""
    if node.expensive:
        return False
    wide = [v for v in node.inputs if not (v in made and (made[v].spreads or not made[v].inputs))]
    size = graph.sizes[node.outputs[0]]
    return sum(graph.sizes[v] >= size for v in wide) <= 1 or sum(node.read) <= size


def _in_library(node: Node, users: Mapping[int, list[Node]], stored: Mapping[int, bool]) -> bool:
    """Whether a node becomes part of a library call: sums and products with one reader each that lead to a reduction."""
    while True:
        if node.kind == "sum":
            return node.library
        readers = users.get(node.outputs[0], [])
        if not node.library or len(readers) != 1 or node.outputs[0] in stored:
            return False
        node = readers[0]


def _kernel(
    last: Node,
    graph: Graph,
    made: Mapping[int, Node],
    users: Mapping[int, list[Node]],
    stored: Mapping[int, bool],
) -> Kernel:
    reads: dict[int, int] = {}
    flops, series = last.flops, last.transcendentals
    seen: set[int] = set()
    absorbs = last.kind in ("light", "sum")
    straight = last.kind == "light"
    in_place: dict[int, bool] = {}
    waiting = [
        (v, size, straight and last.name not in MOVES) for v, size in zip(last.inputs, last.read, strict=True)
    ]
    while waiting:
        v, size, straight = waiting.pop()
        if v < 0 or (v not in stored and v not in made):
            continue
        node = made.get(v)
        if v in stored and not (absorbs and stored[v] and node is not None):
            reads[v] = min(graph.sizes[v], reads.get(v, 0) + size)
            in_place[v] = in_place.get(v, True) and straight
            continue
        if v in seen or node is None:
            continue
        seen.add(v)
        flops += node.flops
        series += node.transcendentals
        straight = straight and node.name not in MOVES and not node.spreads
        waiting += [(u, part, straight) for u, part in zip(node.inputs, node.read, strict=True)]
    return Kernel(last, reads, flops, series, tuple(v for v, yes in in_place.items() if yes))


def _sources(graph: Graph, found: list[Kernel], given: Mapping[int, int]) -> dict[int, int]:
    """Results written where an input given away was, or where a loop left what it made of it."""
    readers: dict[int, list[Kernel]] = {}
    for kernel in found:
        for v in kernel.reads:
            readers.setdefault(v, []).append(kernel)
    sources = {}
    for source, target in given.items():
        v, result = graph.inputs[source], graph.outputs[target]
        if result is None or v == result or not graph.sizes[v]:
            continue
        while len(readers.get(v, ())) == 1:
            node = readers[v][0].node
            loop = node.loop
            around = () if loop is None else node.inputs[loop.consts : loop.consts + loop.carry]
            after = node.outputs[around.index(v)] if v in around else -1
            if after < 0 or after in graph.outputs:
                break
            v = after
        sources[result] = v
    return sources


def _copies(graph: Graph, found: list[Kernel], sources: Mapping[int, int]) -> tuple[int, ...]:
    """Earlier values whose readers are not all over when the result in their place is written."""
    writer = {v: k for k, kernel in enumerate(found) for v in kernel.node.outputs if v >= 0}
    before: list[int] = []
    for k, kernel in enumerate(found):
        bits = 1 << k
        for v in kernel.reads:
            if v in writer:
                bits |= before[writer[v]]
        before.append(bits)
    copies = []
    for result, v in sources.items():
        readers = [k for k, kernel in enumerate(found) if v in kernel.reads]
        if result not in writer or any(not before[writer[result]] >> k & 1 for k in readers):
            copies.append(v)
    return tuple(copies)


def _in_order(found: list[Kernel]) -> list[Kernel]:
    """Breadth first: kernels run in the order in which they become ready, as the compiler has them to run side by side."""
    writer = {v: k for k, kernel in enumerate(found) for v in kernel.node.outputs if v >= 0}
    needs = [{writer[v] for v in kernel.reads if v in writer} for kernel in found]
    readers: list[list[int]] = [[] for _ in found]
    for k, needed in enumerate(needs):
        for other in needed:
            readers[other].append(k)
    waiting = [len(needed) for needed in needs]
    ready = deque(k for k, n in enumerate(waiting) if n == 0)
    order = []
    while ready:
        k = ready.popleft()
        order.append(found[k])
        for reader in readers[k]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                ready.append(reader)
    return order
