"""How the nodes of a NIR graph are connected: subgraphs opened, loops cut, and the order in which nodes are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx

from etcompile.errors import ModelError

__all__ = ["Path", "Wiring", "dotted", "wired"]

#: Names of a node and of the subgraphs around it, outermost first.
Path = tuple[str, ...]


@dataclass(frozen=True)
class Wiring:
    """The nodes of a graph and of its subgraphs.

    Attributes
    ----------
    nodes : dict of Path to NIR node
        In the order in which they are computed.
    sources : dict of Path to tuple of Path
        What is summed at each node.
    late : frozenset of (Path, Path)
        Edges that bring what their source showed at the step before.
    registers : frozenset of Path
        Nodes in loops that show what they held at the start of a step; they take their input at its end.
    inputs, outputs : dict of str to Path
        Those of the outermost graph, by name.
    """

    nodes: dict[Path, Any]
    sources: dict[Path, tuple[Path, ...]]
    late: frozenset[tuple[Path, Path]]
    registers: frozenset[Path]
    inputs: dict[str, Path]
    outputs: dict[str, Path]


def dotted(path: Path) -> str:
    """The name of a node in reports."""
    return ".".join(path)


def wired(graph: Any, has_state: Callable[[Any], bool], is_register: Callable[[Any], bool]) -> Wiring:
    """The wiring of a graph, with its loops cut.

    A loop is cut behind a node that ``has_state``: what follows reads its output of the step before. Of several such places those
    are taken that lie on the way back: edges are drawn from the inputs on, and one that would close a loop is late. A register
    closes a loop without that.

    Raises
    ------
    ModelError
        For edges that lead nowhere, nodes without input, and loops without a state.
    """
    flat = nx.DiGraph()
    _open(graph, (), flat)
    top = {(name,): node for name, node in graph.nodes.items()}
    inputs = {path[0]: path for path, node in top.items() if _is(node, "Input")}
    outputs = {path[0]: path for path, node in top.items() if _is(node, "Output")}
    for what, found in (("Input", inputs), ("Output", outputs)):
        if not found:
            raise ModelError(
                f"the NIR graph has no {what}.",
                got=f"nodes {list(graph.nodes)}",
                expected=f"a nir.{what} among its nodes, and an edge to it"
                if what == "Output"
                else f"a nir.{what} among its nodes, and an edge from it",
                hint="nir.NIRGraph.from_list(...) makes both.",
            )
    for path in flat:
        if (path in inputs.values()) == bool(flat.in_degree(path)):
            what = "something" if flat.in_degree(path) else "nothing"
            raise ModelError(f"{what} leads to the NIR node {dotted(path)}.", got=f"edges {graph.edges}")
    nodes = dict(flat.nodes(data="node"))
    depths = _depths(flat, inputs.values())
    late: set[tuple[Path, Path]] = set()
    registers: set[Path] = set()
    now = flat.copy()
    for loop in _loops(flat):
        held = {path for path in loop if is_register(nodes[path])}
        now.remove_edges_from([(a, b) for a, b in loop.edges if b in held])
        back = _closing(now.subgraph(loop), lambda path: has_state(nodes[path]), depths)
        now.remove_edges_from(back)
        registers |= held
        late |= back
    order = nx.lexicographical_topological_sort(now)
    sources = {path: tuple(sorted(flat.predecessors(path))) for path in flat}
    return Wiring(
        {path: nodes[path] for path in order}, sources, frozenset(late), frozenset(registers), inputs, outputs
    )


def _is(node: Any, kind: str) -> bool:
    return type(node).__name__ == kind


def _open(graph: Any, path: Path, flat: nx.DiGraph) -> None:
    """Put the nodes and edges of a graph and of its subgraphs into ``flat``."""
    for name, node in graph.nodes.items():
        if _is(node, "NIRGraph"):
            _open(node, (*path, name), flat)
        else:
            flat.add_node((*path, name), node=node)
    seen = set()
    for source, target in graph.edges:
        for name in (source, target):
            if name not in graph.nodes:
                raise ModelError(
                    f"an edge of the NIR graph {dotted(path)!r} leads to a node that it has not.",
                    got=f"({source!r}, {target!r})",
                    expected=f"names among {list(graph.nodes)}",
                )
        if (source, target) in seen:
            raise ModelError(
                "a NIR graph has an edge twice.",
                got=f"({source!r}, {target!r})",
                expected="an edge once; nir.Scale doubles a value",
            )
        seen.add((source, target))
        flat.add_edge(_end(graph, path, source, "Output"), _end(graph, path, target, "Input"))


def _end(graph: Any, path: Path, name: str, port: str) -> Path:
    """The node that an edge means: of a subgraph its input or output."""
    node = graph.nodes[name]
    if not _is(node, "NIRGraph"):
        return (*path, name)
    ports = [key for key, inner in node.nodes.items() if _is(inner, port)]
    if len(ports) != 1:
        raise ModelError(
            f"an edge does not say which {port} of the NIR subgraph {dotted((*path, name))} it is for.",
            got=f"{len(ports)} of them: {ports}",
            expected="one",
        )
    return _end(node, (*path, name), ports[0], port)


def _depths(flat: nx.DiGraph, inputs: Any) -> dict[Path, float]:
    """How many edges each node is from the inputs."""
    found = nx.multi_source_dijkstra_path_length(flat, set(inputs), weight=lambda *edge: 1)
    return {path: found.get(path, math.inf) for path in flat}


def _loops(flat: nx.DiGraph) -> Iterator[nx.DiGraph]:
    for component in nx.strongly_connected_components(flat):
        if len(component) > 1 or any(flat.has_edge(path, path) for path in component):
            yield flat.subgraph(component)


def _closing(
    loop: nx.DiGraph, has_state: Callable[[Path], bool], depths: dict[Path, float]
) -> set[tuple[Path, Path]]:
    """The edges behind nodes with a state that would close a loop."""
    drawn = nx.DiGraph()
    drawn.add_nodes_from(loop)
    drawn.add_edges_from((a, b) for a, b in loop.edges if not has_state(a))
    if not nx.is_directed_acyclic_graph(drawn):
        around = [a for a, _ in nx.find_cycle(drawn)]
        raise ModelError(
            "a loop of the NIR graph has no state: each of its values needs the others first.",
            got=" -> ".join(map(dotted, [*around, around[0]])),
            expected="a neuron, an integrator or a delay of a step or more in each loop",
        )
    back = set()
    edges = sorted(
        ((a, b) for a, b in loop.edges if has_state(a)), key=lambda e: (depths[e[0]], depths[e[1]], e)
    )
    for a, b in edges:
        if nx.has_path(drawn, b, a):
            back.add((a, b))
        else:
            drawn.add_edge(a, b)
    return back
