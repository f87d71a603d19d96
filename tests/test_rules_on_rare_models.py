"""Rules other than D-RTRL on models with a rare thing each: shapes without axes, many units, primitives that jax cannot batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from oracles import relative_error
from small_models import SMALL, cell
from test_small_models import loss

import etcompile
from etcompile.lowering import layers


def compiled(parts, algo, **options):
    fn, params, state, xs = parts
    return etcompile.compile(etcompile.from_function(fn, params, state), xs[0], algo=algo, **options)


def backpropagated(parts):
    fn, params, state, xs = parts

    def total(params):
        def one(state, x):
            state, out = fn(params, state, x)
            return state, loss(out)

        return jax.lax.scan(one, state, xs)[1].sum()

    return jax.jit(jax.grad(total))(params)


@pytest.mark.parametrize(
    "name", ["state_without_axes", "two_states_without_axes", "scalar_beside_units", "size_zero_axis"]
)
def test_a_full_pattern_of_snap_is_backpropagation_whatever_the_shapes(name):
    parts = SMALL[name]()
    _, grads = compiled(parts, "snap", n=9).scan_value_and_grad(loss)(parts[3])
    assert relative_error(grads, backpropagated(parts)) < 1e-10
    _, narrow = compiled(parts, "snap", n=1).scan_value_and_grad(loss)(parts[3])
    assert jax.tree.map(jnp.shape, narrow) == jax.tree.map(jnp.shape, grads)


@pytest.mark.parametrize("rule", ["rtrl", "snap"])
def test_more_columns_than_are_taken_at_once_leave_a_rest(rule, monkeypatch):
    monkeypatch.setattr(layers, "_AT_ONCE", 3)  # so that eight states are two parts and a rest, as 1100 are
    parts = cell(
        lambda p, h, d: jax.vmap(lambda h, d: jnp.tanh(jax.nn.relu(h) @ jnp.outer(p["b"], p["b"]) + d))(h, d)
    )
    _, grads = compiled(parts, rule, **({"n": 9} if rule == "snap" else {})).scan_value_and_grad(loss)(
        parts[3]
    )
    assert relative_error(grads, backpropagated(parts)) < 1e-10
