"""A picture of all times and of memory: relative to backpropagation through time, and to what bandwidth allows."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from results import AUTO, BPTT, BRAINTRACE, CAUSAL, CHECKPOINT, HAND, found_cases, label_of

__all__ = ["chart"]

_FASTEST = "fastest"
#: Colour (Okabe and Ito's, told apart by colour-blind people), marker and name of each contender.
_STYLE = {
    AUTO: ("#0072B2", "o", "etcompile"),
    CAUSAL: ("#56B4E9", "^", "etcompile, step by step"),
    HAND: ("#CC79A7", "v", "written by hand"),
    _FASTEST: ("#D55E00", "P", "braintrace, fastest mode"),
    BRAINTRACE: ("#E69F00", "s", "braintrace, step by step"),
    CHECKPOINT: ("#999999", "X", "bptt with checkpoints"),
    BPTT: ("#000000", "|", "bptt: backpropagation through time"),
    "floor": ("#009E73", "D", "floor: matrix products and traces"),
}

#: Whose memory is shown.
_REMEMBERING = (AUTO, BRAINTRACE, CHECKPOINT, BPTT)


def chart(results: Mapping[str, Any]) -> str:
    """An SVG of four panels, of one machine's results."""
    options: dict[Any, Any] = {
        "svg.hashsalt": "etcompile",
        "svg.fonttype": "none",
        "font.size": 9,
        "font.family": "sans-serif",
    }
    with mpl.rc_context(options):
        figure = Figure(figsize=(11, 9.5), layout="constrained")
        axes = figure.subplots(2, 2, height_ratios=(15, 11))
        _sequences(axes[0, 0], results, ("d_rtrl",), "D-RTRL over a sequence")
        _sequences(axes[0, 1], results, ("pp_prop", "e_prop"), "pp_prop, e-prop over a sequence")
        _updates(axes[1, 0], results)
        _memory(axes[1, 1], results)
        handles = {}
        for panel in axes.flat:
            handles.update({label: h for h, label in zip(*panel.get_legend_handles_labels(), strict=True)})
        if handles:
            figure.legend(
                list(handles.values()),
                list(handles),
                loc="outside upper center",
                ncols=4,
                frameon=False,
                title=label_of(results),
            )
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _sequences(axes: Axes, results: Mapping[str, Any], rules: Sequence[str], title: str) -> None:
    """A row for each case, times over that of backpropagation through time."""
    rows, names = [], []
    for rule in rules:
        for f in found_cases(results, "sequence", rule):
            for steps in f.steps:
                back = f.milliseconds(BPTT, steps)
                if back:
                    found = {who: f.milliseconds(who, steps) for who in (AUTO, CAUSAL, HAND, CHECKPOINT)}
                    found[BRAINTRACE], found[_FASTEST] = f.milliseconds(BRAINTRACE), f.fastest_peer(steps)[0]
                    found["floor"] = f.floor()
                    rows.append({who: v / back for who, v in found.items() if v})
                    names.append(f.labelled(steps) + (f", {rule}" if len(rules) > 1 else ""))
    color, _, label = _STYLE[BPTT]
    axes.axvline(1.0, color=color, linewidth=1, label=label)
    _dots(axes, rows, names)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("time over that of bptt (left: faster)")


def _updates(axes: Axes, results: Mapping[str, Any]) -> None:
    rows, names = [], []
    for f in found_cases(results, "update"):
        found = {AUTO: f.milliseconds(AUTO), BRAINTRACE: f.milliseconds(BRAINTRACE), "floor": f.floor()}
        rows.append({who: v for who, v in found.items() if v})
        names.append(f.label)
    _dots(axes, rows, names)
    axes.set_title("D-RTRL, an update at every step", loc="left", fontweight="bold")
    axes.set_xlabel("milliseconds per step")


def _dots(axes: Axes, rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> None:
    for who, (color, marker, label) in _STYLE.items():
        points = [(row[who], k) for k, row in enumerate(rows) if who in row]
        if points:
            xs, ys = zip(*points, strict=True)
            size = 22 if who == "floor" else 36
            axes.scatter(xs, ys, c=color, marker=marker, s=size, label=label, zorder=3)
    _frame(axes, names)


def _memory(axes: Axes, results: Mapping[str, Any]) -> None:
    """Temporary memory at the short sequence (hollow) and at the long one (filled), joined by a line."""
    found = found_cases(results, "memory")
    for row, f in enumerate(found):
        for k, who in enumerate(_REMEMBERING):
            sizes = [r["temporary"] / 2**20 for r in f.data["runs"] if r["who"] == who and "error" not in r]
            if len(sizes) == 2:
                color, marker, _ = _STYLE[who]
                y = row + 0.18 * (k - 1.5)
                axes.plot(sizes, [y, y], color=color, linewidth=1)
                marker = "o" if marker == "|" else marker
                for size, fill in zip(sizes, ("white", color), strict=True):
                    axes.scatter(size, y, c=fill, marker=marker, s=26, edgecolors=color, zorder=3)
    names = [f"{f.label}, {f.rule}" for f in found]
    _frame(axes, names)
    steps = max((f.steps for f in found), key=len, default=[])
    lengths = f": hollow {steps[0]} steps, filled {steps[-1]}" if len(steps) > 1 else ""
    axes.set_title("peak of temporary memory", loc="left", fontweight="bold")
    axes.set_xlabel(f"MiB{lengths} (bptt: black dots)")


def _frame(axes: Axes, names: Sequence[str]) -> None:
    """A row for each name, and a logarithmic scale with plain numbers."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    if names:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="both", color="#e4e4e4", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
