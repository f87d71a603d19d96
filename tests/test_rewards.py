"""Reward-based e-prop against its equations in plain numpy: rewards of every kind, masks, and what it refuses."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from numpy_models import MODELS, SQUARED
from numpy_rules import RewardEProp, run, summed
from oracles import relative_error
from shared import shared
from test_rules import (
    ALL,
    QUIET,
    autodiff_of_the_first_step,
    compare,
    compiled,
    feedback,
    flattened,
    run_compiled,
)

import etcompile

pytestmark = pytest.mark.usefixtures("by_numpy")

TOLERANCE = 1e-10


@shared
def step_of(name, **options):
    """Whoever runs it resets it first."""
    return compiled(ALL[name](), "reward_e_prop", **options)


@pytest.mark.parametrize("name", MODELS)
def test_a_reward_for_each_example_meets_filtered_credit(name):
    model, step, rule = ALL[name](), step_of(name), RewardEProp(0.9)
    rule.reward = np.array([0.5, -2.0, 1.5])
    step.reset()
    got = run_compiled(step, model, SQUARED, model.targets, quiet=QUIET, modulator=jnp.asarray(rule.reward))
    compare(got, run(rule, model, SQUARED, model.targets, quiet=QUIET))


@pytest.mark.parametrize("name", ["spiking", "lstm"])
def test_random_feedback_and_options(name):
    model = ALL[name]()
    step = compiled(model, "reward_e_prop", gamma=0.6, kappa=0.3, feedback="random", seed=2)
    rule = RewardEProp(0.6, kappa=0.3, feedback="random", matrix=feedback(step, model, 2))
    rule.reward = 0.7
    got = run_compiled(step, model, SQUARED, model.targets, quiet=QUIET, modulator=0.7)
    compare(got, run(rule, model, SQUARED, model.targets, quiet=QUIET))


def test_the_first_step_with_a_reward_of_one_is_autodiff():
    model, step = ALL["lstm"](), step_of("lstm")
    step.reset()
    run_first = step.value_and_grad(SQUARED.jax)
    _, found = run_first(jnp.asarray(model.xs[0]), jnp.asarray(model.targets[0]), modulator=1.0)
    assert relative_error(flattened(found), autodiff_of_the_first_step("lstm")) < TOLERANCE


def test_rewards_of_every_step_and_a_mask_in_one_call():
    model, step = ALL["spiking"](), step_of("spiking")
    rewards, mask = np.random.default_rng(1).normal(size=(6, 3)), np.ones(6)
    mask[list(QUIET)] = 0
    step.reset()
    one, total = step.value_and_grad(SQUARED.jax), []
    for t in range(6):
        x = jnp.asarray(model.xs[t])
        if mask[t]:
            y, reward = jnp.asarray(model.targets[t]), jnp.asarray(rewards[t])
            total.append(flattened(one(x, y, modulator=reward)[1]))
        else:
            step(x)
    step.reset()
    data = jnp.asarray(model.xs), jnp.asarray(model.targets)
    _, found = step.scan_value_and_grad(SQUARED.jax)(
        *data, mask=jnp.asarray(mask), modulator=jnp.asarray(rewards)
    )
    assert relative_error(flattened(found), summed(total)) < TOLERANCE


@pytest.mark.parametrize("batch", [None, 1])
def test_other_batch_sizes(batch):
    model = ALL["rate"](batch)
    step, rule = compiled(model, "reward_e_prop"), RewardEProp(0.9)
    rule.reward = -1.5
    got = run_compiled(step, model, SQUARED, model.targets, modulator=-1.5)
    compare(got, run(rule, model, SQUARED, model.targets))


def test_what_learns_is_said_and_chunks_are_refused():
    model, step = ALL["rate"](), step_of("rate")
    step.reset()
    assert len(step.report().to_dict()["learning"]) >= 3
    assert etcompile.parse_program(str(step.program)) == step.program
    with pytest.raises(etcompile.UnsupportedError, match="depends on the loss"):
        step.scan_value_and_grad(SQUARED.jax, chunk=3)(
            jnp.asarray(model.xs), jnp.asarray(model.targets), modulator=1.0
        )


@pytest.mark.parametrize(
    ("modulator", "message"),
    [
        (None, "needs a reward"),
        ({"g0": 1.0}, "a dict"),
        (np.ones(4), "one reward"),
        (np.ones((1, 3)), "one reward"),
    ],
    ids=["none", "dict", "units", "row"],
)
def test_a_reward_that_is_none_of_each_example_is_refused(modulator, message):
    model, step = ALL["rate"](), step_of("rate")
    step.reset()
    run_one = step.value_and_grad(SQUARED.jax)
    given = {} if modulator is None else {"modulator": modulator}
    with pytest.raises(etcompile.InputError, match=message):
        run_one(jnp.asarray(model.xs[0]), jnp.asarray(model.targets[0]), **given)


@pytest.mark.parametrize("options", [{"gamma": 1.0}, {"kappa": -0.1}, {"feedback": "target"}], ids=str)
def test_bad_options(options):
    with pytest.raises(etcompile.OptionError):
        compiled(ALL["rate"](), "reward_e_prop", **options)
