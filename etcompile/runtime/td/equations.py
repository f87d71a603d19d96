"""The equations of temporal-difference learning with eligibility traces, as pure functions of one value that holds everything.

At every step, for each agent, with observation o_t, action a_t and the reward r_t that follows it::

    delta_t = r_t + gamma V(o_{t+1}) - V(o_t)          both by the weights of now; no V where the episode terminated
    z_t     = gamma lambda z_{t-1} + grad_t            grad_t: the rule's online gradient of the method's objective
    theta   = theta + optimiser(mean over agents of delta_t z_t)

and where an episode ends, z, the model's states and the rule's traces go back to their start.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from etcompile.errors import InputError, OptionError
from etcompile.lowering.functions import Carry
from etcompile.nn import GradExpon, Moments
from etcompile.nn.obgd import optax_module
from etcompile.runtime.td.brains import Brains, where_agent
from etcompile.runtime.td.methods import Choice, Method
from etcompile.runtime.td.worlds import Transition, World

__all__ = ["Agents", "Equations", "Record", "with_extra_arguments"]

Array = Any

#: Streams of random numbers, folded into the key of a step: for actions, and for the environment.
_ACTIONS, _WORLD = 0, 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Agents:
    """All that learning needs to go on: agents, their environments, what they share.

    Attributes
    ----------
    params : pytree
        The weights, which all agents share.
    optimizer : pytree
        The optimiser's state.
    carry : Carry
        States and traces of the model, with a leading axis of agents; so have the next three.
    eligibility : pytree
        z, like the parameters; empty where gamma lambda is 0.
    observation : pytree
        What the next action is for, normalised.
    world : pytree
        States of the environments; empty where they are outside.
    seen : Moments or tuple
        Of observations, leaf by leaf; empty where they are not normalised.
    returns, rewards : array and Moments, or tuples
        Discounted sums of rewards, and their moments; empty where rewards are not scaled.
    key : random key
    count : int array, shape ()
        Steps so far.
    """

    params: Any
    optimizer: Any
    carry: Carry
    eligibility: Any
    observation: Any
    world: Any
    seen: Any
    returns: Any
    rewards: Any
    key: Array
    count: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """What happened in a run; arrays of shape ``(T, N)``, of an agent without batch axis ``(T,)``.

    Attributes
    ----------
    reward : array
        As the environment gave it.
    terminated, truncated : bool arrays
    action : array
    value : array
        What the agent held the moment to be worth.
    td_error : array
    """

    reward: Array
    terminated: Array
    truncated: Array
    action: Array
    value: Array
    td_error: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Equations:
    """Pure functions of :class:`Agents`: jit, vmap and scan them as you like (a vmap over seeds, for one).

    Attributes
    ----------
    brains : Brains
        The compiled step, for each agent.
    method : Method
    optimizer : optax.GradientTransformation
    world : World or None
        None: the environment is outside.
    gamma, lam : float
    normalise_observations, scale_rewards : bool
    """

    brains: Brains
    method: Method
    optimizer: Any
    world: World | None
    gamma: float
    lam: float
    normalise_observations: bool
    scale_rewards: bool

    # -- the start ----------------------------------------------------------------------------------------------

    def start(self, params: Any, key: Array, observation: Any = None) -> Agents:
        """Agents at the start of their first episodes; ``observation`` where the environment is outside."""
        world: Any = ()
        if self.world is not None:
            observation, world = self.world.begin(self._keys(key, jnp.array(-1), _WORLD))
        number = self.brains.count
        decayed = self._trace(params)
        seen: Any = ()
        if self.normalise_observations:
            seen = jax.tree.map(
                lambda v: Moments.of(jax.ShapeDtypeStruct(v.shape[1:], _real(v))), observation
            )
            seen = self._seen(seen, observation)
        returns = jnp.zeros(number, self._dtype(params))
        return Agents(
            params,
            self.optimizer.init(params),
            self.brains.initial(),
            () if decayed is None else decayed.value,
            self._normalised(seen, observation),
            world,
            seen,
            returns if self.scale_rewards else (),
            Moments.of(returns[0]) if self.scale_rewards else (),
            key,
            jnp.zeros((), jnp.int32),
        )

    # -- a step -------------------------------------------------------------------------------------------------

    def act(self, agents: Agents) -> Choice:
        """What the agents do about their observations; the same as often as it is asked."""
        return self._act(agents)[0]

    def step(self, agents: Agents) -> tuple[Agents, Record]:
        """One step with the environment inside."""
        assert self.world is not None
        choice = self.act(agents)
        keys = self._keys(agents.key, agents.count, _WORLD)
        world, transition = self.world.follow(keys, agents.world, choice.action)
        return self.learn(dataclasses.replace(agents, world=world), transition)

    def run(self, agents: Agents, steps: int) -> tuple[Agents, Record]:
        """Steps with the environment inside; the record has time on axis 0."""
        return jax.lax.scan(lambda agents, _: self.step(agents), agents, length=steps)

    def learn(self, agents: Agents, transition: Transition) -> tuple[Agents, Record]:
        """What the agents make of what followed their actions."""
        choice, after = self._act(agents)
        params, ended = agents.params, transition.ended
        given = self._of_dtype(transition.reward, params)
        reward, returns, rewards = self._scaled(agents, given, transition)
        seen, observation, first = self._observed(agents, transition)
        out, _ = self.brains.outputs(params, after, observation)
        worth = jax.vmap(self.method.worth)(out)
        ahead = jnp.where(transition.terminated, 0, self.gamma * worth).astype(worth.dtype)
        error = reward.astype(worth.dtype) + ahead - choice.value

        grads, carry = self.brains.gradients(
            self.method.objective, params, agents.carry, agents.observation, choice.action, jnp.sign(error)
        )
        trace = self._eligible(agents, choice, grads)
        uphill = jax.tree.map(lambda z: jnp.conj(z) if jnp.iscomplexobj(z) else z, trace)
        down = jax.tree.map(lambda z: -jnp.mean(_times(error, z), axis=0).astype(z.dtype), uphill)
        changes, optimizer = self.optimizer.update(
            down, agents.optimizer, params, td_error=error, eligibility=uphill
        )
        _check_changes(params, changes)
        record = Record(
            given, transition.terminated, transition.truncated, choice.action, choice.value, error
        )
        new = Agents(
            jax.tree.map(lambda p, c: p + c.astype(p.dtype), params, changes),
            optimizer,
            self.brains.restarted(ended, carry),
            jax.tree.map(lambda z: where_agent(ended, jnp.zeros_like(z), z), trace) if self._decay else (),
            first,
            agents.world,
            seen,
            returns,
            rewards,
            agents.key,
            agents.count + 1,
        )
        return new, record

    # -- its parts ----------------------------------------------------------------------------------------------

    @property
    def _decay(self) -> float:
        return self.gamma * self.lam

    def _trace(self, params: Any) -> GradExpon | None:
        """The leaky sum of gradients, one for each agent; none where nothing lasts."""
        if not self._decay:
            return None
        number = self.brains.count
        like = jax.tree.map(lambda p: jax.ShapeDtypeStruct((number, *p.shape), p.dtype), params)
        return GradExpon(like, self._decay)

    def _act(self, agents: Agents) -> tuple[Choice, Carry]:
        out, after = self.brains.outputs(agents.params, agents.carry, agents.observation)
        keys = self._keys(agents.key, agents.count, _ACTIONS)
        return jax.vmap(self.method.choose, in_axes=(0, 0, None))(keys, out, agents.count), after

    def _keys(self, key: Array, count: Array, stream: int) -> Array:
        """A random key for each agent, for one purpose at one step."""
        key = jax.random.fold_in(jax.random.fold_in(key, count.astype(jnp.uint32)), stream)
        return jax.random.split(key, self.brains.count)

    def _eligible(self, agents: Agents, choice: Choice, grads: Any) -> Any:
        trace = self._trace(agents.params)
        if trace is None:
            return grads
        kept = jax.tree.map(lambda z: where_agent(choice.keeps, z, jnp.zeros_like(z)), agents.eligibility)
        return trace.advanced(kept, grads)

    def _scaled(self, agents: Agents, reward: Array, transition: Transition) -> tuple[Array, Any, Any]:
        """Rewards over the standard deviation of their discounted sums, with these sums and their moments."""
        if not self.scale_rewards:
            return reward, (), ()
        returns = self.gamma * agents.returns + reward
        moments = agents.rewards.seen(returns)
        return moments.scaled(reward), jnp.where(transition.ended, 0, returns), moments

    def _observed(self, agents: Agents, transition: Transition) -> tuple[Any, Any, Any]:
        """Moments with what is new, and the two observations of a transition, normalised."""
        if not self.normalise_observations:
            return (), transition.observation, transition.first
        seen = self._seen(agents.seen, transition.observation)
        observation = self._normalised(seen, transition.observation)
        seen = self._seen(seen, transition.first, transition.ended)
        first = self._normalised(seen, transition.first)
        return seen, observation, first

    def _seen(self, seen: Any, observation: Any, which: Any = None) -> Any:
        return jax.tree.map(
            lambda m, v: m.seen(v.astype(m.mean.dtype), which), seen, observation, is_leaf=_is_moments
        )

    def _normalised(self, seen: Any, observation: Any) -> Any:
        if not self.normalise_observations:
            return observation

        def normalised(moments: Moments, value: Array) -> Array:
            found = moments.normalised(value.astype(moments.mean.dtype))
            return found.astype(value.dtype) if jnp.issubdtype(value.dtype, jnp.floating) else found

        return jax.tree.map(normalised, seen, observation, is_leaf=_is_moments)

    def _dtype(self, params: Any) -> Any:
        floats = [p.real.dtype for p in jax.tree.leaves(params)]
        return jnp.result_type(*floats) if floats else jnp.result_type(float)

    def _of_dtype(self, reward: Array, params: Any) -> Array:
        reward = jnp.asarray(reward)
        if reward.shape != (self.brains.count,):
            raise InputError(
                "a reward is one number for each agent.",
                got=f"shape {reward.shape}",
                expected=f"shape ({self.brains.count},)",
            )
        return reward.astype(jnp.promote_types(self._dtype(params), jnp.float32))


def with_extra_arguments(optimizer: Any) -> Any:
    """An optax optimiser that may be told errors and traces."""
    optax = optax_module("learn_td")
    if isinstance(optimizer, type) or not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise OptionError(
            "learn_td needs an optimiser of optax.",
            got=repr(optimizer),
            expected="an optax GradientTransformation: optax.adam(1e-3), etcompile.nn.obgd(1.0)",
        )
    return optax.with_extra_args_support(optimizer)


def _check_changes(params: Any, changes: Any) -> None:
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(v)] for v in (params, changes)]
    if shapes[0] != shapes[1]:
        raise OptionError(
            "the optimiser's changes do not have the shapes of the parameters.",
            got=str(shapes[1]),
            expected=str(shapes[0]),
        )


def _times(error: Array, z: Array) -> Array:
    return error.reshape(-1, *(1,) * (z.ndim - 1)).astype(z.real.dtype) * z


def _is_moments(value: Any) -> bool:
    return isinstance(value, Moments)


def _real(value: Any) -> Any:
    """The dtype of moments of observations, which may be integers; sums over a run need 32 bits."""
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    return jnp.promote_types(value.dtype, jnp.float32) if floating else jnp.result_type(float)
