"""A run that saves itself, to be killed and started again: ``python long_run.py DIRECTORY RESULT [SAVE DELAY]``.

Writes what it ends with to RESULT. With SAVE and DELAY it kills itself that many seconds after its save number SAVE began.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax

import etcompile

STEPS, EVERY = 120, 5


class Noisy(brainstate.nn.Module):
    """Draws random numbers at every step, from its own key."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        self.w = brainstate.ParamState(jnp.asarray(0.4 * rng.normal(size=(3, 4))))
        self.r = brainstate.ParamState(jnp.asarray(0.4 * rng.normal(size=(4, 4))))
        self.h = brainstate.HiddenState(jnp.full((2, 4), 0.1))
        self.random = brainstate.random.RandomState(5)

    def update(self, x):
        noise = self.random.normal(size=(2, 4))
        self.h.value = jnp.tanh(x @ self.w.value + self.h.value @ self.r.value + 0.1 * noise)
        return self.h.value


def learner(optimizer=None, algo="uoro", update_every=3):
    """A rule with a counter of its own, a model with a random key, and updates that do not fall on the checkpoints."""
    step = etcompile.compile(Noisy(), jnp.zeros((2, 3)), algo=algo)
    return step.learn(
        lambda out, y: jnp.mean((out - y) ** 2), optimizer or optax.adam(1e-2), update_every=update_every
    )


def data(steps=STEPS):
    rng = np.random.default_rng(1)
    return rng.normal(size=(steps, 2, 3)), rng.normal(size=(steps, 2, 4))


def everything(learn):
    """All numbers that a run ends with."""
    step = learn.step
    states = {k: v for k, v in step.executor.live.states().items() if k != "random"}
    key = jax.random.key_data(step.executor.live.states()["random"])
    params = {k: s.value for k, s in step.param_states.items()}
    optimiser = {k: s.value for k, s in learn.saved_states().items()}
    return [np.asarray(v) for v in jax.tree.leaves((params, states, key, step.traces, optimiser))]


def main(directory, result, *kill):
    learn = learner()
    saves = etcompile.Checkpoints(directory, every=EVERY, keep=2)
    done = saves.restore(learn).at
    if kill:
        number, delay = int(kill[0]), float(kill[1])
        write = saves.save

        def save(run, at, extra=None, *, force=False):
            if at // EVERY - done // EVERY == number:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return write(run, at, extra, force=force)

        saves.save = save
    xs, ys = data()
    if done < STEPS:
        learn(xs[done:], ys[done:], checkpoints=saves)
    np.savez(result, *everything(learn))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    brainstate.environ.set(precision=64)
    main(*sys.argv[1:])
