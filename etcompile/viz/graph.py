"""What the drawing reads from the hidden-group graph. Only this module of the drawing imports networkx."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeAlias

import networkx as nx

from etcompile.viz.errors import VizError
from etcompile.viz.labels import plain
from etcompile.viz.picture import Cut

__all__ = ["Graph", "as_graph", "collect_cuts", "direction", "holds_graph", "is_narrow", "recurrent", "title"]

Graph: TypeAlias = nx.DiGraph  # MultiDiGraph is a subclass

_WIDEST_RANK = 9  # nodes side by side; with more, the picture runs from left to right instead
_NARROW = ((5, 1), (7, 2))  # so many ranks at least, with so many nodes side by side at most


def holds_graph(value: object) -> bool:
    """Whether the value is a networkx graph of any kind, or has one as its `graph` attribute."""
    return isinstance(value, nx.Graph) or isinstance(getattr(value, "graph", None), nx.Graph)


def as_graph(value: object) -> Graph:
    """The networkx graph of a step, or the graph itself.

    Raises
    ------
    VizError
        If the value is neither, or the graph is undirected.
    """
    graph = value if isinstance(value, nx.Graph) else getattr(value, "graph", None)
    if isinstance(graph, nx.DiGraph):
        return graph
    got = f"an undirected {type(graph).__name__}" if isinstance(graph, nx.Graph) else type(value).__name__
    raise VizError(
        "The 'graph_or_step' parameter of draw must be a compiled step or its graph "
        f"(a networkx.MultiDiGraph). Got {got} instead."
    )


def collect_cuts(graph: Graph) -> tuple[Cut, ...]:
    """The cuts of the graph, in the order of its edges; edges that share a name are one cut."""
    found: dict[str, Cut] = {}
    for tail, head, data in graph.edges(data=True):
        if data.get("kind") != "cut":
            continue
        name = str(data.get("cut", f"c{len(found)}"))
        if name not in found:
            primitive, source, meaning = (
                str(data.get(key) or "") for key in ("primitive", "source", "meaning")
            )
            names = tuple(map(str, data.get("names") or (name,)))
            found[name] = Cut(name, primitive, source, meaning, (), names, str(data.get("layers") or ""))
        found[name] = replace(found[name], paths=(*found[name].paths, (tail, head)))
    return tuple(found.values())


def title(graph: Graph) -> str:
    """One line about the whole graph: the model, the rule, and whether its gradient is exact."""
    about = graph.graph
    parts = [str(about.get("model") or "model")]
    if about.get("algo"):
        parts.append(str(about["algo"]))
    if about.get("exact") is not None:
        count = len(collect_cuts(graph))
        cuts = "no cut" if not count else f"{count} cut{'s' if count > 1 else ''}"
        parts.append(f"exact: {'yes' if about['exact'] else 'no'}, {cuts}")
    return plain(" \N{MIDDLE DOT} ".join(parts))


def direction(graph: Graph) -> str:
    """``"TB"`` (data flows downwards), or ``"LR"`` for graphs that are wider than they are deep."""
    ranks = _ranks(graph)
    widest = max(ranks, default=0)
    return "LR" if widest > _WIDEST_RANK and widest > len(ranks) else "TB"


def is_narrow(graph: Graph) -> bool:
    """Whether a drawing that runs downwards leaves space beside it: it is high, and no rank holds many nodes."""
    ranks = _ranks(graph)
    return bool(ranks) and any(len(ranks) >= high and max(ranks) <= widest for high, widest in _NARROW)


def _ranks(graph: Graph) -> list[int]:
    """How much stands side by side in each rank: states that feed each other are one, weights stand with their operations."""
    back = recurrent(graph)
    edges = [(a, b) for a, b, kind in graph.edges(data="kind") if kind not in ("cut", "weight", "next")]
    forward = nx.DiGraph(edge for edge in edges if edge not in back)
    return [len(rank) for rank in nx.topological_generations(nx.condensation(forward))] if forward else []


def recurrent(graph: Graph) -> set[tuple[Any, Any]]:
    """Edges from states and spikes to operations that they are made of: what is read there is of the step before."""
    found = set()
    forward = nx.DiGraph((a, b) for a, b, kind in graph.edges(data="kind") if kind not in ("cut", "next"))
    for node, data in graph.nodes(data=True):
        if data.get("kind") == "operation" and node in forward:
            made = nx.descendants(forward, node)
            found |= {
                (tail, node)
                for tail in forward.predecessors(node)
                if tail in made and graph.nodes[tail].get("kind") in ("state", "surrogate")
            }
    return found
