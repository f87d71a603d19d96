"""
Long sequences beside backpropagation
=====================================

Backpropagation through time keeps every step of the past: its memory grows with the sequence. Traces do not.
Both are known before anything runs, and the gradient is the same.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import lax

import etcompile

# %%
# A linear recurrent layer: exact under D-RTRL.


def layer(params, h, x):
    h = jax.nn.sigmoid(params["decay"]) * h + x @ params["w"]
    return h, jnp.tanh(h) @ params["readout"]


rng = np.random.default_rng(0)
UNITS, BATCH = 128, 8
params = {
    "decay": jnp.asarray(rng.uniform(2, 5, UNITS), "float32"),
    "w": jnp.asarray(rng.normal(size=(16, UNITS)) / 4, "float32"),
    "readout": jnp.asarray(rng.normal(size=(UNITS, 4)) / 11, "float32"),
}
start = jnp.zeros((BATCH, UNITS))
step = etcompile.compile(etcompile.from_function(layer, params, start), jnp.zeros((BATCH, 16)))
assert step.exact


def square(out, y):
    return jnp.mean((out - y) ** 2)


def backpropagation(params, xs, ys):
    def one(h, data):
        h, out = layer(params, h, data[0])
        return h, square(out, data[1])

    return lax.scan(one, start, (xs, ys))[1].sum()


# %%
# What each needs beside parameters and data, by length: XLA's own figure of temporary memory for
# backpropagation, ``step.cost`` for the traces.

lengths = [100, 300, 1000, 3000, 10000]
grown, flat = [], []
for steps in lengths:
    shapes = [jax.ShapeDtypeStruct((steps, BATCH, n), jnp.float32) for n in (16, 4)]
    compiled = jax.jit(jax.grad(backpropagation)).lower(params, *shapes).compile()
    grown.append(compiled.memory_analysis().temp_size_in_bytes)
    flat.append(step.cost(steps=steps, chunk=100).peak_bytes)
for steps, backwards, forwards in zip(lengths, grown, flat):
    print(
        f"{steps:6} steps: backpropagation {backwards / 2**20:7.1f} MiB, traces {forwards / 2**20:5.1f} MiB"
    )

# %%

figure, axis = plt.subplots(figsize=(6, 3.2))
axis.loglog(lengths, np.array(grown) / 2**20, marker="s", label="backpropagation through time")
axis.loglog(lengths, np.array(flat) / 2**20, marker="o", label="D-RTRL, in chunks of 100 steps")
axis.set(xlabel="steps", ylabel="MiB")
axis.legend()
figure.tight_layout()

# %%
# The gradient is the same.

xs = jnp.asarray(rng.normal(size=(500, BATCH, 16)), "float32")
ys = jnp.asarray(rng.normal(size=(500, BATCH, 4)), "float32")
_, grads = step.scan_value_and_grad(square, chunk=100)(xs, ys)
wanted = jax.grad(backpropagation)(params, xs, ys)
for name, gradient in grads.items():
    error = jnp.abs(gradient - wanted[name]).max() / jnp.abs(wanted[name]).max()
    print(f"{name:8} differs by {error:.1e} of its largest entry")
    assert error < 1e-4
