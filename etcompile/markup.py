"""HTML, escaped by construction: text becomes markup in :func:`tag` alone."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

__all__ = ["Markup", "bar", "document", "framed", "joined", "table", "tag"]

#: What HTML and XML do not allow in a text, however it is written.
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_WITHOUT_END = frozenset(["br", "meta"])

#: One style for notebooks, light and dark, and for files. Colours are those of the drawings.
_STYLE = """
.etcompile { font: 13px/1.45 "DejaVu Sans", Verdana, Helvetica, Arial, sans-serif; max-width: 1200px; }
.etcompile h3 { margin: 14px 0 2px; font-size: 15px; }
.etcompile p { margin: 2px 0; }
.etcompile .quiet { opacity: 0.7; }
.etcompile .scroll { overflow-x: auto; }
.etcompile table { border-collapse: collapse; margin: 4px 0; }
.etcompile th, .etcompile td { text-align: left; vertical-align: top; padding: 3px 10px 3px 0; background: none; }
.etcompile th { font-weight: 600; border-bottom: 1px solid #8888; white-space: nowrap; }
.etcompile td { border-bottom: 1px solid #8883; }
.etcompile td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.etcompile th.number { text-align: right; }
.etcompile .bar { display: inline-block; width: 90px; height: 9px; background: #8883; margin-right: 8px; }
.etcompile .bar span { display: block; height: 100%; background: #E69F00; }
.etcompile .badge { padding: 1px 8px; border-radius: 9px; border: 1px solid; white-space: nowrap; }
.etcompile .yes { color: #009E73; }
.etcompile .no { color: #D55E00; }
.etcompile pre { margin: 4px 0; padding: 8px; overflow-x: auto; background: #8881; font: 12px/1.5 "DejaVu Sans Mono", monospace; }
.etcompile code { font: 12px "DejaVu Sans Mono", monospace; }
.etcompile a { color: #0072B2; }
.etcompile abbr { text-decoration: underline dotted; cursor: help; }
.etcompile svg { max-width: 100%; height: auto; background: white; }
.etcompile summary { cursor: pointer; font-weight: 600; margin-top: 10px; }
.etcompile .source summary { font-weight: 400; margin: 0; white-space: nowrap; }
.etcompile mark { background: #E69F0055; color: inherit; }
"""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element; children and attributes are escaped unless they are :class:`Markup`.

    ``class_`` and the like stand for words of Python; an attribute that is None is left out.

    Examples
    --------
    >>> tag("td", "a < b", tag("br"), class_="number")
    '<td class="number">a &lt; b<br></td>'
    """
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _WITHOUT_END:
        return Markup(f"<{name}{said}>")
    return Markup(f"<{name}{said}>{joined(*children)}</{name}>")


def joined(*children: object) -> Markup:
    """Parts one after the other, escaped unless they are :class:`Markup`."""
    return Markup("".join(child if isinstance(child, Markup) else _escaped(child) for child in children))


def table(heads: Iterable[object], rows: Iterable[Iterable[object]], numbers: Iterable[int] = ()) -> Markup:
    """A table; the columns ``numbers`` are set to the right. A row of one cell goes across."""
    heads, right = list(heads), set(numbers)

    def cells(name: str, row: Iterable[object]) -> Markup:
        row = list(row)
        across = len(heads) if len(row) == 1 < len(heads) else None
        return joined(
            *(
                tag(name, cell, class_="number" if k in right and not across else None, colspan=across)
                for k, cell in enumerate(row)
            )
        )

    body = joined(*(tag("tr", cells("td", row)) for row in rows))
    inside = joined(tag("thead", tag("tr", cells("th", heads))), tag("tbody", body))
    return tag("div", tag("table", inside), class_="scroll")


def bar(share: float, text: str) -> Markup:
    """An amount with a bar, whose length is its share of the largest."""
    inner = tag("span", style=f"width:{100 * min(max(share, 0.0), 1.0):.1f}%")
    return joined(tag("span", inner, class_="bar"), text)


def framed(*children: object) -> Markup:
    """A view for a notebook, with its style."""
    return tag("div", tag("style", Markup(_STYLE)), *children, class_="etcompile")


def document(title: str, *children: object) -> str:
    """A whole page that needs no other file."""
    head = joined(
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup("body { margin: 24px; color: #1A1A1A; background: white; }")),
    )
    page = tag("html", tag("head", head), tag("body", framed(*children)), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _escaped(value: object) -> str:
    return html.escape(_CONTROLS.sub("\N{REPLACEMENT CHARACTER}", str(value)))
