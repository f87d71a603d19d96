"""The models, as a user would write them, and sequences for them.

Each takes its layers from ``layers``: ``brainstate.nn`` for ordinary ones, or ``braintrace.nn`` for the same ones with
braintrace's own operations inside. Nothing else differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["INPUTS", "MODELS", "OUTPUTS", "Data", "Spec", "loss_fn", "spike_rate"]

INPUTS, OUTPUTS = 64, 10
#: Images of the convolutional model: height, width, channels.
IMAGE = (8, 8, 2)
#: Synapses of a neuron with few, layers of the deep network, and sub-steps of a step.
SYNAPSES, LAYERS, SUBSTEPS = 100, 40, 1000
#: Populations, and those that each of them hears: 300 projections.
POPULATIONS, HEARD = 50, 6
#: Heads of linear attention, states of a channel of the selective state space, and the longest delay of a neuron.
HEADS, STATES, SLOTS = 4, 16, 20
#: Steps from spike to spike of sparse networks of which 2 % and 5 % of the neurons spike at a step.
SELDOM, OFTEN = 50, 20


class GRUNet(brainstate.nn.Module):
    """A gated recurrent unit and a linear readout."""

    def __init__(self, layers: ModuleType, units: int):
        super().__init__()
        self.cell = layers.GRUCell(INPUTS, units)
        self.readout = layers.Linear(units, OUTPUTS)

    def update(self, x: jax.Array) -> jax.Array:
        return self.readout(self.cell(x))


class LSTMNet(brainstate.nn.Module):
    """A long short-term memory and a linear readout."""

    def __init__(self, layers: ModuleType, units: int):
        super().__init__()
        self.cell = layers.LSTMCell(INPUTS, units)
        self.readout = layers.Linear(units, OUTPUTS)

    def update(self, x: jax.Array) -> jax.Array:
        return self.readout(self.cell(x))


@jax.custom_jvp
def spike(v: jax.Array) -> jax.Array:
    """1 where v is above 0; its derivative is that of a fast sigmoid."""
    return (v > 0).astype(v.dtype)


@spike.defjvp
def _spike_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (v,), (dv,) = primals, tangents
    return spike(v), dv / (1.0 + jnp.abs(2.0 * v)) ** 2


class SpikingNet(brainstate.nn.Module):
    """Recurrent neurons with exponential synapses and adaptive thresholds.

    With current i, potential v, adaptation a, spikes z and inputs x::

        z[t] = v[t] > 1 + 0.3 a[t]
        i[t] = 0.8 i[t-1] + W (x[t], z[t-1]) + b
        v[t] = 0.9 v[t-1] + 0.2 i[t] - z[t-1]
        a[t] = 0.97 a[t-1] + z[t-1]
        out  = W_out z[t] + c
    """

    def __init__(self, layers: ModuleType, units: int):
        super().__init__()
        self.units = units
        scale = brainstate.nn.init.Normal(scale=1.5 / (INPUTS + units) ** 0.5)
        self.synapses = layers.Linear(INPUTS + units, units, w_init=scale)
        self.readout = layers.Linear(units, OUTPUTS)

    def init_state(self, batch_size: int | None = None) -> None:
        zeros = jnp.zeros((self.units,) if batch_size is None else (batch_size, self.units))
        self.i, self.v, self.a = (brainstate.HiddenState(zeros) for _ in range(3))

    def spikes(self) -> jax.Array:
        """Spikes of the moment, 0 or 1."""
        return spike(self.v.value - 1.0 - 0.3 * self.a.value)

    def update(self, x: jax.Array) -> jax.Array:
        z = self.spikes()
        self.i.value = 0.8 * self.i.value + self.synapses(jnp.concatenate([x, z], axis=-1))
        self.v.value = 0.9 * self.v.value + 0.2 * self.i.value - z
        self.a.value = 0.97 * self.a.value + z
        return self.readout(self.spikes())


class ConvNet(brainstate.nn.Module):
    """A convolutional gated unit over images, and a readout of each channel's mean.

    With images x and channels h, * a convolution by 3 x 3 kernels::

        u    = sigmoid(K_u * (x[t], h[t-1]))
        h[t] = (1 - u) h[t-1] + u tanh(K_c * (x[t], h[t-1]))
        out  = W_out mean(h[t]) + c
    """

    def __init__(self, layers: ModuleType, units: int):
        super().__init__()
        height, width, channels = IMAGE
        self.shape = (height, width, units)
        size = (height, width, channels + units)
        self.gate = layers.Conv2d(size, units, 3)
        self.candidate = layers.Conv2d(size, units, 3)
        self.readout = layers.Linear(units, OUTPUTS)

    def init_state(self, batch_size: int | None = None) -> None:
        self.h = brainstate.HiddenState(
            jnp.zeros(self.shape if batch_size is None else (batch_size, *self.shape))
        )

    def update(self, x: jax.Array) -> jax.Array:
        h: Any = self.h.value
        both = jnp.concatenate([x, h], axis=-1)
        u = jax.nn.sigmoid(self.gate(both))
        h = (1 - u) * h + u * jnp.tanh(self.candidate(both))
        self.h.value = h
        return self.readout(jnp.mean(h, axis=(-3, -2)))


class SparseNet(brainstate.nn.Module):
    """Leaky neurons with exponential synapses, some hundred each, given by the indices of their neurons.

    With current i, potential v, spikes z, inputs x that every neuron gets one of, and synapses s from neuron a[s] to b[s]::

        i[t] = 0.8 i[t-1] + sum over s with b[s] = n of w[s] z[t-1][a[s]] + x[t]
        v[t] = 0.9 v[t-1] + 0.2 i[t] - z[t-1]
        out  = W_out z[t] + c
    """

    def __init__(self, layers: ModuleType, units: int):
        super().__init__()
        self.units = units
        random = np.random.default_rng(0)
        self.before = jnp.asarray(random.integers(0, units, units * SYNAPSES))
        self.after = jnp.repeat(jnp.arange(units), SYNAPSES)
        weights = random.normal(0.0, 1.5 / SYNAPSES**0.5, units * SYNAPSES)
        self.weight = brainstate.ParamState(jnp.asarray(weights))
        #: Potentials at the start, some of them above the threshold: neurons spike from the first step.
        self.potential = jnp.asarray(random.uniform(0.0, 1.2, units))
        self.readout = layers.Linear(units, OUTPUTS)

    def init_state(self, batch_size: int | None = None) -> None:
        shape = (self.units,) if batch_size is None else (batch_size, self.units)
        self.i = brainstate.HiddenState(jnp.zeros(shape, self.potential.dtype))
        self.v = brainstate.HiddenState(jnp.broadcast_to(self.potential, shape))

    def spikes(self) -> jax.Array:
        """Spikes of the moment, 0 or 1."""
        return spike(self.v.value - 1.0)

    def arriving(self, z: jax.Array) -> jax.Array:
        """What all synapses of each neuron bring of spikes z."""
        each = self.weight.value * z[..., self.before]
        sums: Any = jax.ops.segment_sum(each.T, self.after, self.units, indices_are_sorted=True)
        return sums.T

    def update(self, x: jax.Array) -> jax.Array:
        z = self.spikes()
        self.i.value = 0.8 * self.i.value + self.arriving(z) + x[..., jnp.arange(self.units) % INPUTS]
        self.v.value = 0.9 * self.v.value + 0.2 * self.i.value - z
        return self.readout(self.spikes())


class DrivenNet(SparseNet):
    """The same, each neuron driven by a constant current c, so that it spikes once in so many steps, all at different times.

    With potential v, current i and spikes z::

        v[t] = 0.99 v[t-1] + 0.2 i[t] + c - z[t-1]

    Synapses and inputs are too weak to change how many spike.
    """

    def __init__(self, layers: ModuleType, units: int, period: int):
        super().__init__(layers, units)
        self.weight.value = self.weight.value * (0.02 * SYNAPSES**0.5 / 1.5)
        highest = 1 / (1 - 0.99**period)
        phases = np.random.default_rng(1).integers(0, period, units)
        self.current = 0.01 * highest
        self.potential = jnp.asarray(highest * (1 - 0.99**phases))

    def update(self, x: jax.Array) -> jax.Array:
        z = self.spikes()
        self.i.value = 0.8 * self.i.value + self.arriving(z) + 0.005 * x[..., jnp.arange(self.units) % INPUTS]
        self.v.value = 0.99 * self.v.value + 0.2 * self.i.value + self.current - z
        return self.readout(self.spikes())


class DeepNet(brainstate.nn.Module):
    """Forty recurrent layers one above the other, and a readout."""

    def __init__(self, layers: ModuleType, units: int):
        super().__init__()
        sizes = [INPUTS] + [units] * LAYERS
        self.cells = [layers.ValinaRNNCell(a, b) for a, b in pairwise(sizes)]
        self.readout = layers.Linear(units, OUTPUTS)

    def update(self, x: jax.Array) -> jax.Array:
        for cell in self.cells:
            x = cell(x)
        return self.readout(x)


class PopulationsNet(brainstate.nn.Module):
    """Fifty populations of leaky neurons, each of which hears six others with a delay of one step, and a readout.

    With potentials v[p], and populations q from which p hears::

        v[p][t] = 0.9 v[p][t-1] + 0.1 (sum over q of W[p, q] tanh(v[q][t-1]) + x[t] W_in, for the first)
        out     = W_out v[0][t] + c
    """

    def __init__(self, layers: ModuleType, units: int):
        super().__init__()
        self.units = units
        self.enter, self.readout = layers.Linear(INPUTS, units), layers.Linear(units, OUTPUTS)
        random = np.random.default_rng(0)
        self.heard = [random.choice(POPULATIONS, HEARD, replace=False).tolist() for _ in range(POPULATIONS)]
        self.projections = [[layers.Linear(units, units) for _ in range(HEARD)] for _ in self.heard]

    def init_state(self, batch_size: int | None = None) -> None:
        zeros = jnp.zeros((self.units,) if batch_size is None else (batch_size, self.units))
        self.v = [brainstate.HiddenState(zeros) for _ in range(POPULATIONS)]

    def update(self, x: jax.Array) -> jax.Array:
        potentials: Any = [v.value for v in self.v]
        sent: Any = [jnp.tanh(v) for v in potentials]
        drive: Any = self.enter(x)
        for p, v in enumerate(self.v):
            arrived = sum(w(sent[q]) for w, q in zip(self.projections[p], self.heard[p], strict=True))
            v.value = 0.9 * potentials[p] + 0.1 * (arrived + drive if p == 0 else arrived)
        return self.readout(self.v[0].value)


class SubstepNet(brainstate.nn.Module):
    """Neurons whose potential is integrated in a thousand sub-steps, one after the other in a loop.

    With the drive u = W x + b, k times within each step, and dt = 1 / k::

        v < -v + dt(u - tanh(v))
    """

    def __init__(self, layers: ModuleType, units: int):
        super().__init__()
        self.units = units
        self.inputs = layers.Linear(INPUTS, units)
        self.readout = layers.Linear(units, OUTPUTS)

    def init_state(self, batch_size: int | None = None) -> None:
        self.v = brainstate.HiddenState(
            jnp.zeros((self.units,) if batch_size is None else (batch_size, self.units))
        )

    def update(self, x: jax.Array) -> jax.Array:
        drive: Any = self.inputs(x)

        def one(v: jax.Array, _: None) -> tuple[jax.Array, None]:
            return v + (drive - jnp.tanh(v)) / SUBSTEPS, None

        v: Any = self.v.value
        v, _ = jax.lax.scan(one, v, None, length=SUBSTEPS)
        self.v.value = v
        return self.readout(v)


class AttentionNet(brainstate.nn.Module):
    """Gated linear attention of several heads, each with a matrix of its own for a state, and a readout.

    In each head, with x its queries q, keys k, values v and gates a = sigmoid(W_a x + b)::

        S[t] = diag(a[t]) S[t-1] + k[t] v[t]^T
        out  = W_out (S[t]^T q[t]) + c
    """

    def __init__(self, layers: ModuleType, units: int):
        super().__init__()
        self.units = units
        self.queries, self.keys, self.values, self.gates = (
            layers.Linear(INPUTS, HEADS * units) for _ in range(4)
        )
        self.readout = layers.Linear(HEADS * units, OUTPUTS)

    def init_state(self, batch_size: int | None = None) -> None:
        shape = (HEADS, self.units, self.units)
        self.S = brainstate.HiddenState(jnp.zeros(shape if batch_size is None else (batch_size, *shape)))

    def update(self, x: jax.Array) -> jax.Array:
        def heads(layer: Any) -> jax.Array:
            y = layer(x)
            return y.reshape(*y.shape[:-1], HEADS, self.units)

        q, k, v = heads(self.queries), heads(self.keys), heads(self.values)
        S: Any = jax.nn.sigmoid(heads(self.gates))[..., None] * self.S.value + k[..., None] * v[..., None, :]
        self.S.value = S
        read = jnp.einsum("...k,...kv->...v", q, S)
        return self.readout(read.reshape(*x.shape[:-1], -1))


class StateSpaceNet(brainstate.nn.Module):
    """The recurrence of Mamba: channels with several states each, whose step sizes, inputs and outputs depend on the input.

    With inputs x, u = W_u x, step d = softplus(W_d x + b), B = W_B x and C = W_C x, for channel c and state n::

        h[t][c, n] = exp(-d[c] exp(A[c, n])) h[t-1][c, n] + d[c] u[c] B[n]
        out        = W_out (sum over n of h[t][c, n] C[n] + D[c] u[c]) + c_out
    """

    def __init__(self, layers: ModuleType, units: int):
        super().__init__()
        self.units = units
        self.drive, self.step = layers.Linear(INPUTS, units), layers.Linear(INPUTS, units)
        self.enter, self.leave = layers.Linear(INPUTS, STATES), layers.Linear(INPUTS, STATES)
        rates = jnp.broadcast_to(jnp.log(jnp.arange(1.0, STATES + 1)), (units, STATES))
        self.rates, self.skip = brainstate.ParamState(rates), brainstate.ParamState(jnp.ones(units))
        self.readout = layers.Linear(units, OUTPUTS)

    def init_state(self, batch_size: int | None = None) -> None:
        shape = (self.units, STATES)
        self.h = brainstate.HiddenState(jnp.zeros(shape if batch_size is None else (batch_size, *shape)))

    def update(self, x: jax.Array) -> jax.Array:
        u, step = self.drive(x), jax.nn.softplus(self.step(x))
        kept = jnp.exp(-step[..., None] * jnp.exp(self.rates.value))
        h: Any = kept * self.h.value + (step * u)[..., None] * self.enter(x)[..., None, :]
        self.h.value = h
        read = jnp.einsum("...dn,...n->...d", h, self.leave(x))
        return self.readout(read + self.skip.value * u)


class DelayNet(brainstate.nn.Module):
    """Recurrent neurons whose spikes arrive after a delay of their own, of 1 to 20 steps, in a ring buffer.

    With potential v, spikes z, delay d[n] of neuron n and inputs x::

        v[t] = 0.9 v[t-1] + W (x[t], z[t-d]) + b - z[t-1]
        z[t] = v[t] > 1
        out  = W_out z[t-d] + c
    """

    def __init__(self, layers: ModuleType, units: int):
        super().__init__()
        self.units = units
        self.delays = jnp.asarray(np.random.default_rng(0).integers(1, SLOTS + 1, units))
        scale = brainstate.nn.init.Normal(scale=1.5 / (INPUTS + units) ** 0.5)
        self.synapses = layers.Linear(INPUTS + units, units, w_init=scale)
        self.readout = layers.Linear(units, OUTPUTS)

    def init_state(self, batch_size: int | None = None) -> None:
        lead = () if batch_size is None else (batch_size,)
        self.v = brainstate.HiddenState(jnp.zeros((*lead, self.units)))
        self.sent = brainstate.HiddenState(jnp.zeros((*lead, SLOTS, self.units)))
        self.now = brainstate.ShortTermState(jnp.zeros((), jnp.int32))

    def spikes(self) -> jax.Array:
        """Spikes of the moment, 0 or 1."""
        return spike(self.v.value - 1.0)

    def update(self, x: jax.Array) -> jax.Array:
        now: Any = self.now.value
        sent: Any = self.sent.value
        z, arriving = self.spikes(), sent[..., (now - self.delays) % SLOTS, jnp.arange(self.units)]
        self.v.value = 0.9 * self.v.value + self.synapses(jnp.concatenate([x, arriving], axis=-1)) - z
        self.sent.value = sent.at[..., now % SLOTS, :].set(self.spikes())
        self.now.value = now + 1
        return self.readout(arriving)


@dataclass(frozen=True)
class Spec:
    """How a model is made, and what its inputs are like."""

    make: Callable[[ModuleType, int], brainstate.nn.Module]
    input_shape: tuple[int, ...] = (INPUTS,)
    spikes: bool = False
    #: Whether the model is one of braintrace's layers as well.
    peer: bool = True
    #: Whether a sequence leaves its traces to the next. Those of states of many axes cost more than all else.
    keep_traces: bool = True
    #: The bound of `Schedule(events=...)`, where that is measured.
    events: float | None = None


MODELS = {
    "gru": Spec(GRUNet),
    "lstm": Spec(LSTMNet),
    "spiking": Spec(SpikingNet, spikes=True),
    "conv": Spec(ConvNet, IMAGE),
    "sparse": Spec(SparseNet, spikes=True, peer=False),
    "seldom": Spec(partial(DrivenNet, period=SELDOM), spikes=True, peer=False, events=2 / SELDOM),
    "often": Spec(partial(DrivenNet, period=OFTEN), spikes=True, peer=False, events=2 / OFTEN),
    "deep": Spec(DeepNet, peer=False),
    "populations": Spec(PopulationsNet, peer=False),
    "substeps": Spec(SubstepNet, peer=False),
    "gla": Spec(AttentionNet, peer=False, keep_traces=False),
    "mamba": Spec(StateSpaceNet, peer=False, keep_traces=False),
    "delays": Spec(DelayNet, spikes=True, peer=False, keep_traces=False),
}


@dataclass(frozen=True)
class Data:
    """A model with sizes, and sequences for it."""

    spec: Spec
    units: int
    batch: int

    def model(self, layers: ModuleType = brainstate.nn) -> brainstate.nn.Module:
        """The model, with the same weights at each call if its layers draw them alike."""
        brainstate.random.seed(0)
        return self.spec.make(layers, self.units)

    @property
    def example(self) -> jax.Array:
        return jnp.zeros((self.batch, *self.spec.input_shape))

    def sequence(self, steps: int) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets, time on axis 0; of spikes, one input in five is on."""
        of_inputs, of_targets = jax.random.split(jax.random.key(0))
        shape = (steps, self.batch, *self.spec.input_shape)
        if self.spec.spikes:
            xs = jax.random.bernoulli(of_inputs, 0.2, shape).astype(jnp.float32)
        else:
            xs = jax.random.normal(of_inputs, shape)
        return xs, jax.random.normal(of_targets, (steps, self.batch, OUTPUTS))


def spike_rate(data: Data, steps: int) -> float:
    """The share of a spiking model's neurons that spike at a step, untrained."""
    model = data.model()
    assert isinstance(model, (SpikingNet, SparseNet, DelayNet))
    brainstate.nn.init_all_states(model, batch_size=data.batch)

    def one(x: jax.Array) -> jax.Array:
        model.update(x)
        return jnp.mean(model.spikes())

    return float(jnp.mean(brainstate.transform.for_loop(one, data.sequence(steps)[0])))


def loss_fn(out: jax.Array, target: jax.Array) -> jax.Array:
    """The loss of one step."""
    return jnp.mean((out - target) ** 2)
