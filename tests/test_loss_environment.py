"""A loss reads ``brainstate.environ`` as a model does: at every call, and counted up in sequences."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import saiunit as u

import etcompile
from etcompile import EtcompileError, InputError

BATCH, STEPS = 2, 5
rng = np.random.default_rng(0)
XS, YS = jnp.asarray(rng.normal(size=(STEPS, BATCH, 3))), jnp.asarray(rng.normal(size=(STEPS, BATCH, 4)))
W = jnp.asarray(rng.normal(size=(3, 4)))
environ = brainstate.environ


class Net(brainstate.nn.Module):
    """A leaky tanh state that may read the time."""

    def __init__(self, timed):
        super().__init__()
        self.w, self.timed = brainstate.ParamState(W), timed

    def init_state(self, batch_size=None):
        self.h = brainstate.HiddenState(jnp.zeros((batch_size, 4)))

    def update(self, x):
        shift = jnp.sin(environ.get("t") / u.ms) if self.timed else 0.0
        self.h.value = jnp.tanh(0.9 * self.h.value + x @ self.w.value + shift)
        return self.h.value


@pytest.fixture(scope="module", params=[False, True], ids=["alone", "beside a model that reads the time"])
def step(request):
    with environ.context(t=0.0 * u.ms, i=0, dt=0.5 * u.ms):
        return etcompile.compile(Net(request.param), XS[0], batch_size=BATCH)


@pytest.fixture(autouse=True)
def _start(step):
    step.params = {"w": W}
    step.reset()
    with environ.context(dt=0.5 * u.ms):
        yield


def rate(i, t):
    return 1.0 + 0.1 * i + jnp.cos(t)


def weighs(out, y):
    """A weight from the count and time of the step."""
    return rate(environ.get("i"), environ.get("t") / u.ms) * jnp.mean((out - y) ** 2)


def given(out, y, i, t):
    """The same, told."""
    return rate(i, t) * jnp.mean((out - y) ** 2)


COUNT, TIMES = jnp.arange(3, 3 + STEPS), 2.0 + 0.5 * jnp.arange(STEPS)
START = {"i": 3, "t": 2.0 * u.ms}


def same(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), found, wanted)


@pytest.mark.parametrize(
    ("how", "every_step"),
    [({"chunk": 1}, False), ({"chunk": 2}, False), ({"chunk": 2}, True), ({"progress": True}, False)],
)
def test_sequences_count_up_what_a_loss_reads(step, how, every_step):
    around = {"i": COUNT, "t": TIMES * u.ms} if every_step else START
    call = {k: how[k] for k in how if k == "progress"}
    options = {k: how[k] for k in how if k == "chunk"}
    with environ.context(**around):
        found = step.scan_value_and_grad(weighs, **options)(XS, YS, **call)
        step.reset()
        same(found, step.scan_value_and_grad(given, **options)(XS, YS, COUNT, TIMES, **call))


def test_a_first_call_with_a_value_for_each_step(step):
    def loss(out, y):
        return weighs(out, y)

    with environ.context(i=COUNT, t=TIMES * u.ms):
        found = step.scan_value_and_grad(loss)(XS, YS)
        step.reset()
        same(found, step.scan_value_and_grad(given)(XS, YS, COUNT, TIMES))


def test_a_first_learning_call_with_a_value_for_each_step(step):
    def loss(out, y):
        return weighs(out, y)

    losses = []
    for fn, args in ((loss, ()), (given, (COUNT, TIMES))):
        step.params = {"w": W}
        step.reset()
        with environ.context(i=COUNT, t=TIMES * u.ms):
            losses.append(step.learn(fn, optax.sgd(0.1))(XS, YS, *args))
    same(*losses)


def test_single_steps_read_what_is_around_the_call(step):
    found, wanted = [], []
    for fn, args, results in ((weighs, (), found), (given, (COUNT, TIMES), wanted)):
        step.reset()
        for k in range(STEPS):
            with environ.context(i=COUNT[k], t=TIMES[k] * u.ms):
                results.append(step.value_and_grad(fn)(XS[k], YS[k], *(a[k] for a in args)))
    same(found, wanted)


def test_python_numbers_are_inputs_as_well(step):
    """``i`` and ``t`` are never part of a compilation."""
    before = len(step.executor.compilation.jitted)
    for k in range(STEPS):
        with environ.context(i=k, t=k * 0.5 * u.ms):
            step.value_and_grad(weighs)(XS[k], YS[k])
    assert len(step.executor.compilation.jitted) <= before + 1


@pytest.mark.parametrize(
    ("how", "callback"),
    [({}, None), ({"update_every": 2}, None), ({"update_every": 2}, lambda steps, losses: None)],
)
def test_learn_counts_up_what_a_loss_reads(step, how, callback):
    def run(fn, *args):
        step.params = {"w": W}
        step.reset()
        with environ.context(**START):
            losses = step.learn(fn, optax.sgd(0.1), **how)(XS, YS, *args, callback=callback)
        return losses, step.params

    same(run(weighs), run(given, COUNT, TIMES))


def test_inside_a_loop_of_brainstate(step):
    def run(fn, told):
        step.reset()

        def one(k):
            with environ.context(i=COUNT[k], t=TIMES[k] * u.ms):
                return step.value_and_grad(fn)(XS[k], YS[k], *((COUNT[k], TIMES[k]) if told else ()))

        return brainstate.transform.for_loop(one, jnp.arange(STEPS))

    same(run(weighs, False), run(given, True))


def test_arrays_are_inputs_and_switches_are_followed(step):
    def scaled(out, y):
        strength = environ.get("strength")
        return jnp.mean((out - y) ** 2) * (jnp.sum(strength) if environ.get("fit", False) else 0.5)

    def run():
        step.reset()
        return step.scan_value_and_grad(scaled, chunk=1)(XS, YS)[0]

    with environ.context(i=0, t=0.0 * u.ms):
        with environ.context(fit=True, strength=jnp.ones(2)):
            first = run()
        with environ.context(fit=True, strength=jnp.full(2, 3.0)):
            same(run(), 3 * first)
        with environ.context(fit=False, strength=jnp.ones(2)):
            same(run(), first / 4)
        with environ.context(fit=True, strength=jnp.ones(2)):
            same(run(), first)
        with environ.context(fit=True, strength=2.0):
            same(run(), first)


def test_learn_follows_a_switch_of_the_loss(step):
    def switched(out, y):
        return jnp.mean((out - y) ** 2) * (1.0 if environ.get("fit", True) else 2.0)

    learner = step.learn(switched, optax.sgd(0.0))
    losses = []
    for fit in (True, False, True):
        step.reset()
        with environ.context(fit=fit, **START):
            losses.append(learner(XS, YS))
    same(losses[1], 2 * losses[0])
    same(losses[2], losses[0])


def test_windows_count_as_well():
    with environ.context(**START):
        step = etcompile.compile(Net(False), XS[0], batch_size=BATCH, algo="bptt", window=2)
        found = step.scan_value_and_grad(weighs)(XS, YS)
        step.reset()
        same(found, step.scan_value_and_grad(given)(XS, YS, COUNT, TIMES))


def test_the_gradient_is_that_of_backpropagation_in_one_step(step):
    with environ.context(**START):
        _, grads = step.value_and_grad(weighs)(XS[0], YS[0])
        shift = jnp.sin(2.0) if step.executor.live.module.timed else 0.0
        wanted = jax.grad(lambda w: given(jnp.tanh(XS[0] @ w + shift), YS[0], 3, 2.0))(W)
    np.testing.assert_allclose(grads["w"], wanted, rtol=1e-10)


def test_what_is_not_set_or_does_not_fit_is_named(step):
    def noisy(out, y):
        return environ.get("noise") * jnp.mean(out)

    run = step.scan_value_and_grad(noisy)
    with environ.context(**START):
        with pytest.raises(
            EtcompileError, match=r"test_loss_environment.py:\d+(.|\n)*'noise'(.|\n)*environ.set"
        ):
            run(XS, YS)
        with environ.context(noise=jnp.ones(())):
            run(XS, YS)
        with (
            environ.context(noise=jnp.ones(STEPS + 1)),
            pytest.raises(InputError, match=r"'noise'(.|\n)*each of the 5 steps"),
        ):
            run(XS, YS)
