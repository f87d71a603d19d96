"""Running without a loss in chunks: outputs, states and traces of the step-by-step program; derivatives of its scan."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error
from references import compiled, fresh
from zoo import CASES, by_name

import etcompile

RULES = [("d_rtrl", {}), ("e_prop", {"kappa": 0.7, "normalize": True}), ("pp_prop", {"decay": (0.8, 0.6)}), ("otpe", {}), ("ottt", {})]  # fmt: skip


def run(name, algo, options, chunk):
    """Outputs of two calls, of 5 steps and of 2, and the states and traces left."""
    built = fresh(by_name(name))
    step = compiled(built, algo, schedule=etcompile.Schedule(chunk=chunk), **options)
    outs = [step.scan(jax.tree.map(lambda v, p=part: v[p], built.xs)) for part in (slice(0, 5), slice(5, 7))]
    return outs, jax.tree.map(numbers, step.executor.carry()), built.tolerance


def numbers(value):
    return jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value


def in_turns():
    """Every fourth model, and all of them with `--every-rule`: tests/test_chunks.py has the equations of chunks on all of them."""
    for k, case in enumerate(CASES):
        if k % 4 == 0 or "ETCOMPILE_EVERY_RULE" in os.environ:
            yield (case.name, *RULES[k % len(RULES)])


@pytest.mark.usefixtures("by_numpy")
@pytest.mark.parametrize(("name", "algo", "options"), list(in_turns()))
def test_every_model(name, algo, options):
    wanted, found = run(name, algo, options, 1), run(name, algo, options, 2)  # 2 does not divide 5
    for mine, theirs in zip(found[:2], wanted[:2], strict=True):
        assert relative_error(mine, theirs) < wanted[2]


@pytest.mark.parametrize("name", ["lstm", "noise_and_dropout"])
def test_as_it_is_compiled(name):
    wanted, found = run(name, "d_rtrl", {}, 1), run(name, "d_rtrl", {}, 3)
    for mine, theirs in zip(found[:2], wanted[:2], strict=True):
        assert relative_error(mine, theirs) < wanted[2]


def encoded(params, state, x):
    """An encoder that reads no state, a cell, and a readout."""
    code = jnp.tanh(jnp.exp(x) @ params["encoder"])
    h = jnp.tanh(0.9 * state["h"] + (code + state["h"]) @ params["w"] + 0.1 * x[..., :1])
    return {"h": h}, h @ params["readout"]


SIZES = {"encoder": (3, 5), "w": (5, 5), "readout": (5, 2)}
KEYS = jax.random.split(jax.random.key(0), 5)
PARAMS = {k: jax.random.normal(key, v) / 2 for key, (k, v) in zip(KEYS, SIZES.items(), strict=False)}
XS = jax.random.normal(KEYS[3], (7, 2, 3))


def encoder_step(**options):
    model = etcompile.from_function(encoded, PARAMS, {"h": jnp.zeros((2, 5))})
    return etcompile.compile(model, XS[0], schedule=etcompile.Schedule(**options))


def plan_and_carry(step, steps=7):
    return step.executor.functions.forward_plan(steps), step.init_carry()


def products(jaxpr, inside=False):
    """How many matrix products there are, and how many of them in loops."""
    found = np.zeros(2, int)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found += 1, inside
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(inner, "eqns"):
                found += products(getattr(inner, "jaxpr", inner), inside or eqn.primitive.name == "scan")
    return found


@pytest.mark.parametrize("keep_traces", [True, False])
def test_what_reads_no_state_leaves_the_loop(keep_traces):
    step = encoder_step(keep_traces=keep_traces)
    plan, carry = plan_and_carry(step)
    jaxpr = jax.make_jaxpr(lambda *given: step.executor.functions.scan(plan, *given))(
        step.params, carry, (XS,)
    )
    assert products(jaxpr.jaxpr)[1] == 1  # the recurrent one; encoder and readout are products of all steps
    one_by_one = jax.make_jaxpr(lambda *given: step.executor.functions.scan(None, *given))(
        step.params, carry, (XS,)
    )
    assert products(one_by_one.jaxpr)[1] >= 3


def test_gradients_of_a_sequence_with_an_encoder():
    ys = jnp.ones((7, 2, 2))
    found = [
        encoder_step(chunk=c).scan_value_and_grad(lambda out, y: jnp.sum((out - y) ** 2))(XS, ys)
        for c in (1, 3)
    ]
    assert relative_error(*found) < 1e-10


def test_its_derivative_is_that_of_a_scan_of_steps():
    def of(chunk):
        step = encoder_step(chunk=chunk)
        plan, carry = plan_and_carry(step)
        assert (plan is None) == (chunk == 1)

        def total(params, carry, xs):
            outs, after = step.executor.functions.scan(plan, params, carry, xs)
            return jnp.sum(outs**2) + jnp.sum(after.states["h"] ** 3)

        return jax.grad(total, argnums=(0, 2))(step.params, carry, (XS,))

    found, wanted = of(3), of(1)
    assert jnp.abs(wanted[0]["encoder"]).max() > 0.01
    assert relative_error(found, wanted) < 1e-10


def test_a_rule_that_follows_every_path_runs_step_by_step():
    step = compiled(fresh(by_name("indrnn")), "rtrl")
    assert step.executor.functions.forward_plan(100) is None
    assert compiled(fresh(by_name("indrnn")), "d_rtrl").executor.functions.forward_plan(100).size > 1
