"""What a run takes, as a table."""

from __future__ import annotations

from etcompile.amounts import bytes_text, count_text
from etcompile.cost.cost import Cost
from etcompile.markup import Markup, bar, joined, table, tag

__all__ = ["cost_view"]


def cost_view(cost: Cost) -> Markup:
    """Memory with bars, then operations and traffic of a step."""
    first, *_ = str(cost).splitlines()
    peak = cost.peak_bytes or 1
    rows = [
        ("traces, from step to step", bar(cost.trace_bytes / peak, bytes_text(cost.trace_bytes))),
        ("most in use at one time", bar(1.0, bytes_text(cost.peak_bytes))),
        ("operations per step", f"{count_text(cost.flops)}flop"),
        ("exp, tanh and their like per step", count_text(cost.transcendentals).strip()),
        ("read and written per step", bytes_text(cost.bytes_moved)),
    ]
    return joined(tag("h3", first), table(("", ""), rows))
