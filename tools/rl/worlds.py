"""Tasks that need memory, as pure functions ``reset(key)`` and ``step(key, state, action)``.

``MemoryChain`` and ``MaskedCartPole`` are written here and not taken from gymnax, which asks for a JAX below 0.12. The tests
compare them with gymnax's chain and gymnasium's pole where these are installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["CartPole", "MaskedCartPole", "MemoryChain", "TMaze"]


@dataclass(frozen=True)
class TMaze:
    """A corridor with a sign at its start that tells which way to turn at its end, of which nothing is seen on the way.

    Actions: forward, left, right. Turning in the corridor, or going on at the junction, costs 0.1 and does nothing. The turn
    at the junction ends the episode with 1 where the sign said so, -1 where not. Observed are the sign (two lines, at the start
    alone), whether this is the junction, and two lines of random signs at every step, which tell nothing. After Bakker,
    "Reinforcement learning with long short-term memory", 2001, without the way back.
    """

    corridor: int
    actions = 3
    inputs = 5

    @property
    def limit(self) -> int:
        return 6 * self.corridor + 30

    def reset(self, key: Any) -> tuple[Any, Any]:
        which, noise = jax.random.split(key)
        state = (
            jnp.zeros((), jnp.int32),
            jax.random.bernoulli(which).astype(jnp.int32),
            jnp.zeros((), jnp.int32),
        )
        return self._seen(noise, state), state

    def step(self, key: Any, state: Any, action: Any) -> tuple[Any, ...]:
        at, sign, time = state
        junction, forward = at == self.corridor, jnp.asarray(action) == 0
        right = junction & (action == 1 + sign)
        ends = junction & ~forward
        bumps = junction == forward
        reward = jnp.where(ends, jnp.where(right, 1.0, -1.0), jnp.where(bumps, -0.1, 0.0))
        state = jnp.where(forward & ~junction, at + 1, at), sign, time + 1
        return self._seen(key, state), state, reward, ends, ~ends & (time + 1 >= self.limit), {}

    def _seen(self, key: Any, state: Any) -> Any:
        at, sign, _ = state
        shown = jnp.where(at == 0, jax.nn.one_hot(sign, 2), 0.0)
        noise = jax.random.rademacher(key, (2,)).astype(jnp.float32)
        return jnp.concatenate([shown, (at == self.corridor).astype(jnp.float32)[None], noise])


@dataclass(frozen=True)
class MemoryChain:
    """bsuite's memory length, as gymnax 1.0 has it: a sign at the start, to be told after so many steps.

    Observed are the share of the time that is left, the query (0: there is one bit) and the sign, -1 or 1, at the first step
    alone. The action at the last step is worth 1 if it is the bit, else -1. Osband et al., "Behaviour suite for reinforcement
    learning", 2020.
    """

    length: int
    actions = 2
    inputs = 3

    def reset(self, key: Any) -> tuple[Any, Any]:
        state = jnp.zeros((), jnp.int32), jax.random.bernoulli(key).astype(jnp.int32)
        return self._seen(state), state

    def step(self, key: Any, state: Any, action: Any) -> tuple[Any, ...]:
        time, sign = state
        # What is seen is of before the step, as in gymnax.
        seen = self._seen(state)
        reward = jnp.where(time < self.length, 0.0, jnp.where(action == sign, 1.0, -1.0))
        return seen, (time + 1, sign), reward, time == self.length, {}

    def _seen(self, state: Any) -> Any:
        time, sign = state
        left = 1 - time / self.length
        return jnp.stack([left, jnp.zeros(()), jnp.where(time == 0, 2.0 * sign - 1, 0.0)]).astype(jnp.float32)


@dataclass(frozen=True)
class CartPole:
    """A pole to be balanced on a cart, all of it seen: positions in units of their limits, and velocities.

    Equations and limits of gymnasium's CartPole-v1, 1 for every step, at most 500 steps. A. G. Barto, R. S. Sutton and C. W.
    Anderson, 1983.
    """

    actions = 2
    inputs = 4
    limit = 500

    def reset(self, key: Any) -> tuple[Any, Any]:
        state = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05), jnp.zeros((), jnp.int32)
        return self._seen(state), state

    def step(self, key: Any, state: Any, action: Any) -> tuple[Any, ...]:
        (x, speed, angle, turning), time = state
        cosine, sine = jnp.cos(angle), jnp.sin(angle)
        pushed = (jnp.where(action == 1, 10.0, -10.0) + 0.05 * turning**2 * sine) / 1.1
        angular = (9.8 * sine - cosine * pushed) / (0.5 * (4.0 / 3.0 - 0.1 * cosine**2 / 1.1))
        linear = pushed - 0.05 * angular * cosine / 1.1
        new = jnp.stack([x, speed, angle, turning]) + 0.02 * jnp.stack([speed, linear, turning, angular])
        state = new, time + 1
        falls = (jnp.abs(new[0]) > 2.4) | (jnp.abs(new[2]) > 12 * jnp.pi / 180)
        return self._seen(state), state, 1.0, falls, ~falls & (time + 1 >= self.limit), {}

    def _seen(self, state: Any) -> Any:
        (x, speed, angle, turning), _ = state
        return jnp.stack([x / 2.4, angle / (12 * jnp.pi / 180), speed, turning])


@dataclass(frozen=True)
class MaskedCartPole(CartPole):
    """CartPole of which positions alone are seen; velocities have to be found from what was seen before."""

    inputs = 2

    def _seen(self, state: Any) -> Any:
        return super()._seen(state)[:2]
