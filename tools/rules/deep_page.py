"""The tables of docs/deep.md from what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from deep_measure import DEPTHS, LABELS, TASKS, Cell, Training
from stacks import KINDS

__all__ = ["render"]

Cells = Mapping[tuple[str, int, str], Cell]
Trainings = Mapping[tuple[str, int, str], Training]

BEGIN, END = "<!-- written by make deep -->", "<!-- end of what make deep writes -->"
_STACKS = [(kind, depth) for kind in KINDS for depth in DEPTHS]


def render(page: str, cells: Cells, trainings: Trainings) -> str:
    """The page with its measured part anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    parts = [
        BEGIN,
        "### All layers together",
        _table(("task", "stack", "layers", *LABELS), _whole(cells)),
        "### What is carried and held",
        "KiB for a batch, traces and what backpropagation keeps of a window's steps. In brackets the length of the window that "
        f"keeps as much as the rule carries beside the traces of `d_rtrl`, with {', '.join(_widths(cells))} units in a layer.",
        _table(("stack", "layers", *LABELS), _memory(cells)),
        "### Layer by layer",
        "Layers from the bottom, 1 is the first; the mean over tasks and seeds.",
        _table(("stack", "layers", "rule", *map(str, range(1, max(DEPTHS) + 1))), _by_layer(cells)),
        *_trained(trainings),
        "### What was run",
        _about(cells),
        END,
    ]
    return before + "\n\n".join(parts) + after


def _whole(cells: Cells) -> Iterable[Sequence[str]]:
    for task in TASKS.values():
        for kind, depth in _STACKS:
            if cell := cells.get((kind, depth, task.name)):
                yield task.title, KINDS[kind].title, str(depth), *(_numbers(cell.whole[x]) for x in LABELS)


def _widths(cells: Cells) -> list[str]:
    return list(next(iter(cells.values())).alike) if cells else []


def _memory(cells: Cells) -> Iterable[Sequence[str]]:
    for kind, depth in _STACKS:
        found = [c for (k, d, _), c in cells.items() if (k, d) == (kind, depth)]
        if not found:
            continue
        cell, row = found[0], []
        for label in LABELS:
            alike = [f"{cell.alike[n][label]:.0f}" for n in cell.alike if label in cell.alike[n]]
            equal = f" ({', '.join(alike)})" if alike else ""
            row.append(f"{(cell.carried[label] + cell.held.get(label, 0)) / 1024:.0f}{equal}")
        yield KINDS[kind].title, str(depth), *row


def _by_layer(cells: Cells) -> Iterable[Sequence[str]]:
    for kind, depth in _STACKS:
        found = [c for (k, d, _), c in cells.items() if (k, d) == (kind, depth)]
        for label in LABELS if found else ():
            means = np.mean([seed for c in found for seed in c.layers[label]], axis=0)
            row = [f"{m:.2f}" for m in means] + [""] * (max(DEPTHS) - depth)
            yield KINDS[kind].title, str(depth), label, *row


def _trained(trainings: Trainings) -> list[str]:
    if not trainings:
        return []
    one = next(iter(trainings.values()))
    rows = [
        (TASKS[task].title, KINDS[kind].title, str(depth), *(_numbers(v) for v in t.accuracies.values()))
        for task in TASKS
        for (kind, depth, of), t in sorted(trainings.items())
        if of == task
    ]
    return [
        "### Trained",
        f"Test accuracy after {one.updates} updates by each gradient.",
        _table(("task", "stack", "layers", *one.accuracies), rows),
    ]


def _about(cells: Cells) -> str:
    if not cells:
        return "Nothing."
    one = next(iter(cells.values()))
    losses: dict[str, list[list[float]]] = {}
    for (_, _, task), cell in cells.items():
        losses.setdefault(task, []).extend(cell.losses)
    told = ", ".join(
        f"{before:.2f} to {after:.2f} ({TASKS[task].title})"
        for task, (before, after) in ((t, np.mean(v, axis=0)) for t, v in losses.items())
    )
    silent = [min(map(min, c.activity)) for (kind, _, _), c in cells.items() if kind == "lif"]
    spikes = (
        f" In the least active layer of spiking units {min(silent):.0%} spike at a step." if silent else ""
    )
    return (
        f"{one.units} units in a layer, batches of {one.batch} sequences of {next(iter(TASKS.values())).steps} steps, "
        f"{len(one.losses)} seeds: the mean ± its standard error. Weights are those after {one.updates} updates by "
        f"backpropagation through time, which bring the loss from {told}.{spikes}"
    )


def _numbers(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
