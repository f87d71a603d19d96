"""Temporal-difference learning as its equations say, step by step in plain Python: the oracle of tests/test_td.py.

Every gradient is made by ``jax.grad`` through the whole history of an episode, from its first step, with the weights that each step
was taken with. Actions are given; all else follows from them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

UNITS, SIZE, ACTIONS = 4, 3, 2


def network(params, state, x):
    """Element-wise recurrence with an actor and a critic: nothing is cut in it."""
    h = jnp.tanh(x @ params["w"] + params["v"] * state["h"])
    return {"h": h}, (h @ params["actor"], h @ params["critic"])


def action_values(params, state, x):
    state, (values, _) = network(params, state, x)
    return state, values


def weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"w": (SIZE, UNITS), "v": (UNITS,), "actor": (UNITS, ACTIONS), "critic": (UNITS, 1)}
    return {k: jnp.asarray(0.7 * rng.normal(size=s)) for k, s in shapes.items()}


def reset(key):
    state = jnp.array(0), jnp.array(0)
    return observation(*state), state


def observation(time, taken):
    return jnp.array([jnp.sin(1.0 + time), 0.3 * taken, jnp.cos(0.5 * time * (1 + taken))])


def move(key, state, action):
    """Ends for good when the action 1 was taken three times; is not looked at beyond five steps."""
    time, taken = state
    time, taken = time + 1, taken + action
    reward = jnp.where(action == 1, 1.0, -0.3) + 0.1 * time
    return observation(time, taken), (time, taken), reward, taken >= 3, (time >= 5) & (taken < 3), {}


class InPython:
    """The same environment with gymnasium's API."""

    def reset(self, seed=None):
        first, self.state = reset(None)
        return np.asarray(first), {}

    def step(self, action):
        found, self.state, reward, terminated, truncated, info = move(None, self.state, action)
        return np.asarray(found), float(reward), bool(terminated), bool(truncated), info


class Running:
    """Mean and variance of a list, by numpy from the list itself."""

    def __init__(self):
        self.values = []

    def deviation(self):
        values = np.array(self.values)
        variance = np.var(values, axis=0, ddof=1) if len(values) > 1 else np.ones(values.shape[1:])
        return np.sqrt(variance + 1e-8)

    def normalised(self, x):
        return (x - np.mean(self.values, axis=0)) / self.deviation()


def expected(
    actions, params, *, q=False, gamma=0.9, lam=0.8, entropy=0.0, critic=1.0, rate=0.1, kappa=None,
    normalise=False, scale=False,
):  # fmt: skip
    """Records and weights of a run in which these actions, ``(T, N)``, were taken."""
    steps, number = actions.shape
    seen, rewards_seen = Running(), Running()

    def normal(x):
        return seen.normalised(x) if normalise else x

    def unrolled(shift, history):
        state = {"h": jnp.zeros(UNITS)}
        for at, x in history:
            state, out = network(jax.tree.map(jnp.add, at, shift), state, jnp.asarray(x))
        return out

    def objective(shift, history, action, sign):
        logits, value = unrolled(shift, history)
        if q:
            return logits[action]
        logs = jax.nn.log_softmax(logits)
        return critic * value[0] + logs[action] - entropy * sign * jnp.sum(jnp.exp(logs) * logs)

    def worth(history):
        logits, value = unrolled(zero, history)
        return float(jnp.max(logits)) if q else float(value[0])

    gradient = jax.grad(objective)
    zero = jax.tree.map(jnp.zeros_like, params)
    found = [reset(None) for _ in range(number)]
    worlds = [state for _, state in found]
    seen.values += [np.asarray(x) for x, _ in found]
    observations = [normal(np.asarray(x)) for x, _ in found]
    histories = [[] for _ in range(number)]
    traces = [zero] * number
    returns = np.zeros(number)
    record = {
        k: np.zeros((steps, number)) for k in ("reward", "terminated", "truncated", "value", "td_error")
    }
    for t in range(steps):
        moved = [move(None, w, int(a)) for w, a in zip(worlds, actions[t], strict=True)]
        seen.values += [np.asarray(m[0]) for m in moved]
        nexts = [normal(np.asarray(m[0])) for m in moved]
        reward = np.array([float(m[2]) for m in moved])
        returns = gamma * returns + reward
        rewards_seen.values += list(returns)
        scaled = reward / rewards_seen.deviation() if scale else reward
        ended, errors = [], []
        for n in range(number):
            history = [*histories[n], (params, observations[n])]
            logits, value = unrolled(zero, history)
            held = float(logits[actions[t, n]] if q else value[0])
            terminated, truncated = bool(moved[n][3]), bool(moved[n][4])
            ahead = 0.0 if terminated else gamma * worth([*history, (params, nexts[n])])
            error = scaled[n] + ahead - held
            cut = q and actions[t, n] != int(jnp.argmax(logits))
            grad = gradient(zero, history, int(actions[t, n]), np.sign(error))
            traces[n] = _added(0 if cut else gamma * lam, traces[n], grad)
            for k, v in zip(record, (reward[n], terminated, truncated, held, error), strict=True):
                record[k][t, n] = v
            histories[n] = history
            ended.append(terminated or truncated)
            errors.append(error)
        steps_of = [_step(rate, kappa, e, z) for e, z in zip(errors, traces, strict=True)]
        for step, trace in zip(steps_of, traces, strict=True):
            params = _added(1.0, params, _added(step / number, trace, zero))
        worlds = [m[1] for m in moved]
        firsts = [np.asarray(m[0]) for m in moved]
        for n in range(number):
            if ended[n]:
                first, worlds[n] = reset(None)
                firsts[n] = np.asarray(first)
                seen.values.append(firsts[n])
                histories[n], traces[n], returns[n] = [], zero, 0.0
        observations = [normal(first) for first in firsts] if normalise else firsts
    return record, params


def _added(factor, a, b):
    """``factor a + b``."""
    return jax.tree.map(lambda x, y: factor * x + y, a, b)


def _step(rate, kappa, error, trace):
    """By how much a trace is taken: rate times error, or what ObGD makes of it."""
    if kappa is None:
        return rate * error
    size = sum(float(jnp.abs(z).sum()) for z in jax.tree.leaves(trace))
    bound = rate * kappa * max(abs(error), 1.0) * size
    return (rate / bound if bound > 1 else rate) * error
