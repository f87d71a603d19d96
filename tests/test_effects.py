"""What a step does beside its results, prints and calls to the host, happens once per step, however the step is run."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.experimental import io_callback

import etcompile
from etcompile import ModelError

STEPS = 4
seen: list[str] = []


@pytest.fixture(autouse=True)
def double():
    seen.clear()
    with brainstate.environ.context(precision=64):
        yield


def note(name):
    def called(*values):
        seen.append(name)
        return np.float64(1.5)

    return called


class Net(brainstate.nn.Module):
    """A leaky tanh state; ``effects(h, w)`` gives a number to add to the output."""

    def __init__(self, effects):
        super().__init__()
        self.w = brainstate.ParamState(jnp.asarray(np.random.default_rng(0).normal(size=(3, 4))))
        self.effects = effects

    def init_state(self, batch_size=None):
        self.h = brainstate.HiddenState(jnp.zeros((batch_size, 4)))

    def update(self, x):
        h = jnp.tanh(0.9 * self.h.value + x @ self.w.value)
        self.h.value = h
        return h + self.effects(h, self.w.value)


NUMBER = jax.ShapeDtypeStruct((), jnp.float64)


def printed(h, w):
    jax.debug.callback(note("print"), h)
    jax.debug.callback(note("weights"), w)
    jax.debug.callback(note("nothing"))
    return 0.0


def asked(h, w):
    with_state = io_callback(note("state"), NUMBER, lax.stop_gradient(h))
    alone = io_callback(note("alone"), NUMBER)
    return with_state + alone


def ordered(h, w):
    return io_callback(note("ordered"), NUMBER, lax.stop_gradient(h), ordered=True)


def pure(h, w):
    return jax.pure_callback(note("pure"), NUMBER, lax.stop_gradient(h))


def asked_in_a_condition(h, w):
    total = lax.stop_gradient(h).sum()
    return lax.cond(total < 1e9, lambda: io_callback(note("in cond"), NUMBER, total), lambda: 0.0)


def asked_in_a_loop(h, w):
    def body(_, total):
        return total + 0.0 * io_callback(note("in loop"), NUMBER, total)

    return lax.fori_loop(0, 200, body, lax.stop_gradient(h).sum() * 0.0 + 1.5)


MODELS = {
    asked_in_a_condition: ["in cond"],
    asked_in_a_loop: ["in loop"] * 200,
    printed: ["nothing", "print", "weights"],
    asked: ["alone", "state"],
    ordered: ["ordered"],
    pure: ["pure"],
}


def squared(out, y):
    return jnp.mean((out - y) ** 2)


def by_hand(effects, xs, ys):
    offset = {printed: 0.0, asked: 3.0, ordered: 1.5, pure: 1.5}.get(effects, 1.5)
    model = Net(lambda h, w: offset)
    brainstate.nn.init_all_states(model, batch_size=2)

    def total():
        return sum(squared(model(x), y) for x, y in zip(xs, ys, strict=True))

    return next(iter(brainstate.transform.grad(total, model.states(brainstate.ParamState))().values()))


@pytest.mark.filterwarnings("ignore:chunk=3 cuts:etcompile.EtcompileWarning")
@pytest.mark.parametrize(
    ("effects", "algo"),
    [
        *((e, "d_rtrl") for e in MODELS),
        (printed, "bptt"),
        (asked, "bptt"),
        (asked, "rtrl"),
        (asked_in_a_condition, "rtrl"),
    ],
)
def test_each_effect_happens_once_per_step(effects, algo):
    rng = np.random.default_rng(1)
    xs, ys = jnp.asarray(rng.normal(size=(STEPS, 2, 3))), jnp.asarray(rng.normal(size=(STEPS, 2, 4)))
    step = etcompile.compile(Net(effects), xs[0], batch_size=2, algo=algo)
    seen.clear()

    def happened(steps):
        jax.effects_barrier()
        assert sorted(seen) == sorted(MODELS[effects] * steps)
        seen.clear()

    def over_sequence(whole=True, **options):
        step.reset()
        _, grads = step.scan_value_and_grad(squared, **options)(xs, ys)
        jax.block_until_ready(grads)
        happened(STEPS)
        if whole:
            np.testing.assert_allclose(grads["w"], by_hand(effects, xs, ys), rtol=1e-10)

    over_sequence()
    if algo != "rtrl":
        over_sequence(chunk=3, whole=algo != "bptt")
    jax.block_until_ready(step.scan(xs))
    happened(STEPS)
    jax.block_until_ready(step(xs[0]))
    happened(1)
    if algo == "bptt":
        return
    over_sequence(chunk=1)
    jax.block_until_ready(step.value_and_grad(squared)(xs[0], ys[0]))
    happened(1)
    if effects is not ordered:  # JAX itself refuses ordered effects in brainstate's loops
        jax.block_until_ready(step.learn(squared, optax.sgd(0.0))(xs, ys))
        happened(STEPS)
        grad = brainstate.transform.grad(lambda: squared(step(xs[0]), ys[0]), step.param_states)
        jax.block_until_ready(grad())
        happened(1)


def test_effects_in_inner_programs_happen_once():
    def within(h, w):
        def shown(v):
            jax.debug.callback(note("branch"), v)
            return jnp.sin(v)

        return lax.cond(jnp.sum(h) > -1e9, shown, lambda v: v, h)

    xs, ys = jnp.ones((STEPS, 2, 3)), jnp.ones((STEPS, 2, 4))
    step = etcompile.compile(Net(within), xs[0], batch_size=2)
    jax.effects_barrier()
    seen.clear()
    for chunk in (1, 2):
        step.reset()
        jax.block_until_ready(step.scan_value_and_grad(squared, chunk=chunk)(xs, ys))
        jax.effects_barrier()
        assert seen == ["branch"] * STEPS
        seen.clear()


def test_credit_that_would_pass_a_call_to_the_host_is_refused():
    def through(h, w):
        return jax.pure_callback(lambda v: 2 * v, jax.ShapeDtypeStruct(h.shape, h.dtype), h)

    def from_weights(h, w):
        return jax.pure_callback(lambda v: 2 * v, NUMBER, w.sum())

    for effects in (through, from_weights):
        with pytest.raises(
            ModelError, match=r"test_effects.py:\d+: the credit of .* pure_callback(.|\n)*stop_gradient"
        ):
            etcompile.compile(Net(effects), jnp.ones((2, 3)), batch_size=2)


def inside_of_a_condition(h):
    return lax.cond(
        h.sum() < 1e9, lambda: io_callback(note("in cond"), NUMBER, lax.stop_gradient(h)), lambda: 0.0
    )


def inside_of_a_loop(h):
    return lax.fori_loop(
        0, 200, lambda k, v: 0.99 * v * io_callback(note("in loop"), NUMBER, lax.stop_gradient(v)), h
    )


@pytest.mark.parametrize("effect", [inside_of_a_condition, inside_of_a_loop])
def test_credit_through_what_asks_the_host_inside_is_refused(effect):
    def step(params, state, x):
        h = jnp.tanh(0.9 * state["h"] + x @ params["w"])
        return {"h": h * effect(h)}, h

    model = etcompile.from_function(step, {"w": jnp.ones((3, 4))}, {"h": jnp.zeros(4)})
    with pytest.raises(ModelError, match="asks the host for values inside of it") as caught:
        etcompile.compile(model, jnp.ones(3))
    assert "test_effects.py" in str(caught.value) and "pure_callback" in str(caught.value)
    assert not seen
