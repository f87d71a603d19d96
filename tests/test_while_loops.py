"""While loops pass no derivative: what they keep from learning is said, and which loop it is."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from jax import lax

import etcompile
from etcompile.errors import ModelError


def settle(v, drive):
    """An integrator that chooses its own number of rounds."""

    def body(c):
        return c[0] + 0.5, c[1] + 0.5 * (drive - c[1])

    return lax.while_loop(lambda c: c[0] < 1.0, body, (0.0, v))[1]


LINE = settle.__code__.co_firstlineno + 6


def refused(step, state):
    model = etcompile.from_function(step, {"w": jnp.ones((2, 3))}, state)
    with pytest.raises(ModelError) as error:
        etcompile.compile(model, jnp.ones(2))
    return str(error.value)


def test_a_model_without_hidden_state_because_of_a_loop_names_the_loop():
    def step(p, s, x):
        v = settle(s["v"], s["i"])
        return {"v": v, "i": x @ p["w"]}, v

    text = refused(step, {"v": jnp.zeros(3), "i": jnp.zeros(3)})
    assert (
        f"v: a trained parameter reaches it only through the while loop at test_while_loops.py:{LINE}" in text
    )
    assert f"i: its old value is read only in the while loop at test_while_loops.py:{LINE}" in text
    assert text.count(f"test_while_loops.py:{LINE}") == 2
    assert "fixed number of rounds" in text


def test_a_loop_that_a_parameter_reaches_through_a_value_names_both():
    def step(p, s, x):
        v = settle(s["v"], x @ p["w"])
        return {"v": v}, v

    text = refused(step, {"v": jnp.zeros(3)})
    line = step.__code__.co_firstlineno + 1
    assert "trained parameter (w)" in text
    assert f"the value computed at test_while_loops.py:{line}" in text
    assert f"test_while_loops.py:{LINE}" in text


def test_models_without_loops_keep_their_reasons():
    def step(p, s, x):
        return {"i": x @ p["w"]}, x @ p["w"]

    assert "a result, not a memory" in refused(step, {"i": jnp.zeros(3)})


def test_states_with_one_reason_are_told_together():
    def step(p, s, x):
        v = settle(s["v"], s["i"])
        u = settle(s["u"], s["i"])
        return {"v": v, "u": v + u, "i": x @ p["w"]}, v

    zero = jnp.zeros(3)
    text = refused(step, {"u": zero, "v": zero, "i": zero})
    assert "u, v: a trained parameter reaches it only through the while loop" in text
