"""Sums over kernels: operations, bytes moved, and the most memory in use at one time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from etcompile.cost.graph import Graph, Loop, Node
from etcompile.cost.kernels import Kernels, kernels

__all__ = ["Totals", "totals"]


@dataclasses.dataclass(frozen=True)
class Totals:
    """What a graph takes as a whole.

    Attributes
    ----------
    flops, transcendentals : int
    bytes_moved : int
        Read from and written to memory.
    temporary : int
        Most bytes in use at one time beside inputs, constants and results.
    """

    flops: int
    transcendentals: int
    bytes_moved: int
    temporary: int


def totals(graph: Graph, given: Mapping[int, int], every_trip: bool = True) -> Totals:
    """Totals of a graph; ``given`` as in :func:`kernels`.

    ``every_trip``: count loops as often as they run; else their bodies once, as XLA's own analysis does.
    """
    found = kernels(graph, given)
    flops = series = moved = 0
    inner: dict[int, Totals] = {}
    for k, kernel in enumerate(found.kernels):
        flops += kernel.flops
        series += kernel.transcendentals
        if kernel.node.loop is None:
            written = sum(graph.sizes[v] for v in kernel.node.outputs if v >= 0)
            if kernel.node.name == "dynamic_update_slice":
                written = kernel.node.read[1]
            moved += sum(kernel.reads.values()) + written
            continue
        inner[k] = body = _of_loop(kernel.node.loop, graph, kernel.node, every_trip)
        flops += body.flops
        series += body.transcendentals
        moved += body.bytes_moved + 2 * sum(graph.sizes[v] for v in _loop_copies(graph, found, k, given))
    moved += 2 * sum(graph.sizes[v] for v in found.copies)
    return Totals(flops, series, moved, _temporary(graph, found, given, inner))


def _of_loop(loop: Loop, graph: Graph, node: Node, every_trip: bool) -> Totals:
    parts = [totals(b, _around(loop, b), every_trip) for b in loop.bodies]
    if loop.choice:
        return Totals(*(max(getattr(p, f.name) for p in parts) for f in dataclasses.fields(Totals)))
    (body,) = parts
    trips = loop.trips if every_trip else 1
    sliced = _sliced(loop, graph, node)
    return Totals(
        trips * body.flops, trips * body.transcendentals, trips * (body.bytes_moved + sliced), body.temporary
    )


def _sliced(loop: Loop, graph: Graph, node: Node) -> int:
    """Bytes that one trip moves to put results in their places among the stacked ones."""
    body = loop.bodies[0]
    found = 0
    made = {v for n in body.nodes for v in n.outputs if n.kind in ("whole", "loop")} | set(body.inputs)
    for v, out in zip(body.outputs[loop.carry :], node.outputs[loop.carry :], strict=True):
        if v is not None and out >= 0:
            found += 2 * body.sizes[v] if v in made else 0
    return found


def _around(loop: Loop, body: Graph) -> dict[int, int]:
    return {loop.consts + k: k for k in range(loop.carry) if body.outputs[k] is not None}


def _loop_copies(graph: Graph, found: Kernels, at: int, given: Mapping[int, int]) -> list[int]:
    """Values that a loop starts from but that must outlast it."""
    node = found.kernels[at].node
    loop = node.loop
    assert loop is not None
    started = [v for v in node.inputs[loop.consts : loop.consts + loop.carry] if v >= 0 and graph.sizes[v]]
    fixed = {graph.inputs[k] for k in range(len(graph.inputs)) if k not in given} | set(graph.constants)
    later = {v for kernel in found.kernels[at + 1 :] for v in kernel.reads}
    later |= {v for v in graph.outputs if v is not None}
    copied, seen = [], set()
    for v in started:
        if v in fixed or v in later or v in seen:
            copied.append(v)
        seen.add(v)
    return copied


def _temporary(graph: Graph, found: Kernels, given: Mapping[int, int], inner: Mapping[int, Totals]) -> int:
    """Most bytes of values that are alive at one time, inputs and results apart."""
    count = len(found.kernels)
    made = {v: k for k, kernel in enumerate(found.kernels) for v in kernel.node.outputs if v >= 0}
    last = {v: k for k, kernel in enumerate(found.kernels) for v in kernel.reads}
    fixed = {*graph.inputs, *graph.constants}
    results = {v for v in graph.outputs if v is not None}
    place = _places(graph, found, given, made, last)
    change = [0] * (count + 1)
    spans: dict[int, tuple[int, int]] = {v: (0, last[v]) for v in found.copies if v in last}
    for v in made:
        home = v
        while home in place:
            home = place[home]
        if home in results or home in fixed or v not in last:
            continue
        start, end = spans.get(home, (count, 0))
        spans[home] = min(start, made[v]), max(end, last[v])
    for v, (start, end) in spans.items():
        change[start] += graph.sizes[v]
        change[end + 1] -= graph.sizes[v]
    most = alive = 0
    for k in range(count):
        alive += change[k]
        most = max(most, alive + (inner[k].temporary if k in inner else 0))
    return most


def _places(
    graph: Graph, found: Kernels, given: Mapping[int, int], made: Mapping[int, int], last: Mapping[int, int]
) -> dict[int, int]:
    """Values whose memory a later value takes over: operands read for the last time where the result is written."""
    taken = {graph.outputs[target]: graph.inputs[source] for source, target in given.items()}
    place: dict[int, int] = {}
    homes: dict[int, int] = {}

    def free(v: int, result: int) -> bool:
        """Whether the memory where a result ends is free when ``v`` is written."""
        source = taken.get(homes.get(result, result))
        return source is None or source in found.copies or last.get(source, -1) < made[v]

    for k in range(len(found.kernels) - 1, -1, -1):
        kernel = found.kernels[k]
        loop = kernel.node.loop
        if loop is None:
            pairs = [(v, kernel.node.outputs[0]) for v in kernel.in_place]
        else:
            started = kernel.node.inputs[loop.consts : loop.consts + loop.carry]
            pairs = [(v, r) for v, r in zip(started, kernel.node.outputs, strict=False) if r >= 0]
        used: set[int] = set()
        for v, result in pairs:
            if v in made and last.get(v) == k and v not in place and result not in used and free(v, result):
                if graph.sizes[v] == graph.sizes[result] and v not in graph.outputs:
                    place[v] = result
                    homes[v] = homes.get(result, result)
                    used.add(result)
    return place
