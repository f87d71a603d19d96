"""A comparison of rules as text, as a table of rich, and as HTML."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from etcompile.amounts import bytes_text, count_text
from etcompile.markup import Markup, bar, framed, joined, table, tag

if TYPE_CHECKING:
    import rich.table

    from etcompile.comparison import Comparison, RuleRow

__all__ = ["comparison_html", "comparison_rich", "comparison_text"]

_HEADS = ("rule", "traces", "peak", "per step", "moved", "gradient", "leaves out")
_NUMBERS = (1, 2, 3, 4)
#: Letters of the last column in text; longer ones go on below.
_WIDTH = 60


def comparison_text(comparison: Comparison) -> str:
    """What ``print(comparison)`` shows."""
    rows = [_cells(row) for row in comparison.rows]
    widths = [max(len(head), *(len(row[k]) for row in rows), 0) for k, head in enumerate(_HEADS[:-1])]
    lines = [_title(comparison), _line(_HEADS, widths)]
    for row in rows:
        first, *others = textwrap.wrap(row[-1], _WIDTH) or [""]
        lines.append(_line((*row[:-1], first), widths))
        lines += [_line(("",) * len(widths) + (more,), widths) for more in others]
    return "\n".join(lines)


def comparison_rich(comparison: Comparison) -> rich.table.Table:
    """The table as rich shows it, as wide as the terminal allows."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # The words share a column, so that the numbers fit a terminal of 80.
    shown = Table(title=_title(comparison), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for k, head in enumerate(_HEADS[:5]):
        shown.add_column(head, justify="right" if k in _NUMBERS else "left", no_wrap=bool(k))
    shown.add_column("gradient", min_width=16)
    for row in comparison.rows:
        *amounts, gradient, leaves_out = map(Text, _cells(row))
        style = "dim" if row.refused else ("green" if row.exact else "")
        shown.add_row(*amounts, Text(": ").join([gradient, leaves_out]), style=style)
    return shown


def comparison_html(comparison: Comparison) -> str:
    """What a notebook shows."""
    most = max((row.trace_bytes or 0 for row in comparison.rows), default=0)
    rows = [_html_cells(row, most) for row in comparison.rows]
    return framed(tag("h3", _title(comparison)), table(_HEADS, rows, numbers=(2, 3, 4)))


def _title(comparison: Comparison) -> str:
    run = "one online step" if comparison.steps is None else f"{comparison.steps} steps"
    batch = "" if comparison.batch is None else f", batch {comparison.batch}"
    return f"learning rules for {comparison.model}: {run}{batch}"


def _cells(row: RuleRow) -> tuple[str, ...]:
    """The row as text, one cell for each head."""
    cost, dash = row.cost, "-"
    return (
        row.rule,
        dash if row.trace_bytes is None else bytes_text(row.trace_bytes),
        dash if cost is None else bytes_text(cost.peak_bytes),
        dash if cost is None else f"{count_text(cost.flops)}flop",
        dash if cost is None else bytes_text(cost.bytes_moved),
        _short_gradient(row),
        _words(row),
    )


def _words(row: RuleRow) -> str:
    """What is left out; of an exact rule in which sense it is exact."""
    said = row.gradient if row.exact else row.leaves_out
    return "; ".join(filter(None, (said, f"refused: {row.refused}" if row.refused else "")))


def _short_gradient(row: RuleRow) -> str:
    if row.exact is None:
        return "-"
    return "exact" if row.exact else ("another" if row.another else "approximate")


def _html_cells(row: RuleRow, most: int) -> tuple[object, ...]:
    name, traces, *amounts, gradient, leaves_out = _cells(row)
    badge: object = gradient
    if row.exact is not None:
        badge = tag("span", gradient, class_=f"badge {'yes' if row.exact else 'no'}", title=row.gradient)
    size: Markup | str = traces
    if row.trace_bytes is not None:
        size = bar(row.trace_bytes / most if most else 0.0, traces)
    return joined(tag("code", name)), size, *amounts, badge, leaves_out


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    *fixed, last = cells
    padded = (
        cell.rjust(width) if k in _NUMBERS else cell.ljust(width)
        for k, (cell, width) in enumerate(zip(fixed, widths, strict=True))
    )
    return "  ".join((*padded, last)).rstrip()
