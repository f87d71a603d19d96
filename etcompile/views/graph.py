"""The hidden-group graph, and the dataflow of a program, as pictures that fit into a page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping

from etcompile.graph import HiddenGroupGraph
from etcompile.ir.program import TraceProgram
from etcompile.markup import Markup, tag
from etcompile.viz.dataflow import program_picture
from etcompile.viz.drawing import Drawing, draw, drawing_of
from etcompile.viz.errors import VizError
from etcompile.viz.model import model_picture

__all__ = ["dataflow_view", "graph_svg", "graph_view", "inline_svg"]

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


def graph_svg(graph: HiddenGroupGraph) -> str | None:
    """The picture; None where there is no Graphviz, or the graph was changed to something that is not drawn."""
    try:
        return draw(graph).render("svg").decode()
    except VizError:
        return None


def graph_view(graph: HiddenGroupGraph, table: bool = True) -> Markup:
    """The picture, with its ``table`` of cuts unless the page has one; where it cannot be drawn, why."""
    return _pictured(lambda: drawing_of(model_picture(graph), table))


def dataflow_view(program: TraceProgram, sizes: Mapping[str, int] | None = None) -> Markup:
    """The picture of a program, with the bytes of what it carries where they are known."""
    return _pictured(lambda: drawing_of(program_picture(program, sizes)))


def _pictured(made: Callable[[], Drawing]) -> Markup:
    try:
        return tag("div", inline_svg(made()), class_="scroll")
    except VizError as error:
        return tag("p", f"No picture: {error}", class_="quiet")


def inline_svg(drawing: Drawing) -> Markup:
    """A drawing as an element of a page: no prolog, and no names that another picture of the page has as well."""
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    root = ET.fromstring(drawing.render("svg"))
    for element in root.iter():
        element.attrib.pop("id", None)
    root.attrib["role"] = "img"
    root.attrib["aria-label"] = drawing.title
    text = ET.tostring(root, encoding="unicode")
    return Markup(re.sub(r"<\?xml[^>]*\?>", "", text))
