"""What is to be reached, and whether it is."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from cases import LARGE, MANY_AXES
from results import (
    ANEW,
    AUTO,
    BPTT,
    BRAINTRACE,
    CALLS,
    CAUSAL,
    DROPPED,
    EVENTS,
    FORWARD,
    HAND,
    Found,
    found_cases,
    ratio,
)

__all__ = ["BARS", "Bar", "Verdict"]

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
            absent = self.needs_peer and not results["settings"]["peer"]
            told = "not measured" + (": braintrace is not installed" if absent else "")
            return Verdict(
                self,
                False if failed else None,
                f"failed: {', '.join(failed)}" if failed else told,
                tuple(failed),
            )
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

#: Of what the bars over sequences are: gated and spiking networks, in batches.
_GATED = ("gru", "lstm")


def _sequences(
    results: Mapping[str, Any],
    rule: str,
    models: tuple[str, ...],
    value: Callable[[Found, int], float | None],
) -> Values:
    """A number for each length of each case with a batch."""
    found = [f for f in found_cases(results, "sequence", rule) if f.batch > 1 and f.model in models]
    # A case without a run of ours has failed as a whole.
    return [(f.labelled(n), value(f, n)) for f in found for n in f.steps] + [
        (f.label, None) for f in found if not f.steps
    ]


def _against_peer(
    rule: str, models: tuple[str, ...], who: str = AUTO
) -> Callable[[Mapping[str, Any]], Values]:
    """Times faster than braintrace's fastest mode, where there is one; a gradient of ours that is zero counts as failed."""

    def values(results: Mapping[str, Any]) -> Values:
        found = found_cases(results, "sequence", rule)
        if who != AUTO:  # others were not always measured
            found = [f for f in found if any(f.run(who, n) for n in f.steps)]
        known = {f.labelled(n) for f in found for n in f.steps if f.fastest_peer(n)[0] or not f.run(who, n)}
        known |= {f.label for f in found if not f.steps}
        return [
            (label, v)
            for label, v in _sequences(results, rule, models, partial(_faster, who))
            if label in known
        ]

    return values


def _faster(who: str, found: Found, steps: int) -> float | None:
    mine = found.run(who, steps)
    return None if mine is None or mine["zero"] else found.faster(steps, who)


def _over(other: str, who: str = AUTO) -> Callable[[Found, int], float | None]:
    return lambda f, steps: ratio(f.milliseconds(who, steps), f.milliseconds(other, steps))


def _over_bptt(*which: tuple[str, tuple[str, ...]], who: str = AUTO) -> Callable[[Mapping[str, Any]], Values]:
    def values(results: Mapping[str, Any]) -> Values:
        return [
            (f"{label}, {rule}" if rule != "d_rtrl" else label, v)
            for rule, models in which
            for label, v in _sequences(results, rule, models, _over(BPTT, who))
            if v is not None or who == AUTO  # others were not always measured
        ]

    return values


def _many_axes(results: Mapping[str, Any]) -> Values:
    """Over backpropagation, of the longest sequences alone."""
    found = [f for f in found_cases(results, "sequence", "d_rtrl") if f.model in MANY_AXES]
    return [(f.label, _over(BPTT)(f, f.steps[-1]) if f.steps else None) for f in found]


def _over_hand(results: Mapping[str, Any]) -> Values:
    found = _sequences(results, "d_rtrl", ("gru",), _over(HAND))
    tried = any(f.run(HAND) for f in found_cases(results, "sequence", "d_rtrl"))
    return found if tried else []


def _updates(results: Mapping[str, Any]) -> Values:
    """Times faster than braintrace, which has one mode for this."""
    return [
        (f.label, ratio(f.milliseconds(BRAINTRACE), f.milliseconds(AUTO)))
        for f in found_cases(results, "update")
        if f.run(BRAINTRACE) or not f.run(AUTO)
    ]


def _shares(larger: bool) -> Callable[[Mapping[str, Any]], Values]:
    """Shares of bandwidth, of the cases whose traces are larger than all caches, or of the others."""

    def values(results: Mapping[str, Any]) -> Values:
        cache = max(results["machine"].get("caches", {}).values(), default=0)
        return [
            (f.label, f.share())
            for f in found_cases(results, "update")
            if (f.data.get("trace_bytes", 0) > cache) == larger and (f.trace_bandwidth or not f.run(AUTO))
        ]

    return values


def _first(results: Mapping[str, Any]) -> Values:
    """Over the shortest time of braintrace's modes; of a single step it has one."""
    return [
        (f"{n} steps" if n > 1 else "1 step", ratio(f.seconds(AUTO, n), f.first_of_peer(n)))
        for f in found_cases(results, "first")
        if f.model == "gru"
        for n in f.steps
        if f.first_of_peer(n) is not None or not f.run(AUTO, n)
    ]


def _compiling(results: Mapping[str, Any]) -> Values:
    """The first gradient of large programs over that of backpropagation."""
    return [
        (
            f"{f.title}, {n} steps" if n > 1 else f"{f.title}, 1 step",
            ratio(f.seconds(AUTO, n), f.seconds(BPTT, n)),
        )
        for f in found_cases(results, "first")
        if f.model in LARGE
        for n in f.steps
    ]


def _sparse(value: Callable[[Found], float | None]) -> Callable[[Mapping[str, Any]], Values]:
    return lambda results: [(f.title, value(f)) for f in found_cases(results, "sparse")]


def _events(results: Mapping[str, Any]) -> Values:
    """Times faster by events than by default."""
    return [
        (f.title, ratio(f.milliseconds(AUTO), f.milliseconds(EVENTS)))
        for f in found_cases(results, "sparse-events")
    ]


def _first_call(found: Found) -> float | None:
    mine = found.run(AUTO)
    return mine["first"] if mine else None


def _calls(results: Mapping[str, Any]) -> Values:
    """One call over the bare jitted function with its work."""
    return [
        (f"`{who}`, {f.title}", ratio(f.milliseconds(who), f.milliseconds(bare)))
        for f in found_cases(results, "call")
        for who, (_, bare) in CALLS.items()
        if f.run(who)
    ]


def _agreement(results: Mapping[str, Any]) -> Values:
    return [(f.label, f.data.get("agreement")) for f in found_cases(results, "sequence", "d_rtrl")]


def _growth(results: Mapping[str, Any]) -> Values:
    return [(f"{f.label}, {f.rule}", f.growth(AUTO)) for f in found_cases(results, "memory")]


def _times(value: float) -> str:
    return f"{value:.3g} times faster"


def _plain(value: float) -> str:
    return f"{value:.2f}"


def _seconds(value: float) -> str:
    return f"{value:.2g} s"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


_PEER_MODELS = _against_peer("d_rtrl", (*_GATED, "spiking"))
_ANEW = _against_peer("d_rtrl", (*_GATED, "spiking"), ANEW)

BARS = (
    Bar(
        "sequence-peer",
        "D-RTRL over a sequence against braintrace's fastest mode, at the median; GRU, LSTM, spiking, batch 8 and 16",
        3.0,
        False,
        _PEER_MODELS,
        _times,
        median=True,
    ),
    Bar("sequence-peer-worst", "the same, at worst", 2.0, False, _PEER_MODELS, _times),
    Bar(
        "sequence-bptt",
        "the same over the time of backpropagation through time, at the median",
        0.5,
        True,
        _over_bptt(("d_rtrl", (*_GATED, "spiking"))),
        _plain,
        median=True,
        needs_peer=False,
    ),
    Bar(
        "sequence-bptt-worst",
        "the same, GRU and LSTM, at worst",
        0.8,
        True,
        _over_bptt(("d_rtrl", _GATED)),
        _plain,
        needs_peer=False,
    ),
    Bar(
        "spiking-bptt",
        "the same, spiking networks, and all networks with e-prop with filter, at worst",
        1.0,
        True,
        _over_bptt(("d_rtrl", ("spiking",)), ("e_prop", (*_GATED, "spiking", "conv"))),
        _plain,
        needs_peer=False,
    ),
    Bar(
        "anew-peer",
        "D-RTRL in a loop that resets the step before each sequence, as one that trains on sequences, against braintrace's "
        "fastest mode, at the median",
        3.0,
        False,
        _ANEW,
        _times,
        median=True,
    ),
    Bar("anew-peer-worst", "the same, at worst", 2.0, False, _ANEW, _times),
    Bar(
        "anew-bptt",
        "the same over the time of backpropagation through time, at the median",
        0.5,
        True,
        _over_bptt(("d_rtrl", (*_GATED, "spiking")), who=ANEW),
        _plain,
        median=True,
        needs_peer=False,
    ),
    Bar(
        "anew-bptt-worst",
        "the same, GRU and LSTM, at worst",
        0.8,
        True,
        _over_bptt(("d_rtrl", _GATED), who=ANEW),
        _plain,
        needs_peer=False,
    ),
    Bar(
        "anew-spiking-bptt",
        "the same, spiking networks, and all networks with e-prop with filter, at worst",
        1.0,
        True,
        _over_bptt(("d_rtrl", ("spiking",)), ("e_prop", (*_GATED, "spiking", "conv")), who=ANEW),
        _plain,
        needs_peer=False,
    ),
    Bar(
        "dropped-bptt",
        "the same by sequences that leave no traces whether they are asked for or not (`Schedule(keep_traces=False)`), D-RTRL "
        "over backpropagation at the median",
        0.5,
        True,
        _over_bptt(("d_rtrl", (*_GATED, "spiking")), who=DROPPED),
        _plain,
        median=True,
        needs_peer=False,
    ),
    Bar(
        "dropped-spiking-bptt",
        "the same, spiking networks, and e-prop with filter, at worst",
        1.0,
        True,
        _over_bptt(("d_rtrl", ("spiking",)), ("e_prop", (*_GATED, "spiking", "conv")), who=DROPPED),
        _plain,
        needs_peer=False,
    ),
    Bar(
        "many-axes",
        "the same, states of many axes, 500 steps, at the median",
        1.0,
        True,
        _many_axes,
        _plain,
        median=True,
        needs_peer=False,
    ),
    Bar(
        "by-hand",
        "D-RTRL of a GRU over the time of a program written for it by hand (`tools/bench/hand.py`)",
        1.15,
        True,
        _over_hand,
        _plain,
        needs_peer=False,
    ),
    Bar(
        "pp_prop",
        "pp_prop over a sequence, with all gradients, against braintrace's fastest mode",
        1.5,
        False,
        _against_peer("pp_prop", (*_GATED, "spiking", "conv")),
        _times,
    ),
    Bar(
        "update-braintrace",
        "causal D-RTRL step with a weight update at every step, against braintrace; batch 8 and 16",
        3.0,
        False,
        _updates,
        _times,
    ),
    Bar(
        "update-bandwidth",
        "the same, traces read once and written once over measured bandwidth, traces that a cache holds",
        0.6,
        False,
        _shares(larger=False),
        _percent,
        needs_peer=False,
    ),
    Bar(
        "update-bandwidth-large",
        "the same, traces larger than the caches",
        1.0,
        False,
        _shares(larger=True),
        _percent,
        needs_peer=False,
    ),
    Bar(
        "memory",
        "growth of peak memory from the short to the long sequence, outputs and inputs apart",
        0.02,
        True,
        _growth,
        _percent,
        needs_peer=False,
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
        "first-large",
        "time from `compile` to the first gradient of large programs over that of backpropagation",
        3.0,
        True,
        _compiling,
        _plain,
        needs_peer=False,
    ),
    Bar(
        "sparse-forward",
        "D-RTRL of a sparse spiking network, 100 synapses a neuron, over its forward pass",
        2.5,
        True,
        _sparse(lambda f: ratio(f.milliseconds(AUTO), f.milliseconds(FORWARD))),
        _plain,
        needs_peer=False,
    ),
    Bar(
        "sparse-schedule",
        "the same, the default schedule over step by step",
        1.0,
        True,
        _sparse(lambda f: ratio(f.milliseconds(AUTO), f.milliseconds(CAUSAL))),
        _plain,
        needs_peer=False,
    ),
    Bar(
        "sparse-first",
        "the same, the first call",
        3.0,
        True,
        _sparse(_first_call),
        _seconds,
        needs_peer=False,
    ),
    Bar(
        "sparse-events",
        "D-RTRL of sparse networks of which 2 and 5 % spike at a step, by events against the default schedule",
        3.0,
        False,
        _events,
        _times,
        needs_peer=False,
    ),
    Bar(
        "calls",
        "one call from Python over the bare jitted function with its work, networks of 8 and 64 units",
        1.3,
        True,
        _calls,
        _plain,
        needs_peer=False,
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
