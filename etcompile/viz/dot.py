"""From the hidden-group graph to DOT text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import graphviz

from etcompile.viz.errors import VizError
from etcompile.viz.graph import Cut, Graph, collect_cuts, direction, title
from etcompile.viz.labels import array_type, markup, plain, shorten, wrap
from etcompile.viz.legend import add_key
from etcompile.viz.style import BLUE, EDGES, FONT, INK, NODES, edge_style, node_style

__all__ = ["to_dot"]

_DETAIL = 34  # characters of a detail line
_RESERVED = r"^(?=(cluster|cut|legend|name of|table of)\b)"  # names of what the drawing adds


def to_dot(graph: Graph, rankdir: str | None = None) -> str:
    """DOT text of the drawing: the step, a legend of what occurs in it, a table of its cuts.

    Parameters
    ----------
    graph : networkx.MultiDiGraph
        `step.graph`.
    rankdir : {"TB", "LR"}, optional
        Direction of the drawing; chosen from the shape of the graph by default.

    Raises
    ------
    VizError
        If the graph has no nodes, or holds a kind of node or edge that is not known.
    """
    if not graph.number_of_nodes():
        raise VizError("The graph has no nodes, so there is nothing to draw.")
    nodes = {node: node_style(node, data) for node, data in graph.nodes(data=True)}
    edges = [(tail, head, edge_style(tail, head, data)) for tail, head, data in graph.edges(data=True)]
    cuts = collect_cuts(graph)
    rankdir = rankdir or direction(graph)
    names = _names(graph)

    drawing = _canvas(title(graph), rankdir)
    # One cluster, even if the step falls into several parts: it is laid out beside the legend.
    step = graphviz.Digraph(
        "cluster step", graph_attr=dict(label="", peripheries="0", tooltip=_text(title(graph)))
    )
    # Graphviz lists from the bottom up when it runs from left to right and packs parts.
    order = list(nodes) if rankdir == "TB" else list(nodes)[::-1]
    _add_nodes(step, graph, order, nodes, names)
    for tail, head, kind in edges:
        if kind != "cut":
            tip = f"{EDGES[kind].name}: {tail} \N{RIGHTWARDS ARROW} {head}".replace("\n", " ")
            step.edge(names[tail], names[head], edgetooltip=_text(tip), **EDGES[kind].attributes)
    for cut in cuts:
        _add_cut(step, cut, names)
    drawing.subgraph(step)

    used_nodes = [key for key in NODES if key in nodes.values() or (key == "cut" and cuts)]
    used_edges = [key for key in EDGES if any(kind == key for _, _, kind in edges)]
    add_key(drawing, used_nodes, used_edges, cuts)
    return drawing.source


def _canvas(headline: str, rankdir: str) -> graphviz.Digraph:
    return graphviz.Digraph(
        _text(headline),
        graph_attr=dict(
            rankdir=rankdir,
            label=markup([headline]),
            labelloc="t",
            labeljust="l",
            fontname=FONT,
            fontsize="14",
            tooltip=_text(headline),
            bgcolor="white",
            nodesep="0.28",
            ranksep="0.42",
            # Parts that are not connected (step, legend) are laid out on their own, then set side by side.
            pack="24",
            packmode="array_tu2",
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


def _names(graph: Graph) -> dict[Any, str]:
    """A distinct, readable DOT name for every node."""
    names: dict[Any, str] = {}
    taken: set[str] = set()
    for node in graph:
        name = wanted = re.sub(_RESERVED, "_", _safe(node))
        count = 1
        while name in taken:
            count += 1
            name = f"{wanted} {count}"
        taken.add(name)
        names[node] = name
    return names


def _add_nodes(
    step: graphviz.Digraph,
    graph: Graph,
    order: Sequence[Any],
    styles: Mapping[Any, str],
    names: Mapping[Any, str],
) -> None:
    """Add the nodes in the order given, hidden states inside a box for their group."""
    members: dict[object, list[Any]] = {}
    for node in order:
        group = graph.nodes[node].get("group") if styles[node] == "hidden" else None
        if group is None:
            _add_node(step, names[node], graph.nodes[node], styles[node])
        else:
            members.setdefault(group, []).append(node)
    shapes = graph.graph.get("groups") or {}
    for group, states in members.items():
        box = _group_box(group, shapes.get(group, {}).get("shape"))
        for node in states:
            _add_node(box, names[node], graph.nodes[node], styles[node])
        step.subgraph(box)


def _group_box(group: object, shape: Iterable[int] | None) -> graphviz.Digraph:
    box = graphviz.Digraph(
        f"cluster group {_safe(group)}",
        graph_attr=dict(
            peripheries="1",
            color=BLUE,
            bgcolor="#F1F8FD",
            style="rounded",
            margin="10",
            tooltip=_text(f"hidden group {group}"),
        ),
    )
    # The name is a node: edges go round nodes, but straight through the label of a cluster.
    box.node(
        f"name of group {_safe(group)}",
        markup([f"group {group}"], [array_type(shape)]),
        shape="plain",
        fontcolor=BLUE,
        tooltip=_text(f"hidden group {group}"),
    )
    return box


def _file_name(source: object) -> str:
    """``model.py:31`` of a source line; tooltips and the table of cuts keep the folders."""
    return re.split(r"[/\\]", str(source or ""))[-1]


def _add_node(drawing: graphviz.Digraph, name: str, data: Mapping, style: str) -> None:
    kind = array_type(data.get("shape"), data.get("dtype"))
    match style:
        case "operation":
            details = [kind, *wrap(_file_name(data.get("source")), _DETAIL)]
        case "trace" | "part" | "one step":
            details = [kind, *shorten(wrap(data.get("how") or "", _DETAIL), 3)]
        case "other state":
            details = [kind, *shorten(wrap(data.get("reason") or "", _DETAIL), 3)]
        case _:
            details = [kind]
    attributes = NODES[style].attributes
    label = shorten(wrap(data.get("label", name)), 4)
    tip = "\n".join(f"{key}: {value}" for key, value in data.items() if value is not None)
    lead = 6 if attributes["shape"] == "cylinder" else 0
    drawing.node(name, markup(label, details, lead), tooltip=_text(tip), **attributes)


def _add_cut(drawing: graphviz.Digraph, cut: Cut, names: Mapping[Any, str]) -> None:
    # A node, not a label on an edge: labels of loops and long edges overlap what is near them.
    mark = f"cut {_safe(cut.name)}"
    drawing.node(
        mark,
        markup([f"\N{BLACK SCISSORS} {cut.name}"], wrap(_file_name(cut.source), _DETAIL)),
        tooltip=_text("\n".join(filter(None, (cut.name, cut.primitive, cut.source, cut.meaning)))),
        **NODES["cut"].attributes,
    )
    line = dict(EDGES["cut"].attributes, edgetooltip=_text(f"cut {cut.name}"))
    for tail in dict.fromkeys(tail for tail, _ in cut.paths):
        drawing.edge(names[tail], mark, **{**line, "arrowhead": "none"})
    for head in dict.fromkeys(head for _, head in cut.paths):
        drawing.edge(mark, names[head], **line)
