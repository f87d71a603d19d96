"""Where an integer is asked for, numpy's will do; a truth value or a fraction will not."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import etcompile
from etcompile.errors import EtcompileError
from etcompile.integers import as_integer, positive_integer
from etcompile.nn import FixedRandomFeedback

optax = pytest.importorskip("optax")


def cell(p, s, x):
    h = jnp.tanh(0.5 * s["h"] + x @ p["w"])
    return {"h": h}, h


def squares(out, y):
    return jnp.sum((out - y) ** 2)


def test_integers_of_any_kind():
    for value in (3, np.int64(3), np.uint8(3), np.array(3), jnp.asarray(3)):
        assert as_integer(value) == 3
        assert type(positive_integer("n", value)) is int
    for value in (True, np.True_, 3.0, np.float32(3), "3", None, 0, -1, jnp.ones(3)):
        with pytest.raises(EtcompileError, match="n must be a positive integer"):
            positive_integer("n", value)


def test_every_option_that_counts_takes_numpys_integers(tmp_path):
    three = np.int64(3)
    model = etcompile.from_function(cell, {"w": jnp.ones((2, 4))}, {"h": jnp.zeros((3, 4))})
    step = etcompile.compile(model, jnp.ones((3, 2)), batch_size=three)
    xs, ys = np.ones((6, 3, 2)), np.ones((6, 3, 4))
    step.scan_value_and_grad(squares, chunk=three)(xs, ys)
    step.reset(batch_size=three)
    step.init_carry(three)
    step.cost(three, steps=three, chunk=three)
    step.learn(squares, optax.sgd(0.1), update_every=three)(xs, ys)
    schedule = etcompile.Schedule(chunk=three, memory=np.int64(2**20))
    assert schedule == etcompile.Schedule(chunk=3, memory=2**20)
    etcompile.Checkpoints(tmp_path, every=three, keep=three)
    FixedRandomFeedback(three, np.int32(4), seed=three)
    for algo, options in (
        ("snap", {"n": np.int64(1)}),
        ("pp_prop", {"rank": three}),
        ("bptt", {"window": three}),
    ):
        etcompile.compile(model, jnp.ones((3, 2)), algo=algo, **options)
