"""docs/benchmarks.md from results: what was to be reached, and all tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import tables
from bars import BARS, Verdict
from results import label_of
from settings import FULL

__all__ = ["reasons", "render", "text_of"]

#: Results of all machines, newest JAX first.
All = Sequence[Mapping[str, Any]]

_HERE = Path(__file__).parent


def render(everything: All, command: str) -> str:
    """The page, in Markdown."""
    verdicts = {label_of(results): [bar.verdict(results) for bar in BARS] for results in everything}
    template = Template(text_of("page_template.md"))
    settings = [results["settings"] for results in everything]
    names = ("warm_up", "least", "rounds", "long_steps", "slow_steps", "processes")
    return template.substitute(
        {name: _either([how[name] for how in settings]) for name in names},
        command=command,
        lengths=_either(sorted({n for how in settings for n in how["lengths"]})),
        # What is tried today, also where older numbers do without.
        windows=_either(FULL.windows),
        chunks=_either(FULL.chunks),
        few_steps=_either([how.get("few_steps", FULL.few_steps) for how in settings]),
        braintrace=_either(sorted({_braintrace(results) for results in everything})),
        machines=tables.machines(everything),
        same=f"{tables.SAME:g}",
        bars=_bars(verdicts),
        reasons=_reasons(verdicts),
        d_rtrl=tables.sequences(everything, "d_rtrl"),
        many_axes=tables.many_axes(everything),
        pp_prop=tables.sequences(everything, "pp_prop"),
        e_prop=tables.sequences(everything, "e_prop"),
        memory=tables.memory(everything),
        update=tables.updates(everything),
        sparse=tables.sparse(everything),
        by_events=tables.by_events(everything),
        first=tables.first(everything),
        call=tables.calls(everything),
        gradients=tables.gradients(everything),
        failed=tables.failed(everything),
    )


def _braintrace(results: Mapping[str, Any]) -> str:
    found = results["machine"]["versions"].get("braintrace")
    return found if found and results["settings"]["peer"] else "(not installed here)"


def _either(values: Sequence[Any]) -> str:
    """The values, each once, in words."""
    *others, last = dict.fromkeys(map(str, values))
    return f"{', '.join(others)} or {last}" if others else last


def _bars(verdicts: Mapping[str, Sequence[Verdict]]) -> str:
    rows = [
        (bar.what, bar.told, *(v.measured if v.met is None else f"{v.measured}: {v.told}" for v in of_bar))
        for bar, of_bar in zip(BARS, zip(*verdicts.values(), strict=True), strict=True)
    ]
    return tables.table(("what", "bar", *verdicts), rows)


def _reasons(verdicts: Mapping[str, Sequence[Verdict]]) -> str:
    """Why bars are missed: the hand-written texts of those that are, on any machine."""
    texts = reasons(text_of("reasons.md"))
    parts = []
    for bar, of_bar in zip(BARS, zip(*verdicts.values(), strict=True), strict=True):
        missed = {label: v for label, v in zip(verdicts, of_bar, strict=True) if v.met is False}
        if missed:
            by = " ".join(f"{label}: {'; '.join(v.missed)}." for label, v in missed.items())
            parts.append(
                f"**{bar.what}.** {texts.get(bar.key, 'Not looked into yet.').strip()}\n\nMissed by, on {by}\n"
            )
    return "### Why a bar is missed\n\n" + "\n".join(parts) + "\n" if parts else ""


def reasons(text: str) -> dict[str, str]:
    """The texts of ``reasons.md`` by the keys of their bars."""
    return dict(re.findall(r"^## (\S+)\n+(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))


def text_of(name: str) -> str:
    """A file of this folder."""
    return (_HERE / name).read_text(encoding="utf-8")
