"""
Learning on an endless stream
=============================

No epochs, no end: a signal arrives one value at a time, the network predicts the next one, and its weights
change at every step. Memory does not grow.
"""

import brainstate
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import etcompile

# %%
# The stream: a sum of two sines whose frequencies jump after 3,000 steps. A network that stopped learning would
# be lost from there on.


def stream(steps, seed=0):
    rng = np.random.default_rng(seed)
    speed = np.where(np.arange(steps) < steps // 2, 0.11, 0.23)
    phase = np.cumsum(speed)
    clean = 0.6 * np.sin(phase) + 0.4 * np.sin(2.7 * phase)
    return (clean + 0.02 * rng.normal(size=steps)).astype("float32")[:, None]


class Predictor(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = brainstate.nn.GRUCell(1, 32)
        self.readout = brainstate.nn.Linear(32, 1)

    def update(self, x):
        return self.readout(self.cell(x))


# %%
# There is one example and no batch axis. ``learn`` gives the losses of all steps, each taken before the weights changed.

brainstate.random.seed(0)
net = Predictor()
brainstate.nn.init_all_states(net)  # states without a batch axis
step = etcompile.compile(net, jnp.zeros(1), algo="d_rtrl")
learn = step.learn(lambda out, y: jnp.mean((out - y) ** 2), optax.adam(3e-3))
signal = stream(6001)
traces = sum(leaf.nbytes for leaf in jax.tree.leaves(step.traces))

# %%
# The stream may come in pieces of any length: states, traces and the optimiser go on where the last call stopped.

losses = np.concatenate([learn(signal[k : k + 500], signal[k + 1 : k + 501]) for k in range(0, 6000, 500)])
assert sum(leaf.nbytes for leaf in jax.tree.leaves(step.traces)) == traces
print(f"traces take {traces} bytes, at the first step and at the six-thousandth")
before, after, end = losses[2500:3000].mean(), losses[3000:3100].mean(), losses[5500:].mean()
print(f"mean loss before the jump {before:.4f}, after it {after:.4f}, at the end {end:.4f}")
assert end < after

# %%

figure, axis = plt.subplots(figsize=(6, 3))
axis.semilogy(np.convolve(losses, np.ones(100) / 100, mode="valid"))
axis.axvline(3000, color="0.6", linestyle=":")
axis.set(xlabel="step", ylabel="loss, mean of 100 steps")
figure.tight_layout()

# %%
# To act between steps, as on a robot, give one step at a time: ``learn(x[None], y[None])``. On a long stream,
# ``checkpoints=`` saves all that the run needs to go on after a crash, and ``callback=etcompile.Dashboard()`` draws the run in
# the terminal; ``etcompile.TensorBoard`` writes it down.
