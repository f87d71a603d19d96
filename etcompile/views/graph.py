"""The hidden-group graph as a picture that fits into a page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from etcompile.graph import HiddenGroupGraph
from etcompile.markup import Markup, tag
from etcompile.viz.drawing import Drawing, draw
from etcompile.viz.errors import VizError

__all__ = ["graph_svg", "graph_view", "inline_svg"]

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


def graph_svg(graph: HiddenGroupGraph) -> str | None:
    """The picture; None where there is no Graphviz, or the graph was changed to something that is not drawn."""
    try:
        return draw(graph).render("svg").decode()
    except VizError:
        return None


def graph_view(graph: HiddenGroupGraph) -> Markup:
    """The picture; where it cannot be drawn, why."""
    try:
        return tag("div", inline_svg(draw(graph)), class_="scroll")
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
