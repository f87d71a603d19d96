"""
Flax and Equinox models
=======================

Modules of other frameworks keep their names, their pytrees and their optimisers.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import etcompile

rng = np.random.default_rng(0)
xs = jnp.asarray(rng.normal(size=(30, 4, 3)), "float32")
ys = jnp.cumsum(xs, axis=0)[..., :1]


def square(out, y):
    return jnp.mean((out - y) ** 2)


# %%
# Equinox
# -------
#
# For a module of your own say how a step is taken. Gradients are a module of arrays.


class Net(eqx.Module):
    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear

    def __init__(self, key):
        k1, k2 = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(3, 16, key=k1)
        self.readout = eqx.nn.Linear(16, 1, key=k2)

    def __call__(self, h, x):
        h = self.cell(x, h)
        return h, self.readout(h)


net = Net(jax.random.key(0))
model = etcompile.from_equinox(net, jnp.zeros((4, 16)), lambda net, h, x: jax.vmap(net)(h, x))
step = etcompile.compile(model, xs[0])
optimiser = optax.adam(1e-2)
memory = optimiser.init(step.params)
curve = []
for _ in range(40):
    step.reset()
    losses, grads = step.scan_value_and_grad(square, reduction="mean")(xs, ys)
    updates, memory = optimiser.update(grads, memory, step.params)
    step.params = eqx.apply_updates(step.params, updates)
    curve.append(float(losses.mean()))
trained = eqx.combine(step.params, net)
print(type(trained).__name__, f"loss {curve[0]:.3f} -> {curve[-1]:.3f}")
assert curve[-1] < curve[0]

# %%
# Flax NNX
# --------
#
# A stock recurrent layer is taken as it is; gradients are an ``nnx.State``.

cell = nnx.GRUCell(3, 16, rngs=nnx.Rngs(0))
step = etcompile.compile(cell, xs[0])
losses, grads = step.scan_value_and_grad(lambda out, y: jnp.mean((out[:, :1] - y) ** 2))(xs, ys)
print(type(grads).__name__)
print(step.report())
