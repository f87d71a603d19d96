"""From a picture to DOT text."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import graphviz

from etcompile.viz.labels import markup, plain
from etcompile.viz.legend import add_key
from etcompile.viz.picture import Box, Cut, Edge, Node, Picture
from etcompile.viz.style import BOXES, EDGES, FONT, INK, NODES

__all__ = ["to_dot"]

_RESERVED = r"^(?=(cluster|cut|legend|name of|table of)\b)"  # names of what the drawing adds


def to_dot(picture: Picture, table: bool = True) -> str:
    """DOT text of a picture: the step, a legend of what occurs in it and, unless told otherwise, a table of its cuts."""
    names = _names(picture)
    drawing = _canvas(picture)
    # One cluster, even if the step falls into several parts: it is laid out above the legend.
    step = graphviz.Digraph(
        "cluster step",
        graph_attr=dict(label="", peripheries="0", tooltip=_text(picture.title), sortv="1"),
    )
    _add_nodes(step, picture, names)
    whole = _members(picture)
    for edge in _bundled(picture.edges, whole):
        _add_edge(step, names[edge.tail], names[edge.head], edge)
    for cut in picture.cuts:
        _add_paths(step, cut, names, whole)
    drawing.subgraph(step)
    add_key(drawing, picture, table)
    return drawing.source


def _canvas(picture: Picture) -> graphviz.Digraph:
    return graphviz.Digraph(
        _text(picture.title),
        graph_attr=dict(
            rankdir=picture.rankdir,
            compound="true",
            label=markup([picture.title]),
            labelloc="t",
            labeljust="l",
            fontname=FONT,
            fontsize="14",
            tooltip=_text(picture.title),
            bgcolor="white",
            nodesep="0.25",
            ranksep="0.3",
            # Parts that are not connected (step, legend, table) are laid out on their own, then set in one column or in two.
            pack="16",
            packmode="array_tu2" if picture.narrow else "array_lu1",
        ),
        node_attr=dict(fontname=FONT, fontsize="11", fontcolor=INK, height="0.35", margin="0.1,0.06"),
        edge_attr=dict(fontname=FONT, fontsize="9", arrowsize="0.8"),
    )


def _text(value: object) -> str:
    """Text that DOT shows as it is: no escapes, no markup, no entities."""
    return graphviz.escape(plain(value).replace("&", "&amp;"))


def _safe(value: object) -> str:
    # graphviz splits edge ends at ":" (ports) and reads "\" as an escape.
    return re.sub(r"[^\w.\- ]", "_", str(value))


def _names(picture: Picture) -> dict[Any, str]:
    """A distinct, readable DOT name for every node."""
    names: dict[Any, str] = {}
    taken: set[str] = set()
    for node in picture.nodes:
        name = wanted = re.sub(_RESERVED, "_", _safe(node.name))
        count = 1
        while name in taken:
            count += 1
            name = f"{wanted} {count}"
        taken.add(name)
        names[node.name] = name
    return names


def _add_nodes(step: graphviz.Digraph, picture: Picture, names: Mapping[Hashable, str]) -> None:
    """Add the nodes in reading order, each inside its box."""
    # Graphviz lists from the bottom up when it runs from left to right and packs parts.
    nodes = picture.nodes if picture.rankdir == "TB" else picture.nodes[::-1]
    most = max((node.amount for node in nodes), default=0)
    boxes = {"": step, **{box.name: _box(box) for box in picture.boxes}}
    for node in nodes:
        _add_node(boxes[node.box], node, names[node.name], most)
    for cut in picture.cuts:
        _add_cut(boxes[f"layers {cut.layers}" if cut.layers else ""], cut)
    for operation, weights in _beside(picture).items():
        # A cluster keeps them next to each other in their rank.
        use = graphviz.Digraph(
            f"cluster use {names[operation.name]}", graph_attr=dict(peripheries="0", margin="0")
        )
        row = graphviz.Digraph(graph_attr={"rank": "same"})
        for node in (*weights, operation):
            row.node(names[node.name])
        use.subgraph(row)
        boxes[operation.box].subgraph(use)
    # The innermost first: a graph is copied into the one around it.
    for box in reversed(picture.boxes):
        boxes[box.inside].subgraph(boxes[box.name])


def _beside(picture: Picture) -> Mapping[Node, list[Node]]:
    """By operation, weights that it alone uses: drawn beside it, they take no rank of their own."""
    nodes = {node.name: node for node in picture.nodes}
    users: dict[Hashable, list[Node]] = {}
    for edge in picture.edges:
        if edge.style == "weight":
            users.setdefault(edge.tail, []).append(nodes[edge.head])
    found: dict[Node, list[Node]] = {}
    for weight, (first, *others) in users.items():
        if not others and first.box == nodes[weight].box:
            found.setdefault(first, []).append(nodes[weight])
    return found


def _box(box: Box) -> graphviz.Digraph:
    attributes = dict(BOXES[box.style].attributes)
    color = attributes.pop("fontcolor")
    tip = _text(f"{BOXES[box.style].name}: {box.name}")
    drawn = graphviz.Digraph(
        f"cluster {_safe(box.name)}",
        graph_attr=dict(peripheries="1", margin="8", tooltip=tip, **attributes),
    )
    # The name is a node: edges go round nodes, but straight through the label of a cluster.
    label = markup([box.head], box.details)
    drawn.node(f"name of {_safe(box.name)}", label, shape="plain", fontcolor=color, tooltip=tip)
    return drawn


def _add_node(drawing: graphviz.Digraph, node: Node, name: str, most: int) -> None:
    attributes = NODES[node.style].attributes
    lead = 6 if attributes["shape"] == "cylinder" else 0
    label = markup(node.head, node.details, lead, node.said, node.amount / most if most else 0)
    drawing.node(name, label, tooltip=_text(node.tip), **attributes)


def _mark(cut: Cut) -> str:
    return f"cut {_safe(cut.name)}"


def _add_cut(drawing: graphviz.Digraph, cut: Cut) -> None:
    # A node, not a label on an edge: labels of loops and long edges overlap what is near them.
    more = [f"\N{MULTIPLICATION SIGN} {len(cut.names)}"] if len(cut.names) > 1 else []
    tip = "\n".join(filter(None, (", ".join(cut.names), cut.primitive, cut.source, cut.meaning)))
    size = dict(width="0.3", height="0.25")
    drawing.node(
        _mark(cut), markup([cut.name], more), tooltip=_text(tip), **{**NODES["cut"].attributes, **size}
    )


def _add_paths(
    drawing: graphviz.Digraph, cut: Cut, names: Mapping[Hashable, str], whole: Mapping[str, frozenset]
) -> None:
    line = dict(EDGES["cut"].attributes, edgetooltip=_text(f"cut {cut.name}"))
    for tail in dict.fromkeys(tail for tail, _ in cut.paths):
        drawing.edge(names[tail], _mark(cut), **{**line, "arrowhead": "none", "constraint": "false"})
    for edge in _bundled((Edge(_mark(cut), head, "cut", f"cut {cut.name}") for _, head in cut.paths), whole):
        _add_edge(drawing, _mark(cut), names[edge.head], edge)


def _add_edge(drawing: graphviz.Digraph, tail: str, head: str, edge: Edge) -> None:
    place = {"lhead": f"cluster {_safe(edge.into)}"} if edge.into else {}
    place |= {"constraint": "false"} if edge.back else {}
    drawing.edge(tail, head, edgetooltip=_text(edge.tip), **EDGES[edge.style].attributes, **place)


def _members(picture: Picture) -> Mapping[str, frozenset]:
    """By box, the nodes inside of it."""
    found: dict[str, set[Hashable]] = {}
    for node in picture.nodes:
        if node.box:
            found.setdefault(node.box, set()).add(node.name)
    return {box: frozenset(nodes) for box, nodes in found.items()}


def _bundled(edges: Iterable[Edge], whole: Mapping[str, frozenset]) -> Iterator[Edge]:
    """Edges of one kind from a node outside of a box to all of several nodes in it as one, to the frame."""
    box_of = {node: box for box, nodes in whole.items() if len(nodes) > 1 for node in nodes}
    into: dict[tuple[Hashable, str, str], dict[Hashable, Edge]] = {}
    for edge in dict.fromkeys(edges):
        box = box_of.get(edge.head, "")
        if not box or box == box_of.get(edge.tail):
            yield edge
        else:
            into.setdefault((edge.tail, edge.style, box), {}).setdefault(edge.head, edge)
    for (_, _, box), found in into.items():
        if found.keys() == whole[box]:
            (first, *_) = found.values()
            yield replace(first, into=box)
        else:
            yield from found.values()
