"""One model learning one task by one rule: the same loop, optimiser and data for every rule."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
from replicas import Replicas
from tasks import Batch, Task, accuracy

import etcompile

__all__ = ["CLIP", "MASTERED", "OPTIMISERS", "Outcome", "Trainer", "loss"]

#: Gradients longer than this are shortened to it, for every rule.
CLIP = 1.0
#: A curriculum goes on when this share of answers is right.
MASTERED = 0.9

#: What follows the shortening. RMSprop is Adam without its mean of gradients: it divides each by a mean of its squares.
OPTIMISERS: Mapping[str, Callable[[], optax.GradientTransformation]] = {
    "adam": optax.scale_by_adam,
    "rmsprop": partial(optax.scale_by_adam, b1=0.0),
    "sgd": optax.identity,
}


def loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of one step, mean over the batch; zero where no answer is asked for."""
    return -jnp.sum(targets * jax.nn.log_softmax(outputs)) / outputs.shape[0]


@dataclass(frozen=True)
class Outcome:
    """What one training run came to."""

    accuracy: float
    #: Mean training loss of a batch in the last fifth of the updates.
    loss: float
    #: The difficulty that a curriculum reached; None without one.
    level: int | None
    #: The share of units that spike at a step; 0 for models without spikes.
    activity: float
    #: The weights by path.
    weights: Mapping[str, Any]


class Trainer:
    """A compiled model with its optimiser; :meth:`run` starts afresh for every seed and rate."""

    def __init__(
        self,
        task: Task,
        make: Callable[[], brainstate.nn.Module],
        algo: str,
        options: Mapping[str, Any],
        optimiser: str = "adam",
        block: int = 20,
    ):
        self.task, self.make, self.block = task, make, block
        example = jnp.zeros((task.batch_size, task.inputs))
        self.step = etcompile.compile(make(), example, algo=algo, batch_size=task.batch_size, **options)
        self.gradient = self.step.scan_value_and_grad(loss)
        self.params = self.step.param_states
        self.rate = brainstate.ShortTermState(jnp.zeros(()))
        self.optimiser = optax.chain(optax.clip_by_global_norm(CLIP), OPTIMISERS[optimiser]())
        self.moments = brainstate.ShortTermState(self.optimiser.init(self.values()))
        self._learn: Any = None
        self._answers: Any = None
        self._twin_params: dict[str, Any] = {}

    def values(self) -> dict[str, Any]:
        return {path: state.value for path, state in self.params.items()}

    def start(self, seed: int, rate: float) -> dict[brainstate.State, Any]:
        """The weights of this seed, the same for every rule, and an optimiser that has seen nothing."""
        brainstate.random.seed(seed)
        fresh = _by_path(self.make())
        params = {path: fresh[path].value for path in self.params}
        traces = self.step.traces_state.value
        return {
            **{state: params[path] for path, state in self.params.items()},
            self.rate: jnp.asarray(rate, self.rate.value.dtype),
            self.moments: self.optimiser.init(params),
            # Rules that draw random signs draw others for every seed.
            self.step.traces_state: {k: v + (seed << 20) if _is_count(v) else v for k, v in traces.items()},
        }

    def run(self, cases: Sequence[tuple[int, float]], updates: int) -> list[Outcome]:
        """Train from the weights of each seed with each rate ``(seed, rate)``, all side by side, and test."""
        self._learn = self._learn or self._replicated()
        self._learn.start([self.start(*case) for case in cases])
        rngs = [np.random.default_rng(1000 + seed) for seed, _ in cases]
        levels: list[int | None] = [self.task.first_level] * len(cases)
        losses = []
        blocks = -(-updates // self.block)
        for done in range(blocks):
            left = np.full((len(cases), self.block), 1 - done / blocks, np.float32)
            batches = [
                self.task.train(rng, self.block, level) for rng, level in zip(rngs, levels, strict=True)
            ]
            losses.append(np.mean(self._learn(*_stacked(batches), left), axis=1))
            # Draws of their own: what a seed is trained on must not depend on what runs beside it.
            levels = self._next_levels(levels, [np.random.default_rng((seed, done)) for seed, _ in cases])
        tested, activity = self.test([np.random.default_rng(seed) for seed, _ in cases], [None] * len(cases))
        last = np.mean(losses[-max(1, len(losses) // 5) :], axis=0)
        return [
            Outcome(float(tested[k]), float(last[k]), levels[k], float(activity[k]), weights)
            for k, weights in enumerate(self._weights(len(cases)))
        ]

    def _weights(self, count: int) -> list[dict[str, Any]]:
        """The weights of each replica by path."""
        values = {path: jax.device_get(self._learn.values(state)) for path, state in self.params.items()}
        return [
            {path: jax.tree.map(operator.itemgetter(k), value) for path, value in values.items()}
            for k in range(count)
        ]

    def _replicated(self) -> Replicas:
        batch = self.task.train(np.random.default_rng(0), self.block, self.task.first_level)
        return Replicas(
            lambda *args: brainstate.transform.for_loop(self._update, *args),
            batch.inputs,
            batch.targets,
            np.ones(self.block, np.float32),
        )

    def _next_levels(self, levels: list[int | None], rngs: Sequence[np.random.Generator]) -> list[int | None]:
        """Each level goes on as long as its task is mastered, up to the longest."""
        longest = getattr(self.task, "longest", 0)
        going = {k for k, level in enumerate(levels) if level is not None and level < longest}
        while going:
            right, _ = self.test(rngs, levels)
            going = {k for k in going if right[k] > MASTERED}
            levels = [
                level + 1 if level is not None and k in going else level for k, level in enumerate(levels)
            ]
            going = {k for k in going if levels[k] != longest}
        return levels

    def reset(self) -> None:
        """A new sequence, with new random signs for the rules that draw some: their count of steps goes on."""
        counts = {k: v for k, v in self.step.traces_state.value.items() if _is_count(v)}
        self.step.reset()
        self.step.traces_state.value = {**self.step.traces_state.value, **counts}

    def _update(self, xs: jax.Array, ys: jax.Array, left: jax.Array) -> jax.Array:
        """One batch of whole sequences, one change of the weights; ``left`` is the share of the learning rate that is left."""
        self.reset()
        losses, grads = self.gradient(xs, ys)
        before = self.values()
        changes: Any
        changes, self.moments.value = self.optimiser.update(grads, self.moments.value, before)
        for path, state in self.params.items():
            state.value = jax.tree.map(
                lambda p, c: p - left * self.rate.value * c, before[path], changes[path]
            )
        return losses.sum()

    def test(
        self, rngs: Sequence[np.random.Generator], levels: Sequence[int | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Accuracy of each replica, and the share of units that spike (0 without spikes), on a twin of the model."""
        batches = [self.task.test(rng, level) for rng, level in zip(rngs, levels, strict=True)]
        if self._answers is None:
            twin: Any = self.make()
            size = batches[0].inputs.shape[1]
            brainstate.nn.init_all_states(twin, batch_size=size)

            def one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
                outputs = twin.update(x)
                return outputs, twin.spikes().mean() if hasattr(twin, "spikes") else jnp.zeros(())

            def answers(xs: jax.Array) -> tuple[jax.Array, jax.Array]:
                brainstate.nn.reset_all_states(twin, batch_size=size)
                return brainstate.transform.for_loop(one, xs)

            self._answers, self._twin_params = Replicas(answers, batches[0].inputs), _by_path(twin)
        self._answers.start(
            [
                {self._twin_params[path]: value for path, value in weights.items()}
                for weights in self._weights(len(batches))
            ]
        )
        outputs, activity = self._answers(_stacked(batches)[0])
        right = [accuracy(np.asarray(o), b.targets) for o, b in zip(outputs, batches, strict=True)]
        return np.array(right), np.mean(activity, axis=1)


def _stacked(batches: Sequence[Batch]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([b.inputs for b in batches]), np.stack([b.targets for b in batches])


def _is_count(trace: Any) -> bool:
    return isinstance(trace, jax.Array) and jnp.issubdtype(trace.dtype, jnp.unsignedinteger)


def _by_path(model: brainstate.nn.Module) -> dict[str, Any]:
    found: Any = model.states(brainstate.ParamState)
    return {".".join(map(str, path)): state for path, state in found.items()}
