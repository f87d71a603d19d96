"""Derivatives that are infinite at an initial state: traces of zeros stay zero there, as backpropagation never asks for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error

import etcompile

pytestmark = pytest.mark.usefixtures("by_numpy")

STEPS, BATCH, INPUTS, UNITS = 7, 2, 3, 4
rng = np.random.default_rng(0)
W = {"w": jnp.asarray(0.5 * rng.normal(size=(INPUTS, UNITS)))}
XS = jnp.asarray(rng.normal(size=(STEPS, BATCH, INPUTS)))
ENDED = jnp.asarray(rng.random((STEPS, BATCH)) < 0.3)


def zeros(**shapes):
    return {name: jnp.zeros(shape) for name, shape in shapes.items()}


def scaled_by_its_variance(p, s, x, ended):
    u = x @ p["w"]
    h = 0.5 * s["h"] + u / (jnp.sqrt(s["v"]) + 0.1)
    return {"h": h, "v": 0.9 * s["v"] + 0.1 * u**2}, h


def begun_anew(p, s, x, ended):
    """Episodes of single examples end in the middle of a sequence."""
    s, out = scaled_by_its_variance(p, s, x, ended)
    return jax.tree.map(lambda v: jnp.where(ended[:, None], 0.0, v), s), out


def pairs_of_one_length(p, s, x, ended):
    h = 0.5 * s["h"] / (jnp.linalg.norm(s["h"], axis=-1, keepdims=True) + 0.1)
    h = h + (x @ p["w"])[..., None] * jnp.array([1.0, 0.5])
    return {"h": h}, h


def quotient_where_there_is_one(p, s, x, ended):
    n = 0.5 * s["n"] + jnp.abs(x @ p["w"])
    h = 0.5 * jnp.where(s["n"] > 0, s["h"] / s["n"], 0.0) + x @ p["w"]
    return {"h": h, "n": n}, h


def root_behind_a_long_delay(p, s, x, ended):
    b = 0.5 * jnp.sqrt(jnp.abs(s["line"][0])) + x @ p["w"]
    return {"line": jnp.concatenate([s["line"][1:], b[None]])}, s["line"][0] + b


SIZE = (BATCH, UNITS)
MODELS = {
    scaled_by_its_variance: zeros(h=SIZE, v=SIZE),
    begun_anew: zeros(h=SIZE, v=SIZE),
    pairs_of_one_length: zeros(h=(*SIZE, 2)),
    quotient_where_there_is_one: zeros(h=SIZE, n=SIZE),
    root_behind_a_long_delay: zeros(line=(40, *SIZE)),
}


def loss(out):
    return jnp.sum(jnp.sin(out) * jnp.cos(jnp.arange(out.size)).reshape(out.shape))


def compiled(fn, **options):
    return etcompile.compile(etcompile.from_function(fn, W, MODELS[fn]), XS[0], ENDED[0], **options)


def through_time(fn, steps=STEPS, times=1):
    """The gradient of the last of some sequences, by the weights of all."""

    def total(p):
        def one(s, x):
            s, out = fn(p, s, *x)
            return s, loss(out)

        s = MODELS[fn]
        for _ in range(times):
            s, losses = jax.lax.scan(one, s, (XS[:steps], ENDED[:steps]))
        return losses.sum()

    return jax.grad(total)(W)


@pytest.mark.parametrize("fn", MODELS, ids=lambda fn: fn.__name__)
def test_gradients_are_those_of_backpropagation(fn):
    wanted, again = through_time(fn), through_time(fn, times=2)
    assert jnp.isfinite(wanted["w"]).all() and jnp.abs(wanted["w"]).min() > 0
    step = compiled(fn)
    assert step.exact
    for chunk in (1, 3, STEPS):
        step.reset()
        run = step.scan_value_and_grad(loss, chunk=chunk)
        assert relative_error(run((XS, ENDED))[1], wanted) < 1e-10
        assert relative_error(run((XS, ENDED))[1], again) < 1e-10
    step.reset()
    _, grads = step.value_and_grad(loss)((XS[0], ENDED[0]))
    assert relative_error(grads, through_time(fn, steps=1)) < 1e-10


@pytest.mark.parametrize("options", [{"algo": "rtrl"}, {"algo": "bptt"}, {"within": "exact"}], ids=str)
@pytest.mark.parametrize("fn", [scaled_by_its_variance, root_behind_a_long_delay], ids=lambda fn: fn.__name__)
def test_other_ways_to_the_same_gradient(fn, options):
    _, grads = compiled(fn, **options).scan_value_and_grad(loss)((XS, ENDED))
    assert relative_error(grads, through_time(fn)) < 1e-10


@pytest.mark.parametrize("chunk", [1, STEPS])
def test_what_is_infinite_behind_a_weight_stays_so(chunk):
    """A root of a state that a weight did reach, and that is zero, has no finite gradient by that weight."""

    def root(p, s, x):
        h = 0.5 * jnp.sqrt(s["h"]) + x @ p["w"]
        return {"h": h}, h

    model = etcompile.from_function(root, {"w": jnp.zeros_like(W["w"])}, zeros(h=SIZE))
    _, grads = etcompile.compile(model, XS[0]).scan_value_and_grad(loss, chunk=chunk)(XS)
    assert not jnp.isfinite(grads["w"]).any()


def norm_of_the_new_state(p, s, x, ended):
    h = 0.5 * s["h"] + x @ p["w"]
    return {"h": h}, h / (1.0 + jnp.sqrt(jnp.sum(h**2, -1, keepdims=True)))


def norm_of_the_old_state(p, s, x, ended):
    h = 0.5 * s["h"] + x @ p["w"]
    return {"h": h}, h / (1.0 + jnp.sqrt(jnp.sum(s["h"] ** 2, -1, keepdims=True)))


def root_of_a_state_on_the_way_to_another(p, s, x, ended):
    v = 0.5 * s["v"] + (x @ p["w"]) ** 2
    return {"h": 0.5 * s["h"] + jnp.sqrt(v), "v": v}, s["h"]


@pytest.mark.parametrize(
    ("fn", "state", "steep"),
    [
        (norm_of_the_new_state, zeros(h=SIZE), False),
        (norm_of_the_old_state, zeros(h=SIZE), True),
        (root_of_a_state_on_the_way_to_another, zeros(h=SIZE, v=SIZE), True),
    ],
)
def test_poles_between_a_new_state_and_an_output_are_none_of_the_transition(fn, state, steep):
    model = etcompile.from_function(fn, W, state)
    step = etcompile.compile(model, XS[0], ENDED[0], batch_size=BATCH)
    assert step.executor.compiled.analysis.steep is steep

    def whole(p):
        run = lambda s, x: fn(p, s, *x)  # noqa: E731
        return jnp.sum(jax.vmap(loss)(jax.lax.scan(run, state, (XS, ENDED))[1]))

    for chunk in (1, 3, "auto"):
        step.reset()
        losses, grads = step.scan_value_and_grad(loss, chunk=chunk)((XS, ENDED))
        assert np.isfinite(losses).all()
        assert relative_error(grads, jax.grad(whole)(W)) < 1e-10
