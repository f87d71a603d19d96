"""Costs and synthetic gradients take the losses that ``value_and_grad`` takes, and refuse the same ones."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import etcompile
from etcompile import InputError

BATCH, STEPS, WINDOW = 2, 7, 3
rng = np.random.default_rng(0)
XS, YS = jnp.asarray(rng.normal(size=(STEPS, BATCH, 3))), jnp.asarray(rng.normal(size=(STEPS, BATCH, 4)))
W, V = jnp.asarray(rng.normal(size=(3, 4))), jnp.asarray(rng.normal(size=4))


class Net(brainstate.nn.Module):
    """A state that is the output as well."""

    def __init__(self, leaf=lambda v: v):
        super().__init__()
        self.w, self.v = brainstate.ParamState(leaf(W)), brainstate.ParamState(leaf(V))
        self.leaf = leaf

    def init_state(self, batch_size=None):
        self.h = brainstate.ShortTermState(self.leaf(jnp.zeros((batch_size, 4))))

    def update(self, x):
        self.h.value = jnp.tanh(self.v.value * self.h.value + x @ self.w.value)
        return self.h.value


def shape_of(value):
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def same(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), found, wanted)


def square(out, y):
    return jnp.mean((out - y) ** 2)


@pytest.mark.parametrize("leaf", [lambda v: v, shape_of], ids=["arrays", "shapes"])
@pytest.mark.parametrize("batch", [None, 5])
@pytest.mark.parametrize("run", [{}, {"steps": 6, "chunk": 2}], ids=str)
def test_the_cost_of_a_loss_that_reads_the_state_is_that_of_the_output(leaf, batch, run):
    net = Net(leaf)
    net.init_state(BATCH)
    step = etcompile.compile(net, XS[0])
    wanted = step.cost(loss_fn=lambda o: jnp.mean(o**2), batch=batch, **run)
    found = step.cost(loss_fn=lambda o: jnp.mean(net.h.value**2), batch=batch, **run)
    assert found.flops == pytest.approx(wanted.flops, rel=0.1)
    assert found.peak_bytes == pytest.approx(wanted.peak_bytes, rel=0.1)
    weights = step.cost(loss_fn=lambda o: jnp.mean(o**2) + jnp.sum(net.w.value**2), batch=batch, **run)
    assert weights.flops > wanted.flops
    aux = step.cost(loss_fn=lambda o: (jnp.mean(o**2), {"out": o}), has_aux=True, batch=batch, **run)
    assert aux.flops == pytest.approx(wanted.flops, rel=0.05)
    assert aux.peak_bytes > wanted.peak_bytes


def test_a_cost_refuses_the_losses_that_a_gradient_refuses():
    step = etcompile.compile(Net(), XS[0], batch_size=BATCH)
    for loss, targets, text in (
        (square, (), r"0 targets(.|\n)*square\(out, y\)"),
        (square, (YS[0], YS[0]), "2 targets"),
        (square, (YS,), None),
        (lambda o, y: o - y, (YS[0],), "one number per step"),
        (square, (jnp.ones((BATCH, 3)),), r"target 0 float64\[2, 3\]"),
        (square, ("spikes",), "no array"),
        ("square", (), "must be a function"),
        (lambda o, y: o, (YS[0],), "one number per step"),
    ):
        if text is not None:
            with pytest.raises(InputError, match=text):
                step.cost(loss_fn=loss, targets=targets)
    count = brainstate.ShortTermState(jnp.zeros(()))

    def counts(out):
        count.value = count.value + 1
        return jnp.mean(out) * count.value

    assert step.cost(loss_fn=counts, steps=3).flops > 0
    assert count.value == 0
    assert np.all(step.executor.live.module.h.value == 0)


def windows(**options):
    net = Net()
    return net, etcompile.compile(net, XS[0], batch_size=BATCH, **options)


@pytest.mark.parametrize("stream", [False, True])
def test_synthetic_gradients_take_losses_that_read_states_weights_a_count_and_the_time(stream):
    """Predictors that say zero leave the gradient of windows of backpropagation."""

    def run(make):
        net, step = windows(**make)
        count = brainstate.ShortTermState(jnp.zeros(()))

        def loss(out, y):
            count.value = count.value + 1.0
            penalty = jnp.sum(net.h.value**2) + jnp.sum(net.w.value**2)
            time = brainstate.environ.get("i")
            return square(out, y) + count.value * penalty * (1 + time), {"norm": penalty, "time": time}

        with brainstate.environ.context(i=2):
            if make["algo"] == "bptt":
                found = [step.scan_value_and_grad(loss, has_aux=True)(XS, YS)]
                step.reset()
                found.append(step.scan_value_and_grad(loss, has_aux=True)(XS, YS))
            else:
                helper = etcompile.SyntheticGradient(step, loss, stream=stream, has_aux=True)
                helper.fit(XS, YS, optimizer=optax.sgd(0.0))
                assert count.value == 0
                found = [helper.scan_value_and_grad(loss)(XS, YS)]
                step.reset()
                found.append(helper.update(XS, YS))
        return found, count.value, net.h.value

    same(run({"algo": "dni", "window": WINDOW}), run({"algo": "bptt", "window": WINDOW}))


def test_predictors_are_taught_the_credit_of_states_that_the_loss_reads():
    """A penalty on the state teaches as the same penalty on the output, which is the state."""

    def run(of_state):
        net, step = windows(algo="dni", window=WINDOW)

        def loss(out, y):
            return square(net.h.value if of_state else out, y)

        helper = etcompile.SyntheticGradient(step, loss, hidden=3)
        taught = helper.fit(XS, YS, optimizer=optax.adam(0.1), epochs=3)
        return taught, helper.scan_value_and_grad(loss)(XS, YS), helper.params

    same(run(True), run(False))


def test_synthetic_gradients_refuse_the_losses_that_a_gradient_refuses():
    step = windows(algo="dni", window=WINDOW)[1]
    before = step.params, step.executor.live.states()
    for loss, text in (
        (lambda o: jnp.mean(o), "1 target"),
        (lambda o, y: o - y, "one number per step"),
        (lambda o, y: (jnp.mean(o), 1), "must return one number"),
    ):
        helper = etcompile.SyntheticGradient(step, loss)
        with pytest.raises(InputError, match=text):
            helper.fit(XS, YS, optimizer=optax.sgd(0.1))
    same((step.params, step.executor.live.states()), before)
