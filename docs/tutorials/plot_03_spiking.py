"""
A spiking network with units
============================

Neurons and synapses of ``brainpy.state``, physical units, and e-prop.
"""

import brainpy.state
import brainstate
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import saiunit as u

import etcompile

# %%
# Leaky integrate-and-fire neurons with a surrogate gradient, recurrent and input weights, a leaky readout.
# ``dt`` is in the environment.

brainstate.environ.set(dt=1.0 * u.ms)


class Spiking(brainstate.nn.Module):
    def __init__(self, inputs, neurons, outputs):
        super().__init__()
        self.neurons = brainpy.state.LIF(
            neurons,
            tau=20.0 * u.ms,
            V_rest=0.0 * u.mV,
            V_reset=0.0 * u.mV,
            V_th=1.0 * u.mV,
            V_initializer=brainstate.nn.init.Constant(0.0 * u.mV),
            R=1.0 * u.ohm,
        )
        self.into = brainstate.nn.Linear(inputs, neurons, w_init=brainstate.nn.init.KaimingNormal(scale=60.0))
        self.recurrent = brainstate.nn.Linear(
            neurons, neurons, w_init=brainstate.nn.init.KaimingNormal(scale=1.0)
        )
        self.readout = brainstate.nn.Linear(neurons, outputs)

    def update(self, x):
        spikes = self.neurons.get_spike()
        self.neurons((self.into(x) + self.recurrent(spikes)) * u.mA)
        return self.readout(self.neurons.get_spike())


brainstate.random.seed(0)
rng = np.random.default_rng(0)
net = Spiking(20, 60, 2)
step = etcompile.compile(net, jnp.zeros((8, 20)), algo="e_prop", batch_size=8, kappa=0.8)
print(step.report())

# %%
# A toy task: which of two halves of the inputs spikes more often. Forty steps, one label.


def examples(count, steps=40):
    label = rng.integers(0, 2, count)
    often = np.where((np.arange(20) < 10)[None] == (label == 0)[:, None], 0.3, 0.1)
    return (rng.random((steps, count, 20)) < often).astype("float32"), label


def loss(out, label):
    return optax.softmax_cross_entropy_with_integer_labels(out, label).mean()


learn = step.learn(loss, optax.adam(5e-3), update_every=10)
curve = []
for _ in range(60):
    xs, label = examples(8)
    step.reset()
    curve.append(float(learn(xs, etcompile.SingleStepData(label))[-10:].mean()))

step.reset(batch_size=200)
xs, label = examples(200)
votes = step.scan(xs)[-20:].mean(0)
accuracy = float((votes.argmax(-1) == label).mean())
print(f"accuracy {accuracy:.2f}")
assert accuracy > 0.7

# %%

figure, axis = plt.subplots(figsize=(6, 3))
axis.plot(curve)
axis.set(xlabel="sequence", ylabel="loss of its last ten steps")
figure.tight_layout()

# %%
# The threshold of a spike has no derivative; the neuron's surrogate stands for it, and the report says where. A
# spike without a surrogate, ``(v > 1).astype(float)``, ends credit, and the report of such a model says so as
# well.
