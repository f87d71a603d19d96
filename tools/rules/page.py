"""docs/rules.md from results: tables, a picture, and whether the expected order came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import cast

import numpy as np
from chart import chart, values_of
from earlier import Earlier
from measure import Result
from order import SURE, check
from settings import EVERY, EXPERIMENTS, Search
from table import CLAIM, EXPECTED, LEFT_OUT, REWARDED, RULES, Entry
from tasks import Copy
from training import CLIP, MASTERED

import etcompile
from etcompile.registry import find_rule

__all__ = ["rates", "render"]

Results = Mapping[tuple[str, str], Result]

_TITLES = [e.task.title for e in EXPERIMENTS.values()]
#: What stands before and behind the range of spikes in the page.
_SPIKES = ("the same for every rule. In the spiking network ", " of the")
_COPY = cast(Copy, EXPERIMENTS["copy"].task)


def render(
    results: Results, search: Search, command: str, earlier: str = "", earlier_picture: str = ""
) -> tuple[str, str]:
    """The page and its picture; ``earlier`` is what they were."""
    before = Earlier(earlier)
    template = Template(Path(__file__).with_name("page_template.md").read_text(encoding="utf-8"))
    text = template.substitute(
        command=command,
        rules=_rules(),
        seeds=len(search.seeds),
        few=search.few,
        points=search.points,
        mastered=f"{MASTERED:.0%}",
        longest=_COPY.longest,
        accuracy=_accuracy(results, before),
        share=f"{search.reference_share:.0%}",
        batches=search.batches,
        gradient=_gradient(results, before),
        cost=_cost(results, before),
        claim=_claim(results, before),
        expected="\n".join(f"{k}. {', '.join(f'`{n}`' for n in rung)}" for k, rung in enumerate(EXPECTED, 1)),
        order=_order(results, before),
        sure=f"{SURE:g}",
        settings=_settings(results),
        about=_about_all(),
        clip=f"{CLIP:g}",
        spikes=_spikes(results, before),
        rates=", ".join(f"{r:g}" for r in search.rates),
        borrowed=", ".join(f"`{e.label}` that of `{e.rate_of}`" for e in RULES if e.rate_of),
        single=" and ".join(f"`{e.label}`" for e in RULES if e.seeds == 1),
        untrained=" and ".join(f"`{e.label}`" for e in RULES if e.seeds == 0),
        ordered=", ".join(f"`{e.label}`" for e in RULES if e.seeds is None and _ordered(e)),
        chosen=_chosen(results, before),
        missing=_missing(results, before),
    )
    panels = []
    told = [*values_of(earlier_picture), *({} for _ in EXPERIMENTS)]
    for (task, experiment), known in zip(EXPERIMENTS.items(), told, strict=False):
        found = {label: r.accuracies for (t, label), r in results.items() if t == task}
        panels.append((experiment.task.title, experiment.task.chance, known | found))
    picture = chart(panels, [e.label for e in RULES], "test accuracy of each rule; dashed: chance")
    return text, picture


def _ordered(entry: Entry) -> bool:
    return any(entry.label in rung for rung in EXPECTED)


def _rules() -> str:
    rows = []
    for e in (*RULES, *REWARDED):
        options = ", ".join(f"{k}={v!r}" for k, v in e.options.items())
        how = f"`{e.algo}`" + (f" with `{options}`" if options else "")
        rows.append((e.label, how, _equation(e), e.memory, e.work, e.exact))
    return _table(("rule", "in etcompile", "equation", "memory", "work", "exact for"), rows)


def _equation(entry: Entry) -> str:
    """The one-line equation of a rule's own docstring."""
    if entry.equation:
        return f"`{entry.equation}`"
    if entry.algo not in etcompile.algorithm_names():
        return "(not in this version)"
    line = (find_rule(entry.algo).__doc__ or "").strip().partition("\n")[0]
    _, colon, equation = line.partition(": ")
    return f"`{equation.rstrip('.')}`" if colon else line


def _accuracy_head() -> list[str]:
    others = [e.task.title for name, e in EXPERIMENTS.items() if name != "copy"]
    return ["rule", "copy: longest delay", f"copy: accuracy at delays 1, 2, 4 to {_COPY.longest}", *others]


def _accuracy(results: Results, before: Earlier) -> str:
    rows = []
    for e in RULES:
        levels = _numbers(_of(results, "copy", e, "levels"), 1)
        rows.append((e.label, levels, *(_numbers(_of(results, t, e, "accuracies"), 3) for t in EXPERIMENTS)))
    rows.append(("chance", "", *(f"{e.task.chance:.2f}" for e in EXPERIMENTS.values())))
    return _filled(_accuracy_head(), rows, before)


def _claim(results: Results, before: Earlier) -> str:
    head = ("rule and optimiser", *(e.task.title for e in EVERY.values()))
    # What the tables above have as well may be from earlier.
    told = {row[0]: row[-len(EXPERIMENTS) :] for row in before.rows(_accuracy_head())}
    rows = []
    for e in CLAIM:
        found = {t: _numbers(_of(results, t, e, "accuracies"), 3) for t in EVERY}
        known = dict(zip(EXPERIMENTS, told.get(e.label, ()), strict=False))
        rows.append((e.label, *(found[t] or known.get(t, "") for t in EVERY)))
    rows.append(("chance", *(f"{e.task.chance:.2f}" for e in EVERY.values())))
    return _filled(head, rows, before)


def _gradient(results: Results, before: Earlier) -> str:
    rows = [(e.label, *(_numbers(_of(results, t, e, "cosines")) for t in EXPERIMENTS)) for e in RULES]
    return _filled(("rule", *_TITLES), rows, before)


def _cost(results: Results, before: Earlier) -> str:
    rows = []
    for e in RULES:
        found = [results.get((t, e.label)) for t in EXPERIMENTS]
        sizes = [_bytes(r.trace_bytes) if r and r.cosines else "" for r in found]
        times = [f"{r.relative_time:.1f}" if r and r.relative_time else "" for r in found]
        rows.append((e.label, *sizes, *times))
    return _filled(
        ("rule", *(f"bytes: {t}" for t in _TITLES), *(f"time: {t}" for t in _TITLES)), rows, before
    )


def _order(results: Results, before: Earlier) -> str:
    rows = []
    for name, experiment in EXPERIMENTS.items():
        found = {label: r.accuracies for (t, label), r in results.items() if t == name}
        rows += _checked(f"{experiment.task.title}, accuracy", found | {"chance": [experiment.task.chance]})
        if experiment.task.first_level is not None:
            found = {label: [float(x) for x in r.levels] for (t, label), r in results.items() if t == name}
            rows += _checked(f"{experiment.task.title}, longest delay", found)
        found = {label: r.cosines for (t, label), r in results.items() if t == name}
        rows += _checked(f"{experiment.task.title}, gradient", found)
    head = ("what", "pair", "difference", "standard error", "verdict")
    return _table(head, before.kept(head, rows, 2))


def _checked(title: str, found: Mapping[str, Sequence[float]]) -> list[tuple[str, ...]]:
    return [
        (title, f"{p.upper} > {p.lower}", f"{p.difference:.3f}", f"{p.error:.3f}", p.verdict)
        for p in check(EXPECTED, found)
    ]


def _settings(results: Results) -> str:
    rows = []
    for name, e in EVERY.items():
        updates = next((r.updates for (t, _), r in results.items() if t == name and r.updates), e.updates)
        numbers = (e.task.inputs, e.task.steps, e.task.batch_size, updates)
        rows.append((e.task.title, e.model, *map(str, numbers), f"{e.task.chance:.2f}"))
    return _table(("task", "model", "inputs", "steps", "batch", "updates", "chance"), rows)


def _about_all() -> str:
    """A line for each text; tasks of one kind share theirs."""
    titles: dict[str, list[str]] = {}
    for e in EVERY.values():
        titles.setdefault(_about(e.task), []).append(e.task.title)
    return "\n".join(f"- **{'; '.join(t)}**: {text}" for text, t in titles.items())


def _about(task: object) -> str:
    """What a task is, from its own docstring, on one line."""
    return " ".join((type(task).__doc__ or "").split())


def _spikes(results: Results, before: Earlier) -> str:
    """The range of the shares of units that spike, with those of earlier rows."""
    told = [
        float(share.strip("% ")) / 100 for share in before.between(*_SPIKES).split(" to ") if "%" in share
    ]
    spikes = [*told, *(a for r in results.values() for a in r.activities if a > 0)]
    return f"{min(spikes):.0%} to {max(spikes):.0%}" if spikes else "none"


def _chosen_head() -> tuple[str, ...]:
    return ("rule", *_TITLES, "measured")


def rates(page: str) -> dict[tuple[str, str], float]:
    """The learning rates that a page has, by task and rule."""
    return {
        (task, label): float(rate)
        for label, *found, _ in Earlier(page).rows(_chosen_head())
        for task, rate in zip(EXPERIMENTS, found, strict=True)
        if rate
    }


def _chosen(results: Results, before: Earlier) -> str:
    head = _chosen_head()
    rows = []
    for e in RULES:
        found = [results.get((t, e.label)) for t in EXPERIMENTS]
        said = [r.measured for r in found if r]
        # What is not measured anew keeps its date.
        said += [row[-1] for row in before.rows(head) if row[0] == e.label and not all(found)]
        dates = sorted({date for one in said for date in one.split("; ")} - {""})
        rows.append((e.label, *(f"{r.rate:g}" if r and r.rate else "" for r in found), "; ".join(dates)))
    return _filled(head, rows, before)


def _missing(results: Results, before: Earlier) -> str:
    lines = [f"- `{name}`: {reason}." for name, reason in LEFT_OUT.items()]
    lines += [
        f"- `{r.label}` on {EXPERIMENTS[r.task].task.title}: {r.note}" for r in results.values() if r.note
    ]
    told = {row[0] for row in before.rows(("rule", *_TITLES)) if all(row[1:])}
    absent = [
        e.label
        for e in RULES
        if e.label not in told and any((t, e.label) not in results for t in EXPERIMENTS)
    ]
    if absent:
        lines.append("- Not measured on every task: " + ", ".join(f"`{name}`" for name in absent) + ".")
    return "\n".join(lines)


def _filled(head: Sequence[str], rows: Sequence[Sequence[str]], before: Earlier) -> str:
    return _table(head, before.filled(head, rows))


def _of(results: Results, task: str, entry: Entry, what: str) -> list[float]:
    found = results.get((task, entry.label))
    return getattr(found, what) if found else []


def _numbers(values: Sequence[float], digits: int = 2) -> str:
    """The mean, and its standard error where there are several values."""
    if not values:
        return ""
    mean = f"{float(np.mean(values)):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {float(np.std(values, ddof=1)) / len(values) ** 0.5:.{digits}f}"


def _bytes(size: int) -> str:
    return f"{size / 1024:.1f} KiB" if size >= 1024 else f"{size} B"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
