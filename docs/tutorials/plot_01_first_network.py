"""
A first network
===============

A stock GRU, compiled for online learning: what the compiler found, how each gradient is made, and that it is right.
"""

# %%
# A model is an ordinary ``brainstate`` module. Nothing in it knows about online learning.

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

import etcompile


class Net(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = brainstate.nn.GRUCell(3, 8)
        self.readout = brainstate.nn.Linear(8, 2)

    def update(self, x):
        return self.readout(self.cell(x))


# %%
# ``compile`` takes the model and an example of its input at one step. D-RTRL is the default rule.

net = Net()
step = etcompile.compile(net, jnp.zeros((4, 3)), algo="d_rtrl", batch_size=4)
print(step.report())

# %%
# The report says of every parameter how its gradient is made. Two paths of credit end at a *cut*: the recurrent
# weights of a GRU spread a value over all units, and a rule of the D-RTRL kind follows each unit alone. The
# graph shows the same:

picture = etcompile.viz.draw(step)

# %%
# What will run can be read as a program. A name with ``[t]`` is a value of this step, with ``[t-1]`` of the last one.

print(step.program)

# %%
# One online step gives outputs, a loss and gradients. Nothing of the past is kept but the traces.

rng = np.random.default_rng(0)
xs = jnp.asarray(rng.normal(size=(20, 4, 3)), "float32")
ys = jnp.asarray(rng.normal(size=(20, 4, 2)), "float32")


def loss(out, y):
    return jnp.mean((out - y) ** 2)


value, grads = step.value_and_grad(loss)(xs[0], ys[0])
print(value, {path: jax.tree.map(jnp.shape, g) for path, g in grads.items()})

# %%
# A whole sequence runs in chunks, with the same numbers in less time. ``reset`` starts a new sequence.

step.reset()
losses, grads = step.scan_value_and_grad(loss)(xs, ys)
print("mean loss", losses.mean())

# %%
# Is it right? The rule ``rtrl`` follows every path and is exact: it must give what backpropagation through
# time gives. The gradient of D-RTRL differs from that by what was cut.


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


weights = step.params
exact = etcompile.compile(Net(), jnp.zeros((4, 3)), algo="rtrl", batch_size=4)
exact.params = weights
_, wanted = exact.scan_value_and_grad(loss)(xs, ys)
bptt = etcompile.compile(Net(), jnp.zeros((4, 3)), algo="bptt", batch_size=4)
bptt.params = weights
_, backwards = bptt.scan_value_and_grad(loss)(xs, ys)


def cosine(a, b):
    return float(flat(a) @ flat(b) / np.linalg.norm(flat(a)) / np.linalg.norm(flat(b)))


print("rtrl and backpropagation:", cosine(wanted, backwards))
print("d_rtrl and backpropagation:", cosine(grads, backwards))
assert cosine(wanted, backwards) > 0.99999
