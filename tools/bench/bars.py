"""What is to be reached, and whether it is."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from results import AUTO, BPTT, BRAINTRACE, Found, found_cases, median_bandwidth

__all__ = ["BARS", "Bar", "Verdict", "growth", "share"]

#: One number for each case that counts: what it is of, and None if a contender failed or is not there.
Values = list[tuple[str, float | None]]


@dataclass(frozen=True)
class Bar:
    """One line to reach: at least (or, if ``below``, at most) ``level``, in every case or at the median of them."""

    key: str
    what: str
    level: float
    below: bool
    values: Callable[[Mapping[str, Any]], Values]
    form: Callable[[float], str]
    median: bool = False
    needs_peer: bool = True

    @property
    def told(self) -> str:
        return f"{'at most' if self.below else 'at least'} {self.form(self.level)}"

    def verdict(self, results: Mapping[str, Any]) -> Verdict:
        """What was reached; nothing if there is nothing to judge by."""
        values = self.values(results)
        known = [(label, v) for label, v in values if v is not None]
        failed = [label for label, v in values if v is None]
        if not known:
            why = "braintrace is not installed" if self.needs_peer and not results["settings"]["peer"] else ""
            return Verdict(self, None, "not measured" + (f": {why}" if why else ""), ())
        ordered = sorted(known, key=lambda pair: pair[1], reverse=self.below)
        middle = statistics.median(v for _, v in known)
        reached = middle if self.median else ordered[0][1]
        missed = [label for label, v in ordered if not self._holds(v)]
        told = f"median {self.form(middle)}, {self._range(ordered)}" if len(known) > 1 else self.form(reached)
        if failed:
            told += f"; failed: {', '.join(failed)}"
        return Verdict(self, self._holds(reached) and not failed, told, tuple(missed + failed), reached)

    def _holds(self, value: float) -> bool:
        return value <= self.level if self.below else value >= self.level

    def _range(self, ordered: list[tuple[str, float]]) -> str:
        (worst_of, worst), (best_of, best) = ordered[0], ordered[-1]
        return f"worst {self.form(worst)} ({worst_of}), best {self.form(best)} ({best_of})"


@dataclass(frozen=True)
class Verdict:
    """Whether a bar is met (None: not measured), what was measured, and the cases that miss it."""

    bar: Bar
    met: bool | None
    measured: str
    missed: tuple[str, ...]
    reached: float | None = None

    @property
    def told(self) -> str:
        if self.met is None:
            return "not measured"
        if self.met:
            return "met"
        if self.reached is None or self.bar._holds(self.reached):
            return "**missed**: a case failed"
        return f"**missed** by {_distance(self.reached, self.bar.level)}"


def _distance(reached: float, level: float) -> str:
    """How far apart two positive numbers are, in words."""
    factor = max(reached, level) / max(min(reached, level), 1e-30)
    return f"{factor - 1:.0%}" if factor < 2 else f"a factor of {factor:.1f}"


# -- the numbers ------------------------------------------------------------------------------------------------------


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def growth(found: Found, who: str = AUTO) -> float | None:
    """By what part the peak of temporary memory grows from the short sequence to the long one."""
    if len(found.steps) < 2:
        return None
    short, long = (found.run(who, steps) for steps in (found.steps[0], found.steps[-1]))
    return long["temporary"] / short["temporary"] - 1 if short and long and short["temporary"] else None


def share(found: Found) -> float | None:
    """The part of the measured bandwidth that a causal step uses, if it reads and writes each trace element once."""
    ms, bandwidth = found.milliseconds(AUTO), median_bandwidth(found)
    return 2 * found.data["trace_bytes"] / (ms / 1e3) / bandwidth if ms and bandwidth else None


def _faster(found: Found) -> float | None:
    """How many times faster than braintrace, per step."""
    ours = found.milliseconds(AUTO, found.steps[0]) if found.steps else None
    return _ratio(found.milliseconds(BRAINTRACE), ours)


def _grus(found: list[Found], units: tuple[int, ...] = ()) -> list[Found]:
    return [
        f
        for f in found
        if f.model == "gru" and f.batch > 1 and (not units or f.data["case"]["units"] in units)
    ]


def _peer(
    kind: str, rule: str, units: tuple[int, ...] | None = None
) -> Callable[[Mapping[str, Any]], Values]:
    def values(results: Mapping[str, Any]) -> Values:
        found = found_cases(results, kind, rule)
        if units is not None:
            found = _grus(found, units)
        # Where the peer alone failed there is no ratio; the page says so at its end.
        return [(f.label, _faster(f)) for f in found if f.run(BRAINTRACE) or not f.run(AUTO)]

    return values


def _against_bptt(results: Mapping[str, Any]) -> Values:
    values = []
    for f in _grus(found_cases(results, "sequence", "d_rtrl")):
        steps = f.steps[0] if f.steps else None
        values.append((f.label, _ratio(f.milliseconds(AUTO, steps), f.milliseconds(BPTT, steps))))
    return values


def _first(results: Mapping[str, Any]) -> Values:
    return [
        (
            f"{steps} steps" if steps > 1 else "1 step",
            _ratio(f.seconds(AUTO, steps), f.seconds(BRAINTRACE, steps)),
        )
        for f in found_cases(results, "first")
        for steps in f.steps
        if f.run(BRAINTRACE, steps) or not f.run(AUTO, steps)
    ]


def _agreement(results: Mapping[str, Any]) -> Values:
    return [(f.label, f.data.get("agreement")) for f in found_cases(results, "sequence", "d_rtrl")]


def _times(value: float) -> str:
    return f"{value:.3g} times faster"


def _plain(value: float) -> str:
    return f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


BARS = (
    Bar(
        "sequence-braintrace",
        "D-RTRL over a sequence, chunk auto, against braintrace `D_RTRL` step by step; GRU 256, batch 8 and 16",
        20.0,
        False,
        _peer("sequence", "d_rtrl", (256,)),
        _times,
    ),
    Bar(
        "sequence-bptt",
        "the same over the time of backpropagation through time; GRU 128 to 512, batch 8 and 16, at the median",
        1.0,
        True,
        _against_bptt,
        _plain,
        median=True,
        needs_peer=False,
    ),
    Bar(
        "memory",
        "growth of peak memory from the short to the long sequence, outputs and inputs apart",
        0.02,
        True,
        lambda results: [(f"{f.label}, {f.rule}", growth(f)) for f in found_cases(results, "memory")],
        _percent,
        needs_peer=False,
    ),
    Bar(
        "update-braintrace",
        "causal D-RTRL step with a weight update at every step, against braintrace; batch 8 and 16",
        2.5,
        False,
        _peer("update", "d_rtrl"),
        _times,
    ),
    Bar(
        "update-bandwidth",
        "the same, share of measured bandwidth, each trace element read and written once",
        0.6,
        False,
        lambda results: [(f.label, share(f)) for f in found_cases(results, "update")],
        _percent,
        needs_peer=False,
    ),
    Bar(
        "pp_prop",
        "pp_prop over a sequence, against braintrace's",
        2.0,
        False,
        _peer("sequence", "pp_prop"),
        _times,
    ),
    Bar(
        "e_prop",
        "e-prop with filter and random feedback over a sequence, against braintrace `EProp`",
        20.0,
        False,
        _peer("sequence", "e_prop"),
        _times,
    ),
    Bar(
        "first",
        "time from `compile` to the first gradient, GRU 256, over braintrace's",
        1.0,
        True,
        _first,
        _plain,
    ),
    Bar(
        "agreement",
        "gradients in chunks against step by step, relative difference in float32 (in float64: `tests/test_chunks.py`, 1e-10)",
        1e-5,
        True,
        _agreement,
        lambda value: f"{value:.1e}",
        needs_peer=False,
    ),
)
