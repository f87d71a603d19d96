"""A sequence with its gradient: all who compute one, in turns, and how far their gradients are from each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import floor
import hand
import ours
import peer
import plain
from cases import Case
from clock import interleaved
from contenders import Contender, Ready, distances, ready
from models import Data, spike_rate
from results import (
    ANEW,
    AUTO,
    BPTT,
    BRAINTRACE,
    CAUSAL,
    CHECKPOINT,
    DROPPED,
    EVENTS,
    FORWARD,
    HAND,
    KEPT,
    WINDOWS,
)
from run import Run
from settings import Settings

import etcompile

__all__ = ["by_events", "long_sequence", "sequence", "sparse"]


def sequence(case: Case, data: Data, settings: Settings) -> dict[str, Any]:
    """Times at all lengths, gradients at the shortest."""
    step, kept = (ours.compiled(data, case.rule, data.model(), keep_traces=keep) for keep in (None, True))
    found = _measured(list(_contenders(case, data, settings, step, kept)), step.reset, data, settings)
    short = settings.lengths[0]
    by_name = {e.entry["who"]: e for e in found if e.entry["steps"] == short and e.gradients}
    return {
        "runs": [e.entry for e in _compared(found, case, data, short)],
        "trace_bytes": kept.report().to_dict()["trace_bytes"],
        "floor": floor.products(data, data.model(), short),
        "agreement": _largest(by_name, AUTO, CAUSAL if data.spec.keep_traces else KEPT),
        "by_hand": _largest(by_name, AUTO, HAND),
        "spikes": spike_rate(data, short) if data.spec.spikes else None,
    }


def long_sequence(case: Case, data: Data, settings: Settings) -> dict[str, Any]:
    """Times of a long sequence, by those who compute all of its gradient."""
    step = ours.compiled(data, case.rule, data.model())
    makers = {AUTO: lambda: ours.sequence(step), **_backpropagation(data)}
    contenders = [Contender(who, settings.long_steps, {None: make}) for who, make in makers.items()]
    return {"runs": [e.entry for e in _measured(contenders, step.reset, data, settings)]}


def sparse(case: Case, data: Data, settings: Settings) -> dict[str, Any]:
    """Times of a few steps of a large model: forward, in chunks and step by step.

    Where the default is step by step the two are one compiled function, which is timed once: two medians of it would tell nothing
    but what else the machine does.
    """
    step, steps = ours.compiled(data, case.rule, data.model()), settings.few_steps
    makers = {AUTO: lambda: ours.sequence(step), FORWARD: lambda: plain.forward(data, data.model())}
    together = step.cost(steps=steps).chunk
    if together > 1:
        makers[CAUSAL] = lambda: ours.sequence(step, chunk=1)
    contenders = [Contender(who, steps, {None: make}) for who, make in makers.items()]
    found = _measured(contenders, step.reset, data, settings)
    if together == 1:
        found += [replace(e, entry={**e.entry, "who": CAUSAL}) for e in found if e.entry["who"] == AUTO]
    by_name = {e.entry["who"]: e for e in found if e.gradients}
    return {
        "runs": [e.entry for e in found],
        "trace_bytes": step.report().to_dict()["trace_bytes"],
        "agreement": _largest(by_name, AUTO, CAUSAL),
        "spikes": spike_rate(data, settings.few_steps),
    }


def by_events(case: Case, data: Data, settings: Settings) -> dict[str, Any]:
    """Times of a sequence of a large model of which few neurons spike at a step: by events, as by default, and forward."""
    step = ours.compiled(data, case.rule, data.model())
    events = ours.compiled(data, case.rule, data.model(), events=data.spec.events)
    makers = {
        AUTO: lambda: ours.sequence(step),
        EVENTS: lambda: ours.sequence(events),
        FORWARD: lambda: plain.forward(data, data.model()),
    }

    def reset() -> None:
        step.reset()
        events.reset()

    contenders = [Contender(who, settings.slow_steps, {None: make}) for who, make in makers.items()]
    found = _measured(contenders, reset, data, settings)
    return {
        "runs": [e.entry for e in found],
        "trace_bytes": step.report().to_dict()["trace_bytes"],
        "agreement": _largest({e.entry["who"]: e for e in found if e.gradients}, EVENTS, AUTO),
        "spikes": spike_rate(data, settings.slow_steps),
        "bound": data.spec.events,
    }


def _contenders(
    case: Case, data: Data, settings: Settings, step: etcompile.Step, kept: etcompile.Step
) -> Iterator[Contender]:
    short = settings.lengths[0]
    auto = ours.sequence(step)
    dropped = ours.compiled(data, case.rule, data.model(), keep_traces=False)
    anew = ours.compiled(data, case.rule, data.model())
    for steps in settings.lengths:
        yield Contender(AUTO, steps, {None: lambda: auto})
        if data.spec.keep_traces:
            yield Contender(DROPPED, steps, {None: lambda: ours.sequence(dropped)})
            yield Contender(ANEW, steps, {None: lambda: ours.anew(anew)})
        for who, make in _backpropagation(data).items():
            yield Contender(who, steps, {None: make})
        if case.model == "gru" and case.rule == "d_rtrl":
            chunks = _dividing(settings.chunks, steps)
            yield Contender(HAND, steps, {c: partial(hand.sequence, data, data.model(), c) for c in chunks})
        if settings.peer and data.spec.peer:
            # What small windows do they do at any length.
            windows = _dividing(settings.windows if steps == short else settings.windows[-1:], steps)
            yield Contender(WINDOWS, steps, {k: partial(_theirs, case, data, k) for k in windows})
    yield Contender(FORWARD, short, {None: lambda: plain.forward(data, data.model())})
    if not data.spec.keep_traces:
        yield Contender(KEPT, short, {None: lambda: ours.sequence(kept)})
    elif case.rule == "d_rtrl":
        yield Contender(CAUSAL, short, {None: lambda: ours.sequence(step, chunk=1)})
    if settings.peer and data.spec.peer:
        yield Contender(BRAINTRACE, settings.slow_steps, {None: partial(_theirs, case, data, 1)})


def _backpropagation(data: Data) -> dict[str, Any]:
    return {
        BPTT: lambda: plain.bptt(data, data.model()),
        CHECKPOINT: lambda: plain.checkpointed(data, data.model()),
    }


def _theirs(case: Case, data: Data, window: int) -> Run:
    return peer.sequence(data, case.rule, peer.twin(data), window)


def _dividing(sizes: Any, steps: int) -> list[int]:
    """The sizes of windows that a sequence is a multiple of, itself included."""
    return [k for k in dict.fromkeys((*sizes, steps)) if steps % k == 0]


def _measured(
    contenders: list[Contender], reset: Callable[[], None], data: Data, settings: Settings
) -> list[Ready]:
    found = [ready(one, data, settings, reset) for one in contenders]
    runs = {k: e.run for k, e in enumerate(found) if e.run}
    times = interleaved(runs, settings)
    return [
        replace(e, entry={**e.entry, "seconds": times[k]}) if k in times else e for k, e in enumerate(found)
    ]


def _compared(found: list[Ready], case: Case, data: Data, short: int) -> Iterator[Ready]:
    """With how far each gradient is from that of backpropagation, and braintrace's from ours of the same rule and weights.

    Those of braintrace are compared on the model of its own layers, whose weights are cut another way.
    """
    mine = {e.entry["steps"]: e.gradients for e in found if e.entry["who"] == BPTT}
    references: dict[tuple[str, int], dict[str, Any]] = {}

    def on_twin(who: str, steps: int) -> dict[str, Any]:
        if (who, steps) not in references:
            model, (xs, ys) = peer.twin(data), data.sequence(steps)
            run = (
                plain.bptt(data, model)
                if who == BPTT
                else ours.sequence(ours.compiled(data, case.rule, model))
            )
            references[who, steps] = run(xs, ys)[1]
        return references[who, steps]

    for e in found:
        who, steps = e.entry["who"], e.entry["steps"]
        off: dict[str, Any] = {}
        if e.gradients and who in (WINDOWS, BRAINTRACE) and (steps == short or who == BRAINTRACE):
            off["from_bptt"] = distances(e.gradients, on_twin(BPTT, steps))
            if case.rule != "e_prop":  # Its feedback is drawn at random, by each for itself.
                off["from_rule"] = distances(e.gradients, on_twin(AUTO, steps))
        elif e.gradients and who not in (WINDOWS, BRAINTRACE, BPTT) and steps == short and mine.get(steps):
            off["from_bptt"] = distances(e.gradients, mine[steps])
        yield replace(e, entry={**e.entry, **off})


def _largest(by_name: dict[str, Ready], who: str, other: str) -> float | None:
    """The largest distance of a weight's gradient between two of our own kind."""
    if who not in by_name or other not in by_name:
        return None
    return max(
        v for v in distances(by_name[who].gradients, by_name[other].gradients).values() if v is not None
    )
