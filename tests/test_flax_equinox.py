"""Modules of other frameworks: gradients are those of the framework's own call, in its own pytrees, under its own names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from foreign_models import FOREIGN, draw
from numpy_evaluation import by_numpy
from numpy_gradients import grad
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

    return grad(total, foreign.params)


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


def test_a_state_of_equinox_is_a_carry():
    eqx = pytest.importorskip("equinox")

    class Leaky(eqx.Module):
        held: eqx.nn.StateIndex
        into: eqx.nn.Linear

        def __init__(self):
            self.held = eqx.nn.StateIndex(jnp.zeros(4))
            self.into = eqx.nn.Linear(3, 4, key=jax.random.key(0))

        def __call__(self, x, state):
            h = jnp.tanh(0.5 * state.get(self.held) + self.into(x))
            return h, state.set(self.held, h)

    net, state = eqx.nn.make_with_state(Leaky)()
    model = etcompile.from_equinox(net, state, call=lambda net, state, x: net(x, state)[::-1])
    with by_numpy():
        step = etcompile.compile(model, jnp.ones(3))
        assert step.exact
        first, second = step(jnp.ones(3)), step(jnp.ones(3))
    assert relative_error(second, jnp.tanh(0.5 * first + net.into(jnp.ones(3)))) < TOLERANCE


# -- Flax NNX -----------------------------------------------------------------------------------------------------------


def test_nnx_modules_are_taken_as_they_are():
    nnx = pytest.importorskip("flax.nnx")
    cell = nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0))
    for model in (cell, nnx.RNN(cell)):
        step = etcompile.compile(model, jnp.ones((2, 3)))
        assert jax.tree.structure(step.params) == jax.tree.structure(nnx.state(model, nnx.Param))
        carry = jax.tree.leaves(step.init_carry().states["carry"])
        assert [v.shape for v in carry] == [(2, 4)] * 2 and not any(v.any() for v in carry)


def test_nnx_optimisers_take_the_gradients():
    nnx, optax = pytest.importorskip("flax.nnx"), pytest.importorskip("optax")
    cell = nnx.SimpleCell(3, 4, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    step = etcompile.compile(cell, jnp.ones((2, 3)))
    optimiser = nnx.Optimizer(cell, optax.sgd(0.1), wrt=nnx.Param)
    with by_numpy():
        _, grads = step.value_and_grad(lambda out: jnp.sum(out**2))(jnp.ones((2, 3)))
    before = jax.tree.map(jnp.copy, step.params)
    wanted = jax.tree.map(lambda p, g: p - 0.1 * g, before, grads)
    optimiser.update(cell, grads)
    step.params = nnx.state(cell, nnx.Param)
    assert relative_error(step.params, wanted) < TOLERANCE
    optimiser.update(cell, grads)  # changes the module in place, and not the step
    assert relative_error(step.params, wanted) < TOLERANCE
    nnx.update(cell, before)
    assert relative_error(nnx.state(cell, nnx.Param), before) == 0.0


def _counting(nnx):
    class Counting(nnx.Module):
        """A leaky state in a variable, statistics and noise that outlast a sequence."""

        def __init__(self, rngs):
            self.into = nnx.Linear(3, 4, param_dtype=jnp.float64, rngs=rngs)
            self.h = nnx.Variable(jnp.zeros((2, 4)))
            self.mean = nnx.BatchStat(jnp.zeros(()))
            self.noise = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            self.mean.value = 0.9 * self.mean.value + 0.1 * jnp.mean(x)
            self.h.value = jnp.tanh(0.5 * self.h.value + self.into(x))
            return self.noise(self.h.value)

    return Counting(nnx.Rngs(0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_variables_of_nnx_go_on_and_lasting_ones_outlast_a_reset():
    nnx = pytest.importorskip("flax.nnx")
    model, x = _counting(nnx), jnp.ones((2, 3))
    with by_numpy():
        step = etcompile.compile(model, x)
        outs = [step(x), step(x)]
        assert relative_error(outs, [model(x), model(x)]) < TOLERANCE  # the module itself, with its own noise
        assert step.report().to_dict()["parameters"]["into.kernel"]["groups"] == ("g0",)
        step.reset()
        state = step.executor.live.states()
        assert not state["variables"]["h"].value.any()
        assert relative_error(state["lasting"]["mean"].value, model.mean.value) < TOLERANCE
        step.reset(batch_size=5)
        assert step(jnp.ones((5, 3))).shape == (5, 4)
        assert float(step.executor.live.states()["lasting"]["mean"].value) == pytest.approx(0.271)


def test_nnx_mistakes_are_said():
    nnx = pytest.importorskip("flax.nnx")
    cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))

    class Wrapped(nnx.Module):
        def __init__(self):
            self.cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))

        def __call__(self, carry, x):
            return self.cell(carry, x)[1]

    class Writing(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(3))
            self.h = nnx.Variable(jnp.zeros(3))

        def __call__(self, x):
            self.w[...] = self.w[...] + 1.0
            return self.w[...] * x

    refused(
        lambda: etcompile.compile(Wrapped(), jnp.ones((2, 3))), "carry", "etcompile.from_nnx(model, carry)"
    )
    model = etcompile.from_nnx(Wrapped(), jnp.zeros((2, 4)))
    refused(lambda: etcompile.compile(model, jnp.ones((2, 3))), "two values", "(new_carry, out)")
    refused(lambda: etcompile.compile(Writing(), jnp.ones(3)), "writes its trained variable w")
    refused(lambda: etcompile.from_nnx(nnx.GRUCell, jnp.zeros(3)), "a flax.nnx.Module", "make one")
    refused(lambda: etcompile.from_nnx(nnx.RNN(cell, reverse=True), jnp.zeros((2, 4))), "backwards in time")


# -- Flax linen ---------------------------------------------------------------------------------------------------------


def test_collections_of_linen_go_on_and_statistics_outlast_a_reset():
    nn = pytest.importorskip("flax.linen")

    class Leaky(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = self.variable("memory", "h", jnp.zeros, (2, 4))
            mean = self.variable("batch_stats", "mean", jnp.zeros, ())
            mean.value = 0.9 * mean.value + 0.1 * jnp.mean(x)
            h.value = jnp.tanh(0.5 * h.value + nn.Dense(4, param_dtype=jnp.float64)(x))
            return h.value

    module, x = Leaky(), jnp.ones((2, 3))
    variables = module.init(jax.random.key(0), x)
    with by_numpy():
        step = etcompile.compile(etcompile.from_linen(module, variables), x)
        assert step.exact
        wanted, _ = module.apply(variables, x, mutable=["memory", "batch_stats"])
        assert relative_error(step(x), wanted) < TOLERANCE
        step.reset()
        state = step.executor.live.states()
        assert relative_error(state["variables"]["memory"]["h"], variables["memory"]["h"]) == 0.0
        assert float(state["lasting"]["batch_stats"]["mean"]) == pytest.approx(0.19)


def test_linen_mistakes_are_said():
    nn = pytest.importorskip("flax.linen")
    cell = nn.GRUCell(4)
    refused(
        lambda: etcompile.compile(cell, jnp.ones((2, 3))),
        "variables",
        "etcompile.from_linen(module, variables, carry)",
    )
    refused(lambda: etcompile.from_linen(cell, jnp.zeros((2, 4))), "module.init")
    refused(lambda: etcompile.from_linen(cell, {"kernel": 1.0}), "['kernel']", "module.init")
    refused(lambda: etcompile.from_linen(nn.GRUCell, {"params": {}}), "a flax.linen.Module", "make one")
    refused(lambda: etcompile.from_linen(nn.RNN(cell, reverse=True), {"params": {}}), "backwards in time")
