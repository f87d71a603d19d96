"""The part of docs/reinforcement.md that is measured: a table, what was run, and the picture."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np
from measure import Cell
from models import MODELS
from settings import RULES, TASKS, Protocol

__all__ = ["render"]

Cells = Mapping[tuple[str, str, str], Cell]

BEGIN, END = "<!-- written by make rl -->", "<!-- end of what make rl writes -->"


def render(page: str, cells: Cells, protocol: Protocol) -> tuple[str, str]:
    """The page with its measured part anew, and the picture."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    written = "\n\n".join([BEGIN, _table(cells), _about(cells, protocol), END])
    return before + written + after, _picture(cells)


def _table(cells: Cells) -> str:
    head = ["task", "chance", *(f"{model}, {rule}" for model in MODELS for rule in RULES)]
    lines = [head, ["---"] * len(head)]
    for task in TASKS.values():
        row = [_shown(cells.get((task.name, model, rule))) for model in MODELS for rule in RULES]
        if any(row):
            lines.append([task.title, f"{task.chance:g}", *row])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    digits = 2 if TASKS[cell.task].most == 1 else 0
    return f"{cell.score:.{digits}f} ± {cell.error:.{digits}f}"


def _about(cells: Cells, protocol: Protocol) -> str:
    seconds = sum(c.seconds for c in cells.values())
    rates = ", ".join(f"{rate:g}" for rate in protocol.rates)
    counts = {c.task: c.steps for c in cells.values()}
    steps = "; ".join(
        f"{count:,} on {' and '.join(TASKS[name].title for name in TASKS if counts.get(name) == count)}"
        for count in dict.fromkeys(counts.values())
    )
    lines = [
        f"Mean ± standard error over {len(protocol.seeds)} seeds, in the last {protocol.last} of {protocol.pieces} parts of a "
        f"run, at the better of the learning rates {rates} (Adam; all seeds at all rates, chosen for every cell alike by this "
        f"very mean, so a little flattered). {protocol.agents} agents, gamma {protocol.gamma:g}, lambda {protocol.lam:g}, "
        f"entropy {protocol.entropy:g}; {_options()}. Steps of each agent: {steps}. {len(cells)} cells "
        f"took {seconds / 60:.0f} minutes in one process.",
    ]
    every = [(task, model, rule) for task in TASKS for model in MODELS for rule in RULES]
    unmeasured = [
        task.title for task in TASKS.values() if not any(c.task == task.name for c in cells.values())
    ]
    if any(cell not in cells for cell in every):
        rest = f", nor were {'; '.join(unmeasured)}" if unmeasured else ""
        lines.append(f"Cells that are empty were not measured{rest}.")
    return "\n\n".join(lines)


def _options() -> str:
    """Which tasks have options of their own."""
    titles: dict[str, list[str]] = {}
    for task in TASKS.values():
        if task.options:
            options = ", ".join(f"`{name}={value}`" for name, value in task.options.items())
            titles.setdefault(options, []).append(task.title)
    return "; ".join(f"on {' and '.join(names)} {options}" for options, names in titles.items())


_WIDTH, _HEIGHT, _GAP, _TOP, _LEFT = 150, 90, 34, 40, 106
_COLOURS = ("#2a6fbb", "#d1662b")


def _picture(cells: Cells) -> str:
    """Learning curves: a row for each task, a column for each network; mean over seeds with its standard error."""
    tasks = [t for t in TASKS.values() if any(c.task == t.name for c in cells.values())]
    width = _LEFT + len(MODELS) * (_WIDTH + _GAP)
    height = _TOP + len(tasks) * (_HEIGHT + _GAP) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        "<title>learning curves of agents with d_rtrl and with one-step gradients</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for k, (rule, colour) in enumerate(zip(RULES, _COLOURS, strict=True)):
        x = _LEFT + 120 * k
        parts.append(f'<path d="M{x} 14h18" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 24}" y="18">{escape(rule)}</text>')
    for row, task in enumerate(tasks):
        top = _TOP + row * (_HEIGHT + _GAP)
        parts.append(f'<text x="4" y="{top + 12}">{escape(task.title.split(",")[0])}</text>')
        parts.append(f'<text x="4" y="{top + 26}">{escape(task.title.partition(",")[2].strip())}</text>')
        for column, model in enumerate(MODELS):
            left = _LEFT + column * (_WIDTH + _GAP)
            parts.append(f'<text x="{left}" y="{top - 4}" fill="#555">{model}</text>')
            parts.append(
                f'<rect x="{left}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#ccc"/>'
            )
            chance = top + _HEIGHT * (1 - task.chance / task.most)
            parts.append(f'<path d="M{left} {chance:.1f}h{_WIDTH}" stroke="#888" stroke-dasharray="3 3"/>')
            for rule, colour in zip(RULES, _COLOURS, strict=True):
                cell = cells.get((task.name, model, rule))
                if cell is not None:
                    parts += _curve(cell, task.most, left, top, colour)
    return "\n".join([*parts, "</svg>", ""])


def _curve(cell: Cell, most: float, left: float, top: float, colour: str) -> list[str]:
    mean, error = np.asarray(cell.curve) / most, np.asarray(cell.errors) / most
    xs = left + _WIDTH * (np.arange(len(mean)) + 0.5) / len(mean)

    def line(values: np.ndarray) -> list[str]:
        ys = top + _HEIGHT * (1 - np.clip(values, 0, 1))
        return [f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True)]

    band = " ".join(line(mean + error) + line(mean - error)[::-1])
    return [
        f'<polygon points="{band}" fill="{colour}" fill-opacity="0.2"/>',
        f'<polyline points="{" ".join(line(mean))}" fill="none" stroke="{colour}" stroke-width="1.6"/>',
    ]
