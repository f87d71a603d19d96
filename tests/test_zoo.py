"""The compiler against the oracles, on every model of the zoo."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from numpy_evaluation import by_numpy
from oracles import dense_d_rtrl, relative_error
from references import INSTRUMENTED, autodiff, compiled, dense, fresh, learned, step_of, zoo_cases
from zoo import CASES, by_name


@pytest.mark.parametrize("case", zoo_cases(CASES))
def test_the_first_step_equals_autodiff(case):
    built, wanted, found = fresh(case), autodiff(case), learned(case)
    assert relative_error(found.losses[0], wanted.losses[0]) < built.tolerance
    assert set(found.grads) == set(wanted.first)
    assert relative_error(found.grads_per_step[0], wanted.first) < built.tolerance
    assert len(step_of(case).executor.compilations.now.losses) == 1, "the loss is compiled once for all steps"


@pytest.mark.parametrize("name", ["gru_no_batch", "lif_exponential", "noise_and_dropout", "lru", "embedding"])
def test_a_sequence_of_one_step(name):
    case = by_name(name)
    wanted, built = autodiff(case), fresh(case)
    xs, targets = jax.tree.map(lambda v: v[:1], (built.xs, tuple(built.targets)))
    losses, grads = compiled(built).scan_value_and_grad(built.loss_fn)(xs, *targets)
    assert losses.shape == (1,)
    assert relative_error(losses, wanted.losses[:1]) < built.tolerance
    assert relative_error(grads, wanted.first) < built.tolerance


@pytest.mark.parametrize("case", zoo_cases(INSTRUMENTED))
def test_equals_the_dense_reference(case):
    built, wanted, found = fresh(case), dense(case), learned(case)
    assert relative_error(found.losses, wanted.losses) < built.tolerance
    assert relative_error(found.grads, wanted.grads) < built.tolerance


@pytest.mark.parametrize("case", zoo_cases(CASES))
def test_uncut_equals_bptt_and_cut_does_not(case):
    wanted, online, built = autodiff(case), learned(case), fresh(case)
    # In chunks, the last one shorter: the gradient above goes step by step. XLA compiles that for all, and chunks for a third.
    with by_numpy(on=CASES.index(case) % 3 != 0):
        step = compiled(built)
        losses, grads = step.scan_value_and_grad(built.loss_fn, chunk=3)(built.xs, *built.targets)
    assert relative_error(losses, wanted.losses) < built.tolerance
    assert relative_error(grads, online.grads) < built.tolerance
    if built.exact is not None:
        assert step.exact is built.exact
    assert step.exact is not bool(step.report().cuts)
    error = relative_error(grads, wanted.total)
    if step.exact:
        assert error < built.tolerance
    else:
        assert error > 1e-6


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
