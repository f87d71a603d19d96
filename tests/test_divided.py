"""Products of joined operands in chunks: the part without a state leaves the loop over steps, and no number changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracles import relative_error

import etcompile
from etcompile.lowering.schedules import divided
from etcompile.lowering.schedules.first_pass import FirstPass

STEPS, INPUTS, UNITS, OUT = 7, 12, 5, 2
rng = np.random.default_rng(3)


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    """Weights of tests are small; whether a cache holds them is asked in one test."""
    monkeypatch.setattr(divided, "_SMALL", 0)


def numbers(*shape):
    return jnp.asarray(0.4 * rng.normal(size=shape))


def joined(parts, w):
    return jnp.tanh(jnp.concatenate(parts, -1) @ w)


def state_behind(p, s, x):
    return joined([x, s["h"]], p["w"])


def state_in_front(p, s, x):
    return joined([s["h"], x], p["v"])


def between(p, s, x):
    return joined([x[..., :5], s["h"], x[..., 5:] ** 2], p["w"])


def with_a_constant(p, s, x):
    ones = jnp.ones((*x.shape[:-1], 1))
    return joined([x[..., 1:], ones, 0.5 * s["h"]], p["w"])


def weight_first(p, s, x):
    both = jnp.concatenate([x.T, s["h"].T], 0)
    return jnp.tanh(p["w"].T @ both).T


def two_contracted(p, s, x):
    both = jnp.concatenate([jnp.stack([x, x**2], -1), jnp.stack([s["h"]] * 2, -1)], -2)
    return jnp.tanh(jnp.einsum("...ik,iko->...o", both, p["pair"]))


def gates(p, s, x):
    z, r = jnp.split(jax.nn.sigmoid(jnp.concatenate([x, s["h"]], -1) @ p["two"]), 2, -1)
    return (1 - z) * s["h"] + z * joined([x, r * s["h"]], p["w"])


MODELS = [state_behind, state_in_front, between, with_a_constant, weight_first, two_contracted, gates]


def step_of(fn, batch, x_size=INPUTS, **options):
    both = x_size + UNITS
    shapes = {"w": (both, UNITS), "v": (both, UNITS), "pair": (both, 2, UNITS), "two": (both, 2 * UNITS)}
    local = np.random.default_rng(5)
    params = {name: jnp.asarray(0.4 * local.normal(size=shape)) for name, shape in shapes.items()}
    lead = () if batch is None else (batch,)

    def step(p, s, x):
        h = fn(p, s, x)
        return {"h": h}, h[..., :OUT]

    model = etcompile.from_function(step, params, {"h": jnp.zeros((*lead, UNITS))})
    return etcompile.compile(model, jnp.zeros((*lead, x_size)), **options)


def loss(out, y):
    return jnp.sum((out - y) ** 2)


@pytest.mark.parametrize("batch", [1, 3, None])
@pytest.mark.parametrize("fn", MODELS, ids=lambda fn: fn.__name__)
def test_chunks_are_step_by_step(fn, batch, monkeypatch):
    if batch is None and fn is weight_first:
        pytest.skip("a vector has no transpose")
    monkeypatch.setattr(divided._Product, "pays", True)
    products = []
    divide = divided._Product.divided
    monkeypatch.setattr(divided._Product, "divided", lambda p, avals: products.append(p) or divide(p, avals))
    lead = () if batch is None else (batch,)
    xs, ys = numbers(STEPS, *lead, INPUTS), numbers(STEPS, *lead, OUT)
    wanted = step_of(fn, batch, schedule=etcompile.Schedule(chunk=1)).scan_value_and_grad(loss)(xs, ys)
    for chunk in (STEPS, 3):
        step = step_of(fn, batch, schedule=etcompile.Schedule(chunk=chunk))
        found = step.scan_value_and_grad(loss)(xs, ys)
        assert relative_error(found, wanted) < 1e-12
    assert products
    forward = [step_of(fn, batch, schedule=etcompile.Schedule(chunk=c)).scan(xs) for c in (1, 3)]
    assert relative_error(*forward) < 1e-12


def parts(fn, batch, x_size=INPUTS):
    """Operations of the loop over steps, and those that take parts of a weight before it."""
    first = FirstPass(step_of(fn, batch, x_size).executor.compiled.causal.model)
    return [o.name for o in first._parts.inside], [o.name for o in first._parts.once]


def test_parts_that_the_nearest_cache_holds_stay(monkeypatch):
    monkeypatch.setattr(divided, "_SMALL", 1 << 13)
    assert parts(state_behind, 1) == (["concatenate", "dot_general", "tanh"], [])


def test_where_it_pays():
    inside, once = parts(state_behind, 1)
    assert "concatenate" not in inside and once == ["slice", "slice"]
    assert parts(state_behind, 3)[1] == []  # 12 rows against 3 examples
    assert parts(state_behind, 1, x_size=4)[1] == []  # most of the product is in the loop


def test_the_same_rows_are_taken_for_all_parts_of_one_kind():
    assert parts(between, 1)[1] == ["slice", "slice", "concatenate", "slice"]


@pytest.mark.parametrize("kind", ["io", "oi", "batched", "two", "left"])
def test_the_gradient_of_a_matrix_over_steps(kind):
    """One product in the order of the weight's axes, against JAX's transpose."""
    shape, numbers_of = {
        "io": ((4, 5), (((1,), (0,)), ((), ()))),
        "oi": ((5, 4), (((1,), (1,)), ((), ()))),
        "batched": ((3, 4, 5), (((1,), (1,)), ((0,), (0,)))),
        "two": ((4, 2, 5), (((1, 2), (0, 1)), ((), ()))),
        "left": ((5, 4), None),
    }[kind]
    x_shape = (3, 4, 2) if kind == "two" else (3, 4)

    def step(p, s, x):
        y = p["w"] @ x.T if kind == "left" else lax.dot_general(x, p["w"], numbers_of)
        y = y.T if kind == "left" else y
        h = 0.5 * s["h"] + y
        return {"h": h}, h

    model = etcompile.from_function(step, {"w": numbers(*shape)}, {"h": jnp.zeros((3, 5))})
    compiled = etcompile.compile(model, jnp.zeros(x_shape))
    site = compiled.executor.compiled.causal.model.sites["s0"]
    x, credit = numbers(6, *site.reads[0].shape), numbers(6, *site.y.shape)
    found = site.pullback_of_steps((x,), credit)
    assert relative_error(found, sum(site.pullback((x[t],), credit[t]) for t in range(6))) < 1e-12
