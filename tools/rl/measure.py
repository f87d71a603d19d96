"""One cell: a network with a rule on a task, all rates and seeds side by side in one compiled run."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
from models import MODELS
from settings import RULES, TASKS, Protocol, Task

import etcompile

__all__ = ["Cell", "Result", "keep", "kept", "load", "measure", "save"]


@dataclasses.dataclass(frozen=True)
class Result:
    """What one cell came to. Curves are by rate, seed and piece.

    A score is the share of episodes that ended right, or the mean length of an episode (CartPole).
    """

    task: str
    model: str
    rule: str
    rates: list[float]
    steps: int
    agents: int
    curves: list[list[list[float]]]
    last: int
    exact: bool
    seconds: float

    @property
    def scores(self) -> np.ndarray:
        """By rate and seed, over the last pieces."""
        return np.nanmean(np.asarray(self.curves)[..., -self.last :], axis=-1)

    @property
    def best(self) -> int:
        """The rate with the best mean over seeds."""
        return int(np.argmax(self.scores.mean(axis=1)))

    def cell(self) -> Cell:
        """What the page shows of it."""
        curves, scores = np.asarray(self.curves[self.best]), self.scores[self.best]
        return Cell(
            self.task,
            self.model,
            self.rule,
            self.rates[self.best],
            len(scores),
            self.steps,
            round(self.seconds, 1),
            *_with_error(scores),
            *(v.tolist() for v in _with_error(curves)),
        )


@dataclasses.dataclass(frozen=True)
class Cell:
    """A result as the page shows it: at the better rate, means over seeds with their standard errors."""

    task: str
    model: str
    rule: str
    rate: float
    seeds: int
    steps: int
    seconds: float
    score: float
    error: float
    curve: list[float]
    errors: list[float]


def _with_error(values: np.ndarray) -> tuple[Any, Any]:
    """Mean over seeds, the leading axis, and its standard error."""
    error = values.std(axis=0, ddof=1) / len(values) ** 0.5
    return np.round(values.mean(axis=0), 4), np.round(error, 4)


def measure(task: Task, model: str, rule: str, protocol: Protocol, tell: Callable[[int], None]) -> Result:
    started = time.perf_counter()
    step, params = _networks(task, model, rule, protocol)
    learner = step.learn_td(
        optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
        task.world,
        gamma=protocol.gamma,
        lam=protocol.lam,
        entropy=protocol.entropy,
        **task.options,
    )
    equations = learner.equations
    rates = jnp.repeat(jnp.asarray(protocol.rates), len(protocol.seeds))
    keys = jax.vmap(jax.random.key)(jnp.tile(jnp.asarray(protocol.seeds), len(protocol.rates)))
    params = jax.tree.map(lambda v: jnp.concatenate([v] * len(protocol.rates)), params)

    def start(params: Any, key: Any, rate: Any) -> Any:
        agents = equations.start(params, key)
        held = {**agents.optimizer.hyperparams, "learning_rate": rate}
        return dataclasses.replace(agents, optimizer=agents.optimizer._replace(hyperparams=held))

    def piece(agents: Any) -> tuple[Any, Any]:
        agents, record = equations.run(agents, protocol.steps(task))
        ended = record.terminated | record.truncated
        right = record.terminated & (record.reward > 0)
        counts: list[Any] = [right, ended]
        return agents, jnp.stack([jnp.sum(v) for v in counts])

    agents = jax.jit(jax.vmap(start))(params, keys, rates)
    run, counts = jax.jit(jax.vmap(piece)), []
    for _ in range(protocol.pieces):
        agents, counted = run(agents)
        counts.append(np.asarray(counted))
        tell(protocol.steps(task))
    right, ended = np.stack(counts, axis=-1).swapaxes(0, 1).astype(float)
    taken = protocol.steps(task) * protocol.agents
    with np.errstate(divide="ignore", invalid="ignore"):
        curves = right / ended if task.most == 1 else np.minimum(taken / ended, task.most)
    # No episode ended: none was right.
    curves = np.where(ended == 0, 0.0 if task.most == 1 else task.most, curves)
    shape = len(protocol.rates), len(protocol.seeds), protocol.pieces
    return Result(
        task.name,
        model,
        rule,
        list(protocol.rates),
        protocol.steps(task) * protocol.pieces,
        protocol.agents,
        curves.reshape(shape).tolist(),
        protocol.last,
        step.exact,
        time.perf_counter() - started,
    )


def _networks(task: Task, model: str, rule: str, protocol: Protocol) -> tuple[etcompile.Step, Any]:
    """A compiled step, and the parameters of all seeds along a leading axis."""
    drawn, step = [], None
    for seed in protocol.seeds:
        brainstate.random.seed(seed)
        net = MODELS[model](task.world.inputs, task.world.actions)
        found = net.states(brainstate.ParamState)
        drawn.append({".".join(map(str, path)): state.value for path, state in found.items()})
        if step is None:
            x = jnp.zeros((protocol.agents, task.world.inputs))
            step = etcompile.compile(net, x, algo=RULES[rule], batch_size=protocol.agents)
    assert step is not None
    return step, {k: jax.tree.map(lambda *v: jnp.stack(v), *(d[k] for d in drawn)) for k in step.params}


def save(result: Result, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{result.task}-{result.model}-{result.rule.replace(' ', '_')}.json"
    (folder / name).write_text(json.dumps(dataclasses.asdict(result)), encoding="utf-8")


def load(folder: Path) -> dict[tuple[str, str, str], Result]:
    """All that were saved, by task, model and rule."""
    found = [Result(**json.loads(p.read_text(encoding="utf-8"))) for p in sorted(folder.glob("*.json"))]
    return {(r.task, r.model, r.rule): r for r in found if r.task in TASKS}


def kept(file: Path) -> dict[tuple[str, str, str], Cell]:
    """Cells that were measured before, by task, model and rule."""
    found = [Cell(**c) for c in json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []
    return {(c.task, c.model, c.rule): c for c in found if c.task in TASKS}


def keep(cells: Mapping[tuple[str, str, str], Cell], file: Path) -> None:
    """One line for each cell, in their order on the page."""
    order = [(task, model, rule) for task in TASKS for model in MODELS for rule in RULES]
    lines = [json.dumps(dataclasses.asdict(cells[c])) for c in order if c in cells]
    file.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
