"""Two ways to train one model: online with etcompile, and with backpropagation through time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
from demo_data import STEPS, Batch, Digits, batches, batches_per_epoch

import etcompile

Model = brainstate.nn.Module
#: Learns from one batch and returns the loss of each step.
Learner = Callable[[Batch], jax.Array]


@dataclass(frozen=True)
class Settings:
    epochs: int
    batch_size: int = 32
    noise: float = 0.2
    seed: int = 0
    #: Online, the weights change at every step; offline, once a sequence: eight times as rarely.
    online_rate: float = 2e-3
    offline_rate: float = 5e-3


@dataclass
class Curve:
    """Training loss and test accuracy after each epoch."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)


def loss(logits: jax.Array, labels: jax.Array, weight: jax.Array) -> jax.Array:
    """The loss of one step, over the batch."""
    return weight * jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def online_learner(model: Model, digits: Digits, settings: Settings) -> tuple[Learner, etcompile.Step]:
    """The model compiled with D-RTRL; its weights change at every time step."""
    example = jnp.zeros((settings.batch_size, digits.train_images.shape[-1]))
    step = etcompile.compile(model, example, algo="d_rtrl", batch_size=settings.batch_size)
    learn = step.learn(loss, adam(settings.online_rate, STEPS, digits, settings), update_every=1)

    def learner(batch: Batch) -> jax.Array:
        step.reset()
        return learn(batch.pixels, batch.labels, batch.weights)

    return learner, step


def offline_learner(model: Model, digits: Digits, settings: Settings) -> Learner:
    """Backpropagation through time, with nothing of etcompile in it."""
    parameters = model.states(brainstate.ParamState)
    optimizer = adam(settings.offline_rate, 1, digits, settings)
    moments = optimizer.init(values(parameters))

    @brainstate.transform.jit
    def update(
        moments: optax.OptState, pixels: jax.Array, labels: jax.Array, weights: jax.Array
    ) -> tuple[optax.OptState, jax.Array]:
        def total() -> tuple[jax.Array, jax.Array]:
            logits = brainstate.transform.for_loop(model.update, pixels)
            losses = jax.vmap(loss)(logits, labels, weights)
            return losses.sum(), losses

        brainstate.nn.reset_all_states(model, batch_size=settings.batch_size)
        gradients, losses = brainstate.transform.grad(total, parameters, has_aux=True)()
        updates, moments = optimizer.update(dict(gradients), moments, values(parameters))
        for name, value in optax.apply_updates(values(parameters), updates).items():
            parameters[name].value = value
        return moments, losses

    def learner(batch: Batch) -> jax.Array:
        nonlocal moments
        moments, losses = update(moments, batch.pixels, batch.labels, batch.weights)
        return losses

    return learner


def adam(
    rate: float, updates_per_batch: int, digits: Digits, settings: Settings
) -> optax.GradientTransformation:
    """Adam, its rate falling to zero along half a cosine."""
    updates = settings.epochs * batches_per_epoch(digits, settings.batch_size) * updates_per_batch
    return optax.adam(optax.cosine_decay_schedule(rate, updates))


def values(parameters: dict) -> dict:
    return {name: parameter.value for name, parameter in parameters.items()}


class Examiner:
    """Test accuracy of a model, measured on a twin so that the model's own states stay as they are."""

    def __init__(self, twin: Model, digits: Digits):
        brainstate.nn.init_all_states(twin, batch_size=len(digits.test_labels))
        self.parameters = twin.states(brainstate.ParamState)

        @brainstate.transform.jit
        def answers(pixels: jax.Array) -> jax.Array:
            brainstate.nn.reset_all_states(twin, batch_size=len(digits.test_labels))
            return brainstate.transform.for_loop(twin.update, pixels)[-1].argmax(axis=-1)

        self.answers = answers
        self.pixels = np.swapaxes(digits.test_images, 0, 1)
        self.labels = digits.test_labels

    def __call__(self, model: Model) -> float:
        for name, parameter in model.states(brainstate.ParamState).items():
            self.parameters[name].value = parameter.value
        return float(np.mean(np.asarray(self.answers(self.pixels)) == self.labels))


def fit(
    learner: Learner,
    accuracy: Callable[[], float],
    digits: Digits,
    settings: Settings,
    on_epoch: Callable[[Curve], None],
) -> Curve:
    """Train, calling `on_epoch` after every pass over the training images."""
    rng = np.random.default_rng(settings.seed)
    curve = Curve()
    for _ in range(settings.epochs):
        losses = [learner(batch) for batch in batches(digits, rng, settings.batch_size, settings.noise)]
        curve.losses.append(float(np.mean([each.sum() for each in losses])))
        curve.accuracies.append(accuracy())
        on_epoch(curve)
    return curve
