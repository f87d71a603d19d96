"""From ``model.py:31`` to the lines around it, where the file is known to this process."""

from __future__ import annotations

import linecache
import re
import sys
from pathlib import Path

from etcompile.markup import Markup, tag
from etcompile.paths import user_line

__all__ = ["source_view"]

#: Lines shown before and behind.
_AROUND = 3


def source_view(source: str) -> Markup:
    """A source line that opens to show itself among its neighbours, with a link to the file; as text where it is not found."""
    said = user_line(source)
    place = re.fullmatch(r"(.+):(\d+)", said)
    path = _path(place[1]) if place else None
    lines = linecache.getlines(path) if path else []
    if not place or not path or not 0 < int(place[2]) <= len(lines):
        return tag("code", said, title=source)
    number = int(place[2])
    first, last = max(1, number - _AROUND), min(len(lines), number + _AROUND)
    shown = []
    for k in range(first, last + 1):
        text = f"{k:>5}  {lines[k - 1].rstrip()}\n"
        shown.append(tag("mark", text) if k == number else text)
    link: object = ""
    if Path(path).is_file():
        link = tag("p", tag("a", path, href=Path(path).resolve().as_uri()), class_="quiet")
    return tag(
        "details", tag("summary", tag("code", said), title=source), tag("pre", *shown), link, class_="source"
    )


def _path(name: str) -> str | None:
    """The file of this name that was imported, run or typed into a notebook; None where there are several."""
    imported = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    found = {file for file in (*imported, *linecache.cache) if file and re.split(r"[/\\]", file)[-1] == name}
    real = {str(Path(file).resolve()) if Path(file).is_file() else file for file in found}
    return real.pop() if len(real) == 1 else None
