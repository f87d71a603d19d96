"""The compiler against the oracles, on every model of the zoo."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import optax
import pytest
from oracles import bptt, dense_d_rtrl, one_step_grad, relative_error, time_slice
from zoo import CASES, Function, by_name

import etcompile

INSTRUMENTED = [c for c in CASES if "no_step" not in c.tags]


def ids(cases):
    return [c.name for c in cases]


def compiled(built, algo="d_rtrl"):
    """The compiled step of a built case, at its random states."""
    model = built.model
    if isinstance(model, Function):
        model = etcompile.from_function(model.fn, model.params, model.state)
    return etcompile.compile(model, time_slice(built.xs, 0), algo=algo)


def first(tree, n):
    return jax.tree.map(lambda a: a[:n], tree)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_t1_equals_autodiff(case):
    built = case()
    step = compiled(built)
    x, target = time_slice(built.xs, 0), time_slice(built.targets, 0)
    wanted_loss, wanted = one_step_grad(built.plain_step, built.params, built.state, x, target, built.loss_fn)
    losses, grads = step.scan_value_and_grad(built.loss_fn)(first(built.xs, 1), *first(built.targets, 1))
    assert losses.shape == (1,)
    assert relative_error(losses[0], wanted_loss) < built.tolerance
    assert set(grads) == set(wanted)
    assert relative_error(grads, wanted) < built.tolerance


@pytest.mark.parametrize("case", INSTRUMENTED, ids=ids(INSTRUMENTED))
def test_equals_the_dense_reference(case):
    built = case()
    step = compiled(built)
    wanted = dense_d_rtrl(
        built.step, built.params, built.state, built.xs, built.targets, built.loss_fn, built.groups
    )
    losses, grads = step.scan_value_and_grad(built.loss_fn, chunk=1)(built.xs, *built.targets)
    assert relative_error(losses, wanted.losses) < built.tolerance
    assert relative_error(grads, wanted.grads) < built.tolerance


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_uncut_equals_bptt_and_cut_does_not(case):
    built = case()
    step = compiled(built)
    wanted_losses, wanted = bptt(
        built.plain_step, built.params, built.state, built.xs, built.targets, built.loss_fn
    )
    # In chunks, the last one shorter: the other tests of this file go step by step.
    losses, grads = step.scan_value_and_grad(built.loss_fn, chunk=3)(built.xs, *built.targets)
    assert relative_error(losses, wanted_losses) < built.tolerance
    error = relative_error(grads, wanted)
    if built.exact is not None:
        assert step.exact is built.exact
    cuts = step.report().to_dict()["cuts"]
    if step.exact:
        assert error < built.tolerance
        assert not cuts
    else:
        assert error > 1e-6
        assert cuts
        brainstate.random.seed(0)  # the same weights, states and noise once more
        again = case()
        _, causal = compiled(again).scan_value_and_grad(again.loss_fn, chunk=1)(again.xs, *again.targets)
        assert relative_error(grads, causal) < built.tolerance


@pytest.mark.parametrize("name", ["gru", "lstm", "lif_exponential", "indrnn"])
def test_fifty_steps_with_an_update_at_every_step(name):
    built = by_name(name)()
    repeated = jax.tree.map(lambda a: jnp.concatenate([a] * 8)[:50], (built.xs, built.targets))
    xs, targets = repeated
    optimizer = optax.adam(1e-2)

    def update(params, carried, grads):
        updates, carried = optimizer.update(grads, carried, params)
        return optax.apply_updates(params, updates), carried

    wanted = dense_d_rtrl(
        built.step,
        built.params,
        built.state,
        xs,
        targets,
        built.loss_fn,
        built.groups,
        update=update,
        update_state=optimizer.init(built.params),
    )
    step = compiled(built)
    losses = step.learn(built.loss_fn, optimizer, update_every=1)(xs, *targets)
    assert relative_error(losses, wanted.losses) < 1e-8
    got = {path: state.value for path, state in step.param_states.items()}
    assert relative_error(got, wanted.params) < 1e-8
