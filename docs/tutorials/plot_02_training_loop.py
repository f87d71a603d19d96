"""
A whole training loop
=====================

Minibatches, a reset for each, evaluation, stopping early, checkpoints, and going on after a crash. The data are
scikit-learn's handwritten digits, read row by row: eight steps of eight pixels.
"""

import tempfile

import brainstate
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import etcompile

# %%
# Time is axis 0, examples are axis 1.

digits = load_digits()
images = (digits.images / 16).astype("float32").transpose(1, 0, 2)
picked, held_out = train_test_split(np.arange(images.shape[1]), test_size=297, random_state=0)
train_x, train_y = images[:, picked], digits.target[picked]
valid_x, valid_y = images[:, held_out], digits.target[held_out]


class Net(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = brainstate.nn.GRUCell(8, 64)
        self.readout = brainstate.nn.Linear(64, 10)

    def update(self, x):
        return self.readout(self.cell(x))


# %%
# The loss of a step. ``step.learn`` joins it with an optimiser; here the weights change after every second step
# of a sequence.

BATCH = 100


def cross_entropy(logits, label):
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()


def new_run():
    brainstate.random.seed(1)
    step = etcompile.compile(Net(), jnp.zeros((BATCH, 8)), batch_size=BATCH)
    return step.learn(cross_entropy, optax.adam(5e-3), update_every=2)


# %%
# An epoch: a new order, ``reset`` before every batch. The label is the same at every step, so it is given once.


def one_epoch(learn, rng):
    losses = []
    order = rng.permutation(train_x.shape[1])
    for first in range(0, len(order) - BATCH + 1, BATCH):
        batch = order[first : first + BATCH]
        learn.step.reset()
        losses.append(learn(train_x[:, batch], etcompile.SingleStepData(train_y[batch]))[-1])
    return float(np.mean(losses))


# %%
# To evaluate, run the sequence forward: ``scan`` changes no weight. Another number of examples is compiled for
# once, and kept: going back and forth compiles nothing again.


def accuracy(step):
    step.reset(batch_size=len(valid_y))
    logits = step.scan(valid_x)[-1]
    step.reset(batch_size=BATCH)
    return float((logits.argmax(-1) == valid_y).mean())


# %%
# The loop stops after three epochs without a better accuracy, and keeps the best weights. Every epoch is saved, with the
# optimiser, which is the learner's, and with what the loop itself needs as ``extra``.

directory = tempfile.mkdtemp()


def train(epochs):
    learn = new_run()
    saves = etcompile.Checkpoints(directory, every=1, keep=2)
    done, kept = saves.restore(learn, extra={"best": 0.0, "weights": learn.step.params, "waited": 0})
    curve, best, waited = [], (float(kept["best"]), kept["weights"]), int(kept["waited"])
    for epoch in range(done, epochs):
        loss = one_epoch(learn, np.random.default_rng(epoch))
        found = accuracy(learn.step)
        curve.append((epoch, loss, found))
        waited = 0 if found > best[0] else waited + 1
        best = max(best, (found, learn.step.params), key=lambda pair: pair[0])
        saves.save(learn, epoch + 1, extra={"best": best[0], "weights": best[1], "waited": waited})
        if waited == 3:
            break
    return learn.step, curve, best


step, before, best = train(4)  # killed after four epochs, say
step, after, best = train(10)  # the same program, started again
print(f"went on at epoch {after[0][0]}, best accuracy {best[0]:.3f}")
assert after[0][0] == 4 and best[0] > 0.85

# %%

epochs, losses, accuracies = zip(*before, *after)
figure, axis = plt.subplots(figsize=(6, 3))
axis.plot(epochs, accuracies, marker="o")
axis.axvline(3.5, color="0.6", linestyle=":")
axis.set(xlabel="epoch", ylabel="accuracy on held-out digits", ylim=(0, 1))
axis.annotate("started again", (3.5, 0.1), xytext=(4, 0.1))
figure.tight_layout()

# %%
# The weights are in the model's ``ParamState`` objects, and in ``step.params`` as a dictionary. ``step.params =
# ...`` brings the best ones back.

step.params = best[1]
print(sorted(step.params))
