"""Modules of other frameworks: gradients are those of the framework's own call, in its own pytrees, under its own names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from foreign_models import FOREIGN, draw
from numpy_evaluation import by_numpy, op_by_op
from oracles import relative_error

import etcompile
from etcompile.errors import ModelError

TOLERANCE = 1e-10
T = 5


@pytest.fixture(params=FOREIGN)
def foreign(request):
    with by_numpy():
        yield request.param()


def loss(out, y):
    return jnp.mean((out - y) ** 2)


def data(foreign):
    """Inputs and targets."""
    xs = draw(7, T, *foreign.size)
    out = jax.eval_shape(foreign.step, foreign.params, foreign.carry, xs[0])[1]
    return xs, draw(8, T, *out.shape)


def backpropagated(foreign, xs, ys):
    """The gradient of the summed losses through the framework's own calls."""

    def total(params):
        carry, losses = foreign.carry, 0.0
        for x, y in zip(xs, ys, strict=True):
            carry, out = foreign.step(params, carry, x)
            losses = losses + loss(out, y)
        return losses

    return op_by_op(jax.grad(total), foreign.params)


def compiled(foreign, algo="d_rtrl", **options):
    return etcompile.compile(foreign.model, jnp.ones(foreign.size), algo=algo, **options)


def test_one_step_equals_autodiff_and_trains(foreign):
    """The gradient has the framework's own tree, so that its optimisers take it."""
    optax = pytest.importorskip("optax")
    xs, ys = data(foreign)
    step = compiled(foreign)
    _, grads = step.value_and_grad(loss)(xs[0], ys[0])
    assert jax.tree.structure(grads) == jax.tree.structure(foreign.params)
    assert relative_error(grads, backpropagated(foreign, xs[:1], ys[:1])) < TOLERANCE
    assert foreign.names <= set(step.report().to_dict()["parameters"])
    optimiser = optax.sgd(0.1)
    updates, _ = optimiser.update(grads, optimiser.init(foreign.params), foreign.params)
    step.params = optax.apply_updates(foreign.params, updates)
    wanted = jax.tree.map(lambda p, g: p - 0.1 * g, foreign.params, grads)
    assert relative_error(step.params, wanted) < TOLERANCE
    step.value_and_grad(loss)(xs[1], ys[1])


def test_chunks_equal_step_by_step(foreign):
    xs, ys = data(foreign)
    step = compiled(foreign)
    _, one = step.scan_value_and_grad(loss, chunk=1)(xs, ys)
    step.reset()
    _, two = step.scan_value_and_grad(loss, chunk=2)(xs, ys)
    assert relative_error(two, one) < TOLERANCE


def test_exact_equals_backpropagation_through_time(foreign):
    xs, ys = data(foreign)
    step = compiled(foreign, "bptt")
    assert step.exact
    _, grads = step.scan_value_and_grad(loss)(xs, ys)
    assert relative_error(grads, backpropagated(foreign, xs, ys)) < TOLERANCE


def refused(call, *says):
    with pytest.raises(ModelError) as caught:
        call()
    for text in says:
        assert text in str(caught.value)


# -- Equinox ------------------------------------------------------------------------------------------------------------


def test_an_equinox_cell_is_taken_as_it_is():
    eqx = pytest.importorskip("equinox")
    for kind in (eqx.nn.GRUCell, eqx.nn.LSTMCell):
        cell = kind(3, 4, key=jax.random.key(0))
        step = etcompile.compile(cell, jnp.ones((2, 3)))
        assert jax.tree.structure(step.params) == jax.tree.structure(eqx.filter(cell, eqx.is_inexact_array))
        assert all(not v.any() for v in jax.tree.leaves(step.init_carry().states))
        assert etcompile.compile(cell, jnp.ones(3)).init_carry().states["carry"] is not None


def test_equinox_mistakes_are_said():
    eqx = pytest.importorskip("equinox")
    linear = eqx.nn.Linear(3, 3, key=jax.random.key(0))
    refused(lambda: etcompile.compile(linear, jnp.ones(3)), "carry", "etcompile.from_equinox(module, carry")
    refused(
        lambda: etcompile.from_equinox(linear, jnp.zeros(3)), "how Linear is called", "call(module, carry, x)"
    )
    refused(lambda: etcompile.from_equinox(eqx.nn.GRUCell, jnp.zeros(3)), "an equinox.Module", "make one")
    refused(lambda: etcompile.from_equinox(3, jnp.zeros(3)), "a int")
    model = etcompile.from_equinox(linear, jnp.zeros(3), call=lambda m, c, x: m(x))
    refused(lambda: etcompile.compile(model, jnp.ones(3)), "two values", "call(module, carry, x)")


def test_equinox_modules_of_shapes_are_analysed():
    eqx = pytest.importorskip("equinox")
    cell = eqx.filter_eval_shape(eqx.nn.GRUCell, 3, 4, key=jax.random.key(0))
    step = etcompile.compile(etcompile.from_equinox(cell, jnp.zeros((2, 4))), jnp.ones((2, 3)))
    assert step.cost(batch=100).trace_bytes > 0
