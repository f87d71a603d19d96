"""Text inside the picture: types in short form, long names over several lines, safe markup."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable

from etcompile.viz.style import ORANGE, QUIET

__all__ = ["array_type", "markup", "plain", "shorten", "wrap"]

_SHORT = {"float": "f", "uint": "u", "int": "i", "complex": "c", "bfloat": "bf"}


def array_type(shape: Iterable[int] | None, dtype: object = None) -> str:
    """``f32[16,256]`` for a float32 array of that shape; parts that are unknown are left out."""
    match = re.fullmatch(r"(bfloat|float|uint|int|complex)(\d+)", str(dtype or ""))
    kind = _SHORT[match[1]] + match[2] if match else str(dtype or "")
    return kind if shape is None else f"{kind}[{','.join(str(size) for size in shape)}]"


def plain(text: object) -> str:
    """Text without the control characters that XML forbids."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", str(text)
    )


def wrap(text: object, width: int = 26) -> list[str]:
    """Break text into lines of at most `width` characters, at spaces or after ``. / _ - , :`` where possible.

    Examples
    --------
    >>> wrap("encoder.layers.recurrent_weight", 18)
    ['encoder.layers.', 'recurrent_weight']
    """
    lines = [""]
    # Each piece ends in the character after which a line may break.
    for piece in re.findall(r"[^\s./_\-,:]*(?:[./_\-,:]+|\s+|$)", plain(text)):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        while len(piece.rstrip()) > width:
            head, piece = piece[:width], piece[width:]
            lines[-1] = head
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines if line.strip()] or [""]


def shorten(lines: list[str], limit: int) -> list[str]:
    """At most `limit` lines, the last one ending in an ellipsis where lines were left out."""
    return (
        lines if len(lines) <= limit else [*lines[: limit - 1], lines[limit - 1] + " \N{HORIZONTAL ELLIPSIS}"]
    )


#: Of the largest area, in points.
_WIDEST, _HIGHEST = 56, 14


def markup(
    head: Iterable[str], details: Iterable[str] = (), lead: int = 0, amount: str = "", share: float = 0
) -> str:
    """A Graphviz HTML-like label: bold head lines, then smaller, quieter detail lines.

    Parameters
    ----------
    head, details : iterable of str
        Lines, not yet escaped.
    lead : int
        Points left free above the text, for shapes with a lid.
    amount, share : str, float
        A last line of an area and what it stands for; the area is a share of the largest that is drawn.
    """
    rows = [f"<b>{html.escape(plain(line))}</b>" for line in head]
    rows += [_quiet(line) for line in details if line]
    cells = "".join(f"<tr><td>{row}</td></tr>" for row in rows)
    space = f'<tr><td height="{lead}"></td></tr>' if lead else ""
    last = f"<tr><td>{_area(amount, share)}</td></tr>" if amount else ""
    return f'<<table border="0" cellborder="0" cellspacing="0" cellpadding="1">{space}{cells}{last}</table>>'


def _quiet(line: str) -> str:
    return f'<font point-size="9" color="{QUIET}">{html.escape(plain(line))}</font>'


def _area(amount: str, share: float) -> str:
    width, height = (max(1, round(size * math.sqrt(share))) for size in (_WIDEST, _HIGHEST))
    area = f'<td bgcolor="{ORANGE}" fixedsize="true" width="{width}" height="{height}" cellpadding="0"></td>'
    # The area stands in a table of its own: a cell is as high as the highest of its row.
    inner = f'<table border="0" cellborder="0" cellspacing="0" cellpadding="0"><tr>{area}</tr></table>'
    row = f"<tr><td>{inner}</td><td>{_quiet(amount)}</td></tr>"
    return f'<table border="0" cellborder="0" cellspacing="0" cellpadding="2">{row}</table>'
