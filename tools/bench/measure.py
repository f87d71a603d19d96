"""One case, in the process that it was given: times, memory, and whether gradients make sense."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import ours
import peers
from cases import Case
from clock import interleaved, timed
from machine import Bandwidth
from memory import resident_growth, temporary
from models import MODELS, Data, spike_rate
from process import fresh
from results import AUTO, BPTT, BRAINTRACE, CAUSAL, FORWARD
from settings import Settings

__all__ = ["first_gradient", "measure"]

#: Runs between the contenders of a case with updates.
BANDWIDTH = "bandwidth"


def measure(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a case, as JSON takes them; ``{"runs": [...], ...}``."""
    one, how = Case(**case), Settings(**settings)
    data = Data(MODELS[one.model], how.units(one.units), one.batch)
    kinds = {"sequence": _sequence, "memory": _memory, "update": _update, "first": _first, "call": _call}
    return {"case": case, "units": data.units, **kinds[one.kind](one, data, how)}


# -- a sequence with its gradient -------------------------------------------------------------------------------------


def _sequence(case: Case, data: Data, settings: Settings) -> dict[str, Any]:
    lengths = [settings.steps, settings.long_steps] if case.long else [settings.steps]
    step = ours.compiled(data, case.rule, data.model())
    entries: list[tuple[str, int, Callable[[], Any]]] = []
    auto, back = ours.sequence(step), peers.bptt(data, data.model())
    entries += [(AUTO, n, lambda: auto) for n in lengths] + [(BPTT, n, lambda: back) for n in lengths]
    only = peers.forward(data, data.model())
    entries.append((FORWARD, settings.steps, lambda: only))
    if case.rule == "d_rtrl":
        causal = ours.sequence(step, chunk=1)
        entries.append((CAUSAL, settings.steps, lambda: causal))
    if settings.peer:

        def theirs() -> Any:
            return peers.learner_sequence(peers.learner(data, case.rule, peers.twin(data)))

        steps = settings.steps if case.rule == "pp_prop" else settings.slow_steps
        entries.append((BRAINTRACE, steps, theirs))
    found = [_started(who, steps, make, data, step.reset, settings) for who, steps, make in entries]
    ready = {k: e["run"] for k, e in enumerate(found) if "run" in e}
    times = interleaved(ready, settings)
    return {
        "runs": [_entry(e, times.get(k)) for k, e in enumerate(found)],
        "trace_bytes": step.report().to_dict()["trace_bytes"],
        "flops": 3 * peers.forward_flops(data, data.model()),
        "agreement": _agreement(found, settings.steps),
        "spikes": spike_rate(data, settings.steps) if data.spec.spikes else None,
    }


def _started(
    who: str,
    steps: int,
    make: Callable[[], Any],
    data: Data,
    reset: Callable[[], None],
    settings: Settings,
) -> dict[str, Any]:
    """A contender after its first runs, with the gradients from the initial states; or why it failed."""
    try:
        run = make()
        xs, ys = data.sequence(steps)
        reset()
        first, (losses, grads) = timed(lambda: run(xs, ys))
        _warm_up(lambda: run(xs, ys), settings)
    except Exception as error:
        return {"who": who, "steps": steps, "error": _reason(error)}
    return {
        "who": who,
        "steps": steps,
        "first": first,
        "loss": float(jnp.mean(losses)),
        "zero": [name for name, g in grads.items() if not any(bool(jnp.any(v)) for v in jax.tree.leaves(g))],
        "run": lambda: run(xs, ys),
        "gradients": grads,
    }


def _warm_up(run: Callable[[], Any], settings: Settings) -> None:
    """The runs after the first that are not timed."""
    for _ in range(settings.warm_up - 1):
        jax.block_until_ready(run())


def _entry(found: dict[str, Any], seconds: list[float] | None) -> dict[str, Any]:
    kept = {name: value for name, value in found.items() if name not in ("run", "gradients")}
    return kept if seconds is None else {**kept, "seconds": seconds}


def _agreement(found: list[dict[str, Any]], steps: int) -> float | None:
    """The largest relative difference of a weight's gradient, in chunks against step by step."""
    gradients = {e["who"]: e["gradients"] for e in found if e["steps"] == steps and "gradients" in e}
    if AUTO not in gradients or CAUSAL not in gradients:
        return None
    pairs = zip(jax.tree.leaves(gradients[AUTO]), jax.tree.leaves(gradients[CAUSAL]), strict=True)
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)


# -- memory -----------------------------------------------------------------------------------------------------------


def _memory(case: Case, data: Data, settings: Settings) -> dict[str, Any]:
    step = ours.compiled(data, case.rule, data.model())
    contenders: list[tuple[str, Callable[[], Any]]] = [
        (AUTO, lambda: ours.sequence(step)),
        (BPTT, lambda: peers.bptt(data, data.model())),
    ]
    if settings.peer:

        def theirs() -> Any:
            return peers.learner_sequence(peers.learner(data, case.rule, peers.twin(data)))

        contenders.append((BRAINTRACE, theirs))
    runs = []
    for who, make in contenders:
        try:
            run = make()
            for steps in (settings.steps, settings.long_steps):
                xs, ys = data.sequence(steps)
                found = {"who": who, "steps": steps, "temporary": temporary(run.lower(xs, ys))}
                if who != BRAINTRACE:  # Its memory is told by XLA well enough, and its time is long.
                    jax.block_until_ready(run(xs, ys))
                    found["resident"] = resident_growth(lambda run=run, xs=xs, ys=ys: run(xs, ys))
                runs.append(found)
        except Exception as error:
            runs.append({"who": who, "steps": settings.steps, "error": _reason(error)})
    return {"runs": runs, "trace_bytes": step.report().to_dict()["trace_bytes"]}


# -- a weight update at every step ------------------------------------------------------------------------------------


def _update(case: Case, data: Data, settings: Settings) -> dict[str, Any]:
    step = ours.compiled(data, case.rule, data.model())
    makers: list[tuple[str, Callable[[], Any]]] = [(AUTO, lambda: ours.updates(step))]
    if settings.peer:

        def theirs() -> Any:
            return peers.braintrace_updates(peers.learner(data, case.rule, peers.twin(data)))

        makers.append((BRAINTRACE, theirs))
    xs, ys = data.sequence(settings.slow_steps)
    found, ready = [], {}
    for who, make in makers:
        try:
            run = make()
            first, losses = timed(lambda run=run: run(xs, ys))
            _warm_up(lambda run=run: run(xs, ys), settings)
            ready[who] = lambda run=run: run(xs, ys)
            found.append({"who": who, "steps": len(xs), "first": first, "loss": float(jnp.mean(losses))})
        except Exception as error:
            found.append({"who": who, "steps": len(xs), "error": _reason(error)})
    bandwidth = Bandwidth(settings.array)
    timed(bandwidth)
    times = interleaved({**ready, BANDWIDTH: bandwidth}, settings)
    return {
        "runs": [_entry(e, times.get(e["who"])) for e in found],
        "trace_bytes": step.report().to_dict()["trace_bytes"],
        "bandwidth": [bandwidth.bytes / seconds for seconds in times[BANDWIDTH]],
    }


# -- the first gradient -----------------------------------------------------------------------------------------------


def _first(case: Case, data: Data, settings: Settings) -> dict[str, Any]:
    contenders = [AUTO, BPTT] + [BRAINTRACE] * settings.peer
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for _ in range(settings.processes):
        for steps in (1, settings.steps):
            for who in contenders:
                found = fresh(
                    "measure:first_gradient",
                    who=who,
                    case=case.to_dict(),
                    units=data.units,
                    steps=steps,
                )
                entry = runs.setdefault(
                    (who, steps), {"who": who, "steps": steps, "seconds": [], "again": []}
                )
                if "error" in found:
                    entry["error"] = found["error"]
                else:
                    entry["seconds"].append(found["seconds"])
                    entry["again"].append(found["again"])
    return {"runs": list(runs.values())}


def first_gradient(who: str, case: dict[str, Any], units: int, steps: int) -> dict[str, Any]:
    """Seconds from compiling a model to its first gradient, and of the second gradient."""
    one = Case(**case)
    data = Data(MODELS[one.model], units, one.batch)
    xs, ys = jax.block_until_ready(data.sequence(steps))
    model = peers.twin(data) if who == BRAINTRACE else data.model()
    start = time.perf_counter()
    if who == AUTO:
        step = ours.compiled(data, one.rule, model)
        run = ours.single(step) if steps == 1 else ours.sequence(step)
    elif who == BRAINTRACE:
        run = peers.learner_sequence(peers.learner(data, one.rule, model))
    else:
        run = peers.bptt(data, model)
    jax.block_until_ready(run(xs, ys))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "again": timed(lambda: run(xs, ys))[0]}


# -- one call from Python ---------------------------------------------------------------------------------------------


def _call(case: Case, data: Data, settings: Settings) -> dict[str, Any]:
    xs, ys = data.sequence(1)
    step = ours.compiled(data, case.rule, data.model())
    alone = data.model()
    brainstate.nn.init_all_states(alone, batch_size=data.batch)
    found = ours.calls(step, alone, xs[0], ys[0])
    runs = {}
    for who, call in found.items():

        def run(call: Callable[[], Any] = call) -> Any:
            return [call() for _ in range(settings.slow_steps)][-1]

        runs[who] = run
        _warm_up(run, settings)
        timed(run)
    times = interleaved(runs, settings)
    return {
        "runs": [
            {"who": who, "steps": settings.slow_steps, "seconds": seconds} for who, seconds in times.items()
        ]
    }


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
