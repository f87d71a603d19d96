"""
Choosing a rule by cost and accuracy
====================================

What a rule costs is known before anything runs. What it learns has to be tried; on a small task both fit into a minute.
"""

import brainstate
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import etcompile

RULES = ["d_rtrl", "e_prop", "pp_prop", "sltt"]


class Net(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = brainstate.nn.GRUCell(2, 32)
        self.readout = brainstate.nn.Linear(32, 1)

    def update(self, x):
        return self.readout(self.cell(x))


# %%
# By cost: traces, operations and memory traffic of one online step.

table = etcompile.compare(Net(), jnp.zeros((16, 2)), rules=RULES, batch_size=16)
table

# %%
# By accuracy: among random values, remember the one that came with a flag, and output it seven steps later. A rule
# without traces (``sltt``) gives no credit to the step with the flag; the others do.

STEPS = 8


def task(rng, count=16):
    xs = rng.choice([-1.0, 1.0], (STEPS, count, 2)).astype("float32")
    xs[:, :, 1] = 0.0
    xs[0, :, 1] = 1.0
    mask = np.zeros(STEPS, "float32")
    mask[-1] = 1
    return xs, xs[0, :, :1], mask


def square(out, y):
    return jnp.mean((out - y) ** 2)


curves = {}
for rule in RULES:
    brainstate.random.seed(3)
    rng = np.random.default_rng(3)
    step = etcompile.compile(Net(), jnp.zeros((16, 2)), algo=rule, batch_size=16)
    learn = step.learn(square, optax.adam(5e-3), update_every=STEPS)
    curve = []
    for _ in range(300):
        xs, y, mask = task(rng)
        step.reset()
        curve.append(float(learn(xs, etcompile.SingleStepData(y), mask=mask)[-1]))
    curves[rule] = curve
    print(f"{rule:8} last losses {np.mean(curve[-20:]):.3f}, traces {table[rule].trace_bytes} bytes")

# %%

figure, axis = plt.subplots(figsize=(6, 3))
for rule, curve in curves.items():
    axis.plot(np.convolve(curve, np.ones(10) / 10, mode="valid"), label=rule)
axis.set(xlabel="sequence", ylabel="loss at the last step")
axis.legend()
figure.tight_layout()

# %%
# One seed is no evidence. :doc:`/rules` has three tasks, many seeds and standard errors for all rules.
