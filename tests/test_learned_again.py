"""Calls of a learner in a row: the short way gives what calls in full give, and ends where something is another."""

from __future__ import annotations

import copy

import brainstate
import jax
import jax.numpy as jnp
import optax
import pytest
from test_reset import B, draw, fresh, same, squared

import etcompile
from etcompile.errors import CarryError, ForeignWriteWarning

XS, YS = draw(10, 6, B, 3), draw(11, 6, B, 4)


class Watched:
    """A learner, and how many of its calls were made in full."""

    def __init__(self, step, loss=squared, optimizer=None):
        self.step, self.full = step, 0
        self.learner = step.learn(loss, optimizer or optax.adam(1e-2))
        learn = self.learner._learn
        self.learner._learn = lambda *args: (setattr(self, "full", self.full + 1), learn(*args))[1]

    def __call__(self, t, n=1, **others):
        return self.learner(XS[t : t + n], YS[t : t + n], **others)

    def in_full(self, *args, **kwargs):
        before = self.full
        self(*args, **kwargs)
        return self.full > before


@pytest.mark.by_xla
def test_step_by_step_is_the_sequence():
    one, whole = Watched(fresh()), Watched(fresh())
    losses = jnp.concatenate([one(t) for t in range(len(XS))])
    same(losses, whole(0, len(XS)))
    same(one.step.params, whole.step.params)
    same(one.step.traces, whole.step.traces)
    same(one.learner.saved_states()["optimizer"].value, whole.learner.saved_states()["optimizer"].value)
    assert one.full < len(XS) and whole.full == 1


@pytest.mark.by_xla
def test_it_goes_on_from_what_others_put_in():
    def changed(step, k):
        if k == 1:
            step.params = {path: 2 * value for path, value in step.params.items()}
        if k == 2:
            step.reset()
        if k == 3:
            step(XS[1])
        if k == 4:
            step.value_and_grad(squared)(XS[2], YS[2])

    def trained(short):
        watched, losses = Watched(fresh()), []
        for k in range(6):
            changed(watched.step, k)
            for t in range(4):
                if not short:
                    watched.learner._again = None
                losses.append(watched(t))
        return losses, watched.step.params, watched.step.traces, watched.full

    (*short, few), (*full, all_of_them) = trained(True), trained(False)
    same(short, full)
    assert few < all_of_them == 24


@pytest.mark.by_xla
def test_it_is_in_full_where_something_is_another():
    scale = [1.0]
    watched = Watched(fresh(), lambda out, y: scale[0] * squared(out, y))
    step = watched.step
    for t in range(3):
        watched(t)
    assert not watched.in_full(3)
    weight, state = step.param_states["w"], step.executor.live.state_objects["h"]

    def scaled():
        scale[0] = 2.0

    changes = {
        "loss": scaled,
        "hook": lambda: weight.register_hook("read", lambda context: None),
        "reset": step.reset,
        "value": lambda: setattr(state, "value", state.value + 0),
    }
    step(XS[0])
    assert not watched.in_full(1)  # it was this step that moved the states
    for name, change in changes.items():
        if name == "value":
            with pytest.warns(ForeignWriteWarning):
                change()
        else:
            change()
        assert watched.in_full(0), name
        weight.clear_hooks()
        watched(1)
        assert not watched.in_full(2), name
    assert watched.in_full(0, n=2) and not watched.in_full(0, n=2) and not watched.in_full(0)
    for others in ({"mask": jnp.ones(1)}, {"progress": True}):
        assert watched.in_full(0, **others) and watched.in_full(1)
    assert watched.learner([XS[0]], [YS[0]]).shape == (1,)  # lists of steps are stacked at every call


@pytest.mark.by_xla
def test_a_call_that_fails_leaves_all_as_it_was():
    watched = Watched(fresh())
    for t in range(3):
        watched(t)
    before = jax.tree.map(jnp.copy, (watched.step.params, watched.step.traces))
    for wrong in (XS[:1, :, :2], "text", XS[:1] + 1j):
        with pytest.raises(etcompile.EtcompileError):
            watched.learner(wrong, YS[:1])
    same((watched.step.params, watched.step.traces), before)
    watched(0)


def two_steps():
    class Leaky(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = brainstate.ParamState(draw(1, 3, 4))

        def init_state(self, batch_size=None):
            self.h = brainstate.HiddenState(jnp.zeros((batch_size, 4)))
            self.a = brainstate.HiddenState(jnp.zeros((batch_size, 4)))

        def update(self, x):
            self.h.value = 0.9 * self.h.value + x @ self.w.value - 0.1 * self.a.value
            self.a.value = 0.8 * self.a.value + self.h.value
            return self.h.value

    model = Leaky()
    return model, [etcompile.compile(model, XS[0], batch_size=XS.shape[1]) for _ in range(2)]


def power(out):
    return jnp.mean(out**2)


@pytest.mark.by_xla
@pytest.mark.parametrize("steps", [1, 3])
def test_another_step_that_moved_the_states_is_said_by_a_loop_that_is_compiled(steps):
    _, (step, other) = two_steps()
    learner = step.learn(power, optax.sgd(1e-2))
    learner(XS[:steps])
    learner(XS[:steps])
    other(XS[0])
    with pytest.raises(CarryError, match="another step compiled from the same Leaky"):
        learner(XS[:steps])
    step.reset()
    learner(XS[:steps])


@pytest.mark.by_xla
@pytest.mark.parametrize("how", ["learn", "jit"])
def test_a_write_after_a_function_that_was_compiled_before_the_reset_is_said(how):
    model, (step, _) = two_steps()
    learner, jitted = step.learn(power, optax.sgd(1e-2)), brainstate.transform.jit(lambda x: step(x))
    for _ in range(3):
        learner(XS[:3]) if how == "learn" else jitted(XS[0])
        with pytest.warns(ForeignWriteWarning, match="state h of Leaky was assigned"):
            model.h.value = 0.5 * model.h.value
        step.reset()
        model.h.value = 0.5 * model.h.value  # traces are zero: nothing to say
        step.reset()


@pytest.mark.by_xla
def test_a_copy_of_a_fresh_step_is_fresh():
    model, (step, _) = two_steps()
    step(XS[0])
    step.reset()
    new = copy.deepcopy(step)
    state = new.executor.live.state_objects["h"]
    state.value = 0.5 * state.value
    new(XS[0])
