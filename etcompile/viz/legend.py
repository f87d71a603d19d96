"""The legend, drawn with the very shapes and lines of the picture, and the table of cuts."""

from __future__ import annotations

import html
from collections.abc import Sequence

import graphviz

from etcompile.paths import short_text
from etcompile.viz.graph import Cut
from etcompile.viz.labels import markup, plain, wrap
from etcompile.viz.style import EDGES, NODES, QUIET, VERMILLION

__all__ = ["add_key"]

_FRAME = "#A6A6A6"


def add_key(
    drawing: graphviz.Digraph, nodes: Sequence[str], edges: Sequence[str], cuts: Sequence[Cut]
) -> None:
    """Add what explains the picture.

    Parameters
    ----------
    drawing : graphviz.Digraph
        Added to.
    nodes, edges : sequence of str
        Keys of `NODES` and `EDGES`; each is shown once.
    cuts : sequence of Cut
        Listed in a table under the legend.
    """
    legend = graphviz.Digraph(
        "cluster legend",
        graph_attr=dict(label=markup(["Legend"]), fontsize="11", color=_FRAME, margin="12", tooltip="legend"),
    )
    half = (len(edges) + 1) // 2
    chains = [part for part in (edges[:half], edges[half:]) if part]
    last = [_node_column(legend, nodes)]
    for chain, part in enumerate(chains):
        last.append(_edge_column(legend, chain, part))
        # Only connected parts are laid out together; a flat edge also keeps the columns in this order.
        left = _node(nodes[0]) if chain == 0 else _point(chain - 1, 0)
        row = graphviz.Digraph(graph_attr={"rank": "same"})
        row.edge(left, _point(chain, 0), style="invis")
        legend.subgraph(row)
    drawing.subgraph(legend)
    if cuts:
        drawing.node("table of cuts", _table(cuts), shape="plain", tooltip="cuts")
        for name in last:
            drawing.edge(name, "table of cuts", style="invis")


def _node(key: str) -> str:
    return f"legend node {key}"


def _point(chain: int, index: int) -> str:
    return f"legend point {chain} {index}"


def _node_column(legend: graphviz.Digraph, nodes: Sequence[str]) -> str:
    for index, key in enumerate(nodes):
        attributes = {**NODES[key].attributes, "fontsize": "9.5", "width": "2.3"}
        legend.node(_node(key), NODES[key].name, tooltip=NODES[key].name, **attributes)
        if index:
            legend.edge(_node(nodes[index - 1]), _node(key), style="invis", weight="10")
    return _node(nodes[-1])


def _edge_column(legend: graphviz.Digraph, chain: int, edges: Sequence[str]) -> str:
    """A chain of sample lines, each two ranks long, with its text beside its middle.

    (Edge labels would be the simple way, but Graphviz drops them when it packs parts.)
    """
    invisible = dict(label="", shape="point", width="0.01", style="invis")
    for index in range(len(edges) + 1):
        legend.node(_point(chain, index), group=f"chain {chain}", **invisible)
    previous = None
    for index, key in enumerate(edges):
        style = EDGES[key]
        start, end, middle = _point(chain, index), _point(chain, index + 1), f"legend middle {key}"
        legend.edge(start, end, minlen="2", weight="100", **style.attributes)
        legend.node(middle, **invisible)
        legend.edge(start, middle, style="invis", weight="0")
        text = f"legend text {key}"
        row = graphviz.Digraph(graph_attr={"rank": "same"})
        row.node(
            text, style.name.replace("\n", "\\l") + "\\l", shape="plaintext", fontsize="9.5", margin="0.05,0",
            width="1.6", height="0.55", fixedsize="true", tooltip=style.name.replace("\n", " "),
        )  # fmt: skip
        row.edge(middle, text, style="invis")
        legend.subgraph(row)
        if previous:
            legend.edge(previous, text, style="invis", minlen="2", weight="10")
        previous = text
    return _point(chain, len(edges))


def _table(cuts: Sequence[Cut]) -> str:
    """Where each cut is and what is lost; equal rows are joined."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for cut in cuts:
        rows.setdefault((cut.primitive, cut.source, cut.meaning), []).append(cut.name)
    body = "".join(
        "<tr>"
        + _cell(wrap(", ".join(names), 20), VERMILLION)
        + _cell(wrap(primitive, 18))
        + _cell(wrap(source, 24))
        + _cell(wrap(short_text(meaning), 46))
        + "</tr>"
        for (primitive, source, meaning), names in rows.items()
    )
    heading = '<tr><td align="left" colspan="4"><b>\N{BLACK SCISSORS} Cuts</b></td></tr>'
    return f'<<table border="1" color="{_FRAME}" cellborder="0" cellspacing="4">{heading}{body}</table>>'


def _cell(lines: Sequence[str], color: str = QUIET) -> str:
    end = '<br align="left"/>'
    text = end.join(html.escape(plain(line)) for line in lines) + end
    return f'<td align="left" valign="top"><font point-size="9.5" color="{color}">{text}</font></td>'
