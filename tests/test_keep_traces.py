"""Sequences of their own: traces that start at zero and are given up, so that none has to be stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error

import etcompile

T, B = 6, 4
SEQUENCES = etcompile.Schedule(keep_traces=False)


@jax.custom_vjp
def own_product(w, x):
    """A product with a derivative rule of its own: nothing tells how it acts on a weight, short of its Jacobian."""
    return x @ w


own_product.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, c: (kept[1].T @ c, c @ kept[0].T))


def step_function(params, state, x):
    h = 0.8 * state["h"] + jnp.tanh(own_product(params["w"], x) + params["b"])
    return {"h": h}, h @ params["o"]


def loss(out, target):
    return jnp.sum((out - target) ** 2)


def model_of(units):
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "w": jax.random.normal(keys[0], (units, units)) / units**0.5,
        "b": jnp.zeros(units),
        "o": jax.random.normal(keys[1], (units, 3)),
    }
    return etcompile.from_function(step_function, params, {"h": jnp.zeros((B, units))}), params


def data_of(units):
    keys = jax.random.split(jax.random.key(1), 2)
    return jax.random.normal(keys[0], (T, B, units)), jax.random.normal(keys[1], (T, B, 3))


def by_bptt(params, state, xs, targets):
    """Gradient over the sequence, and the state at its end."""

    def total(params):
        def body(state, item):
            state, out = step_function(params, state, item[0])
            return state, loss(out, item[1])

        end, losses = jax.lax.scan(body, state, (xs, targets))
        return losses.sum(), end

    return jax.grad(total, has_aux=True)(params)


@pytest.mark.parametrize("units", [5, 512])
def test_a_sequence_of_its_own_is_backpropagation_through_it(units):
    model, params = model_of(units)
    xs, targets = data_of(units)
    step = etcompile.compile(model, xs[0], schedule=SEQUENCES)
    state = {"h": jnp.zeros((B, units))}
    for length in (T, 1, T - 1):  # states go on, traces do not
        _, found = step.scan_value_and_grad(loss)(xs[:length], targets[:length])
        expected, state = by_bptt(params, state, xs[:length], targets[:length])
        assert relative_error(found, expected) < 1e-10
    assert step.traces == {}
    assert step.report().traces == {}


def test_pieces_of_a_sequence_are_chunked_as_asked():
    xs, targets = data_of(5)
    found = []
    for chunk in ("auto", 1, 4):
        model, _ = model_of(5)
        step = etcompile.compile(model, xs[0], schedule=SEQUENCES)
        found.append(step.scan_value_and_grad(loss, chunk=chunk)(xs, targets)[1])
        step.reset()
        found.append(step.scan_value_and_grad(loss, chunk=chunk)(xs, targets, progress=True)[1])
    for other in found[1:]:
        assert relative_error(other, found[0]) < 1e-10


def test_what_cannot_be_stored_is_said_by_compile():
    model, _ = model_of(512)
    xs, _ = data_of(512)
    with pytest.raises(etcompile.UnsupportedError, match=r"the trace of w .* cannot be stored") as error:
        etcompile.compile(model, xs[0])
    assert "test_keep_traces.py:" in str(error.value)
    assert "keep_traces=False" in str(error.value)
    with pytest.raises(etcompile.UnsupportedError, match="cannot be stored"):
        etcompile.compile(model, xs[0], algo="pp_prop", schedule=SEQUENCES)
    with pytest.raises(etcompile.UnsupportedError, match="cannot be stored"):
        etcompile.compile(model, xs[0], within="exact", schedule=SEQUENCES)


def test_shorter_chunks_than_the_sequence_would_store_it():
    model, _ = model_of(512)
    xs, targets = data_of(512)
    step = etcompile.compile(model, xs[0], schedule=SEQUENCES)
    for chunk in (1, T - 1):
        with pytest.raises(etcompile.UnsupportedError, match="cannot be stored"):
            step.scan_value_and_grad(loss, chunk=chunk)(xs, targets)
    assert not np.any(step.executor.live.states()["h"])


def test_nothing_learns_step_by_step():
    model, params = model_of(5)
    xs, targets = data_of(5)
    step = etcompile.compile(model, xs[0], schedule=SEQUENCES)
    with pytest.raises(etcompile.OptionError, match="value_and_grad of one step needs the traces"):
        step.value_and_grad(loss)
    with pytest.raises(etcompile.OptionError, match="learn needs the traces"):
        step.learn(loss, None)
    carry = step.init_carry()
    with pytest.raises(etcompile.OptionError, match="the gradient of one step needs the traces"):
        jax.grad(lambda p: loss(step.apply(p, carry, xs[0])[1], targets[0]))(params)
    expected = step_function(params, {"h": jnp.zeros((B, 5))}, xs[0])[1]
    assert relative_error(step(xs[0]), expected) < 1e-10


def test_random_numbers_go_on_from_sequence_to_sequence():
    model, _ = model_of(5)
    xs, targets = data_of(5)
    step = etcompile.compile(model, xs[0], algo="uoro", schedule=SEQUENCES)
    _, first = step.scan_value_and_grad(loss)(xs, targets)
    step.reset()
    _, second = step.scan_value_and_grad(loss)(xs, targets)
    assert np.abs(first["w"] - second["w"]).max() > 1e-3


def test_keep_traces_is_true_or_false():
    with pytest.raises(etcompile.OptionError, match="keep_traces must be True or False"):
        etcompile.Schedule(keep_traces=1)


def test_one_chunk_may_take_what_its_traces_would():
    model, _ = model_of(5)
    step = etcompile.compile(model, data_of(5)[0][0], schedule=SEQUENCES)
    (chunked,) = [s for s in step.executor.compiled.functions.schedules if s.name == "chunks"]
    kept = etcompile.compile(model_of(5)[0], data_of(5)[0][0]).report().trace_bytes
    most = 10 * chunked.bytes_of_a_step
    for memory, steps, size in ((most, 10, 10), (most - 2 * kept, 10, 10), (most - 2 * kept - 1, 10, 5)):
        schedule = etcompile.Schedule(keep_traces=False, memory=max(1, memory))
        assert chunked.size(schedule, steps, None) == size
