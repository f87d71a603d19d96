"""Sums over kernels: operations, bytes moved, and the most memory in use at one time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from etcompile.cost.graph import Graph, Loop, Node
from etcompile.cost.kernels import Kernels, kernels
from etcompile.cost.memory import temporary

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


def totals(graph: Graph, given: Mapping[int, int], every_trip: bool = True, inside: bool = False) -> Totals:
    """Totals of a graph; ``given`` as in :func:`kernels`.

    ``every_trip``: count loops as often as they run; else their bodies once, as XLA's own analysis does. ``inside``: the graph
    is the body of a loop, whose results have no memory of their own.
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
        stacked = [v for v in kernel.node.outputs[kernel.node.loop.carry :] if v >= 0]
        if not kernel.node.loop.choice:  # the memory where a loop stacks its results is set to zero first
            stacked += _loop_copies(graph, found, k, given)
            moved += 2 * sum(graph.sizes[v] for v in stacked)
        moved += body.bytes_moved
    moved += 2 * sum(graph.sizes[v] for v in found.copies)
    within = {k: body.temporary for k, body in inner.items()}
    return Totals(flops, series, moved, temporary(graph, found, within, inside))


def _of_loop(loop: Loop, graph: Graph, node: Node, every_trip: bool) -> Totals:
    parts = [totals(b, _around(loop, b), every_trip, inside=True) for b in loop.bodies]
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
