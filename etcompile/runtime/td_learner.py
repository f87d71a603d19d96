"""The learner of ``step.learn_td``: what stands between calls, and the environment inside or outside of the compiled loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

from etcompile.cost.cost import Cost, measured, priced
from etcompile.errors import InputError, OptionError
from etcompile.integers import as_integer, positive_integer
from etcompile.keywords import refuse_others
from etcompile.lowering.in_place import alike_at_every_size
from etcompile.runtime.progress import in_pieces, piece_lengths, progress_bar, segment_lengths
from etcompile.runtime.shapes import shapes_of
from etcompile.runtime.td.brains import Brains
from etcompile.runtime.td.equations import Agents, Equations, Record, with_extra_arguments
from etcompile.runtime.td.methods import method_of
from etcompile.runtime.td.worlds import Transition, world_of

if TYPE_CHECKING:
    from rich.progress import Progress

    from etcompile.runtime.checkpoints import Checkpoints
    from etcompile.runtime.step import Step

__all__ = ["TDLearner"]


class TDLearner:
    """Agents that act with a compiled step and learn from rewards at every step; made by :meth:`Step.learn_td`.

    Calling it with a number of steps runs the environment inside of the compiled loop. Without an environment of pure functions,
    :meth:`play` runs one of gymnasium's, or :meth:`begin` and :meth:`observe` are called at every step of whatever it is.

    The weights are the step's. States and traces of the agents are the learner's own, and go on from call to call; the model's
    own states stay as they were. :meth:`reset` begins new episodes.

    Parameters
    ----------
    step : Step
        Its batch axis numbers the agents.
    optimizer, env, method, gamma, lam, normalise_observations, scale_rewards, env_params, seed, options
        As for :meth:`Step.learn_td`.

    Attributes
    ----------
    step : Step
    equations : Equations
        The pure functions underneath.

    Examples
    --------
    An agent that is shown a sign and shall answer with it at once:

    >>> import brainstate, etcompile, jax, jax.numpy as jnp, optax
    >>> class Net(brainstate.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.cell = brainstate.nn.GRUCell(1, 8)
    ...         self.actor, self.critic = brainstate.nn.Linear(8, 2), brainstate.nn.Linear(8, 1)
    ...
    ...     def update(self, x):
    ...         h = self.cell(x)
    ...         return self.actor(h), self.critic(h)
    >>> def reset(key):
    ...     sign = jax.random.bernoulli(key).astype(jnp.float32)
    ...     return sign[None], sign
    >>> def move(key, sign, action):
    ...     reward = (action == sign).astype(jnp.float32)
    ...     return sign[None], sign, reward, True, {}
    >>> brainstate.random.seed(0)
    >>> step = etcompile.compile(Net(), jnp.zeros((16, 1)), batch_size=16)
    >>> learn = step.learn_td(optax.adam(1e-2), (reset, move), gamma=0.9, lam=0.9)
    >>> record = learn(300)
    >>> record.reward.shape, bool(record.reward[-50:].mean() > 0.9)
    ((300, 16), True)
    """

    def __init__(
        self,
        step: Step,
        optimizer: Any,
        env: Any = None,
        *,
        method: Any = "actor_critic",
        gamma: float = 0.99,
        lam: float = 0.9,
        normalise_observations: bool = False,
        scale_rewards: bool = False,
        env_params: Any = None,
        seed: Any = 0,
        **options: Any,
    ) -> None:
        self._step = step
        run = step.executor
        self._made = run.compilation
        self.equations = Equations(
            Brains.of(run),
            method_of(method, options),
            with_extra_arguments(optimizer),
            None if env is None else world_of(env, env_params),
            *_shares(gamma, lam),
            bool(normalise_observations),
            bool(scale_rewards),
        )
        self._made = run.compilation
        self._key = seed if isinstance(seed, jax.Array) else jax.random.key(_seed(seed))
        self._state = brainstate.ShortTermState(None)
        self._jitted: dict[str, Callable] = {}
        if env is not None:
            self.reset()

    # -- what it is ---------------------------------------------------------------------------------------------

    @property
    def step(self) -> Step:
        """The compiled step that learns."""
        return self._step

    @property
    def agents(self) -> Agents:
        """All that goes on from step to step, with the step's weights as they are.

        Raises
        ------
        OptionError
            Before :meth:`begin`, where the environment is outside.
        """
        if self._state.value is None:
            raise OptionError(
                "these agents have seen nothing yet.",
                got="no observation",
                expected="begin(observation) first, or play(env, steps)",
            )
        return dataclasses.replace(self._state.value, params=self._step.executor.live.params())

    def saved_states(self) -> dict[str, Any]:
        """What the learner keeps from call to call beside its step."""
        self.agents  # noqa: B018  (raises where there is nothing yet)
        return {"agents": self._state}

    def cost(self) -> Cost:
        """What one step of all agents takes, environment included, found without running.

        ``trace_bytes`` has the model's traces and z: for N agents N times the size of the parameters, beside what
        ``step.cost(batch=N)`` says.
        """
        agents = shapes_of(self.agents)
        fn: Callable = self.equations.step
        args: tuple[Any, ...] = (agents,)
        if self.equations.world is None:
            fn, flags = self.equations.learn, jax.ShapeDtypeStruct((self.equations.brains.count,), bool)
            reward = jax.ShapeDtypeStruct(flags.shape, jnp.result_type(float))
            seen = agents.observation
            args = agents, Transition(reward, seen, flags, flags, seen)
        with alike_at_every_size():
            closed = jax.make_jaxpr(fn)(*args)
        ids = {id(leaf) for leaf in jax.tree.leaves((agents.carry.traces, agents.eligibility))}
        kept = [k for k, leaf in enumerate(jax.tree.leaves(args)) if id(leaf) in ids]
        return priced(measured(closed, kept), None, 1, self.equations.brains.agents)

    # -- the environment inside ---------------------------------------------------------------------------------

    def __call__(
        self,
        steps: int,
        *,
        progress: bool | Progress = False,
        checkpoints: Checkpoints | None = None,
        callback: Callable[[int, Record], None] | None = None,
        **others: Any,
    ) -> Record:
        """Run so many steps of the environment; weights, agents and environments go on from call to call.

        With ``progress``, ``checkpoints`` or ``callback`` the run is cut in pieces, with the numbers of one call. An interrupted
        call leaves everything as it was after its last whole piece.

        Parameters
        ----------
        steps : int
        progress : bool or rich.progress.Progress
            A bar, with minus the mean reward of the last piece as its loss.
        checkpoints : Checkpoints, optional
            Steps are counted there, and all is saved whenever the count is a multiple of its ``every``.
        callback : callable, optional
            ``callback(steps, record)`` after every piece, with the steps of this call so far and the record of the piece.

        Returns
        -------
        Record
            Time on axis 0.
        """
        refuse_others("the learner of learn_td", others, ("progress", "checkpoints", "callback"))
        steps = positive_integer("steps", steps, error=InputError)
        _check_callback(callback)
        if self.equations.world is None:
            raise OptionError(
                "this learner has no environment of its own.",
                got="learn_td without env",
                expected="learn_td(optimizer, env) with pure functions",
                hint="an environment of gymnasium's runs in play(env, steps).",
            )
        with self._step.executor.turns:
            return self._in_pieces(steps, progress, checkpoints, callback)

    def _in_pieces(self, steps: int, progress: Any, checkpoints: Any, callback: Any) -> Record:
        run = self._step.executor
        self._follow()
        if progress is False and checkpoints is None and callback is None:
            lengths = [steps]
        elif checkpoints is None:
            lengths = piece_lengths(steps)
        else:
            checkpoints.check_goes_on()
            lengths = segment_lengths(steps, checkpoints.at, checkpoints.every, fine=progress is not False)
        done = 0

        def piece(counted: Any) -> Record:
            nonlocal done
            agents, record = self._jit("run", self._run)(self.agents, counted)
            self._commit(agents)
            done += counted.shape[0]
            record = self._as_asked(record, axis=1)
            if callback is not None:
                callback(done, record)
            return record

        def after(steps: int) -> None:
            if checkpoints is not None:
                checkpoints.save(self, checkpoints.at + steps)

        shown = lambda record: -record.reward  # noqa: E731
        return in_pieces(
            run, piece, (np.arange(steps),), lengths, progress, "learning", shown=shown, after=after
        )

    def _run(self, agents: Agents, counted: Any) -> tuple[Agents, Record]:
        return self.equations.run(agents, counted.shape[0])

    # -- the environment outside --------------------------------------------------------------------------------

    def begin(self, observation: Any) -> Any:
        """Actions for the first observations of new episodes; states and traces at their start.

        Parameters
        ----------
        observation : pytree of arrays
            Of all agents, ``(N, ...)``; without the leading axis where the step has no batch axis.
        """
        with self._step.executor.turns:
            self._follow()
            return self._begin(self._given(observation))

    def _begin(self, observation: Any) -> Any:
        agents = self._jit("start", self.equations.start)(
            self._step.executor.live.params(), self._key, observation
        )
        if self._state.value is not None:
            old = self._state.value
            kept = dict(
                optimizer=old.optimizer, seen=old.seen, rewards=old.rewards, count=old.count, key=old.key
            )
            agents = dataclasses.replace(agents, **kept)
        choice = self._jit("act", self.equations.act)(agents)
        self._commit(agents)
        return self._as_asked(choice.action)

    def observe(
        self, reward: Any, observation: Any, terminated: Any, truncated: Any = False, first: Any = None
    ) -> tuple[Any, Record]:
        """Learn from what followed the last actions; returns the next actions and the record of the step.

        Parameters
        ----------
        reward : array, (N,)
        observation : pytree of arrays, (N, ...)
            What the actions led to.
        terminated, truncated : bool arrays, (N,)
            The episode ends there: for good, or since it is not looked at further, with a value that still counts.
        first : pytree of arrays, (N, ...), optional
            Where an episode ended, the first observation of the next one; elsewhere it is not read.
        """
        with self._step.executor.turns:
            self._follow()
            agents, number = self.agents, self.equations.brains.count
            flags = [jnp.broadcast_to(jnp.asarray(v, bool), (number,)) for v in (terminated, truncated)]
            if first is None and bool(jnp.any(flags[0] | flags[1])):
                raise InputError(
                    "an episode ended, and the next one has no first observation.",
                    got="first=None",
                    expected="first=, the observation that the environment's reset gave",
                )
            observation = self._given(observation)
            first = observation if first is None else self._given(first)
            first = jax.tree.map(
                lambda a, b: jnp.where((flags[0] | flags[1]).reshape(-1, *(1,) * (jnp.ndim(a) - 1)), a, b),
                first,
                observation,
            )
            rewards = jnp.broadcast_to(jnp.asarray(reward), (number,))
            transition = Transition(rewards, observation, flags[0], flags[1], first)
            agents, record, action = self._jit("observe", self._observe)(agents, transition)
            self._commit(agents)
            return self._as_asked(action), self._as_asked(record)

    def _observe(self, agents: Agents, transition: Transition) -> tuple[Agents, Record, Any]:
        agents, record = self.equations.learn(agents, transition)
        return agents, record, self.equations.act(agents).action

    def play(
        self,
        envs: Any,
        steps: int,
        *,
        seed: int | None = None,
        progress: bool | Progress = False,
        callback: Callable[[int, Record], None] | None = None,
    ) -> Record:
        """Run so many steps of environments with gymnasium's API, which are Python; each call begins new episodes.

        Parameters
        ----------
        envs : gymnasium.Env or sequence of these
            ``reset(seed=None) -> (observation, info)`` and ``step(action) -> (observation, reward, terminated, truncated,
            info)``: one, or one for each agent.
        steps : int
        seed : int, optional
            Of the first environment's first episode; the next ones get the numbers that follow.
        progress : bool or rich.progress.Progress
        callback : callable, optional
            ``callback(steps, record)`` after every step.

        Returns
        -------
        Record
            Time on axis 0.
        """
        steps = positive_integer("steps", steps, error=InputError)
        _check_callback(callback)
        envs = list(envs) if isinstance(envs, Sequence) else [envs]
        if len(envs) != self.equations.brains.count:
            raise InputError(
                "every agent needs an environment of its own.",
                got=f"{len(envs)} environments",
                expected=f"{self.equations.brains.count}",
                hint="compile the step with batch_size= for the number of environments.",
            )
        alone = self.equations.brains.agents is None
        records: list[Record] = []
        seeds = [None if seed is None else _seed(seed) + k for k in range(len(envs))]
        firsts = [env.reset(seed=number)[0] for env, number in zip(envs, seeds, strict=True)]
        action = self.begin(_together(firsts, alone))
        with progress_bar(progress, steps, "learning") as advance:
            for number in range(1, steps + 1):
                actions = [action] if alone else action
                found = [env.step(_of_python(a)) for env, a in zip(envs, np.asarray(actions), strict=True)]
                observations, rewards, terminated, truncated, _ = zip(*found, strict=True)
                ended = [a or b for a, b in zip(terminated, truncated, strict=True)]
                firsts = [
                    env.reset()[0] if end else now
                    for env, end, now in zip(envs, ended, observations, strict=True)
                ]
                action, record = self.observe(
                    np.asarray(rewards),
                    _together(list(observations), alone),
                    np.asarray(terminated),
                    np.asarray(truncated),
                    _together(firsts, alone),
                )
                records.append(record)
                if callback is not None:
                    callback(number, record)
                advance(1, -float(np.mean(rewards)))
        return jax.tree.map(lambda *v: jnp.stack(v), *records)

    # -- what stands between calls ------------------------------------------------------------------------------

    def reset(self) -> None:
        """New episodes in all environments, and z, states and traces at their start; what was learnt stays.

        Moments of observations and rewards, the optimiser and the count of steps go on.
        """
        with self._step.executor.turns:
            self._follow()
            if self.equations.world is None:
                self._state.value = None
                return
            old = self._state.value
            key = self._key if old is None else jax.random.fold_in(old.key, old.count)
            agents = self._jit("start", self.equations.start)(self._step.executor.live.params(), key)
            if old is not None:
                agents = dataclasses.replace(
                    agents, optimizer=old.optimizer, seen=old.seen, rewards=old.rewards, count=old.count
                )
            self._commit(agents)

    def _commit(self, agents: Agents) -> None:
        live = self._step.executor.live
        live.set_params(agents.params)
        self._state.value = dataclasses.replace(agents, params=())

    def _follow(self) -> None:
        """Be for the step as it is compiled now: for another environment of brainstate the functions are others."""
        run = self._step.executor
        run.follow_environment()
        if run.compilation is self._made:
            return
        brains = Brains.of(run)
        if brains.count != self.equations.brains.count:
            raise OptionError(
                "the step was given another batch size, and these agents are as many as before.",
                got=f"{brains.count} agents",
                expected=f"{self.equations.brains.count}",
                hint="make another learner: step.learn_td(...).",
            )
        self.equations = dataclasses.replace(self.equations, brains=brains)
        self._made = run.compilation
        self._jitted.clear()

    def _jit(self, name: str, fn: Callable) -> Callable:
        if name not in self._jitted:
            self._jitted[name] = jax.jit(fn)
        return self._jitted[name]

    def _given(self, observation: Any) -> Any:
        """Observations of all agents as arrays of the dtypes that the model takes."""
        brains = self.equations.brains
        if brains.agents is None:
            observation = jax.tree.map(lambda v: jnp.asarray(v)[None], observation)
        wanted = [leaf.aval.dtype for leaf in brains.functions.model.given]
        leaves, tree = jax.tree.flatten(observation)
        if len(leaves) == len(wanted):
            leaves = [jnp.asarray(v).astype(d) for v, d in zip(leaves, wanted, strict=True)]
        if any(jnp.shape(v)[:1] != (brains.count,) for v in leaves):
            raise InputError(
                "observations do not fit the agents.",
                got=f"shapes {[jnp.shape(v) for v in leaves]}",
                expected=f"a leading axis of {brains.count} agents",
            )
        return jax.tree.unflatten(tree, leaves)

    def _as_asked(self, found: Any, axis: int = 0) -> Any:
        """Without the axis of agents where the step has none."""
        if self.equations.brains.agents is not None:
            return found
        return jax.tree.map(lambda v: jnp.take(v, 0, axis=axis), found)


def _together(values: list[Any], alone: bool) -> Any:
    return values[0] if alone else jax.tree.map(lambda *v: np.stack(v), *values)


def _of_python(action: Any) -> Any:
    """An action as gymnasium's environments take it: a number of its own for one of a kind."""
    return (
        int(action)
        if np.ndim(action) == 0 and np.issubdtype(np.asarray(action).dtype, np.integer)
        else action
    )


def _share(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not 0 <= number <= 1:
        raise OptionError(f"{name} is out of range.", got=f"{name}={value!r}", expected="a number in [0, 1]")
    return number


def _shares(gamma: Any, lam: Any) -> tuple[float, float]:
    gamma, lam = _share("gamma", gamma), _share("lam", lam)
    if gamma * lam == 1:
        raise OptionError(
            "a trace that never decays cannot be kept.",
            got="gamma=1, lam=1",
            expected="gamma * lam below 1",
            hint="lam=0.999 credits a thousand steps, and episodes that end clear the trace.",
        )
    return gamma, lam


def _seed(seed: Any) -> int:
    number = as_integer(seed)
    if number is None:
        raise OptionError("seed must be an integer or a random key.", got=f"seed={seed!r}", expected="0")
    return number


def _check_callback(callback: Any) -> None:
    if callback is not None and not callable(callback):
        raise OptionError(
            "the callback must be a function.", got=repr(callback), expected="callback(steps, record)"
        )
