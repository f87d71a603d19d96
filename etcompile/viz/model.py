"""The first view: hidden groups, states, weights, operations, spikes and cuts of a step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from etcompile.amounts import bytes_text
from etcompile.viz.errors import VizError
from etcompile.viz.graph import Graph, collect_cuts, direction, is_narrow, recurrent, title
from etcompile.viz.labels import array_type, shorten, wrap
from etcompile.viz.layers import collapsed
from etcompile.viz.picture import Box, Edge, Node, Picture
from etcompile.viz.style import EDGES, edge_style, node_style
from etcompile.viz.weights import with_biases

__all__ = ["file_name", "model_picture"]

_DETAIL = 34  # characters of a detail line


def model_picture(graph: Graph, every_layer: bool = False, rankdir: str | None = None) -> Picture:
    """The picture of a hidden-group graph.

    Parameters
    ----------
    graph : networkx.MultiDiGraph
        `step.graph`.
    every_layer : bool
        Draw repeated layers one by one.
    rankdir : {"TB", "LR"}, optional
        Direction of the drawing; chosen from the shape of the graph by default.

    Raises
    ------
    VizError
        If the graph has no nodes, or holds a kind of node or edge that is not known.
    """
    if not graph.number_of_nodes():
        raise VizError("The graph has no nodes, so there is nothing to draw.")
    headline = title(graph)
    for node, data in graph.nodes(data=True):
        node_style(node, data)
    for tail, head, data in graph.edges(data=True):
        edge_style(tail, head, data)
    graph = with_biases(graph)
    graph = graph if every_layer else collapsed(graph)
    rankdir = rankdir or direction(graph)
    nodes = [_node(name, data) for name, data in graph.nodes(data=True)]
    back = recurrent(graph)
    edges = [
        _edge(tail, head, data, (tail, head) in back)
        for tail, head, data in graph.edges(data=True)
        if data.get("kind") != "cut"
    ]
    narrow = rankdir == "TB" and is_narrow(graph)
    return Picture(headline, tuple(nodes), tuple(edges), _boxes(graph), collect_cuts(graph), rankdir, narrow)


def _node(name: Any, data: Mapping) -> Node:
    style = node_style(name, data)
    amount = int(data.get("trace_bytes") or 0)
    how, size = _how(data), _size(data, amount) if amount else ""
    together = bool(size) and len(how) + len(size) < _DETAIL
    details = _details(style, data, "" if together else how)
    return Node(
        name=name,
        style=style,
        head=tuple(shorten(wrap(data.get("label", name)), 4)),
        details=tuple(details),
        tip="\n".join(f"{key}: {_said(value)}" for key, value in data.items() if value not in (None, ())),
        amount=amount,
        said=f"{how}: {size}" if together else size,
        box=_box_of(style, data),
    )


def _details(style: str, data: Mapping, how: str) -> list[str]:
    types = data.get("types") or (array_type(data.get("shape"), data.get("dtype")),)
    several = data.get("count", 1) > 1 and data.get("shape") is None
    said = wrap(", ".join((*types, *["several sizes"] * several)), _DETAIL) if any(types) else []
    match style:
        case "operation":
            return wrap("  ".join(filter(None, (*said, file_name(data.get("source"))))), _DETAIL)
        case "surrogate":
            return []
        case "hidden" | "input" | "output" | "one step":  # the legend says the rest
            return said
        case "other state":
            how = str(data.get("reason") or "")
    return [*said, *shorten(wrap(how, _DETAIL), 3)]


def _how(data: Mapping) -> str:
    return str(data.get("how") or "").removesuffix(", and one step")


def _size(data: Mapping, amount: int) -> str:
    count, each = data.get("count", 1), data.get("each")
    if count == 1:
        return bytes_text(amount)
    return (
        f"{bytes_text(amount)} in all"
        if each is None
        else f"{bytes_text(each)} \N{MULTIPLICATION SIGN} {count}"
    )


def _said(value: object) -> object:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else value


def _edge(tail: Any, head: Any, data: Mapping, back: bool) -> Edge:
    style = edge_style(tail, head, data)
    tip = f"{EDGES[style].name}: {tail} \N{RIGHTWARDS ARROW} {head}"
    return Edge(tail, head, style, tip, back=back or style == "next")


def _box_of(style: str, data: Mapping) -> str:
    if style == "hidden" and data.get("group") is not None:
        return f"group {data['group']}"
    return f"layers {data['layers']}" if data.get("layers") else ""


def _boxes(graph: Graph) -> tuple[Box, ...]:
    """A box for repeated layers, and one for each group that is drawn."""
    repeated = {
        str(data["layers"]): data["count"] for _, data in graph.nodes(data=True) if data.get("layers")
    }
    boxes = [
        Box(f"layers {name}", "layers", f"\N{MULTIPLICATION SIGN} {count}", tuple(wrap(name, _DETAIL)))
        for name, count in repeated.items()
    ]
    shapes = graph.graph.get("groups") or {}
    for node, data in graph.nodes(data=True):
        name = _box_of(node_style(node, data), data)
        if name.startswith("group ") and all(box.name != name for box in boxes):
            inside = f"layers {data['layers']}" if data.get("layers") else ""
            shape = (
                array_type(shapes.get(data["group"], {}).get("shape"))
                if data.get("shape") is not None
                else ""
            )
            more = " \N{HORIZONTAL ELLIPSIS}" if inside else ""
            boxes.append(Box(name, "group", f"{name}{more}", (shape,), inside))
    return tuple(boxes)


def file_name(source: object) -> str:
    """``model.py:31`` of a source line; tooltips and the table of cuts keep the folders."""
    return re.split(r"[/\\]", str(source or ""))[-1]
