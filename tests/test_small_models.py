"""Small models with one rare thing each learn as autodiff says: no crash inside, no number off, whatever the primitive or type."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from oracles import relative_error
from small_models import SMALL, STEPS

import etcompile
from etcompile.errors import EtcompileError

pytestmark = pytest.mark.usefixtures("by_numpy")


def loss(out):
    """A loss of all floating-point results."""
    leaves = [v for v in jax.tree.leaves(out) if jnp.issubdtype(v.dtype, jnp.floating)]
    return sum((jnp.sum(jnp.sin(v.astype(jnp.float64))) for v in leaves), jnp.zeros(()))


def built(name, algo):
    fn, params, state, xs = SMALL[name]()
    first = jax.tree.map(lambda v: v[0], xs)
    return etcompile.compile(etcompile.from_function(fn, params, state), first, algo=algo)


def tolerance(name) -> float:
    """Rounding of the narrowest type in the model."""
    _, params, state, xs = SMALL[name]()
    types = {v.dtype for v in jax.tree.leaves((params, state, xs)) if jnp.issubdtype(v.dtype, jnp.inexact)}
    bits = min(jnp.finfo(t).bits for t in types)
    return {64: 1e-10, 32: 1e-4, 16: 0.1}[bits]


@pytest.mark.parametrize("name", SMALL)
def test_chunks_and_steps_agree_and_exact_means_backpropagation(name):
    fn, params, state, xs = SMALL[name]()
    step = built(name, "d_rtrl")
    assert step.exact is not bool(step.report().cuts or step.report().leaves_out)
    losses, grads = step.scan_value_and_grad(loss, chunk=3)(xs)
    step.reset()
    again, online = step.scan_value_and_grad(loss, chunk=1)(xs)
    assert relative_error(losses, again) < tolerance(name)
    assert relative_error(grads, online) < tolerance(name)
    if not step.exact or name == "custom_vmap":  # JAX itself differentiates no custom_vmap backwards
        return

    def total(params):
        def one(state, x):
            state, out = fn(params, state, x)
            return state, loss(out)

        return jax.lax.scan(one, state, xs, length=STEPS)[1].sum()

    assert relative_error(online, jax.jit(jax.grad(total))(params)) < tolerance(name)


#: What other rules stumbled over.
RARE = (
    "two_states_without_axes", "state_without_axes", "linear_solve", "custom_linear_solve", "while_of_an_input",
    "barrier_of_two_shapes", "vmapped_cell", "a_factor_of_zero", "zero_input", "size_zero_axis",
)  # fmt: skip


@pytest.mark.parametrize("rule", ["rtrl", "kf_rtrl", "rank_rtrl", "e_prop"])
@pytest.mark.parametrize("name", RARE)
def test_other_rules_run_or_say_why_not(name, rule):
    _, _, _, xs = SMALL[name]()
    try:
        losses, grads = built(name, rule).scan_value_and_grad(loss)(xs)
    except EtcompileError:
        return
    assert all(bool(jnp.isfinite(v).all()) for v in jax.tree.leaves((losses, grads)))
