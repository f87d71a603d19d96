"""What a model reads in ``brainstate.environ`` is what it is around the call, not what it was when the model was compiled."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import saiunit as u
from brainstate import environ

import etcompile
from etcompile import EnvironmentWarning, InputError, ModelError, UnsupportedError

DT = 0.1 * u.ms
STEPS = 5


@pytest.fixture(autouse=True)
def double():
    with environ.context(precision=64):
        yield


class Clocked(brainstate.nn.Module):
    """A state that is moved by the time and number of the step, and that holds still for a while after it was large."""

    def __init__(self):
        super().__init__()
        self.w = brainstate.ParamState(jnp.asarray(np.random.default_rng(0).normal(size=(3, 4))))

    def init_state(self, batch_size=None):
        self.h = brainstate.HiddenState(jnp.zeros((batch_size, 4)))
        self.last = brainstate.ShortTermState(jnp.full((batch_size, 4), -10.0))

    def update(self, x):
        t, i = environ.get("t") / u.ms, environ.get("i")
        free = t - self.last.value > 0.15
        h = jnp.where(free, 0.7 * self.h.value + jnp.sin(3 * t) * (x @ self.w.value), self.h.value)
        self.h.value = h + 0.1 * (i % 3)
        self.last.value = jnp.where(jnp.abs(h) > 0.5, t, self.last.value)
        return self.h.value


def at(i):
    return environ.context(i=i, t=i * DT, dt=DT)


def compiled(model, *args, batch=2, **kwargs):
    with at(0):
        return etcompile.compile(model, *args, batch_size=batch, **kwargs)


def data(steps=STEPS):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(steps, 2, 3))), jnp.asarray(rng.normal(size=(steps, 2, 4)))


def squared(out, y):
    return jnp.mean((out - y) ** 2)


def by_hand(xs, ys, first=0):
    """Outputs, losses and the gradient by backpropagation of the model itself, every step in its own environment."""
    model = Clocked()
    brainstate.nn.init_all_states(model, batch_size=2)

    def total():
        outs = []
        for k in range(len(xs)):
            with at(first + k):
                outs.append(model(xs[k]))
        losses = jnp.stack([squared(o, y) for o, y in zip(outs, ys, strict=True)])
        return losses.sum(), (jnp.stack(outs), losses)

    gradient, (outs, losses) = brainstate.transform.grad(
        total, model.states(brainstate.ParamState), has_aux=True
    )()
    return outs, losses, next(iter(gradient.values()))


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_a_call_of_the_step_reads_the_time_around_it():
    xs, ys = data()
    step = compiled(Clocked(), xs[0])
    outs = []
    for k, x in enumerate(xs):
        with at(k + 2):
            outs.append(step(x))
    close(jnp.stack(outs), by_hand(xs, ys, first=2)[0])


def test_sequences_count_from_the_start_that_is_given():
    xs, ys = data()
    step = compiled(Clocked(), xs[0])
    wanted = by_hand(xs, ys, first=3)
    with at(3):
        close(step.scan(xs), wanted[0])
        step.reset()
        close(step.scan(xs, progress=True), wanted[0])
        step.reset()
        close(step(etcompile.MultiStepData(xs)), wanted[0])
        for chunk in (1, 2, "auto"):
            step.reset()
            losses, grads = step.scan_value_and_grad(squared, chunk=chunk)(xs, ys)
            close(losses, wanted[1])
            close(grads["w"], wanted[2])
        step.reset()
        losses, grads = step.scan_value_and_grad(squared, chunk=2)(xs, ys, progress=True)
        close(losses, wanted[1])
        close(grads["w"], wanted[2])
        step.reset()
        learner = step.learn(squared, optax.sgd(0.0))
        close(learner(xs, ys), wanted[1])
        step.reset()
        close(learner(xs, ys, progress=True), wanted[1])
    with at(7):
        step.reset()
        close(learner(xs, ys), by_hand(xs, ys, first=7)[1])
        step.reset()
        total = 0
        for k, (x, y) in enumerate(zip(xs, ys, strict=True)):
            with at(7 + k):
                total += step.value_and_grad(squared)(x, y)[1]["w"]
        close(total, by_hand(xs, ys, first=7)[2])


def test_windows_count_as_well():
    xs, ys = data()
    step = compiled(Clocked(), xs[0], algo="bptt")
    with at(1):
        losses, grads = step.scan_value_and_grad(squared)(xs, ys)
    close(losses, by_hand(xs, ys, first=1)[1])
    close(grads["w"], by_hand(xs, ys, first=1)[2])


def test_the_time_of_every_step_can_be_given():
    xs, ys = data()
    step = compiled(Clocked(), xs[0])
    with environ.context(i=jnp.arange(STEPS) + 4, t=(jnp.arange(STEPS) + 4) * DT):
        close(step.scan(xs), by_hand(xs, ys, first=4)[0])
        step.reset()
        learner = step.learn(squared, optax.sgd(0.0))
        close(learner(xs, ys), by_hand(xs, ys, first=4)[1])
    with environ.context(i=jnp.arange(3), t=jnp.arange(3) * DT), pytest.raises(InputError, match="entry 'i'"):
        step.scan(xs)


def test_apply_reads_the_environment_of_the_loop_around_it():
    xs, ys = data()
    step = compiled(Clocked(), xs[0])
    params = {"w": step.param_states["w"].value}

    @jax.jit
    def run(params, xs, first):
        def body(carry, item):
            x, k = item
            with environ.context(i=first + k, t=(first + k) * DT):
                return step.apply(params, carry, x)

        with at(0):
            carry = step.init_carry()
        return jax.lax.scan(body, carry, (xs, jnp.arange(STEPS)))[1]

    for first in (0, 5):
        close(run(params, xs, first), by_hand(xs, ys, first=first)[0])


def test_a_differentiated_step_reads_the_time_around_it():
    xs, ys = data()
    step = compiled(Clocked(), xs[0])

    def total():
        losses = []
        for k, (x, y) in enumerate(zip(xs, ys, strict=True)):
            with at(k):
                losses.append(squared(step(x), y))
        return sum(losses)

    close(brainstate.transform.grad(total, step.param_states)()["w"], by_hand(xs, ys)[2])


def leaky(params, state, x):
    h = environ.get("scale") * state["h"] + environ.get("gain", 1.0) * (x @ params["w"])
    return {"h": h}, h


def function_model():
    return etcompile.from_function(leaky, {"w": jnp.ones((3, 4))}, {"h": jnp.zeros((2, 4))})


def test_arrays_that_a_function_reads_are_inputs():
    xs, _ = data()
    with environ.context(scale=jnp.asarray(0.5)):
        step = etcompile.compile(function_model(), xs[0])
    with environ.context(scale=jnp.asarray([0.5, 0.1, 0.3, 0.2, 0.4])):
        outs = step.scan(xs)
    h, wanted = 0, []
    for scale, x in zip([0.5, 0.1, 0.3, 0.2, 0.4], xs, strict=True):
        h = scale * h + x @ jnp.ones((3, 4))
        wanted.append(h)
    close(outs, jnp.stack(wanted))
    assert step.executor.compilation is step.executor.compilation
    made = step.executor.compilations.made
    with environ.context(scale=jnp.asarray(0.9)):
        step(xs[0])
    assert step.executor.compilations.made == made


def test_a_number_that_changed_is_compiled_for_and_kept():
    xs, _ = data()
    with environ.context(scale=0.5):
        step = etcompile.compile(function_model(), xs[0])
        first = step.executor.compilation
    with environ.context(scale=0.25):
        step(xs[0])
        close(step(xs[0]), 1.25 * (xs[0] @ jnp.ones((3, 4))))
    step.reset()
    with environ.context(scale=0.5):
        close(step(xs[0]), xs[0] @ jnp.ones((3, 4)))
        assert step.executor.compilation is first
    step.reset()
    with environ.context(scale=0.5, gain=2.0):  # it was asked for, and was not there
        close(step(xs[0]), 2 * (xs[0] @ jnp.ones((3, 4))))
    assert step.executor.compilations.made == 3


def test_what_the_model_never_reads_compiles_nothing():
    xs, _ = data()
    with environ.context(scale=0.5):
        step = etcompile.compile(function_model(), xs[0])
        with environ.context(other=3, fit=True, epoch=jnp.ones(2)):
            step(xs[0])
    assert step.executor.compilations.made == 1


def test_an_array_that_the_model_needs_as_a_size_is_compiled_for():
    def rounds(params, state, x):
        h = state["h"]
        for _ in range(int(environ.get("rounds"))):
            h = 0.5 * h + x @ params["w"]
        return {"h": h}, h

    model = etcompile.from_function(rounds, {"w": jnp.ones((3, 4))}, {"h": jnp.zeros((2, 4))})
    xs, _ = data()
    y = xs[0] @ jnp.ones((3, 4))
    with environ.context(rounds=jnp.asarray(2)):
        step = etcompile.compile(model, xs[0])
        close(step(xs[0]), 1.5 * y)
    step.reset()
    with environ.context(rounds=jnp.asarray(1)):
        close(step(xs[0]), y)


class Dropped(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.drop = brainstate.nn.GRUCell(3, 4), brainstate.nn.Dropout(0.5)

    def update(self, x):
        return self.drop(self.cell(x))


def test_dropout_follows_fit():
    xs, ys = data()
    model = Dropped()
    with environ.context(fit=True):
        step = etcompile.compile(model, xs[0], batch_size=2)
        trained = step.scan(xs)
        assert (trained == 0).any()
    step.reset()
    with environ.context(fit=False):
        outs = step.scan(xs)
        assert not (outs == 0).any()
        brainstate.nn.init_all_states(model, batch_size=2)
        close(outs, jnp.stack([model(x) for x in xs]))
        step.reset()
        step.scan_value_and_grad(squared)(xs, ys)
        carry = step.init_carry()
        out = step.apply({p: s.value for p, s in step.param_states.items()}, carry, xs[0])[1]
        assert not (out == 0).any()
    step.reset()
    with environ.context(fit=True):
        learner = step.learn(squared, optax.sgd(0.0))
        learner(xs, ys)
        assert (step.scan(xs) == 0).any()
    with environ.context(fit=False):
        learner(xs, ys)
        assert not (step.scan(xs) == 0).any()
    assert step.executor.compilations.made == 2


def test_a_switch_in_a_transformation_is_followed():
    xs, _ = data()
    with environ.context(fit=True):
        step = etcompile.compile(Dropped(), xs[0], batch_size=2)

    @brainstate.transform.jit
    def evaluate(xs):
        with environ.context(fit=False):
            return brainstate.transform.for_loop(step, xs)

    assert not (evaluate(xs) == 0).any()


def test_traces_that_a_switch_gives_up_are_said():
    class Gated(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = brainstate.ParamState(jnp.ones((3, 4)))

        def init_state(self, batch_size=None):
            self.h = brainstate.HiddenState(jnp.zeros((batch_size, 4)))

        def update(self, x):
            y = x @ self.w.value
            self.h.value = jnp.tanh(0.5 * self.h.value + y) if environ.get("fit") else 0.5 * self.h.value + y
            return self.h.value

    xs, ys = data()
    with environ.context(fit=True):
        step = etcompile.compile(Gated(), xs[0], batch_size=2)
        step.value_and_grad(squared)(xs[0], ys[0])
    with environ.context(fit=False):
        with pytest.warns(EnvironmentWarning, match="'fit'"):
            step(xs[0])
        step.reset()
    with environ.context(fit=True):
        step(xs[0])


def test_a_switch_that_is_no_longer_set_stays_where_the_model_needs_it():
    class Timed(Clocked):
        def update(self, x):
            return super().update(x) * (environ.get("dt") / DT)

    xs, ys = data()
    step = compiled(Timed(), xs[0])
    with environ.context(i=2, t=2 * DT):
        close(step.scan(xs), by_hand(xs, ys, first=2)[0])
        step.reset()
        close(step.learn(squared, optax.sgd(0.0))(xs, ys), by_hand(xs, ys, first=2)[1])
    assert step.executor.compilations.made == 1
    with at(0):
        step = compiled(Clocked(), xs[0])  # it does not read dt, but time cannot advance without
    with environ.context(i=0, t=0 * u.ms), pytest.raises(InputError, match=r"dt=0.1"):
        step.scan(xs)


def test_a_missing_entry_is_named():
    xs, _ = data()
    step = compiled(Clocked(), xs[0])
    with pytest.raises(ModelError, match=r"'t'.*not set(.|\n)*brainstate.environ.set\(t="):
        step(xs[0])
    with pytest.raises(ModelError, match=r"test_environment.py:\d+(.|\n)*'t'.*not set"):
        etcompile.compile(Clocked(), xs[0], batch_size=2)
    with pytest.raises(ModelError, match=r"'fit'.*not set(.|\n)*brainstate.environ.set\(fit="):
        etcompile.compile(Dropped(), xs[0], batch_size=2)
    with pytest.raises(ModelError, match=r"'scale'.*not set"):
        etcompile.compile(function_model(), xs[0])


def test_a_reset_for_another_batch_size_needs_no_environment():
    xs, ys = data()
    step = compiled(Clocked(), xs[0], batch=2)
    step.reset(batch_size=1)
    step.reset(batch_size=2)
    with at(0):
        close(step.scan(xs), by_hand(xs, ys)[0])


def test_a_python_if_on_a_traced_value_names_where():
    def branching(params, state, x):
        h = state["h"] + x @ params["w"]
        if h.sum() > 0:
            h = -h
        return {"h": h}, h

    class Branching(Clocked):
        def update(self, x):
            if environ.get("t") > 1 * u.ms:
                return self.h.value
            return super().update(x)

    model = etcompile.from_function(branching, {"w": jnp.ones((3, 4))}, {"h": jnp.zeros((2, 4))})
    xs, _ = data()
    with pytest.raises(ModelError, match=r"test_environment.py:\d+(.|\n)*jnp.where"):
        etcompile.compile(model, xs[0])
    with pytest.raises(ModelError, match=r"test_environment.py:\d+(.|\n)*jnp.where"):
        compiled(Branching(), xs[0])


def test_a_step_of_64_bits_is_refused_where_jax_makes_none():
    def leaky(params, state, x):
        h = jnp.tanh(0.9 * state["h"] + x @ params["w"])
        return {"h": h}, h

    x = jnp.ones((2, 3))
    model = etcompile.from_function(leaky, {"w": jnp.ones((3, 4))}, {"h": jnp.zeros((2, 4))})
    step = etcompile.compile(model, x)
    gradient = step.value_and_grad(jnp.sum)
    losses, _ = gradient(x)
    step.reset()
    with environ.context(precision=32):
        for call in (lambda: step(x), lambda: gradient(x), lambda: step.scan(x[None])):
            with pytest.raises(UnsupportedError, match=r"jax_enable_x64 is False.*\n.*\n.*precision=32"):
                call()
    assert gradient(x)[0] == losses
