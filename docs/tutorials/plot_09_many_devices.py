"""
Many devices
============

A mesh says how examples and units are split; program and numbers stay the same. This page was built with four
devices that are threads of one processor: ``XLA_FLAGS=--xla_force_host_platform_device_count=4``, set before
Python starts.
"""

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

import etcompile


class Net(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = brainstate.nn.GRUCell(8, 16)
        self.readout = brainstate.nn.Linear(16, 10)

    def update(self, x):
        return self.readout(self.cell(x))


# %%
# Two devices along the examples, two along the units; on a machine with one device, a mesh of one by one.

along = 2 if jax.device_count() >= 4 else 1
mesh = jax.make_mesh((along, along), ("data", "model"), devices=jax.devices()[: along * along])
split = etcompile.Schedule(mesh=mesh, batch="data", units="model")

brainstate.random.seed(0)
one = etcompile.compile(Net(), jnp.zeros((32, 8)), batch_size=32)
many = etcompile.compile(Net(), jnp.zeros((32, 8)), batch_size=32, schedule=split)
many.params = one.params
print("\n".join(many.report().devices))

# %%
# The gradients are those of one device, to rounding.

rng = np.random.default_rng(0)
xs = jnp.asarray(rng.normal(size=(20, 32, 8)), "float32")
ys = jnp.asarray(rng.normal(size=(20, 32, 10)), "float32")


def square(out, y):
    return jnp.mean((out - y) ** 2)


_, alone = one.scan_value_and_grad(square)(xs, ys)
_, together = many.scan_value_and_grad(square)(xs, ys)
for path in alone:
    for a, b in zip(jax.tree.leaves(alone[path]), jax.tree.leaves(together[path])):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
print("equal on", jax.tree.leaves(many.traces)[0].sharding.num_devices, "devices")
