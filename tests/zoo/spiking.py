"""Spiking models by hand: LIF, ALIF and GIF-like cells with delta, exponential and conductance-based synapses."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp

from .base import case, cat, from_module, linear
from .written import weights, written


@jax.custom_jvp
def spike(v):
    """1 where v is above zero; its surrogate derivative is positive everywhere."""
    return (v > 0).astype(v.dtype)


@spike.defjvp
def _spike_jvp(primals, tangents):
    (v,), (dv,) = primals, tangents
    return spike(v), dv / (1.0 + jnp.abs(2.0 * v)) ** 2


SYNAPSES = {"U": (3, 5), "W": (5, 5), "V": (5, 2)}


def synaptic(p, x, z, cut, gain=1.5):
    return gain * (x @ p["U"]) + cut(z) @ p["W"]


def spiking(body, params, states, **kwargs):
    return written(body, weights(**params), states, spikes=("z",), **kwargs)


@case("spiking")
def lif_delta(batch, dtype):
    def body(p, s, x, *, cut, put):
        v = put("v", 0.8 * s["v"] * (1 - s["z"]) + synaptic(p, x, s["z"], cut))
        z = put("z", spike(v - 1.0))
        return {"v": v, "z": z}, z @ p["V"]

    return spiking(body, SYNAPSES, {"v": (5,), "z": (5,)}, exact=False, batch=batch, dtype=dtype)


@case("spiking")
def lif_feedforward(batch, dtype):
    """No recurrent weight: the reset is elementwise, so nothing is cut."""

    def body(p, s, x, *, cut, put):
        v = put("v", 0.8 * s["v"] - s["z"] + 1.5 * (x @ p["U"]))
        z = put("z", spike(v - 1.0))
        return {"v": v, "z": z}, z @ p["V"]

    params = {"U": (3, 5), "V": (5, 2)}
    return spiking(body, params, {"v": (5,), "z": (5,)}, exact=True, batch=batch, dtype=dtype)


@case("spiking")
def lif_exponential(batch, dtype):
    def body(p, s, x, *, cut, put):
        i = put("i", 0.7 * s["i"] + synaptic(p, x, s["z"], cut))
        v = put("v", 0.8 * s["v"] * (1 - s["z"]) + 0.4 * i)
        z = put("z", spike(v - 0.6))
        return {"i": i, "v": v, "z": z}, z @ p["V"]

    return spiking(body, SYNAPSES, dict.fromkeys("ivz", (5,)), exact=False, batch=batch, dtype=dtype)


@case("spiking")
def lif_conductance(batch, dtype):
    """Excitatory and inhibitory conductances, positive weights, reversal potentials."""

    def body(p, s, x, *, cut, put):
        source = cat(jax.nn.relu(x), cut(s["z"]))
        ge = put("ge", 0.6 * s["ge"] + source @ jnp.abs(p["We"]))
        gi = put("gi", 0.8 * s["gi"] + source @ jnp.abs(p["Wi"]))
        v = s["v"] * (1 - s["z"])
        v = put("v", v + 0.2 * (-v + 1.2 * ge * (3.0 - v) + 0.5 * gi * (-1.0 - v)))
        z = put("z", spike(v - 1.0))
        return {"ge": ge, "gi": gi, "v": v, "z": z}, z @ p["V"]

    params = {"We": (8, 5), "Wi": (8, 5), "V": (5, 2)}
    return spiking(
        body, params, dict.fromkeys(("ge", "gi", "v", "z"), (5,)), exact=False, batch=batch, dtype=dtype
    )


@case("spiking")
def lif_spike_not_kept(batch, dtype):
    """The spike is computed anew from the old potential: one group of current and potential, no spike state."""

    def body(p, s, x, *, cut, put):
        z = spike(s["v"] - 0.6)
        i = put("i", 0.7 * s["i"] + cat(x, cut(z)) @ p["W"])
        v = put("v", 0.8 * (s["v"] - 0.6 * z) + 0.6 * i)
        return {"i": i, "v": v}, spike(v - 0.6) @ p["V"]

    params = weights(W=(8, 5), V=(5, 2))
    return written(body, params, {"i": (5,), "v": (5,)}, exact=False, batch=batch, dtype=dtype)


@case("spiking")
def lif_hard_reset(batch, dtype):
    """Refractory counter, `where`, and a detached reset."""

    def body(p, s, x, *, cut, put):
        resting = s["rest"] > 0
        v = s["v"] - jax.lax.stop_gradient(s["v"]) * s["z"]
        v = put("v", jnp.where(resting, v, 0.8 * v + synaptic(p, x, s["z"], cut)))
        z = put("z", spike(v - 1.0))
        rest = jnp.where(jax.lax.stop_gradient(z) > 0, 1, jnp.maximum(s["rest"] - 1, 0))
        return {"v": v, "z": z, "rest": rest}, z @ p["V"]

    states = {"v": (5,), "z": (5,), "rest": lambda b: jnp.zeros((5,) if b is None else (b, 5), int)}
    return spiking(
        body,
        SYNAPSES,
        states,
        groups=(("v", "z"),),
        exact=False,
        batch=batch,
        dtype=dtype,
        kind=brainstate.ShortTermState,
    )


def alif(synapse):
    def build(batch, dtype):
        def body(p, s, x, *, cut, put):
            new, drive = {}, synaptic(p, x, s["z"], cut)
            if synapse == "exponential":
                drive = new["i"] = put("i", 0.7 * s["i"] + 0.5 * drive)
            a = put("a", 0.9 * s["a"] + 0.3 * s["z"])
            v = put("v", 0.8 * s["v"] - s["z"] + drive)
            z = put("z", spike(v - 0.7 - p["beta"] * a))
            return {**new, "a": a, "v": v, "z": z}, z @ p["V"]

        states = dict.fromkeys("i" * (synapse == "exponential") + "avz", (5,))
        return spiking(body, {**SYNAPSES, "beta": (5,)}, states, exact=False, batch=batch, dtype=dtype)

    return build


case("spiking", name="alif_delta")(alif("delta"))
case("spiking", name="alif_exponential")(alif("exponential"))


@case("spiking")
def gif(batch, dtype):
    """Two internal currents and an adaptive threshold, all moved by the spike; learned time constants."""

    def body(p, s, x, *, cut, put):
        z = s["z"]
        syn = put("syn", 0.6 * s["syn"] + synaptic(p, x, z, cut))
        i1 = put("i1", jax.nn.sigmoid(p["k1"]) * s["i1"] * (1 - z) - 0.4 * z)
        i2 = put("i2", jax.nn.sigmoid(p["k2"]) * s["i2"] + 0.2 * z)
        th = put("th", 0.8 * s["th"] + 0.1 * s["v"] + 0.2 * z)
        v = put("v", 0.7 * s["v"] * (1 - z) + i1 + i2 + 0.5 * syn)
        z = put("z", spike(v - th - 0.5))
        return {"syn": syn, "i1": i1, "i2": i2, "th": th, "v": v, "z": z}, z @ p["V"]

    params = {**SYNAPSES, "k1": (5,), "k2": (5,)}
    states = dict.fromkeys(("syn", "i1", "i2", "th", "v", "z"), (5,))
    return spiking(body, params, states, exact=False, batch=batch, dtype=dtype)


@case("spiking")
def learned_time_constants(batch, dtype):
    """Every decay is a parameter, and nothing is recurrent but the unit on itself."""

    def body(p, s, x, *, cut, put):
        di, dv = jax.nn.sigmoid(p["tau_i"]), jax.nn.sigmoid(p["tau_v"] + 1.0)
        i = put("i", di * s["i"] + 1.5 * (x @ p["U"]) + p["self"] * s["z"])
        v = put("v", dv * s["v"] * (1 - s["z"]) + (1 - dv) * 2 * i)
        z = put("z", spike(v - 0.8))
        return {"i": i, "v": v, "z": z}, z @ p["V"]

    params = {"U": (3, 5), "tau_i": (5,), "tau_v": (5,), "self": (5,), "V": (5, 2)}
    return spiking(body, params, dict.fromkeys("ivz", (5,)), exact=True, batch=batch, dtype=dtype)


@case("spiking")
def two_spiking_layers_and_a_leaky_readout(batch, dtype):
    def body(p, s, x, *, cut, put):
        i1 = put("i1", 0.7 * s["i1"] + 1.2 * (x @ p["U"]) + cut(s["z1"]) @ p["W1"])
        v1 = put("v1", 0.8 * s["v1"] * (1 - s["z1"]) + 0.5 * i1)
        z1 = put("z1", spike(v1 - 0.6))
        i2 = put("i2", 0.7 * s["i2"] + cut(cat(z1, s["z2"])) @ p["W2"])
        v2 = put("v2", 0.8 * s["v2"] * (1 - s["z2"]) + 0.7 * i2)
        z2 = put("z2", spike(v2 - 0.4))
        r = put("r", 0.9 * s["r"] + cut(z2) @ p["V"])
        return {"i1": i1, "v1": v1, "z1": z1, "i2": i2, "v2": v2, "z2": z2, "r": r}, r

    return written(
        body,
        weights(U=(3, 5), W1=(5, 5), W2=(9, 4), V=(4, 2)),
        {**dict.fromkeys(("i1", "v1", "z1"), (5,)), **dict.fromkeys(("i2", "v2", "z2"), (4,)), "r": (2,)},
        groups=(("i1", "v1", "z1"), ("i2", "v2", "z2"), ("r",)),
        exact=False,
        batch=batch,
        dtype=dtype,
        spikes=("z1", "z2"),
    )


class Exponential(brainstate.nn.Module):
    """An exponential synapse that keeps its current, the way a user of brainstate writes it."""

    def __init__(self, size, decay):
        super().__init__()
        self.size, self.decay = size, decay

    def init_state(self, batch_size=None, **kwargs):
        shape = (self.size,) if batch_size is None else (batch_size, self.size)
        self.g = brainstate.HiddenState(jnp.zeros(shape))

    def update(self, x):
        self.g.value = self.decay * self.g.value + x
        return self.g.value


class LIF(brainstate.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def init_state(self, batch_size=None, **kwargs):
        shape = (self.size,) if batch_size is None else (batch_size, self.size)
        self.V = brainstate.HiddenState(jnp.zeros(shape))
        self.spike = brainstate.ShortTermState(jnp.zeros(shape))

    def update(self, current):
        v = self.V.value - jax.lax.stop_gradient(self.V.value) * self.spike.value
        self.V.value = v + 0.25 * (-v + current)
        self.spike.value = spike(self.V.value - 0.5)
        return self.spike.value


class SpikingNet(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = brainstate.nn.Linear(3, 5)
        self.recur = brainstate.nn.Linear(5, 5, b_init=None)
        self.synapse = Exponential(5, 0.7)
        self.neuron = LIF(5)
        self.readout = brainstate.nn.Linear(5, 2)

    def update(self, x):
        drive = 1.5 * self.encode(x) + self.recur(self.neuron.spike.value)
        return self.readout(self.neuron(self.synapse(drive)))


@case("spiking")
def spiking_net_of_modules(batch, dtype):
    def step(params, state, x, *, cut, put):
        z = state["neuron.spike"]
        drive = 1.5 * linear(params["encode.weight"], x) + linear(params["recur.weight"], cut(z))
        g = put("synapse.g", 0.7 * state["synapse.g"] + drive)
        v = state["neuron.V"] - jax.lax.stop_gradient(state["neuron.V"]) * z
        v = put("neuron.V", v + 0.25 * (-v + g))
        z = put("neuron.spike", spike(v - 0.5))
        new = {"synapse.g": g, "neuron.V": v, "neuron.spike": z}
        return {**state, **new}, linear(params["readout.weight"], z)

    return from_module(
        SpikingNet(),
        step,
        groups=(("synapse.g", "neuron.V", "neuron.spike"),),
        exact=False,
        batch=batch,
        dtype=dtype,
        spikes=("neuron.spike",),
    )
