"""The hidden-group graph: the only module that uses networkx."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import networkx as nx

__all__ = ["connected_components"]


def connected_components(nodes: Sequence[int], edges: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Connected components in the order of their first node, each in the order of ``nodes``."""
    graph = nx.Graph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from(edges)
    rank = {node: k for k, node in enumerate(nodes)}
    return sorted(
        (sorted(c, key=rank.__getitem__) for c in nx.connected_components(graph)), key=lambda c: rank[c[0]]
    )
