"""One case, in the process that it was given: times, memory, and whether gradients make sense."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import brainstate
import floor
import jax
import jax.numpy as jnp
import ours
import peer
import plain
from cases import Case
from clock import interleaved, timed
from contenders import reason, warm_up
from machine import Bandwidth
from memory import resident_growth, temporary
from models import MODELS, Data
from process import fresh
from results import AUTO, BPTT, BRAINTRACE, CHECKPOINT, WINDOWS
from sequences import by_events, long_sequence, sequence, sparse
from settings import Settings

__all__ = ["calls", "first_gradient", "measure"]

#: Runs between the contenders of a case with updates.
BANDWIDTH = "bandwidth"


def measure(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a case, as JSON takes them; ``{"runs": [...], ...}``."""
    one, how = Case(**case), Settings(**settings)
    data = Data(MODELS[one.model], how.units(one.units), one.batch)
    kinds = {
        "sequence": sequence,
        "long": long_sequence,
        "memory": _memory,
        "update": _update,
        "sparse": sparse,
        "sparse-events": by_events,
        "first": _first,
        "call": _call,
    }
    return {"case": case, "units": data.units, **kinds[one.kind](one, data, how)}


# -- memory -----------------------------------------------------------------------------------------------------------


def _memory(case: Case, data: Data, settings: Settings) -> dict[str, Any]:
    step = ours.compiled(data, case.rule, data.model())
    window = settings.windows[-1]
    contenders: dict[str, Callable[[], Any]] = {
        AUTO: lambda: ours.sequence(step),
        BPTT: lambda: plain.bptt(data, data.model()),
        CHECKPOINT: lambda: plain.checkpointed(data, data.model()),
    }
    if settings.peer and data.spec.peer:
        contenders[BRAINTRACE] = lambda: peer.sequence(data, case.rule, peer.twin(data))
        contenders[WINDOWS] = lambda: peer.sequence(data, case.rule, peer.twin(data), window)
    runs = []
    for who, make in contenders.items():
        length = settings.lengths[-1] // window * window if who == WINDOWS else settings.lengths[-1]
        try:
            run = make()
            for steps in (length, settings.long_steps):
                xs, ys = data.sequence(steps)
                found: dict[str, Any] = {
                    "who": who,
                    "steps": steps,
                    "temporary": temporary(run.lower(xs, ys)),
                }
                found |= {"window": window} if who == WINDOWS else {}
                if who not in (
                    BRAINTRACE,
                    WINDOWS,
                ):  # Its memory is told by XLA well enough, and its time is long.
                    jax.block_until_ready(run(xs, ys))
                    found["resident"] = resident_growth(lambda run=run, xs=xs, ys=ys: run(xs, ys))
                runs.append(found)
        except Exception as error:
            runs.append({"who": who, "steps": length, "error": reason(error)})
    return {"runs": runs, "trace_bytes": step.report().to_dict()["trace_bytes"]}


# -- a weight update at every step ------------------------------------------------------------------------------------


def _update(case: Case, data: Data, settings: Settings) -> dict[str, Any]:
    step = ours.compiled(data, case.rule, data.model())
    makers: dict[str, Callable[[], Any]] = {AUTO: lambda: ours.updates(step)}
    if settings.peer:
        makers[BRAINTRACE] = lambda: peer.updates(peer.learner(data, case.rule, peer.twin(data)))
    xs, ys = data.sequence(settings.slow_steps)
    found: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], Any]] = {}
    for who, make in makers.items():
        try:
            run = partial(make(), xs, ys)
            first, losses = timed(run)
            warm_up(run, settings)
            runs[who] = run
            found.append({"who": who, "steps": len(xs), "first": first, "loss": float(jnp.mean(losses))})
        except Exception as error:
            found.append({"who": who, "steps": len(xs), "error": reason(error)})
    trace_bytes = step.report().to_dict()["trace_bytes"]
    bandwidth = Bandwidth(trace_bytes)
    timed(bandwidth)
    times = interleaved({**runs, BANDWIDTH: bandwidth}, settings)
    return {
        "runs": [{**e, "seconds": times[e["who"]]} if e["who"] in times else e for e in found],
        "trace_bytes": trace_bytes,
        "trace_bandwidth": [bandwidth.bytes / seconds for seconds in times[BANDWIDTH]],
        "floor": floor.products(data, data.model(), len(xs)),
    }


# -- the first gradient -----------------------------------------------------------------------------------------------


def _first(case: Case, data: Data, settings: Settings) -> dict[str, Any]:
    window = settings.windows[-1]
    length = settings.lengths[-1] // window * window
    theirs = settings.peer and data.spec.peer
    # Large programs take long, and as long for several steps.
    lengths = (1, length) if data.spec.peer else (1,)
    contenders = [(who, n) for n in lengths for who in (AUTO, BPTT, *[BRAINTRACE] * theirs)]
    contenders += [(WINDOWS, length)] * theirs
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for _ in range(settings.processes):
        for who, steps in contenders:
            given = {"case": case.to_dict(), "units": data.units, "steps": steps, "window": window}
            found = fresh("measure:first_gradient", who=who, **given)
            entry = runs.setdefault((who, steps), {"who": who, "steps": steps, "seconds": [], "again": []})
            if "error" in found:
                entry["error"] = found["error"]
            else:
                entry["seconds"].append(found["seconds"])
                entry["again"].append(found["again"])
    return {"runs": list(runs.values())}


def first_gradient(who: str, case: dict[str, Any], units: int, steps: int, window: int) -> dict[str, Any]:
    """Seconds from compiling a model to its first gradient, and of the second gradient."""
    one = Case(**case)
    data = Data(MODELS[one.model], units, one.batch)
    xs, ys = jax.block_until_ready(data.sequence(steps))
    theirs = who in (BRAINTRACE, WINDOWS)
    model = peer.twin(data) if theirs else data.model()
    start = time.perf_counter()
    if who == AUTO:
        step = ours.compiled(data, one.rule, model)
        run = ours.single(step) if steps == 1 else ours.sequence(step)
    elif theirs:
        run = peer.sequence(data, one.rule, model, window if who == WINDOWS else 1)
    else:
        run = plain.bptt(data, model)
    jax.block_until_ready(run(xs, ys))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "again": timed(lambda: run(xs, ys))[0]}


# -- one call from Python ---------------------------------------------------------------------------------------------


def _call(case: Case, data: Data, settings: Settings) -> dict[str, Any]:
    # A process may have one contender in a slow way for as long as it lives: that is no property of the contender.
    runs: dict[str, dict[str, Any]] = {}
    for _ in range(settings.processes):
        found = fresh("measure:calls", case=case.to_dict(), settings=dataclasses.asdict(settings))
        if "error" in found:
            return found
        for who, seconds in found["seconds"].items():
            entry = runs.setdefault(who, {"who": who, "steps": found["count"], "seconds": []})
            entry["seconds"] += seconds
    return {"runs": list(runs.values())}


def calls(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of so many calls in a row by each contender, in turns, several times."""
    one, how = Case(**case), Settings(**settings)
    data = Data(MODELS[one.model], how.units(one.units), one.batch)
    # The first call after those of another contender takes up to a millisecond, so there are many in a row.
    count = 20 * how.slow_steps
    xs, ys = data.sequence(1)
    step = ours.compiled(data, one.rule, data.model())
    alone = data.model()
    brainstate.nn.init_all_states(alone, batch_size=data.batch)
    runs = {}
    for who, call in ours.calls(step, alone, xs[0], ys[0]).items():

        def run(call: Callable[[], Any] = call) -> Any:
            for _ in range(count - 1):
                call()
            return call()

        runs[who] = run
        warm_up(run, how)
        timed(run)
    return {"count": count, "seconds": interleaved(runs, how)}
