"""Agents: temporal-difference learning with eligibility traces, beside its equations in plain Python."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import saiunit as u
from td_reference import (
    ACTIONS,
    SIZE,
    UNITS,
    InPython,
    action_values,
    expected,
    move,
    network,
    reset,
    weights,
)

import etcompile
from etcompile.nn import Moments, obgd

ENV = (reset, move)


def compiled(agents=2, fn=network, **options):
    batch = () if agents is None else (agents,)
    model = etcompile.from_function(fn, weights(), {"h": jnp.zeros((*batch, UNITS))})
    return etcompile.compile(model, jnp.zeros((*batch, SIZE)), **options)


def learner(agents=2, env=ENV, optimizer=None, fn=network, gamma=0.9, lam=0.8, seed=3, **options):
    step = compiled(agents, fn)
    return step.learn_td(optimizer or optax.sgd(0.1), env, gamma=gamma, lam=lam, seed=seed, **options)


def check(learn, record, tolerance=1e-10, **options):
    """The record and the weights after a run are those of the equations."""
    actions = np.asarray(record.action).reshape(len(record.action), -1)
    assert 0 < actions.mean() < 1
    want, params = expected(actions, weights(), **options)
    for name, value in want.items():
        got = np.asarray(getattr(record, name)).reshape(value.shape)
        np.testing.assert_allclose(got, value, rtol=tolerance, atol=tolerance, err_msg=name)
    moved = 0.0
    for name, value in params.items():
        np.testing.assert_allclose(
            learn.step.params[name], value, rtol=tolerance, atol=tolerance, err_msg=name
        )
        moved = max(moved, float(jnp.abs(value - weights()[name]).max()))
    assert moved > 1e-3
    return want


@pytest.fixture(scope="module")
def usual():
    """A run of 14 steps, and what it started from."""
    learn = learner(entropy=0.05)
    return learn, learn(14)


# --- the equations ---------------------------------------------------------------------------------------------------


def test_actor_critic_is_its_equations_with_gradients_through_whole_episodes(usual):
    learn, record = usual
    assert learn.step.exact
    want = check(learn, record, entropy=0.05)
    # Episodes end for good and not, and of one agent without the other.
    assert want["terminated"].any() and want["truncated"].any()
    assert (want["terminated"] + want["truncated"]).sum(axis=1).tolist().count(1) > 1


def test_q_learning_cuts_its_trace_where_an_action_was_not_greedy():
    learn = learner(fn=action_values, method="q", epsilon=0.5)
    check(learn, learn(14), q=True)


def test_normalised_observations_scaled_rewards_and_bounded_steps():
    learn = learner(
        optimizer=obgd(1.0, kappa=2.0), normalise_observations=True, scale_rewards=True, critic=0.5
    )
    check(learn, learn(12), normalise=True, scale=True, rate=1.0, kappa=2.0, critic=0.5, tolerance=1e-9)


def test_one_step_without_a_trace_is_ordinary_temporal_difference_learning():
    learn = learner(lam=0.0)
    assert learn.agents.eligibility == ()
    actions = np.asarray(learn(1).action)
    _, params = expected(actions, weights(), lam=0.0)
    for name, value in params.items():
        np.testing.assert_allclose(learn.step.params[name], value, rtol=1e-10)


@pytest.mark.parametrize("agents", [None, 1])
def test_one_agent_with_and_without_a_batch_axis(agents):
    learn = learner(agents)
    record = learn(9)
    assert record.reward.shape == ((9,) if agents is None else (9, 1))
    check(learn, record)


def test_gaussian_policy():
    method = etcompile.runtime.td.methods.GaussianActorCritic(entropy=0.1)
    out = (jnp.array([0.3, -1.0]), jnp.array([0.2, 0.1])), jnp.array([0.7])
    deviation = np.log1p(np.exp([0.2, 0.1]))
    action = jnp.array([0.5, 0.5])
    log = jax.scipy.stats.norm.logpdf(action, out[0][0], deviation).sum()
    entropy = np.sum(0.5 * np.log(2 * np.pi * np.e * deviation**2))
    np.testing.assert_allclose(method.objective(out, action, -1.0), 0.7 + log - 0.1 * entropy, rtol=1e-12)
    drawn = jax.vmap(lambda k: method.choose(k, out, 0).action)(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(drawn.mean(0), out[0][0], atol=0.06)
    np.testing.assert_allclose(drawn.std(0), deviation, rtol=0.06)


def test_moments_are_those_of_numpy():
    rng = np.random.default_rng(0)
    values, which = 5 + rng.normal(size=(7, 3, 2)), rng.random((7, 3)) < 0.6
    seen = Moments.of(jnp.zeros(2))
    np.testing.assert_array_equal(seen.variance, 1.0)
    for v, w in zip(values, which, strict=True):
        seen = seen.seen(jnp.asarray(v), jnp.asarray(w))
    np.testing.assert_allclose(seen.mean, values[which].mean(0), rtol=1e-12)
    np.testing.assert_allclose(seen.variance, values[which].var(0, ddof=1), rtol=1e-12)


# --- inside and outside ----------------------------------------------------------------------------------------------


def test_an_environment_outside_gives_the_same_numbers_as_one_inside(usual):
    inside, record = usual
    outside = learner(env=None, entropy=0.05)
    played = outside.play([InPython(), InPython()], 14)
    for a, b in zip(jax.tree.leaves(record), jax.tree.leaves(played), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
    for name, value in inside.step.params.items():
        np.testing.assert_allclose(outside.step.params[name], value, rtol=1e-12)


class AutoReset:
    """As gymnax has them: with parameters, and the next episode begun by the last step."""

    default_params = 5

    def reset(self, key, params):
        return reset(key)

    def step(self, key, state, action, params):
        found, state, reward, terminated, truncated, _ = move(key, state, action)
        ended = terminated | truncated
        first, fresh = reset(key)
        state = jax.tree.map(lambda a, b: jnp.where(ended, a, b), fresh, state)
        return (
            jnp.where(ended, first, found),
            state,
            reward,
            terminated,
            truncated,
            {"final_observation": found},
        )


def test_an_environment_that_resets_itself(usual):
    learn = learner(env=AutoReset(), entropy=0.05)
    record = learn(14)
    for a, b in zip(jax.tree.leaves(record), jax.tree.leaves(usual[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_environments_of_gymnax_as_they_are():
    gymnax = pytest.importorskip("gymnax")
    env, params = gymnax.make("MemoryChain-bsuite")
    step = compiled()
    learn = step.learn_td(optax.sgd(0.1), env, env_params=params.replace(memory_length=2))
    record = learn(9)
    assert np.asarray(record.terminated).sum(axis=0).tolist() == [3, 3]  # every third step
    assert set(np.unique(np.asarray(record.reward)[2::3])) <= {-1.0, 1.0}


def test_environments_of_gymnasium_as_they_are():
    gymnasium = pytest.importorskip("gymnasium")

    class Three(gymnasium.ObservationWrapper):
        def observation(self, observation):
            return observation[1:]

    learn = learner(None, env=None, normalise_observations=True)
    record = learn.play(Three(gymnasium.make("CartPole-v1")), 60, seed=0)
    assert record.reward.shape == (60,) and np.asarray(record.terminated).any()
    assert np.isfinite(np.asarray(record.td_error)).all()


# --- going on --------------------------------------------------------------------------------------------------------


def numbers(learn):
    leaves = jax.tree.leaves(learn.agents)
    plain = [jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in leaves]
    return [np.asarray(v).tobytes() for v in plain]


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    options = dict(optimizer=optax.adam(1e-2), normalise_observations=True, scale_rewards=True)
    whole = learner(**options)
    whole(16, checkpoints=etcompile.Checkpoints(tmp_path / "whole", every=4))

    class Stop(Exception):
        pass

    def stop(steps, record):
        if steps >= 12:
            raise Stop

    killed, saves = learner(**options), etcompile.Checkpoints(tmp_path / "killed", every=4)
    with pytest.raises(Stop):
        killed(16, checkpoints=saves, callback=stop)
    again, saves = learner(**options), etcompile.Checkpoints(tmp_path / "killed", every=4)
    done = saves.restore(again).at
    assert done == 8
    again(16 - done, checkpoints=saves)
    assert numbers(again) == numbers(whole)
    with pytest.raises(etcompile.CheckpointError, match="saved of something else"):
        etcompile.Checkpoints(tmp_path / "whole").restore(again.step)


def test_pieces_and_calls_give_the_numbers_of_one_call(usual):
    learn, told = learner(entropy=0.05), []
    parts = [learn(4), learn(10, callback=lambda steps, record: told.append(steps))]
    assert told[-1] == 10 and len(told) == 5
    joined = jax.tree.map(lambda *v: jnp.concatenate(v), *parts)
    for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(usual[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_many_seeds_by_vmap():
    learn = learner(entropy=0.05)
    equations, keys = learn.equations, jax.random.split(jax.random.key(3), 2)

    def run(key):
        return equations.run(equations.start(learn.step.params, key), 6)

    agents, record = jax.jit(jax.vmap(run))(keys)
    assert record.reward.shape == (2, 6, 2)
    alone, _ = jax.jit(run)(keys[1])
    for a, b in zip(jax.tree.leaves(agents.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-12)


def test_a_reset_begins_episodes_and_keeps_what_was_learnt():
    learn = learner(scale_rewards=True)
    learn(7)
    params, count = jax.tree.map(np.asarray, learn.step.params), int(learn.agents.rewards.count)
    learn.reset()
    assert all(not np.any(z) for z in jax.tree.leaves(learn.agents.eligibility))
    assert all(not np.any(h) for h in jax.tree.leaves(learn.agents.carry))
    assert int(learn.agents.rewards.count) == count == 14
    assert all(np.array_equal(learn.step.params[k], v) for k, v in params.items())


# --- models ----------------------------------------------------------------------------------------------------------


class Spiking(brainstate.nn.Module):
    """Leaky neurons with a time step that has a unit, a random key of its own, and a readout in bfloat16."""

    def __init__(self):
        super().__init__()
        self.w = brainstate.ParamState(jnp.asarray(weights()["w"], jnp.float32) * u.mV)
        self.random = brainstate.random.RandomState(5)
        self.readout = brainstate.ParamState(jnp.ones((UNITS, ACTIONS + 1), jnp.bfloat16))

    def init_state(self, batch_size=None):
        self.v = brainstate.HiddenState(jnp.zeros((batch_size, UNITS), jnp.float32) * u.mV)

    def update(self, x):
        decay = jnp.exp(-brainstate.environ.get("dt") / (20.0 * u.ms)).astype(jnp.float32)
        noise = 0.1 * self.random.normal(size=self.v.value.shape).astype(jnp.float32) * u.mV
        self.v.value = decay * self.v.value + x.astype(jnp.float32) @ self.w.value + noise
        out = jnp.tanh(self.v.value / u.mV).astype(jnp.bfloat16) @ self.readout.value
        return out[:, :ACTIONS], out[:, ACTIONS]


def test_units_random_keys_and_mixed_precision():
    with brainstate.environ.context(dt=1.0 * u.ms):
        step = etcompile.compile(Spiking(), jnp.zeros((3, SIZE)), batch_size=3)
        learn = step.learn_td(optax.sgd(0.1), ENV)
        record = learn(6)
    z = learn.agents.eligibility
    assert z["w"].shape == (3, SIZE, UNITS) and u.get_unit(z["w"]) == u.mV
    assert z["readout"].dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(record.td_error, np.float32)).all()
    drawn = learn.agents.carry.states["random"]
    assert len({np.asarray(jax.random.key_data(k)).tobytes() for k in drawn}) == 3  # each agent's own


@pytest.mark.parametrize("rule", ["pp_prop", "uoro"])
def test_other_rules(rule):
    step = compiled(algo=rule)
    record = step.learn_td(optax.sgd(0.1), ENV)(6)
    assert np.isfinite(np.asarray(record.td_error)).all()


def test_cost_counts_a_trace_of_gradients_for_each_agent():
    learn = learner(3)
    size = sum(v.nbytes for v in jax.tree.leaves(weights()))
    traces = sum(v.nbytes for v in jax.tree.leaves(learn.agents.carry.traces))
    assert learn.cost().trace_bytes == 3 * size + traces
    assert traces == learn.step.cost(batch=3).trace_bytes


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "told"), [
    (dict(gamma=1.5), "gamma is out of range"),
    (dict(gamma=1.0, lam=1.0), "never decays"),
    (dict(method="sarsa"), "no such method"),
    (dict(epsilon=0.1), "has no option 'epsilon'"),
    (dict(entropy=-1.0), "entropy is out of range"),
    (dict(env=InPython), "reset\\(key\\)|something else|two pure functions|fails"),
    (dict(env=3), "two pure functions"),
    (dict(optimizer=optax.sgd), "needs an optimiser of optax"),
    (dict(seed=0.5), "seed must be"),
])  # fmt: skip
def test_options_that_make_no_sense(options, told):
    if options.get("env") is InPython:
        env = InPython()
        env.observation_space = None
        options, told = {"env": env}, "runs in Python"
    with pytest.raises(etcompile.OptionError, match=told):
        learner(**options)


def test_what_cannot_be_an_agent():
    with pytest.raises(etcompile.InputError, match="actor and a critic"):
        learner(fn=action_values)(1)
    with pytest.raises(etcompile.InputError, match="vector of real numbers"):
        learner(method="q")(1)
    with pytest.raises(etcompile.OptionError, match="reads a modulator"):
        compiled(algo="three_factor").learn_td(optax.sgd(0.1), ENV)
    with pytest.raises(etcompile.UnsupportedError, match="end of a window"):
        compiled(algo="bptt").learn_td(optax.sgd(0.1), ENV)
    outside = learner(env=None)
    with pytest.raises(etcompile.OptionError, match="no environment of its own"):
        outside(3)
    with pytest.raises(etcompile.OptionError, match="seen nothing yet"):
        outside.observe(0.0, np.zeros((2, SIZE)), False)
    outside.begin(np.zeros((2, SIZE)))
    before = numbers(outside)
    with pytest.raises(etcompile.InputError, match="no first observation"):
        outside.observe(0.0, np.zeros((2, SIZE)), True)
    with pytest.raises(etcompile.InputError, match="do not fit the agents"):
        outside.observe(0.0, np.zeros((3, SIZE)), False)
    with pytest.raises(etcompile.InputError, match="environment of its own"):
        outside.play(InPython(), 3)
    assert numbers(outside) == before
    optimizer = obgd()
    with pytest.raises(etcompile.OptionError, match=r"step\.learn_td"):
        optimizer.update(weights(), optimizer.init(weights()))
