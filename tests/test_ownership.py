"""Whose arrays are whose: what is donated, copied, set and handed out; and what a step says where it cannot run."""

from __future__ import annotations

import copy
import pickle

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saiunit as u
from oracles import relative_error
from test_reset import XS, YS, B, Net, fresh, same, squared, wanted

import etcompile
from etcompile.errors import CarryError, InputError, UnsupportedError


def leaky(params, state, x):
    h = jnp.tanh(0.9 * state["h"] + x @ params["w"])
    return {"h": h, "unit": state["unit"]}, h * state["unit"]


def function_step():
    params = {"w": jnp.full((3, 4), 0.3)}
    state = {"h": jnp.zeros((B, 4)), "unit": jnp.ones(4)}
    return etcompile.compile(etcompile.from_function(leaky, params, state), XS[0]), params, state


# --- donated buffers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [fresh, lambda: function_step()[0]])
def test_a_carry_may_be_donated(make):
    step = make()
    reference = make().scan_value_and_grad(squared)(XS, YS)
    run = jax.jit(step.apply, donate_argnums=1)
    for _ in range(2):
        carry = step.init_carry()
        for x in XS:
            carry, _ = run(step.params, carry, x)
    same(step.scan_value_and_grad(squared)(XS, YS), reference)
    step.reset()
    same(step.scan_value_and_grad(squared)(XS, YS), reference)


def test_a_function_model_keeps_no_array_of_the_caller():
    step, params, state = function_step()
    reference = step.value_and_grad(squared)(XS[0], YS[0])
    jax.jit(lambda p, s: (p, s), donate_argnums=(0, 1))(params, state)
    step.reset()
    same(step.value_and_grad(squared)(XS[0], YS[0]), reference)


def test_arrays_taken_before_a_call_stay():
    step = fresh()
    run = step.value_and_grad(squared)
    run(XS[0], YS[0])
    taken = step.traces_state.value, step.executor.live.states(), step.params
    before = jax.tree.map(np.array, taken)
    run(XS[1], YS[1])
    step.scan_value_and_grad(squared)(XS, YS)
    same(taken, before)
    mine = jax.tree.map(jnp.array, step.traces)
    step.traces_state.value = mine
    run(XS[2], YS[2])
    assert not any(v.is_deleted() for v in jax.tree.leaves(mine))


def test_loops_of_calls_still_give_their_traces_away():
    step = fresh()
    run = step.value_and_grad(squared)
    run(XS[0], YS[0])
    old = jax.tree.leaves(step.executor.traces.own())
    run(XS[1], YS[1])
    assert all(v.is_deleted() for v in old)


@pytest.mark.parametrize("which", ["parameter w", "state h", "trace "])
def test_a_step_whose_arrays_were_donated_says_which(which):
    step = fresh()
    step(XS[0])
    tree = {
        "parameter w": lambda: step.params["w"],
        "state h": lambda: step.executor.live.states()["h"],
        "trace ": lambda: step.traces_state.value,
    }[which]()
    jax.jit(lambda v: jax.tree.map(lambda a: a + 1, v), donate_argnums=0)(tree)
    with pytest.raises(CarryError, match=which):
        step.value_and_grad(squared)(XS[0], YS[0])


# --- copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [fresh, lambda: function_step()[0]])
def test_a_deep_copy_is_a_step_of_its_own(make):
    step, other = make(), make()
    for s in (step, other):
        s.scan(XS)
    twin = copy.deepcopy(step)
    twin.scan(XS)
    twin.params = jax.tree.map(jnp.zeros_like, twin.params)
    reference = other.value_and_grad(squared)(XS[0], YS[0])
    same(step.value_and_grad(squared)(XS[0], YS[0]), reference)
    twin = copy.deepcopy(other)
    same(twin.value_and_grad(squared)(XS[1], YS[1]), other.value_and_grad(squared)(XS[1], YS[1]))
    twin.reset(), other.reset()
    same(twin.value_and_grad(squared)(XS[1], YS[1]), other.value_and_grad(squared)(XS[1], YS[1]))


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy])
def test_pickling_is_refused_with_the_way_out(way):
    with pytest.raises(UnsupportedError, match="Checkpoints"):
        way(fresh())


# --- parameters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [fresh, lambda: function_step()[0]])
def test_params_are_like_the_gradients_and_may_be_set(make):
    step = make()
    _, grads = step.value_and_grad(squared)(XS[0], YS[0])
    assert jax.tree.structure(step.params) == jax.tree.structure(grads)
    step.params = new = jax.tree.map(lambda p, g: p - g, step.params, grads)
    same(step.params, new)
    path = next(iter(new))
    for bad in ({}, {**new, path: new[path][:1]}, {**new, "more": new[path]}):
        with pytest.raises(InputError):
            step.params = bad
        same(step.params, new)


# --- states that are numbers ----------------------------------------------------------------------------------------------


class Number(Net):
    def __init__(self, start):
        super().__init__()
        self.start, self.v = start, brainstate.ShortTermState(start)

    def init_state(self, batch_size=None, **kwargs):
        super().init_state(batch_size)
        self.v = brainstate.ShortTermState(self.start)

    def update(self, x):
        unit = u.ms if isinstance(self.start, u.Quantity) else 1.0
        self.v.value = 0.5 * self.v.value + jnp.mean(x @ self.w.value) * unit
        return super().update(x) + self.v.value / unit


@pytest.mark.parametrize("start", [0.0, 0.0 * u.ms], ids=["number", "quantity"])
def test_a_state_may_be_a_python_number(start):
    step, other = fresh(lambda: Number(start)), fresh(lambda: Number(jnp.zeros(()) + start))
    reference = other.scan_value_and_grad(squared)(XS, YS)
    run = step.value_and_grad(squared)
    found = [run(x, y) for x, y in zip(XS, YS, strict=True)]
    same(jnp.stack([loss for loss, _ in found]), reference[0])
    for again in (step.reset, lambda: step.reset(batch_size=B)):
        again()
        same(brainstate.transform.for_loop(run, XS, YS)[0], reference[0])
        again()
        same(step.scan_value_and_grad(squared)(XS, YS), reference)
    carry, _ = jax.lax.scan(lambda c, x: step.apply(step.params, c, x), step.init_carry(), XS)
    assert relative_error(carry.states["h"], step.executor.live.states()["h"]) < 1e-10


# --- transformations of JAX's own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", ["jit", "scan", "vmap", "grad"])
@pytest.mark.parametrize("method", ["call", "value_and_grad", "scan", "learn"])
def test_the_stateful_step_inside_jax_names_apply_and_changes_nothing(method, plain):
    step = fresh()
    step(XS[0])
    before = jax.tree.map(np.array, (step.executor.carry(), step.params))
    optax = pytest.importorskip("optax")
    run = {
        "call": step,
        "value_and_grad": lambda x: step.value_and_grad(squared)(x, YS[0])[0],
        "scan": lambda x: step.scan(x[None]),
        "learn": lambda x: step.learn(squared, optax.sgd(0.1))(x[None], YS[:1]),
    }[method]
    with pytest.raises(UnsupportedError, match=r"step\.apply"):
        {
            "jit": lambda: jax.jit(run)(XS[0]),
            "scan": lambda: jax.lax.scan(lambda c, x: (c, run(x)), 0, XS),
            "vmap": lambda: jax.vmap(run)(XS),
            "grad": lambda: jax.grad(lambda x: jnp.sum(run(x)))(XS[0]),
        }[plain]()
    same((step.executor.carry(), step.params), before)


def test_a_reset_inside_plain_jit_is_refused():
    step = fresh()
    with pytest.raises(UnsupportedError, match=r"step\.apply"):
        jax.jit(step.reset)()
    same(step.scan_value_and_grad(squared)(XS, YS), wanted())


def test_forward_mode_is_refused_in_the_documentation_and_by_jax():
    step = fresh()
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda p: step.apply(p, step.init_carry(), XS[0])[1], (step.params,), (step.params,))
    assert "Forward mode" in type(step).apply.__doc__


@pytest.mark.parametrize("batch_size", [3, 0, "2", True])
def test_a_carry_of_another_batch_size_is_refused(batch_size):
    with pytest.raises((CarryError, InputError), match="batch"):
        fresh().init_carry(batch_size)


@pytest.mark.by_xla
@pytest.mark.parametrize("kind", ["one step", "sequence"])
def test_brainstates_vmap_finds_the_arrays_that_it_puts_back(kind):
    """It runs a lane once to see what is written, and puts back what was there before."""

    def run_of(step):
        one = kind == "one step"
        return step.value_and_grad(squared) if one else step.scan_value_and_grad(squared, chunk=1)

    def first(values):
        return values[0] if kind == "one step" else values

    step, lanes = fresh(), jnp.array([1.0, 2.0])
    xs = jnp.stack([lane * first(XS) for lane in lanes])
    ys = jnp.stack([first(YS)] * 2)
    run_of(step)(first(XS), first(YS))
    before = step.traces
    with pytest.raises(brainstate.BatchAxisError):
        brainstate.transform.vmap(run_of(step))(xs, ys)
    same(step.traces, before)
    step.reset()
    states = {0: {"h": step.executor.live.state_objects["h"], "traces": step.traces_state}}
    losses, grads = brainstate.transform.vmap(run_of(step), out_states=states)(xs, ys)
    for k, lane in enumerate(lanes):
        loss, wanted_grads = run_of(fresh())(lane * first(XS), first(YS))
        same((losses[k], jax.tree.map(lambda v, k=k: v[k], grads)), (loss, wanted_grads))
