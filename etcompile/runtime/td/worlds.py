"""Environments as pure functions: gymnax's, or any ``reset(key)`` and ``step(key, state, action)``, for many agents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from etcompile.errors import InputError, OptionError

__all__ = ["Transition", "World", "world_of"]

Array = Any


class Transition(NamedTuple):
    """What follows an action, of all agents.

    Attributes
    ----------
    reward : array, (N,)
    observation : pytree
        What the action led to, also where the episode ends with it.
    terminated, truncated : bool arrays, (N,)
        The episode ends: nothing is worth anything any more; or it is only not looked at further.
    first : pytree
        What the next action is for: the observation, or the first one of the next episode.
    """

    reward: Array
    observation: Any
    terminated: Array
    truncated: Array
    first: Any

    @property
    def ended(self) -> Array:
        return self.terminated | self.truncated


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """A pair of pure functions of one agent's environment.

    ``reset(key) -> (observation, state)`` and ``step(key, state, action) -> (observation, state, reward, done, info)``, or with
    ``terminated, truncated`` in the place of ``done``. An environment that starts the next episode itself says in
    ``info["final_observation"]`` what the last action led to.
    """

    reset: Callable[..., Any]
    step: Callable[..., Any]

    def begin(self, keys: Array) -> tuple[Any, Any]:
        """First observations and states of all agents."""
        return jax.vmap(self.reset)(keys)

    def follow(self, keys: Array, states: Any, actions: Array) -> tuple[Any, Transition]:
        """New states, and what follows the actions; where an episode ends the next one begins."""
        return jax.vmap(self._follow)(keys, states, actions)

    def _follow(self, key: Array, state: Any, action: Array) -> tuple[Any, Transition]:
        now, anew = jax.random.split(key)
        found = self.step(now, state, action)
        if not isinstance(found, tuple) or len(found) not in (5, 6):
            raise InputError(
                "the environment's step returns something else than a step.",
                got=f"a tuple of {len(found)}" if isinstance(found, tuple) else type(found).__name__,
                expected="(observation, state, reward, done, info), or with terminated, truncated in the place of done",
            )
        observation, after, reward, *ends, info = found
        terminated = jnp.asarray(ends[0], bool)
        truncated = jnp.asarray(ends[1], bool) if len(ends) == 2 else jnp.zeros((), bool)
        info = info if isinstance(info, Mapping) else {}
        ended = terminated | truncated
        if "final_observation" in info:
            # By the shapes of what reset gives: some environments return another dtype from a step.
            return after, Transition(reward, info["final_observation"], terminated, truncated, observation)
        first, fresh = self.reset(anew)
        after = jax.tree.map(lambda a, b: _chosen(ended, a, b), fresh, after)
        first = jax.tree.map(lambda a, b: _chosen(ended, a, b), first, observation)
        return after, Transition(reward, observation, terminated, truncated, first)


def _chosen(which: Array, a: Any, b: Any) -> Any:
    """A or b, in the dtype of a."""
    b = jnp.asarray(b)
    return jnp.where(
        which, a, b if jnp.issubdtype(b.dtype, jax.dtypes.prng_key) else b.astype(jnp.asarray(a).dtype)
    )


def world_of(env: Any, params: Any = None) -> World:
    """An environment's pure functions, with its parameters where it has some (gymnax)."""
    pair: Any = env
    if not (isinstance(env, tuple) and len(env) == 2):
        pair = getattr(env, "reset", None), getattr(env, "step", None)
    reset: Any = pair[0]
    step: Any = pair[1]
    # A value there; environments of pure functions have a function of their parameters.
    if not callable(getattr(env, "observation_space", len)):
        raise OptionError(
            "this environment runs in Python, and not inside of a compiled loop.",
            got=repr(env),
            expected="pure functions reset(key) and step(key, state, action)",
            hint="leave env out: step.learn_td(optimizer).play(env, steps).",
        )
    if not callable(reset) or not callable(step):
        raise OptionError(
            "an environment is two pure functions.",
            got=repr(env),
            expected="(reset, step), or an object with both: reset(key) -> (observation, state), "
            "step(key, state, action) -> (observation, state, reward, done, info)",
        )
    params = getattr(env, "default_params", None) if params is None else params
    if params is None:
        return World(reset, step)
    return World(lambda key: reset(key, params), lambda key, state, action: step(key, state, action, params))
