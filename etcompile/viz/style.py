"""What each kind of node and edge looks like, and what the legend calls it.

The colours are the palette of Okabe and Ito (2008), "Color Universal Design", which readers with any of
the common colour-vision deficiencies can tell apart. No distinction rests on colour alone: kinds of node
also differ in shape and outline, kinds of edge in line style, width and arrowhead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from etcompile.viz.errors import VizError

__all__ = [
    "AREA",
    "BOXES",
    "EDGES",
    "FONT",
    "FRAME",
    "INK",
    "NODES",
    "ORANGE",
    "QUIET",
    "VERMILLION",
    "Style",
    "edge_style",
    "node_style",
]

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"

INK = "#1A1A1A"
FRAME = "#A6A6A6"
QUIET = "#595959"  # contrast 7:1 on white, for the second line of labels

# The two first families have the same widths, so text laid out with one fits when the other is shown.
FONT = "DejaVu Sans,Verdana,Helvetica,Arial,sans-serif"


@dataclass(frozen=True)
class Style:
    """One row of the legend.

    Attributes
    ----------
    name : str
        What the legend calls this kind.
    attributes : Mapping[str, str]
        Its Graphviz attributes.
    """

    name: str
    attributes: Mapping[str, str] = field(default_factory=dict)


# Tints of the palette: text on them keeps a contrast above 12:1.
NODES: Mapping[str, Style] = {
    "hidden": Style(
        "hidden state",
        dict(shape="box", style="rounded,filled", color=BLUE, fillcolor="#CFE8F8", penwidth="2"),
    ),
    "other state": Style(
        "state, not hidden",
        dict(shape="box", style="rounded,filled,dashed", color=QUIET, fillcolor="#F2F2F2"),
    ),
    "trace": Style(
        "weight with a trace",
        dict(shape="cylinder", style="filled", color="#9A6A00", fillcolor="#FBE3B0", penwidth="2"),
    ),
    "part": Style(
        "weight with a trace, in part",
        dict(shape="cylinder", style="filled,dashed", color="#9A6A00", fillcolor="#FBE3B0", penwidth="2"),
    ),
    "influence": Style(
        "weight with an influence",
        dict(shape="cylinder", style="filled,bold", color="#8A4A70", fillcolor="#F3DCEA", penwidth="3"),
    ),
    "window": Style(
        "weight, by backpropagation in windows",
        dict(shape="cylinder", style="filled,diagonals", color=INK, fillcolor="#FFFFFF"),
    ),
    "one step": Style(
        "weight, within the step only",
        dict(shape="cylinder", style="filled,dotted", color=INK, fillcolor="#FFFFFF", penwidth="2"),
    ),
    "no gradient": Style(
        "array without a gradient", dict(shape="cylinder", style="dashed", color=QUIET, penwidth="1")
    ),
    "operation": Style(
        "operation",
        dict(shape="component", style="filled", color=GREEN, fillcolor="#E3F4EE", margin="0.16,0.04"),
    ),
    "surrogate": Style(
        "spike with a surrogate derivative",
        dict(shape="diamond", style="filled", color="#8A4A70", fillcolor="#F3DCEA", margin="0,0"),
    ),
    "input": Style("input", dict(shape="note", style="filled", color=INK, fillcolor="#FFFFFF")),
    "output": Style(
        "output",
        dict(shape="box", style="filled,diagonals", color=INK, fillcolor="#FFFFFF", margin="0.2,0.08"),
    ),
    "cut": Style(
        "cut: credit stops here",
        dict(shape="octagon", style="filled", color=VERMILLION, fillcolor="#FCE4D6", margin="0,0"),
    ),
    # Of programs.
    "read": Style(
        "read from the model", dict(shape="ellipse", style="filled", color=GREEN, fillcolor="#E3F4EE")
    ),
    "of the loss": Style(
        "derivative of the loss",
        dict(shape="ellipse", style="filled,dashed", color="#8A4A70", fillcolor="#F3DCEA", penwidth="2"),
    ),
    "value": Style("computed", dict(shape="box", style="filled", color=INK, fillcolor="#FFFFFF")),
    "carried": Style(
        "carried to the next step",
        dict(shape="box3d", style="filled", color="#9A6A00", fillcolor="#FBE3B0", penwidth="2"),
    ),
    "gradient": Style(
        "gradient of the weights",
        dict(shape="box", style="filled,bold", color=BLUE, fillcolor="#CFE8F8", penwidth="3"),
    ),
}

#: What the legend says of the areas.
AREA = Style("area: bytes carried", dict(shape="box", style="filled", color=ORANGE, fillcolor=ORANGE))

#: Frames around nodes.
BOXES: Mapping[str, Style] = {
    "group": Style("hidden group", dict(color=BLUE, bgcolor="#F1F8FD", style="rounded", fontcolor=BLUE)),
    "layers": Style("layers that repeat", dict(color=FRAME, style="dashed", fontcolor=INK)),
}

EDGES: Mapping[str, Style] = {
    "transition": Style("transition D, from step to step", dict(color=BLUE, penwidth="3.2")),
    "immediate": Style(
        "immediate f, on the new state", dict(color=GREEN, penwidth="1.8", arrowhead="onormal")
    ),
    "presynaptic": Style("presynaptic value x", dict(color=INK, penwidth="1.2", arrowhead="vee")),
    "weight": Style("weight of an operation", dict(color="#9A6A00", penwidth="1.2", arrowhead="dot")),
    "data": Style("other data", dict(color=QUIET, penwidth="1", style="dotted", arrowhead="vee")),
    "next": Style("to the next layer", dict(color=INK, penwidth="1.2", style="dashed", arrowhead="veevee")),
    "cut": Style(
        "credit that was cut", dict(color=VERMILLION, penwidth="1.8", style="dashed", arrowhead="tee")
    ),
    # Of programs.
    "now": Style("value of this step", dict(color=INK, penwidth="1.2")),
    "before": Style("value of the step before", dict(color=BLUE, penwidth="2", style="dashed")),
}


#: How the gradient of a weight is made, by the first words with which the report says so.
_HOW = {
    "trace": "trace",
    "influence": "influence",
    "backpropagation inside of windows": "window",
    "not trained": "no gradient",
    "not used": "no gradient",
}


def node_style(name: str, data: Mapping) -> str:
    """Key into `NODES` for a node of the graph."""
    kind = data.get("kind")
    if kind == "state":
        return "hidden" if data.get("hidden") else "other state"
    if kind == "parameter":
        how = str(data.get("how", ""))
        begins = (key for words, key in _HOW.items() if how.startswith(words))
        style = next(begins, "one step")
        return "part" if style == "trace" and "in part" in how else style
    if kind in ("operation", "surrogate", "input", "output"):
        return str(kind)
    raise VizError(
        f"Node {name!r} of the graph has kind {kind!r}; expected one of 'state', 'parameter', 'operation', "
        "'surrogate', 'input', 'output'. Draw `step.graph` of a compiled step, or give every node such a `kind`."
    )


def edge_style(source: str, target: str, data: Mapping) -> str:
    """Key into `EDGES` for an edge of the graph."""
    kind = data.get("kind")
    if kind in EDGES:
        return str(kind)
    expected = ", ".join(repr(key) for key in EDGES)
    raise VizError(
        f"Edge {source!r} -> {target!r} of the graph has kind {kind!r}; expected one of {expected}. "
        "Draw `step.graph` of a compiled step, or give every edge such a `kind`."
    )
