"""One cell of the comparison: a rule on a task. Accuracy, gradient, memory and time."""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from settings import EVERY, STREAMS, Search
from table import ENTRIES, EXPECTED, Entry
from tasks import Batch
from training import Outcome, Trainer

import etcompile

__all__ = ["Result", "load", "measure", "save"]


@dataclasses.dataclass(frozen=True)
class Result:
    """What one rule came to on one task; lists have one entry per seed."""

    task: str
    label: str
    note: str = ""
    rate: float = 0.0
    updates: int = 0
    accuracies: list[float] = dataclasses.field(default_factory=list)
    levels: list[int] = dataclasses.field(default_factory=list)
    activities: list[float] = dataclasses.field(default_factory=list)
    cosines: list[float] = dataclasses.field(default_factory=list)
    trace_bytes: int = 0
    #: Seconds of one step with its gradient, over those of backpropagation through time measured beside it.
    relative_time: float = 0.0
    milliseconds: float = 0.0
    #: When, and with which version of JAX.
    measured: str = ""


def measure(task: str, label: str, search: Search, rate: float | None) -> Result:
    """Measure one rule on one task; with ``rate`` given, it is not searched for."""
    entry = next(e for e in ENTRIES if e.label == label)
    if entry.algo not in etcompile.algorithm_names():
        return Result(task, label, f"there is no rule {entry.algo} in this version")
    try:
        return _measure(task, entry, search, rate)
    except (etcompile.EtcompileError, jax.errors.JAXTypeError) as error:
        reason = str(error).splitlines()[0]
        return Result(task, label, f"{type(error).__name__}: {reason}")


def _measure(task: str, entry: Entry, search: Search, rate: float | None) -> Result:
    experiment = EVERY[task]
    updates = search.updates(experiment)
    trainer = Trainer(experiment.task, experiment.make, entry.algo, entry.options, entry.optimiser)
    cosines = [_cosine(trainer, point) for point in _points(task, search)]
    ours, theirs = _times((trainer, _reference(task)), search)
    best, outcomes = _trained(trainer, entry, search, rate, updates)
    report = trainer.step.report().to_dict()
    return Result(
        task,
        entry.label,
        rate=best,
        updates=updates,
        accuracies=[o.accuracy for o in outcomes],
        levels=[o.level for o in outcomes if o.level is not None],
        activities=[o.activity for o in outcomes],
        cosines=cosines,
        trace_bytes=report["trace_bytes"],
        relative_time=ours / theirs,
        milliseconds=1e3 * ours,
        measured=f"{datetime.date.today()}, JAX {jax.__version__}",
    )


def _trained(
    trainer: Trainer, entry: Entry, search: Search, rate: float | None, updates: int
) -> tuple[float, list[Outcome]]:
    """The best learning rate, from a search unless it is given; and the outcome of each seed with it."""
    in_order = trainer.task.name not in STREAMS and any(entry.label in rung for rung in EXPECTED)
    seeds = (search.seeds if in_order else search.seeds[: search.few])[: entry.seeds]
    if not seeds:
        return 0.0, []
    rates = [entry.faster * r for r in search.rates] if rate is None else [rate]
    cases = [(seed, r) for r in rates for seed in seeds]
    found = trainer.run(cases, updates)
    runs = {r: [o for (_, of), o in zip(cases, found, strict=True) if of == r] for r in rates}
    best = max(runs, key=lambda r: _quality(runs[r]))
    return best, runs[best]


def _quality(outcomes: list[Outcome]) -> tuple[float, float]:
    """What a learning rate is chosen by, from training alone: the level reached, then the loss."""
    return float(np.mean([o.level or 0 for o in outcomes])), -float(np.mean([o.loss for o in outcomes]))


# -- gradients --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
    """Weights part of the way through training, some batches, and their true gradient."""

    weights: Mapping[str, Any]
    batches: Batch
    gradient: np.ndarray


def _cosine(trainer: Trainer, point: Point) -> float:
    """The cosine of a rule's gradient to the true one, at a point on the way of backpropagation through time.

    Over all weights but the readout's, summed over batches of whole sequences.
    """
    ours, true = _gradient(trainer, point.weights, point.batches), point.gradient
    return float(ours @ true / max(np.linalg.norm(ours) * np.linalg.norm(true), 1e-30))


@lru_cache
def _points(task: str, search: Search) -> list[Point]:
    experiment = EVERY[task]
    trainer, seeds = _reference(task), search.seeds[: search.points]
    updates = max(1, int(search.reference_share * search.updates(experiment)))
    points = []
    outcomes = trainer.run([(seed, search.reference_rate) for seed in seeds], updates)
    for seed, outcome in zip(seeds, outcomes, strict=True):
        batches = experiment.task.train(np.random.default_rng(2000 + seed), search.batches, outcome.level)
        points.append(Point(outcome.weights, batches, _gradient(trainer, outcome.weights, batches)))
    return points


@lru_cache
def _reference(task: str) -> Trainer:
    experiment = EVERY[task]
    return Trainer(experiment.task, experiment.make, "bptt", {})


def _gradient(trainer: Trainer, weights: Mapping[str, Any], batches: Batch) -> np.ndarray:
    for path, state in trainer.params.items():
        state.value = weights[path]
    total: Any = None
    for xs, ys in zip(batches.inputs, batches.targets, strict=True):
        trainer.reset()
        _, grads = trainer.gradient(xs, ys)
        traced = {path: g for path, g in grads.items() if not path.startswith("readout")}
        total = traced if total is None else jax.tree.map(jnp.add, total, traced)
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(total)])


# -- time -------------------------------------------------------------------------------------------------------------


def _times(trainers: Sequence[Trainer], search: Search) -> list[float]:
    """The shortest time of one step with its gradient, of each, over whole sequences taken in turns."""
    batch = trainers[0].task.train(np.random.default_rng(0), 1, trainers[0].task.first_level)
    xs, ys = jnp.asarray(batch.inputs[0]), jnp.asarray(batch.targets[0])
    times: list[list[float]] = [[] for _ in trainers]
    end = time.perf_counter() + search.seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for trainer, found in zip(trainers, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(trainer.gradient(xs, ys))
            found.append(time.perf_counter() - start)
    return [min(found) / trainers[0].task.steps for found in times]


# -- files ------------------------------------------------------------------------------------------------------------


def save(result: Result, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{result.task}--{result.label.replace(', ', '-').replace(' ', '-')}.json"
    (folder / name).write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n", encoding="utf-8")


def load(folder: Path) -> dict[tuple[str, str], Result]:
    """All results of a folder by task and rule."""
    results = [Result(**json.loads(p.read_text(encoding="utf-8"))) for p in sorted(folder.glob("*--*.json"))]
    return {(r.task, r.label): r for r in results}
