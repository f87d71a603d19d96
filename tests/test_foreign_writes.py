"""States that somebody else than the step writes: resets are followed, other writes are said or refused."""

from __future__ import annotations

import copy
import warnings

import brainstate
import jax
import jax.numpy as jnp
import pytest
from test_reset import XS, YS, B, Net, draw, fresh, same, squared, wanted

import etcompile
from etcompile.errors import CarryError, ForeignWriteWarning


class Resets(Net):
    def reset_state(self, batch_size=None, **kwargs):
        self.h.value = jnp.full((batch_size or B, 4), 0.3)


class Stack(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Resets(), brainstate.nn.GRUCell(4, 4)
        self.count = brainstate.ShortTermState(jnp.zeros((), jnp.int32))

    def update(self, x):
        self.count.value += 1
        return self.second(self.first(x))


def compiled(model=Resets):
    model = model()
    return etcompile.compile(model, XS[0], batch_size=B), model


def init(model):
    brainstate.nn.init_all_states(model, batch_size=B)


def reset(model):
    brainstate.nn.reset_all_states(model, batch_size=B)


@pytest.mark.parametrize("again", [init, reset])
def test_a_reset_by_brainstate_is_a_reset_of_the_step(again):
    step, model = compiled()
    run = step.value_and_grad(squared)
    for _ in range(3):
        again(model)
        found = [run(x, y) for x, y in zip(XS, YS, strict=True)]
        same(sum(loss for loss, _ in found), wanted()[0].sum())
        same(jax.tree.map(lambda *g: sum(g), *[g for _, g in found]), wanted()[1])


def test_a_reset_by_brainstate_inside_jit_is_one_at_every_call():
    step, model = compiled()

    @brainstate.transform.jit
    def train(xs, ys):
        reset(model)
        return brainstate.transform.for_loop(step.value_and_grad(squared), xs, ys)

    step.scan(XS)
    for _ in range(3):
        losses, grads = train(XS, YS)
        same((losses, jax.tree.map(lambda g: g.sum(0), grads)), wanted())


def test_a_compiled_reset_by_brainstate_clears_the_traces_at_every_call():
    step, model = compiled()
    compiled_reset = brainstate.transform.jit(lambda: reset(model))
    for _ in range(3):
        compiled_reset()
        same(step.scan_value_and_grad(squared)(XS, YS), wanted())


@pytest.mark.parametrize("part", [lambda m: m.first.reset_state(), lambda m: reset(m.second)])
def test_a_reset_of_a_part_is_refused_at_the_next_call_until_the_rest_is_reset(part):
    step, model = compiled(Stack)
    step.scan(XS)
    part(model)
    with pytest.raises(CarryError, match="was reset, but not"):
        step(XS[0])
    reset(model)
    other, _ = compiled(Stack)
    other.params = step.params
    same(step.scan_value_and_grad(squared)(XS, YS), other.scan_value_and_grad(squared)(XS, YS))


def test_an_assignment_is_said_with_its_line_and_the_traces_stay():
    step, model = compiled()
    twin = copy.deepcopy(step)
    step.scan(XS), twin.scan(XS)
    with pytest.warns(
        ForeignWriteWarning, match=r"state h of Resets was assigned at test_foreign_writes\.py:\d+"
    ):
        model.h.value = model.h.value + 0.1
    same(step.traces, twin.traces)
    step.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.h.value = jnp.full((B, 4), 0.3)  # a start of one's own: there is no credit yet
        same(step.scan_value_and_grad(squared)(XS, YS), wanted())


def test_nothing_is_said_in_ordinary_loops():
    optax = pytest.importorskip("optax")
    step, _ = compiled(Stack)
    run = step.value_and_grad(squared)
    learn = step.learn(squared, optax.sgd(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            step.reset()
            run(XS[0], YS[0])
            brainstate.transform.for_loop(run, XS, YS)
            brainstate.transform.jit(lambda xs: step.scan(xs))(XS)
            brainstate.transform.grad(lambda: squared(step(XS[0]), YS[0]), step.param_states)()
            learn(XS, YS)
            run(XS[0], YS[0])
            step.reset(batch_size=4)
            step.cost(batch=3)
            step.reset(batch_size=B)


@pytest.mark.parametrize("jitted", [False, True])
def test_two_steps_of_one_model_are_refused_in_turns_but_not_after_a_reset(jitted):
    step, model = compiled()
    other = etcompile.compile(model, XS[0], algo="e_prop")
    run = brainstate.transform.jit(other) if jitted else other
    step.scan(XS)
    run(XS[0])
    with pytest.raises(CarryError, match="another step"):
        step(XS[0])
    step.reset()
    same(step.scan_value_and_grad(squared)(XS, YS), wanted())
    other.reset()
    run(XS[0])
    step.reset()
    same(step.scan_value_and_grad(squared)(XS, YS), wanted())


def test_a_second_compilation_alone_changes_nothing():
    step, model = compiled()
    step.scan(XS[:1])
    etcompile.compile(model, XS[0], algo="e_prop")
    etcompile.compile(model, XS[0]).cost(batch=3)
    other = fresh()
    other.scan(XS[:1])
    same(step.scan_value_and_grad(squared)(XS, YS), other.scan_value_and_grad(squared)(XS, YS))


def test_a_copy_of_the_model_is_nobody_elses():
    step, model = compiled()
    step.scan(XS)
    twin = etcompile.compile(copy.deepcopy(model), XS[0], batch_size=B)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin.scan(XS)
        step.scan(XS)
    assert draw(0, 1).shape == (1,)
