"""What the drawing reads from the hidden-group graph. Only this module of the drawing imports networkx."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import networkx as nx

from etcompile.viz.errors import VizError
from etcompile.viz.labels import plain

__all__ = ["Cut", "Graph", "as_graph", "collect_cuts", "direction", "holds_graph", "title"]

Graph: TypeAlias = nx.DiGraph  # MultiDiGraph is a subclass

_WIDEST_RANK = 9  # nodes side by side; with more, the picture runs from left to right instead


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


@dataclass(frozen=True)
class Cut:
    """One cut and the edges of the graph that it stands for.

    Attributes
    ----------
    name : str
        As in the report, for example ``"c0"``.
    primitive, source, meaning : str
        The operation where the local Jacobian stops, the line of the model, what is lost.
    paths : tuple of (str, str)
        Pairs of nodes: where the credit would have come from, and the state it would have reached.
    """

    name: str
    primitive: str = ""
    source: str = ""
    meaning: str = ""
    paths: tuple[tuple[str, str], ...] = ()


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
            found[name] = Cut(name, primitive, source, meaning)
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
    forward = nx.DiGraph((a, b) for a, b, kind in graph.edges(data="kind") if a != b and kind != "cut")
    ranks = list(nx.topological_generations(nx.condensation(forward))) if forward else []
    widest = max(map(len, ranks), default=0)
    return "LR" if widest > _WIDEST_RANK and widest > len(ranks) else "TB"
