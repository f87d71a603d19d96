"""The tables of docs/deep.md from what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from deep_measure import DEPTHS, FULL, LABELS, TASKS, WIDER, Cell, Training
from earlier import Earlier
from stacks import KINDS

__all__ = ["render"]

Cells = Mapping[tuple[str, int, str], Cell]
Trainings = Mapping[tuple[str, int, str], Training]

BEGIN, END = "<!-- written by make deep -->", "<!-- end of what make deep writes -->"
_TRAINED, _RUN = "### Trained", "### What was run"
_STACKS = [(kind, depth) for kind in KINDS for depth in DEPTHS]
_HEAD = ("task", "stack", "layers", *LABELS)
#: Columns that name a row, and the order of what stands in them.
_NAMES = ("task", "stack", "layers", "rule")
_ORDER = {
    name: place
    for names in (
        [t.title for t in TASKS.values()],
        [k.title for k in KINDS.values()],
        list(map(str, DEPTHS)),
        LABELS,
    )
    for place, name in enumerate(names)
}


def render(page: str, cells: Cells, trainings: Trainings) -> str:
    """The page with its measured part anew; rows of stacks that were not measured again stay as they are."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    earlier = Earlier(rest)
    parts = [
        BEGIN,
        "### All layers together",
        _table(earlier, _HEAD, _whole(cells)),
        "### What is carried and held",
        "KiB for a batch, traces and what backpropagation keeps of a window's steps. In brackets the length of the window that "
        f"keeps as much as the rule carries beside the traces of `d_rtrl`, with {', '.join(_widths(cells))} units in a layer.",
        _table(earlier, ("stack", "layers", *LABELS), _memory(cells)),
        "### Layer by layer",
        "Layers from the bottom, 1 is the first; the mean over tasks and seeds.",
        _table(earlier, ("stack", "layers", "rule", *map(str, range(1, max(DEPTHS) + 1))), _by_layer(cells)),
        *_trained(earlier, trainings),
        _RUN,
        _about(earlier, cells),
        END,
    ]
    return before + "\n\n".join(parts) + after


def _whole(cells: Cells) -> Iterable[Sequence[str]]:
    for task in TASKS.values():
        for kind, depth in _STACKS:
            if cell := cells.get((kind, depth, task.name)):
                yield task.title, KINDS[kind].title, str(depth), *(_numbers(cell.whole[x]) for x in LABELS)


def _widths(cells: Cells) -> list[str]:
    return list(next(iter(cells.values())).alike) if cells else [str(n) for n in (FULL.units, *WIDER)]


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


def _trained(earlier: Earlier, trainings: Trainings) -> list[str]:
    if not trainings:
        section = earlier.between(_TRAINED, _RUN).strip()
        return [_TRAINED, section] if section else []
    one = next(iter(trainings.values()))
    rows = [
        (TASKS[task].title, KINDS[kind].title, str(depth), *(_numbers(v) for v in t.accuracies.values()))
        for (kind, depth, task), t in trainings.items()
    ]
    return [
        _TRAINED,
        f"Test accuracy after {one.updates} updates by each gradient.",
        _table(earlier, ("task", "stack", "layers", *one.accuracies), rows),
    ]


def _about(earlier: Earlier, cells: Cells) -> str:
    there = {tuple(row[:3]) for row in earlier.rows(_HEAD)}
    if not cells or there - {tuple(row[:3]) for row in _whole(cells)}:
        return earlier.between(_RUN, END).strip() or "Nothing."
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


def _table(earlier: Earlier, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    names = sum(h in _NAMES for h in head)
    kept = earlier.kept(head, list(rows), names)
    kept.sort(key=lambda row: [_ORDER[name] for name in row[:names]])
    lines = [head, ["---"] * len(head), *kept]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
