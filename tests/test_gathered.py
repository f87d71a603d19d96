"""Weights that meet what a unit sends at each place where it arrives: the presynaptic value is the unit's, and not the synapse's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO
from oracles import relative_error

import etcompile

pytestmark = pytest.mark.usefixtures("by_numpy")

SENDERS, UNITS, SYNAPSES = 5, 4, 14
DRAW = np.random.default_rng(0)
PRE, POST = DRAW.integers(0, SENDERS, SYNAPSES), DRAW.integers(0, UNITS, SYNAPSES)
PER_UNIT = DRAW.integers(0, SENDERS, (UNITS, 3))
PER_SENDER = DRAW.integers(0, UNITS, (SENDERS, 2))
XS, YS = DRAW.standard_normal((5, SENDERS)), DRAW.standard_normal((5, UNITS))


def summed(value):
    return jax.ops.segment_sum(value, POST, UNITS)


PRODUCTS = {  # y of weights and what the senders send, the shape of the weights
    "segment_sum": (lambda w, x: summed(w * x[PRE]), (SYNAPSES,)),
    "weight_behind": (lambda w, x: summed(x[PRE] * w), (SYNAPSES,)),
    "scaled_behind": (lambda w, x: summed(w * (2.0 * x[PRE])), (SYNAPSES,)),
    "events": (lambda w, x: summed(w * (x[PRE] > 0.3).astype(w.dtype)), (SYNAPSES,)),
    "selected": (lambda w, x: summed(jnp.where(x[PRE] > 0.3, w, 0.0)), (SYNAPSES,)),
    "selected_where_not": (lambda w, x: summed(jnp.where((x > 0.3)[PRE], 0.0, w)), (SYNAPSES,)),
    "per_unit": (lambda w, x: (w * x[PER_UNIT]).sum(1), (UNITS, 3)),
    "per_sender": (lambda w, x: jnp.zeros(UNITS).at[PER_SENDER].add(w * x[:, None]), (SENDERS, 2)),
    "by_hand": (lambda w, x: (w * x[:, None]).sum(0), (SENDERS, UNITS)),
    "bcoo": (lambda w, x: x @ BCOO((w, np.stack([PRE, POST], 1)), shape=(SENDERS, UNITS)), (SYNAPSES,)),
    "of_a_function": (lambda w, x: summed(jnp.abs(w) * jnp.tanh(x)[PRE]), (SYNAPSES,)),
}  # fmt: skip


def leaky(product):
    def fn(params, state, x):
        h = 0.8 * state["h"] + product(params["w"], x)
        return {"h": h}, jnp.tanh(h)

    return fn


def squared(out, y):
    return jnp.mean((out - y) ** 2)


def compiled(fn, shape, batch=(), **options):
    params = {"w": jnp.asarray(np.random.default_rng(1).standard_normal(shape))}
    step_model = etcompile.from_function(fn, params, {"h": jnp.zeros((*batch, UNITS))})
    return etcompile.compile(step_model, jnp.zeros((*batch, SENDERS)), **options), params


def through_time(fn, params, xs, ys, batch=()):
    def whole(params):
        def body(state, item):
            state, out = fn(params, state, item[0])
            return state, squared(out, item[1])

        return jnp.sum(jax.lax.scan(body, {"h": jnp.zeros((*batch, UNITS))}, (xs, ys))[1])

    return jax.grad(whole)(params)


def carried(step):
    return sum(v.size for v in jax.tree.leaves(step.traces))


@pytest.mark.parametrize("name", PRODUCTS)
def test_with_constant_decay_a_sender_has_one_number(name):
    product, shape = PRODUCTS[name]
    step, params = compiled(leaky(product), shape)
    assert step.exact and carried(step) == SENDERS
    wanted = through_time(leaky(product), params, XS, YS)
    assert float(jnp.abs(wanted["w"]).max()) > 0.01
    for chunk in (1, 3):
        step.reset()
        assert relative_error(step.scan_value_and_grad(squared, chunk=chunk)(XS, YS)[1], wanted) < 1e-10


@pytest.mark.parametrize("name", ["segment_sum", "per_unit", "events"])
def test_with_a_decay_that_varies_a_synapse_has_one_number(name):
    product, shape = PRODUCTS[name]

    def fn(params, state, x):
        h = jnp.tanh(0.8 * state["h"] + product(params["w"], x))
        return {"h": h}, h

    step, params = compiled(fn, shape)
    assert step.exact and carried(step) == np.prod(shape)
    wanted = through_time(fn, params, XS, YS)
    for chunk in (1, 3):
        step.reset()
        assert relative_error(step.scan_value_and_grad(squared, chunk=chunk)(XS, YS)[1], wanted) < 1e-10


def test_a_batch_of_examples():
    def fn(params, state, x):
        arrived = jnp.zeros((2, UNITS)).at[:, POST].add(params["w"] * x[:, PRE])
        h = 0.8 * state["h"] + arrived
        return {"h": h}, jnp.tanh(h)

    xs, ys = DRAW.standard_normal((4, 2, SENDERS)), DRAW.standard_normal((4, 2, UNITS))
    step, params = compiled(fn, (SYNAPSES,), (2,))
    assert carried(step) == 2 * SENDERS
    wanted = through_time(fn, params, xs, ys, (2,))
    for chunk in (1, 3):
        step.reset()
        assert relative_error(step.scan_value_and_grad(squared, chunk=chunk)(xs, ys)[1], wanted) < 1e-10


# ----------------------------------------------------------------------------------------------------------------
# rows that are constant beside others that are not


@jax.custom_jvp
def spike(v):
    return (v > 1).astype(v.dtype)


spike.defjvp(lambda v, dv: (spike(v[0]), dv[0] / (1 + jnp.abs(v[0] - 1)) ** 2))


def with_reset(params, state, x):
    """The current's row is constant; the membrane's has a constant f and a D that varies."""
    i = 0.8 * state["i"] + summed(params["w"] * x[PRE])
    v = 0.9 * state["v"] + 0.2 * i - spike(state["v"])
    return {"i": i, "v": v}, jnp.tanh(v)


def with_rest(params, state, x):
    """Nothing of the membrane's row is constant."""
    i = 0.8 * state["i"] + summed(params["w"] * x[PRE])
    v = jnp.where(state["rests"] > 0, 0.0, 0.9 * state["v"] + 0.2 * i)
    rests = jnp.where(v > 0.3, 2, jnp.maximum(state["rests"] - 1, 0))
    return {"i": i, "v": jnp.where(v > 0.3, 0.0, v), "rests": rests}, jnp.tanh(v)


def two_currents(params, state, x):
    """Two rows that are filters, one of them by two decays, and two that are not and read each other."""
    decay = jnp.where(jnp.arange(UNITS) < 2, 0.7, 0.85)
    i = decay * state["i"] + 0.5 * summed(params["w"] * x[PRE])
    j = 0.6 * state["j"] + 0.3 * state["i"]
    v = jnp.tanh(0.9 * state["v"] + 0.2 * i + 0.1 * state["j"] - 0.1 * state["b"])
    b = 0.95 * state["b"] + 0.1 * state["v"]
    return {"i": i, "j": j, "v": v, "b": b}, jnp.sin(v) + state["b"]


ZERO = jnp.zeros(UNITS)
START = jnp.linspace(0.0, 1.2, UNITS)
NEURONS = {  # states, numbers carried by d_rtrl
    "with_reset": (with_reset, {"i": ZERO, "v": START}, SYNAPSES + SENDERS),
    "with_rest": (
        with_rest,
        {"i": ZERO, "v": ZERO, "rests": jnp.zeros(UNITS, jnp.int32)},
        SYNAPSES + SENDERS,
    ),
    "two_currents": (two_currents, {"i": ZERO, "j": ZERO, "v": ZERO, "b": ZERO}, 2 * SYNAPSES + 4 * SENDERS),
}


def neurons(name, **options):
    fn, state, _ = NEURONS[name]
    params = {"w": jnp.asarray(np.random.default_rng(1).standard_normal(SYNAPSES))}
    return etcompile.compile(
        etcompile.from_function(fn, params, state), jnp.zeros(SENDERS), **options
    ), params


def twice(step, chunk):
    """Gradients of two sequences, the second with the traces that the first left."""
    run = step.scan_value_and_grad(squared, chunk=chunk)
    return [run(XS[:part], YS[:part])[1] for part in (5, 4)]


@pytest.mark.parametrize("algo", ["d_rtrl", "e_prop"])
@pytest.mark.parametrize("name", NEURONS)
def test_rows_that_are_constant_are_filters(name, algo):
    step, params = neurons(name, algo=algo)
    assert etcompile.parse_program(str(step.program)) == step.program
    wanted = twice(neurons(name, algo=algo, optimise=False)[0], 1)
    found = twice(step, 1)
    assert relative_error(found, wanted) < 1e-10
    assert carried(step) == NEURONS[name][2] * (2 if algo == "e_prop" else 1)
    step.reset()
    assert relative_error(twice(step, 3), wanted) < 1e-10
    if algo == "d_rtrl":
        fn, state, _ = NEURONS[name]

        def whole(params):
            def body(state, item):
                state, out = fn(params, state, item[0])
                return state, squared(out, item[1])

            return jnp.sum(jax.lax.scan(body, state, (XS, YS))[1])

        assert step.exact and relative_error(found[0], jax.grad(whole)(params)) < 1e-10


def test_only_what_varies_is_in_the_trace():
    text = str(neurons("with_rest")[0].program)
    assert "constant=0.8,0.0/?,?:1.0,? filtered=14 decays=1" in text
    assert "row(f0[t], 1)" in text


def test_pp_prop_filters_what_is_sent():
    step, _ = compiled(leaky(PRODUCTS["segment_sum"][0]), (SYNAPSES,), algo="pp_prop")
    assert step.traces["x2"].shape == (SENDERS,)


def test_a_weight_that_is_used_twice_keeps_one_trace():
    """With a trace for each use it would carry more, and not less."""

    def fn(params, state, x):
        h = jnp.tanh(0.8 * state["h"] + summed(params["w"] * x[PRE]) + summed(params["w"] * jnp.cos(x)[PRE]))
        return {"h": h}, h

    step, params = compiled(fn, (SYNAPSES,))
    assert len(step.program.header.sites) == 1 and carried(step) == SYNAPSES
    found = step.scan_value_and_grad(squared)(XS, YS)[1]
    assert relative_error(found, through_time(fn, params, XS, YS)) < 1e-10


def test_senders_beyond_the_end_send_nothing():
    """The fill value of a gather is not gathered: such a weight is a direct one, with a trace for each of its elements."""
    pre = PRE.copy()
    pre[0] = SENDERS + 2

    def fn(params, state, x):
        h = 0.8 * state["h"] + summed(params["w"] * x.at[pre].get(mode="fill", fill_value=0.5))
        return {"h": h}, h

    step, params = compiled(fn, (SYNAPSES,))
    assert carried(step) == SYNAPSES
    found = step.scan_value_and_grad(squared)(XS, YS)[1]
    assert relative_error(found, through_time(fn, params, XS, YS)) < 1e-10
    assert float(found["w"][0]) != 0
