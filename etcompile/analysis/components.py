"""Algorithms on small graphs of numbers, with order from the model: components and colors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import networkx as nx
import numpy as np

__all__ = ["color_columns", "connected_components", "strongly_connected_components"]


def connected_components(nodes: Sequence[int], edges: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Connected components in the order of their first node, each in the order of ``nodes``."""
    graph = nx.Graph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from(edges)
    rank = {node: k for k, node in enumerate(nodes)}
    return sorted(
        (sorted(c, key=rank.__getitem__) for c in nx.connected_components(graph)), key=lambda c: rank[c[0]]
    )


def strongly_connected_components(nodes: Sequence[int], edges: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Strongly connected components in the order of their first node, each in the order of ``nodes``."""
    graph = nx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from(edges)
    rank = {node: k for k, node in enumerate(nodes)}
    return sorted(
        (sorted(c, key=rank.__getitem__) for c in nx.strongly_connected_components(graph)),
        key=lambda c: rank[c[0]],
    )


def color_columns(conflict: np.ndarray) -> np.ndarray:
    """A color for every column, different for those in conflict; ``conflict`` is a symmetric bool matrix."""
    size = len(conflict)
    off = conflict & ~np.eye(size, dtype=bool)
    if not off.any():
        return np.zeros(size, np.int64)
    if off.sum() == size * (size - 1):
        return np.arange(size)
    colors = nx.greedy_color(nx.from_numpy_array(off), strategy="largest_first")
    return np.array([colors[k] for k in range(size)])
