"""
What is cut, and why
====================

A local rule follows each unit alone. Where a value is spread over several units, credit ends; the report lists
every such place with its source line. This page makes four models and reads their reports.
"""

import jax.numpy as jnp

import etcompile

x = jnp.ones((2, 3))


def report_of(fn, params, state, algo="d_rtrl"):
    return etcompile.compile(etcompile.from_function(fn, params, state), x, algo=algo).report()


# %%
# Nothing is cut
# --------------
#
# Each unit's new state depends on its own old state alone: ``h`` decays element by element. The gradient equals
# backpropagation through time.


def leaky(params, state, x):
    h = jnp.tanh(params["decay"] * state + x @ params["w"])
    return h, h


weights = {"w": 0.1 * jnp.ones((3, 4)), "decay": 0.5 * jnp.ones(4)}
report = report_of(leaky, weights, jnp.zeros((2, 4)))
print(report)
assert report.exact and not report.cuts

# %%
# Recurrent weights
# -----------------
#
# ``h @ r`` spreads every unit over all others. Credit through it counts within one step only, and the verdict
# is no longer exact.


def recurrent(params, state, x):
    h = jnp.tanh(x @ params["w"] + state @ params["r"])
    return h, h


report = report_of(recurrent, {"w": jnp.ones((3, 4)), "r": jnp.ones((4, 4))}, jnp.zeros((2, 4)))
for cut in report.cuts:
    print(cut)
assert not report.exact

# %%
# A rule that follows every path cuts nothing. The table shows its price:

costs = etcompile.compare(
    etcompile.from_function(recurrent, {"w": jnp.ones((3, 4)), "r": jnp.ones((4, 4))}, jnp.zeros((2, 4))),
    x,
    rules=["d_rtrl", "snap", "rtrl"],
)
print(costs)

# %%
# A normalisation
# ---------------
#
# Layer norm of what a weight gives: each unit then depends on the mean of all. The part of credit that stays
# within a unit is kept, and the part through the mean is cut.


def normalised(params, state, x):
    y = x @ params["w"]
    y = (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-3)
    h = 0.9 * state + y
    return h, h


report = report_of(normalised, {"w": jnp.arange(12.0).reshape(3, 4)}, jnp.zeros((2, 4)))
print(report)

# %%
# Silence
# -------
#
# A spike without a surrogate gradient has the derivative zero. A framework that says nothing would hand out a
# gradient of zeros; here it is a line of the report.


def hard(params, state, x):
    v = 0.9 * state + x @ params["w"]
    return v, (v > 1).astype(v.dtype)


report = report_of(hard, {"w": jnp.ones((3, 4))}, jnp.zeros((2, 4)))
print(report)
assert "no differentiable path" in str(report)
