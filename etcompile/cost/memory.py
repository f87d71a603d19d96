"""Memory in use while kernels run one after the other, beside inputs, constants and results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from etcompile.cost.graph import Graph
from etcompile.cost.kernels import Kernels

__all__ = ["temporary"]

Span = tuple[int, int]  #: numbers of the first and the last kernel during which a value is alive


@dataclasses.dataclass
class _Slot:
    """Memory of a result, which other values may use while the result is not there yet."""

    size: int
    taken: list[Span]

    def free(self, span: Span) -> bool:
        return all(span[1] < start or end < span[0] for start, end in self.taken)


def temporary(graph: Graph, found: Kernels, within: Mapping[int, int], inside: bool) -> int:
    """Most bytes of temporary values alive at one time.

    A value that is read for the last time where a result of its size is written, element by element, leaves it its
    memory; and memory of results serves other values until they are written. ``within``: bytes that loops need inside, by the
    number of their kernel; ``inside`` as in :func:`etcompile.cost.totals.totals`.
    """
    count = len(found.kernels)
    made = {v: k for k, kernel in enumerate(found.kernels) for v in kernel.node.outputs if v >= 0}
    last = {v: k for k, kernel in enumerate(found.kernels) for v in kernel.reads}
    results = {v for v in graph.outputs if v is not None}
    place = _places(graph, found, made, last)
    for kernel in (
        found.kernels
    ):  # where a loop stacks results nothing needs to be waited for: it is zero from the start
        if kernel.node.loop is not None:
            made |= {
                v: 0
                for v in kernel.node.outputs[kernel.node.loop.carry :]
                if v >= 0 and not kernel.node.loop.choice
            }
    spans: dict[int, Span] = {}
    for v, start in made.items():
        home = v
        while home in place:
            home = place[home]
        end = count if home in results else last.get(v, -1)
        if end >= 0:
            first, latest = spans.get(home, (start, end))
            spans[home] = min(start, first), max(end, latest)
    slots = []
    for v in results & set(spans):
        span, source = spans.pop(v), found.sources.get(v)
        if source is not None:
            spans.pop(source, None)
            until = made.get(source, -1) if source in found.copies else last.get(source, -1)
            slots.append(_Slot(graph.sizes[v], [span, (-1, until)]))
        elif not inside:
            slots.append(_Slot(graph.sizes[v], [span]))
    spans |= {v: (made.get(v, -1) + 1, last[v]) for v in found.copies if v in last}
    change = [0] * (count + 1)
    for v, span in sorted(spans.items(), key=lambda item: -graph.sizes[item[0]]):
        fitting = [slot for slot in slots if slot.size >= graph.sizes[v] and slot.free(span)]
        if fitting:
            min(fitting, key=lambda slot: slot.size).taken.append(span)
            continue
        change[span[0]] += graph.sizes[v]
        change[span[1] + 1] -= graph.sizes[v]
    most = alive = 0
    for k in range(count):
        alive += change[k]
        most = max(most, alive + within.get(k, 0))
    return most


def _places(graph: Graph, found: Kernels, made: Mapping[int, int], last: Mapping[int, int]) -> dict[int, int]:
    """Values whose memory a later value takes over, with that value."""
    place: dict[int, int] = {}
    homes: dict[int, int] = {}
    results = {v for v in graph.outputs if v is not None}
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
            if v not in made or v in results or v in place or last.get(v) != k or result in used:
                continue
            home = homes.get(result, result)
            source = found.sources.get(home, -1)
            until = made.get(source, -1) if source in found.copies else last.get(source, -1)
            if until < made[v] and graph.sizes[v] == graph.sizes[result]:
                place[v], homes[v] = result, home
                used.add(result)
    return place
