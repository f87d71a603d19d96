"""The oracles against each other and against finite differences; the zoo's steps against its models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from numpy_evaluation import op_by_op
from oracles import (
    bptt,
    cut_tree,
    dense_d_rtrl,
    directional,
    finite_difference,
    identity,
    keep,
    length,
    local_groups,
    relative_error,
    time_slice,
)
from random_models import build, loss_fn, recipes
from references import INSTRUMENTED, autodiff, dense, fresh, zoo_cases
from zoo import CASES
from zoo.brainpy_parts import spikes_of

SMOOTH = [c for c in INSTRUMENTED if not c.tags & {"spiking", "low_precision", "not_smooth"}]


def numbers(tree):
    """`tree` without random keys, whose leaves are no numbers."""
    return [a for a in jax.tree.leaves(tree) if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key)]


@pytest.mark.parametrize("case", zoo_cases(INSTRUMENTED))
def test_step_equals_the_model(case):
    built, wanted = fresh(case), autodiff(case)

    def run(state):
        def body(states, x):
            found = [
                built.step(built.params, state, x, cut=cut, put=keep)
                for state, cut in zip(states, (identity, cut_tree), strict=True)
            ]
            return [state for state, _ in found], found

        return jax.lax.scan(body, [state, state], built.xs)[1]

    whole, cut = op_by_op(run, built.state)
    assert set(whole[0]) == set(built.state)
    for states, outs in (whole, cut):
        assert relative_error(numbers((outs, states)), numbers((wanted.outs, wanted.states))) < 1e-12


@pytest.mark.parametrize("case", zoo_cases(CASES))
def test_model_is_alive(case):
    built, found = fresh(case), autodiff(case)
    steps = range(length(built.xs))
    states = [time_slice(found.states, t) for t in steps]
    for name in [n for g in built.groups or () for n in g]:
        for leaf in jax.tree.leaves([s[name] for s in states]):
            assert np.all(np.isfinite(leaf)), name
        leaves = np.stack([np.concatenate([np.ravel(v) for v in jax.tree.leaves(s[name])]) for s in states])
        assert np.mean(np.any(leaves != leaves[0], axis=0)) > (0.25 if name in built.spikes else 0.5), (
            f"{name} hardly moves"
        )
    for name in built.spikes:
        rate = np.mean([s[name] != 0 for s in states])
        assert 0.02 < rate < 0.6, f"{name} spikes {rate:.0%} of the time"
    if "brainpy" in case.tags:
        rate = np.mean([spikes_of(built.model, s) for s in states])
        assert 0.02 < rate < 0.6, f"the population spikes {rate:.0%} of the time"
    assert np.all(np.isfinite(found.losses))
    for name, grad in found.total.items():
        for leaf in jax.tree.leaves(grad):
            assert np.all(np.isfinite(leaf)), name
            assert np.any(leaf), f"the gradient of {name} is zero"


@pytest.mark.parametrize("case", zoo_cases(INSTRUMENTED))
def test_groups_are_the_local_components(case):
    built = fresh(case)
    hidden = [n for g in built.groups for n in g]
    found = local_groups(built.step, built.params, built.state, time_slice(built.xs, 0), hidden)
    assert {frozenset(g) for g in found} == {frozenset(g) for g in built.groups}


@pytest.mark.parametrize("case", zoo_cases(INSTRUMENTED))
def test_dense_equals_autodiff_at_one_step_and_bptt_exactly_when_nothing_is_cut(case):
    built, online, wanted = fresh(case), dense(case), autodiff(case)
    assert relative_error(online.grads_per_step[0], wanted.first) < built.tolerance
    assert relative_error(online.losses, wanted.losses) < built.tolerance
    error = relative_error(online.grads, wanted.total)
    if built.exact:
        assert error < built.tolerance
    else:
        assert error > 1e-6


@pytest.mark.parametrize("case", zoo_cases(SMOOTH))
def test_bptt_equals_finite_differences(case):
    built, found = fresh(case), autodiff(case)
    rng = np.random.default_rng(1)

    def draw(leaf):
        noise = rng.normal(size=leaf.shape)
        return noise + 1j * rng.normal(size=leaf.shape) if jnp.iscomplexobj(leaf) else noise

    direction = jax.tree.map(draw, built.params)

    wanted = directional(found.total, direction)
    got = finite_difference(found.losses_of, built.params, direction)
    size = np.sqrt(sum(float(np.sum(np.abs(g) ** 2)) for g in jax.tree.leaves(found.total)))
    assert abs(got - wanted) < 1e-6 * max(abs(wanted), size)


def test_online_updates_change_the_parameters_of_the_next_step():
    built = next(c for c in CASES if c.name == "gru")()
    arguments = (built.step, built.params, built.state, built.xs, built.targets, built.loss_fn, built.groups)

    def descend(params, count, grads):
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), count + 1

    still, moving = dense_d_rtrl(*arguments), dense_d_rtrl(*arguments, update=descend, update_state=0)
    assert relative_error(moving.grads_per_step[0], still.grads_per_step[0]) == 0
    assert relative_error(moving.grads_per_step[1], still.grads_per_step[1]) > 1e-6
    assert relative_error(moving.params, still.params) > 1e-6


@pytest.mark.slow
def test_random_models_differ_from_bptt_unless_they_are_exact():
    """Dense equals backpropagation through time on every exact model, and differs on nearly all others.

    Not on all: what is cut may be beside every path to the loss.
    """
    exact, differ, agree = 0, 0, 0

    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )
    @given(recipes())
    def compare(recipe):
        nonlocal exact, differ, agree
        model = build(recipe)
        arguments = (model.step, model.params, model.state, model.xs, (model.targets,), loss_fn)
        online = dense_d_rtrl(*arguments, model.groups)
        losses, through_time = bptt(*arguments)
        assert relative_error(online.losses, losses) < 1e-12
        error = relative_error(online.grads, through_time)
        if model.exact:
            assert error < 1e-10
            exact += 1
        elif error > 1e-8:
            differ += 1
        else:
            agree += 1

    compare()
    print(f"{exact} exact, {differ} differ, {agree} agree though something is cut")
    assert exact
    assert agree <= 0.1 * (differ + agree)
