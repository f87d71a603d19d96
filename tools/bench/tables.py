"""The tables of the page, with rows of all machines side by side; what was not measured is blank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cases import MANY_AXES
from results import (
    ANEW,
    AUTO,
    BPTT,
    BRAINTRACE,
    CALLS,
    CAUSAL,
    CHECKPOINT,
    DROPPED,
    EVENTS,
    FORWARD,
    HAND,
    KEPT,
    WINDOWS,
    Found,
    found_cases,
    label_of,
    ratio,
)

__all__ = [
    "by_events",
    "calls",
    "failed",
    "first",
    "gradients",
    "machines",
    "many_axes",
    "memory",
    "sequences",
    "sparse",
    "table",
    "updates",
]

#: The results of one machine and one version of JAX, and all of them.
Results = Mapping[str, Any]
All = Sequence[Results]

#: Gradients that are no further apart, relative to their size in float32, count as the same.
SAME = 1e-3


def machines(everything: All) -> str:
    """What was measured on what."""
    head = ["called", "processor", "Python and libraries", "measured"]
    head += ["large product", "product of 16 rows in a loop", "`a * x + b` in place"]
    rows = []
    for results in everything:
        machine = results["machine"]
        versions = {"Python": machine["python"], **machine["versions"]}
        days = sorted({data["measured"] for data in results["cases"].values() if "measured" in data})
        caches = [f"{_bytes(size)} level {level}" for level, size in machine.get("caches", {}).items()]
        cores = f"{machine['processor']}, {machine['cores']} cores" + "".join(
            f", {cache}" for cache in caches
        )
        rates = [f"{name} {rate / 1e9:.0f} GB/s" for name, rate in machine["memory"].items()]
        told = (
            cores,
            ", ".join(f"{name} {v}" for name, v in versions.items()),
            " to ".join(days[:: max(1, len(days) - 1)]),
        )
        rows.append(
            (
                label_of(results),
                *told,
                *(_gflops(machine.get(k)) for k in ("flops", "rows")),
                ", ".join(rates),
            )
        )
    return table(head, rows)


def sequences(everything: All, rule: str) -> str:
    """Milliseconds per step of every contender."""
    by_hand = rule == "d_rtrl"
    head = ["on", "model", "batch", "steps", "etcompile", "no traces", "reset before each"]
    head += ["by hand", "step by step"] * by_hand
    head += ["braintrace, fastest", "braintrace, step by step", "bptt", "checkpointed", "forward", "floor"]
    head += ["faster than braintrace", "over bptt", "no traces over bptt"] + ["over by hand"] * by_hand
    rows = []
    for label, f in _cases(everything, ("sequence", "long"), rule):
        for steps in f.steps if f.model not in MANY_AXES else ():
            ours, short, back, hand = (f.milliseconds(who, steps) for who in (AUTO, DROPPED, BPTT, HAND))
            mine = [_windowed(f, HAND, steps), _ms(f.milliseconds(CAUSAL, steps))] * by_hand
            theirs = (_fastest(*f.fastest_peer(steps)), _ms(f.milliseconds(BRAINTRACE)))
            rest = (
                _ms(back),
                _ms(f.milliseconds(CHECKPOINT, steps)),
                _ms(f.milliseconds(FORWARD)),
                _ms(f.floor()),
            )
            ratios = (_ratio(f.faster(steps)), _ratio(ratio(ours, back)), _ratio(ratio(short, back)))
            more = [_ratio(ratio(ours, hand))] * by_hand
            own = (_ms(ours), _ms(short), _ms(f.milliseconds(ANEW, steps)), *mine)
            rows.append((label, f.title, str(f.batch), str(steps), *own, *theirs, *rest, *ratios, *more))
    return table(head, rows)


def many_axes(everything: All) -> str:
    """Milliseconds per step where states have many axes."""
    head = ["on", "model", "batch", "steps", "etcompile", "traces kept", "bptt", "checkpointed", "forward"]
    rows = []
    for label, f in _cases(everything, ("sequence", "long"), "d_rtrl"):
        for steps in f.steps if f.model in MANY_AXES else ():
            own = [f.milliseconds(who, steps) for who in (AUTO, KEPT, BPTT, CHECKPOINT, FORWARD)]
            size = f.data.get("trace_bytes")
            told = (_ratio(ratio(own[0], own[2])), _bytes(size) if size else "")
            rows.append((label, f.title, str(f.batch), str(steps), *map(_ms, own), *told))
    return table([*head, "over bptt", "traces"], rows)


def memory(everything: All) -> str:
    """Peaks of memory at the short and the long length."""
    head = ["on", "model", "batch", "rule", "by", "short", "long", "growth"]
    rows = []
    for label, f in _cases(everything, ("memory",)):
        for who in (AUTO, BPTT, CHECKPOINT, BRAINTRACE, WINDOWS):
            runs = [r for r in f.data["runs"] if r["who"] == who and "error" not in r]
            if len(runs) == 2:
                grown = f.growth(who)
                told = "" if grown is None else f"{100 * grown:.1f} %"
                name = who + (f" of {runs[0]['window']}" if "window" in runs[0] else "")
                rows.append((label, f.title, str(f.batch), f.rule, name, *map(_peak, runs), told))
    return table(head, rows)


def updates(everything: All) -> str:
    """Milliseconds of a step with an update, and the share of bandwidth."""
    head = ["on", "model", "batch", "etcompile", "braintrace", "faster than braintrace"]
    head += ["traces", "floor", "bandwidth", "share of bandwidth"]
    rows = []
    for label, f in _cases(everything, ("update",)):
        ours, theirs = f.milliseconds(AUTO), f.milliseconds(BRAINTRACE)
        rate, share, size = f.trace_bandwidth, f.share(), f.data.get("trace_bytes")
        told = (_bytes(size) if size else "", _ms(f.floor()), f"{rate / 1e9:.1f} GB/s" if rate else "")
        percent = "" if share is None else f"{share:.0%}"
        rows.append(
            (
                label,
                f.title,
                str(f.batch),
                _ms(ours),
                _ms(theirs),
                _ratio(ratio(theirs, ours)),
                *told,
                percent,
            )
        )
    return table(head, rows)


def sparse(everything: All) -> str:
    """Milliseconds of a step, and seconds of the first call."""
    head = [
        "on",
        "model",
        "synapses' traces",
        "etcompile",
        "step by step",
        "forward",
        "over forward",
        "over step by step",
        "first call, s",
    ]
    rows = []
    for label, f in _cases(everything, ("sparse",)):
        ours, causal, forward = (f.milliseconds(who) for who in (AUTO, CAUSAL, FORWARD))
        mine, size = f.run(AUTO), f.data.get("trace_bytes")
        times = (
            _ms(ours),
            _ms(causal),
            _ms(forward),
            _ratio(ratio(ours, forward)),
            _ratio(ratio(ours, causal)),
        )
        rows.append(
            (label, f.title, _bytes(size) if size else "", *times, f"{mine['first']:.1f}" if mine else "")
        )
    return table(head, rows)


def by_events(everything: All) -> str:
    """Milliseconds of a step by events and by default, and how far their gradients are apart."""
    head = [
        "on",
        "model",
        "spiking at a step",
        "etcompile",
        "by events",
        "forward",
        "times faster",
        "over forward",
    ]
    rows = []
    for label, f in _cases(everything, ("sparse-events",)):
        ours, events, forward = (f.milliseconds(who) for who in (AUTO, EVENTS, FORWARD))
        rate, off = f.data.get("spikes"), f.data.get("agreement")
        told = (
            _ratio(ratio(ours, events)),
            _ratio(ratio(events, forward)),
            "" if off is None else f"{off:.1e}",
        )
        spiking = "" if rate is None else f"{100 * rate:.2f} %"
        rows.append((label, f.title, spiking, *map(_ms, (ours, events, forward)), *told))
    return table([*head, "gradients apart"], rows)


def first(everything: All) -> str:
    """Seconds to the first gradient."""
    who = {
        AUTO: "etcompile",
        BRAINTRACE: "braintrace, step by step",
        WINDOWS: "braintrace, windows",
        BPTT: "bptt",
    }
    rows = []
    for label, f in _cases(everything, ("first",)):
        for steps in f.steps:
            over = ratio(f.seconds(AUTO, steps), f.first_of_peer(steps))
            rows.append((label, f.label, str(steps), *(_first_time(f, w, steps) for w in who), _ratio(over)))
    return table(("on", "model", "steps", *who.values(), "over braintrace"), rows)


def _first_time(found: Found, who: str, steps: int) -> str:
    r = found.run(who, steps)
    seconds = found.seconds(who, steps)
    return f"{seconds:.2f} ({min(r['again']):.3f})" if r and seconds is not None else ""


def calls(everything: All) -> str:
    """Microseconds of one call from Python."""
    head = ["on", "model", "batch", "call", "etcompile"]
    head += ["the model in `brainstate.transform.jit`", "bare jitted function"]
    rows = []
    for label, f in _cases(everything, ("call",)):
        for who, others in CALLS.items():
            times = [f.milliseconds(name) for name in (who, *others)]
            micro = [None if ms is None else 1e3 * ms for ms in times]
            rows.append((label, f.title, str(f.batch), f"`{who}`", *map(_ms, micro)))
    return table(head, rows)


def gradients(everything: All) -> str:
    """What each contender's gradient is: whose it equals, weight by weight, and which weights it leaves at zero."""
    head = [
        "on",
        "by",
        "rule",
        "model",
        "zero",
        "as backpropagation through time",
        "as the rule's equations",
        "neither",
    ]
    worst: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    for label, f in _cases(everything, ("sequence",)):
        for r in f.data["runs"]:
            if r["who"] in (BRAINTRACE, WINDOWS) and ("from_bptt" in r or r.get("zero")):
                name = r["who"] + (f" of {r['window']}" if "window" in r else "")
                weights = worst.setdefault((label, name, f.rule, f.title.split()[0]), {})
                for weight in dict.fromkeys((*r.get("from_bptt", ()), *r["zero"])):
                    far = weights.setdefault(weight, {"zero": 0.0, "bptt": 0.0, "rule": 0.0})
                    far["zero"] = max(far["zero"], float(weight not in r["zero"]))
                    for which in ("bptt", "rule"):
                        off = r.get(f"from_{which}", {}).get(weight)
                        far[which] = max(far[which], float("inf") if off is None else off)
    rows = [(*key, *_classes(weights)) for key, weights in worst.items()]
    return table(head, rows)


def _classes(weights: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """The weights of each column, by how far their gradients are from what it is of, at worst."""
    columns: dict[str, list[str]] = {"zero": [], "bptt": [], "rule": [], "neither": []}
    for weight, far in weights.items():
        held = [
            which for which, limit in (("zero", 0.5), ("bptt", SAME), ("rule", SAME)) if far[which] < limit
        ]
        for which in held[:1] if "zero" in held else held:
            columns[which].append(f"`{weight}`")
        if not held:
            known = [v for v in (far["bptt"],) if v < float("inf")]
            columns["neither"].append(
                f"`{weight}`" + "".join(f" ({v:.2g} from backpropagation)" for v in known)
            )
    return (", ".join(names) for names in columns.values())


def failed(everything: All) -> str:
    """What has no number, and why."""
    lines = [
        f"- {label}: {f.kind}, {f.label}, {f.rule}: {who}: {why}"
        for results in everything
        for label in [label_of(results)]
        for f in map(Found, results["cases"].values())
        for who, why in f.errors()
    ]
    return "\n".join(lines) or "- none"


def _cases(everything: All, kinds: Sequence[str], rule: str | None = None) -> Iterator[tuple[str, Found]]:
    """The cases of all machines with their labels: those of the same case next to each other, and its kinds in turn."""
    found = [
        (label_of(results), f)
        for kind in kinds
        for results in everything
        for f in found_cases(results, kind, rule)
    ]
    order: dict[tuple[str, str], int] = {}
    for _, f in found:
        order.setdefault((f.title, str(f.batch) + f.rule), len(order))
    return iter(sorted(found, key=lambda one: order[one[1].title, str(one[1].batch) + one[1].rule]))


# -- cells ------------------------------------------------------------------------------------------------------------


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _windowed(found: Found, who: str, steps: int) -> str:
    r = found.run(who, steps)
    return f"{_ms(found.milliseconds(who, steps))} ({r['window']})" if r else ""


def _fastest(ms: float | None, window: int | None) -> str:
    return "" if ms is None else f"{_ms(ms)} ({window})"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _gflops(rate: float | None) -> str:
    return "" if rate is None else f"{rate / 1e9:.0f} GFLOP/s"


def _peak(run: Mapping[str, Any]) -> str:
    resident = run.get("resident")
    return _bytes(run["temporary"]) + (f" ({_bytes(resident)})" if resident is not None else "")


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; columns in which no row has anything are left out."""
    kept = [k for k, _ in enumerate(head) if not rows or any(row[k] for row in rows)]
    lines = [[line[k] for k in kept] for line in (head, ["---"] * len(head), *rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
