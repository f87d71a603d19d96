"""docs/benchmarks.md from results: what was to be reached, all tables, a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from bars import BARS, Verdict, growth, share
from chart import chart
from results import AUTO, BPTT, BRAINTRACE, CALLS, CAUSAL, FORWARD, Found, found_cases, median_bandwidth

__all__ = ["reasons", "render", "text_of"]

Results = Mapping[str, Any]

_HERE = Path(__file__).parent


def render(results: Results, command: str) -> tuple[str, str]:
    """The page and its picture."""
    settings, machine = results["settings"], results["machine"]
    verdicts = [bar.verdict(results) for bar in BARS]
    template = Template(text_of("page_template.md"))
    names = ("warm_up", "least", "rounds", "steps", "long_steps", "slow_steps", "processes")
    text = template.substitute(
        {name: settings[name] for name in names},
        command=command,
        braintrace=machine["versions"].get("braintrace", "") if settings["peer"] else "(not installed here)",
        machine=_machine(machine),
        matmul=f"{machine['flops'] / 1e9:.0f} GFLOP/s",
        bandwidth=f"{machine['bandwidth'] / 1e9:.1f} GB/s",
        array=_bytes(4 * settings["array"]),
        bars=_bars(verdicts),
        reasons=_reasons(verdicts),
        d_rtrl=_sequences(results, "d_rtrl"),
        pp_prop=_sequences(results, "pp_prop"),
        e_prop=_sequences(results, "e_prop"),
        memory=_memory(results),
        update=_updates(results),
        first=_first(results),
        call=_calls(results),
        zero=_zero(results),
        failed=_failed(results),
    )
    return text, chart(results)


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['cores']} cores ({machine['processor']}), Python {machine['python']}, {versions}"


def _bars(verdicts: Sequence[Verdict]) -> str:
    rows = [(v.bar.what, v.bar.told, v.measured, v.told) for v in verdicts]
    return _table(("what", "bar", "measured", "met?"), rows)


def _reasons(verdicts: Sequence[Verdict]) -> str:
    """Why bars are missed: the hand-written texts of those that are."""
    texts = reasons(text_of("reasons.md"))
    missed = [v for v in verdicts if v.met is False]
    parts = [
        f"**{v.bar.what}.** {_cases(v)}{texts.get(v.bar.key, 'Not looked into yet.').strip()}\n"
        for v in missed
    ]
    return "### Why a bar is missed\n\n" + "\n".join(parts) + "\n" if missed else ""


def reasons(text: str) -> dict[str, str]:
    """The texts of ``reasons.md`` by the keys of their bars."""
    return dict(re.findall(r"^## (\S+)\n+(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))


def _cases(verdict: Verdict) -> str:
    return f"Missed by: {'; '.join(verdict.missed)}. " if verdict.missed else ""


def text_of(name: str) -> str:
    """A file of this folder."""
    return (_HERE / name).read_text(encoding="utf-8")


# -- tables -----------------------------------------------------------------------------------------------------------


def _sequences(results: Results, rule: str) -> str:
    head = ["model", "batch", "steps", "chunk auto"] + ["step by step"] * (rule == "d_rtrl")
    head += ["braintrace", "bptt", "forward", "floor", "faster than braintrace", "over bptt"]
    rows = []
    for f in found_cases(results, "sequence", rule):
        for steps in f.steps:
            ours, back = f.milliseconds(AUTO, steps), f.milliseconds(BPTT, steps)
            theirs = f.milliseconds(BRAINTRACE)
            floor = 1e3 * f.data["flops"] / results["machine"]["flops"]
            causal = [_ms(f.milliseconds(CAUSAL, steps))] * (rule == "d_rtrl")
            ratios = (_over(theirs, ours), _over(ours, back))
            rows.append(
                (
                    f.title,
                    str(f.batch),
                    str(steps),
                    _ms(ours),
                    *causal,
                    _ms(theirs),
                    _ms(back),
                    _ms(f.milliseconds(FORWARD)),
                    _ms(floor),
                    *ratios,
                )
            )
    return _table(head, rows)


def _memory(results: Results) -> str:
    head = ["model", "batch", "rule", "by", "short", "long", "growth"]
    rows = []
    for f in found_cases(results, "memory"):
        for who in (AUTO, BPTT, BRAINTRACE):
            runs = [f.run(who, steps) for steps in f.steps]
            if any(runs):
                grown = growth(f, who)
                told = "" if grown is None else f"{100 * grown:.1f} %"
                rows.append((f.title, str(f.batch), f.rule, who, *map(_peak, runs), told))
    return _table(head, rows)


def _updates(results: Results) -> str:
    head = ["model", "batch", "etcompile", "braintrace", "faster than braintrace"]
    head += ["traces", "floor", "bandwidth", "share of bandwidth"]
    rows = []
    for f in found_cases(results, "update"):
        ours, theirs, rate = f.milliseconds(AUTO), f.milliseconds(BRAINTRACE), median_bandwidth(f)
        part, size = share(f), f.data.get("trace_bytes", 0)
        floor = 1e3 * 2 * size / rate if rate else None
        rows.append(
            (
                f.title,
                str(f.batch),
                _ms(ours),
                _ms(theirs),
                _over(theirs, ours),
                _bytes(size),
                _ms(floor),
                f"{rate / 1e9:.1f} GB/s" if rate else "",
                "" if part is None else f"{part:.0%}",
            )
        )
    return _table(head, rows)


def _first(results: Results) -> str:
    rows = []
    for f in found_cases(results, "first"):
        for steps in f.steps:
            ratio = _over(f.seconds(AUTO, steps), f.seconds(BRAINTRACE, steps))
            times = [_first_time(f, who, steps) for who in (AUTO, BRAINTRACE, BPTT)]
            rows.append((f.label, str(steps), *times, ratio))
    return _table(("model", "steps", "etcompile", "braintrace", "bptt", "over braintrace"), rows)


def _first_time(found: Found, who: str, steps: int) -> str:
    r = found.run(who, steps)
    seconds = found.seconds(who, steps)
    return f"{seconds:.2f} ({min(r['again']):.3f})" if r and seconds is not None else ""


def _calls(results: Results) -> str:
    head = [
        "model",
        "batch",
        "call",
        "etcompile",
        "the model in `brainstate.transform.jit`",
        "bare jitted function",
    ]
    rows = []
    for f in found_cases(results, "call"):
        for who, others in CALLS.items():
            times = [f.milliseconds(name) for name in (who, *others)]
            micro = [None if ms is None else 1e3 * ms for ms in times]
            rows.append((f.title, str(f.batch), f"`{who}`", *map(_ms, micro)))
    return _table(head, rows)


def _zero(results: Results) -> str:
    zero: dict[tuple[str, str], list[str]] = {}
    for f in found_cases(results, "sequence"):
        for r in f.data["runs"]:
            if r.get("zero"):
                names = zero.setdefault((r["who"], f"{f.model}, {f.rule}"), [])
                names += [name for name in r["zero"] if name not in names]
    lines = [
        f"- {who}, {model}: {', '.join(f'`{n}`' for n in names)}" for (who, model), names in zero.items()
    ]
    return "\n".join(lines) or "- none"


def _failed(results: Results) -> str:
    found = [Found(data) for data in results["cases"].values()]
    lines = [f"- {f.kind}, {f.label}, {f.rule}: {who}: {why}" for f in found for who, why in f.errors()]
    return "\n".join(lines) or "- none"


# -- cells ------------------------------------------------------------------------------------------------------------


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _over(above: float | None, below: float | None) -> str:
    return (
        ""
        if above is None or not below
        else f"{above / below:.2f}"
        if above < 10 * below
        else f"{above / below:.0f}"
    )


def _peak(run: Mapping[str, Any] | None) -> str:
    if run is None:
        return ""
    resident = run.get("resident")
    return _bytes(run["temporary"]) + (f" ({_bytes(resident)})" if resident is not None else "")


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
