"""The legend, drawn with the very shapes and lines of the picture, and the table of cuts. Both stand below it, or beside it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import graphviz

from etcompile.paths import short_list, short_text
from etcompile.viz.labels import plain, shorten, wrap
from etcompile.viz.picture import Cut, Picture
from etcompile.viz.style import AREA, EDGES, FRAME, NODES, QUIET, VERMILLION, Style

__all__ = ["add_key"]

_ROW = 150  # characters of a row of the legend, about
_CUTS = "table of cuts"
_CHARACTER = 5.2  # points of a character, about
_ROWS = 8  # rows of the table of cuts
_LINES = 2  # lines of a row


@dataclass(frozen=True)
class _Entry:
    """A node or a line of the legend, with the width of its row that it takes, in characters."""

    name: str
    style: Style
    line: bool

    @property
    def width(self) -> int:
        return len(self.style.name) + 12


def add_key(drawing: graphviz.Digraph, picture: Picture, table: bool) -> None:
    """Add the legend, the kinds of node and edge that occur in the picture, each once; and a ``table`` of cuts, if wanted."""
    nodes = {node.style for node in picture.nodes} | ({"cut"} if picture.cuts else set())
    edges = {edge.style for edge in picture.edges} | ({"cut"} if picture.cuts else set())
    entries = [_Entry(f"node {key}", style, False) for key, style in NODES.items() if key in nodes]
    if any(node.amount for node in picture.nodes):
        entries.append(_Entry("area", AREA, False))
    lines = [_Entry(f"edge {key}", style, True) for key, style in EDGES.items() if key in edges]
    rows = _columns(entries, lines) if picture.narrow else [*_rows(entries), *_rows(lines)]
    drawing.subgraph(_legend(rows, picture.rankdir == "TB", picture.narrow))
    if table and picture.cuts:
        _add_cuts(drawing, picture.cuts)
        if picture.narrow:
            # One part with the legend, so that it stands below it.
            drawing.edge(_right(rows[-1][0]), _CUTS, style="invis")


def _legend(rows: Sequence[Sequence[_Entry]], across: bool, columns: bool) -> graphviz.Digraph:
    """Rows of entries, in ``columns`` of one width if wanted.

    Side by side is along a rank where ranks go down (``across``), else from rank to rank.
    """
    widest = [max(len(entry.style.name) for entry in column if entry) for column in zip_longest(*rows)]
    legend = graphviz.Digraph(
        "cluster legend", graph_attr=dict(label="", color=FRAME, margin="6", tooltip="legend", sortv="2")
    )
    for row in rows if across else rows[::-1]:
        inside = graphviz.Digraph(graph_attr={"rank": "same"} if across else {})
        for entry, width in zip(row, widest, strict=False):
            _add_entry(inside, entry, width if columns else len(entry.style.name) + 3)
        for left, right in pairwise(row):
            inside.edge(_right(left), _left(right), style="invis", weight="10")
        legend.subgraph(inside)
    for above, below in pairwise(rows):
        for first, second in list(zip(above, below, strict=False))[: None if columns else 1]:
            if across:
                legend.edge(_left(first), _left(second), style="invis", weight="10")
            else:
                legend.subgraph(_same(_left(first), _left(second)))
    return legend


def _columns(entries: Sequence[_Entry], lines: Sequence[_Entry]) -> list[list[_Entry]]:
    """Nodes below each other, and lines beside them."""
    return [list(filter(None, row)) for row in zip_longest(entries, lines)]


def _rows(entries: Sequence[_Entry]) -> list[list[_Entry]]:
    """As few rows as they fit into, about equally long."""
    if not entries:
        return []
    whole = sum(entry.width for entry in entries)
    each = whole / -(-whole // _ROW)
    rows: list[list[_Entry]] = [[]]
    filled = 0.0
    for entry in entries:
        if rows[-1] and filled + entry.width / 2 > each * len(rows):
            rows.append([])
        rows[-1].append(entry)
        filled += entry.width
    return rows


def _left(entry: _Entry) -> str:
    return f"legend start {entry.name}"


def _right(entry: _Entry) -> str:
    return f"legend {entry.name}"


def _add_entry(legend: graphviz.Digraph, entry: _Entry, width: int) -> None:
    """A small shape, or a line, and what it means to the right of it, in a field of so many characters."""
    field = f'<td align="left" width="{round(_CHARACTER * width)}">{html.escape(entry.style.name)}</td>'
    said = f'<<table border="0" cellborder="0" cellspacing="0" cellpadding="0"><tr>{field}</tr></table>>'
    place = dict(fontsize="9", height="0.2", width="0.1", margin="0.02,0", shape="plaintext")
    legend.node(_right(entry), said, tooltip=entry.style.name, **place)
    if entry.line:
        # The line begins at the middle of an unseen node, so it is long enough to show its dashes.
        legend.node(_left(entry), "", shape="box", style="invis", width="0.5", height="0.1")
        legend.edge(_left(entry), _right(entry), tailclip="false", **entry.style.attributes)
        return
    size = dict(width="0.4", height="0.22", fixedsize="true", margin="0", tooltip=entry.style.name)
    legend.node(_left(entry), "", **{**entry.style.attributes, **size})
    legend.edge(_left(entry), _right(entry), style="invis", weight="10")


def _same(*names: str) -> graphviz.Digraph:
    row = graphviz.Digraph(graph_attr={"rank": "same"})
    for name in names:
        row.node(name)
    return row


def _add_cuts(drawing: graphviz.Digraph, cuts: Sequence[Cut]) -> None:
    """Add a table of the cuts: where each is and what is lost. Equal rows are joined; of many the first are shown."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for cut in cuts:
        rows.setdefault((cut.primitive, cut.source, cut.meaning), []).extend(cut.names)
    shown = list(rows.items())[: _ROWS if len(rows) <= _ROWS else _ROWS - 1]
    body = "".join(
        "<tr>"
        + _cell(wrap(short_list(names), 24), VERMILLION)
        + _cell(wrap(primitive, 18))
        + _cell(wrap(source, 30))
        + _cell(wrap(short_text(meaning), 80))
        + "</tr>"
        for (primitive, source, meaning), names in shown
    )
    if len(shown) < len(rows):
        left = sum(map(len, rows.values())) - sum(len(names) for _, names in shown)
        body += f"<tr>{_cell([f'and {left} more: the report has all of them'], span=4)}</tr>"
    table = f'<<table border="1" color="{FRAME}" cellborder="0" cellspacing="2">{body}</table>>'
    # In a cluster: Graphviz sets a part that is one node by its middle, not by its side.
    part = graphviz.Digraph("cluster cuts", graph_attr=dict(label="", peripheries="0", margin="0", sortv="3"))
    part.node(_CUTS, table, shape="plain", tooltip="cuts")
    drawing.subgraph(part)


def _cell(lines: Iterable[str], color: str = QUIET, span: int = 1) -> str:
    end = '<br align="left"/>'
    text = end.join(html.escape(plain(line)) for line in shorten(list(lines), _LINES)) + end
    across = f' colspan="{span}"' if span > 1 else ""
    return f'<td align="left" valign="top"{across}><font point-size="9" color="{color}">{text}</font></td>'
