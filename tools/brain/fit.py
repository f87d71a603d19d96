"""Fit the rates of the regions with one learning rule, and measure what it takes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import memory
import numpy as np
import optax
from network import Network

import etcompile

__all__ = ["RULES", "Settings", "fit", "targets"]

Array = Any

#: Options of each rule; e-prop's filter is that of the rates.
RULES: dict[str, Callable[[Network], dict[str, Any]]] = {
    "d_rtrl": lambda network: {},
    "e_prop": lambda network: {"kappa": float(network.times.decay("rate"))},
    "pp_prop": lambda network: {},
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """``updates`` of the weights, each after ``window`` steps, in which states and traces go on."""

    updates: int
    window: int
    settle: int
    learning_rate: float
    seed: int


def targets(network: Network, seed: int) -> Array:
    """A rate for each region, 10 to 40 hertz."""
    rng = np.random.default_rng(seed + 1)
    return np.exp(rng.uniform(np.log(10.0), np.log(40.0), network.connectome.regions)).astype(np.float32)


def loss(rates: Array, wanted: Array) -> Array:
    return jnp.mean(jnp.square((rates - wanted) / 20.0))


def fit(
    network: Network, rule: str, settings: Settings, tell: Callable[[int, float], None]
) -> dict[str, Any]:
    """Train, and return rates before and after, losses and measurements; ``tell`` hears of each update.

    The memory of the rates themselves is left to the rule (``exclude``): a trace of it would be one more number for each synapse.
    """
    wanted = jnp.asarray(targets(network, settings.seed))
    before = _rates(network, network.theta, settings)
    began = time.perf_counter()
    step = etcompile.compile(
        network.model(), jax.ShapeDtypeStruct((network.connectome.neurons,), jnp.float32),
        algo=rule, exclude="rate", **RULES[rule](network),
    )  # fmt: skip
    compiled = time.perf_counter() - began
    run = step.scan_value_and_grad(loss)
    given = lambda k: (network.drives(settings.window, settings.seed + 2 + k), _each(wanted, settings))  # noqa: E731
    began = time.perf_counter()
    jax.block_until_ready(run(*given(0)))
    first = time.perf_counter() - began
    so_far = memory.peak()
    measured = _measured(network, step, run, given(0), wanted)
    losses = list(_learn(step, run, given, settings, tell))
    return {
        "rule": rule,
        "neurons": network.connectome.neurons,
        "connections": network.connectome.connections,
        "targets": np.asarray(wanted).tolist(),
        "before": before.tolist(),
        "after": _rates(network, np.asarray(step.params["theta"]), settings).tolist(),
        "losses": losses,
        "seconds_to_compile": compiled,
        "seconds_of_first_call": first,
        "trace_bytes": step.report().to_dict()["trace_bytes"],
        "peak_bytes": max(so_far, memory.peak()),
        **measured,
    }


def _rates(network: Network, theta: Array, settings: Settings) -> Array:
    """Rates of the regions at each step of a run of its own."""
    drives = network.drives(settings.settle, settings.seed)
    _, rates = network.run()(jnp.asarray(theta), network.start(), drives)
    return np.asarray(rates)


def _each(wanted: Array, settings: Settings) -> Array:
    return jnp.broadcast_to(wanted, (settings.window, len(wanted)))


def _learn(
    step: etcompile.Step, run: Callable, given: Callable, settings: Settings, tell: Callable
) -> Iterator[float]:
    step.reset()
    optimiser = optax.adam(settings.learning_rate)
    update = jax.jit(_updated(optimiser), donate_argnums=(0, 1))
    state = optimiser.init(step.params)
    for k in range(settings.updates):
        losses, grads = run(*given(k))
        params, state = update(step.params, state, grads)
        step.params = params
        value = float(jnp.mean(losses))
        tell(k, value)
        yield value


def _updated(optimiser: optax.GradientTransformation) -> Callable:
    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        change, state = optimiser.update(grads, state)
        return optax.apply_updates(params, change), state

    return update


def _measured(
    network: Network, step: etcompile.Step, run: Callable, given: tuple, wanted: Array
) -> dict[str, Any]:
    """Milliseconds of a step, learning and forward in turns; memory of a run, predicted and measured."""
    steps, target = len(given[0]), jax.ShapeDtypeStruct(wanted.shape, wanted.dtype)
    cost = step.cost(steps=steps, loss_fn=loss, targets=(target,))
    run_bytes = memory.held() + memory.growth(lambda: run(*given))  # before there are arrays of others
    forward, theta, start = network.run(), step.params["theta"], network.start()
    contenders = {"learning": lambda: run(*given), "forward": lambda: forward(theta, start, given[0])}
    jax.block_until_ready(contenders["forward"]())
    found = {name: [] for name in contenders}
    for _ in range(3):
        for name, contender in contenders.items():
            began = time.perf_counter()
            jax.block_until_ready(contender())
            found[name].append(1000 * (time.perf_counter() - began) / steps)
    return {
        "milliseconds": {name: min(times) for name, times in found.items()},
        "predicted_bytes": cost.peak_bytes,
        "run_bytes": run_bytes,
    }
