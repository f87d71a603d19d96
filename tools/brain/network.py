"""Leaky integrate-and-fire neurons with exponential synapses and a delay, all synapses of which learn.

    g_t = a g_{t-1} + sum_s w_s z_{t-delay}[sender_s]      w_s = sign[sender_s] softplus(theta_s)
    v_t = b v_{t-1} + (1 - b) (g_t + drive_t)              0 after a spike, and while the neuron rests
    z_t = 1 where v_t > 1

The sign of a sender is kept whatever is learned, since softplus is positive. What is fitted is the rate of each region, which is
the mean of its spikes in hertz, low-pass filtered.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from connectome import Connectome

import etcompile

__all__ = ["Network", "Times"]

Array = Any
State = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds: of a step, and of a neuron as models of the fly brain have it."""

    step: float = 0.2
    delay: float = 1.8
    membrane: float = 20.0
    synapse: float = 5.0
    rest: float = 2.2
    rate: float = 20.0

    def steps(self, name: str) -> int:
        return max(1, round(getattr(self, name) / self.step))

    def decay(self, name: str) -> np.float32:
        """What is left after a step."""
        return np.float32(np.exp(-self.step / getattr(self, name)))


@jax.custom_jvp
def spike(v: Array) -> Array:
    return (v > 0).astype(v.dtype)


@spike.defjvp
def _spike_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (v,), (dv,) = primals, tangents
    return spike(v), dv / jnp.square(1 + 5 * jnp.abs(v))


class Network:
    """A connectome as a model that etcompile compiles, and as a forward pass alone.

    ``gain`` is what a synapse adds to a receiver's current, in units of the threshold.
    """

    def __init__(self, connectome: Connectome, times: Times, gain: float) -> None:
        self.connectome, self.times = connectome, times
        theta = gain * connectome.synapses
        self.theta = np.log(np.expm1(theta)).astype(np.float32)
        counts = np.bincount(connectome.region, minlength=connectome.regions)
        self._hertz = (1000.0 / times.step / counts).astype(np.float32)

    def model(self) -> etcompile.FunctionModel:
        sign = self.connectome.signs[self.connectome.senders]
        indices = self.connectome.senders, self.connectome.receivers

        def brain(params: State, state: State, drive: Array) -> tuple[State, Array]:
            return self.step(sign * jax.nn.softplus(params["theta"]), indices, state, drive)

        return etcompile.from_function(brain, {"theta": jnp.asarray(self.theta)}, self.start())

    def start(self) -> State:
        n = self.connectome.neurons
        return {
            "g": jnp.zeros(n),
            "v": jnp.linspace(0.0, 0.9, n)[np.random.default_rng(0).permutation(n)],
            "rests": jnp.zeros(n, jnp.int32),
            "sent": jnp.zeros((self.times.steps("delay"), n), bool),
            "rate": jnp.zeros(self.connectome.regions),
        }

    def step(self, w: Array, indices: tuple[Array, Array], state: State, drive: Array) -> tuple[State, Array]:
        """One step, given the weights themselves; the output is the rate of each region in hertz."""
        senders, receivers = indices
        times, c = self.times, self.connectome
        sent = state["sent"][0].astype(drive.dtype)
        arrived = jax.ops.segment_sum(w * sent[senders], receivers, c.neurons, indices_are_sorted=True)
        g = times.decay("synapse") * state["g"] + arrived
        b, awake = times.decay("membrane"), state["rests"] == 0
        v = jnp.where(awake, b * state["v"] + (1 - b) * (g + drive), 0.0)
        z = spike(v - 1.0)
        fired = z > 0
        rests = jnp.where(fired, times.steps("rest"), jnp.maximum(state["rests"] - 1, 0))
        now = self._hertz * jax.ops.segment_sum(z, c.region, c.regions, indices_are_sorted=True)
        k = times.decay("rate")
        rate = k * state["rate"] + (1 - k) * now
        new = {
            "g": g,
            "v": jnp.where(fired, 0.0, v),
            "rests": rests,
            "sent": jnp.concatenate([state["sent"][1:], fired[None]]),
            "rate": rate,
        }
        return new, rate

    def run(self) -> Any:
        """A jitted forward pass ``(theta, state, drives) -> (state, rates)``, the weights made once."""
        c = self.connectome
        fixed = tuple(map(jnp.asarray, (c.signs, c.senders, c.receivers)))

        @jax.jit
        def forward(theta: Array, fixed: Any, state: State, drives: Array) -> tuple[State, Array]:
            signs, senders, receivers = fixed
            w = signs[senders] * jax.nn.softplus(theta)
            return jax.lax.scan(lambda s, x: self.step(w, (senders, receivers), s, x), state, drives)

        return lambda theta, state, drives: forward(theta, fixed, state, drives)

    def drives(
        self, steps: int, seed: int, mean: float = 0.9, spread: float = 0.6, noise: float = 1.5
    ) -> Array:
        """Currents from outside: one of its own for each neuron, and noise."""
        n = self.connectome.neurons
        own = mean + spread * np.random.default_rng(0).standard_normal(n, np.float32)
        return jnp.asarray(own + noise * np.random.default_rng(seed).standard_normal((steps, n), np.float32))
