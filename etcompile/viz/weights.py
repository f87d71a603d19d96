"""A bias is drawn with its weight: parameters that meet data at one operation are one node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from math import prod
from typing import Any

from etcompile.viz.graph import Graph
from etcompile.viz.labels import array_type
from etcompile.viz.style import node_style

__all__ = ["with_biases"]


def with_biases(graph: Graph) -> Graph:
    """The graph with one node in place of parameters that only one operation uses, the same for all of them.

    Those whose gradients are made in different ways stay apart. The node keeps the name of the largest.
    """
    together: dict[tuple[Any, str], list[Any]] = {}
    for node, data in graph.nodes(data=True):
        users = set(graph.successors(node))
        if data.get("kind") == "parameter" and len(users) == 1:
            together.setdefault((*users, node_style(node, data)), []).append(node)
    found = graph.copy()
    for parts in together.values():
        if len(parts) > 1:
            first, *others = sorted(parts, key=lambda node: -prod(graph.nodes[node].get("shape") or ()))
            found.nodes[first].update(_joined([graph.nodes[node] for node in (first, *others)]))
            found.remove_nodes_from(others)
    return found


def _joined(parts: Sequence[Mapping]) -> dict[str, Any]:
    """What is said of several parameters: what their paths have in common, then each by its own part."""
    labels = [str(part.get("label", "")) for part in parts]
    module = ".".join(_shared([label.split(".") for label in labels]))
    own = [label.removeprefix(f"{module}.") if module else label for label in labels]
    types = [array_type(part.get("shape"), part.get("dtype")) for part in parts]
    return dict(
        label=module or ", ".join(labels),
        types=tuple(f"{name} {kind}" for name, kind in zip(own, types, strict=True)),
        parts=tuple(labels),
        trace_bytes=_bytes(parts),
    )


def _shared(paths: Sequence[Sequence[str]]) -> Sequence[str]:
    """What all paths begin with."""
    return [first for first, *_ in takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))]


def _bytes(parts: Iterable[Mapping]) -> int:
    """Bytes of all their traces. Parameters of one expression have one trace, which each of them counts as its own."""
    by_sites = {part.get("sites") or str(part.get("label")): part.get("trace_bytes") or 0 for part in parts}
    return sum(by_sites.values())
