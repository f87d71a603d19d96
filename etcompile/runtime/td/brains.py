"""One agent's share of a compiled step: its states and traces, and the pure functions that advance them.

Errors differ from agent to agent, so every agent needs its own trace of gradients, and gradients of a batch come summed. So the
step is compiled for a batch of one, and mapped over agents, each with a carry of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import brainstate
import jax
import jax.numpy as jnp

from etcompile.errors import OptionError, UnsupportedError
from etcompile.lowering.carried import outlasts
from etcompile.lowering.functions import Carry, StepFunctions
from etcompile.lowering.losses import Loss
from etcompile.lowering.schedules.windowed import check_end
from etcompile.runtime.checks import keywords_of
from etcompile.runtime.executor import Executor
from etcompile.runtime.resizing import batch_leaves

__all__ = ["Brains", "where_agent"]

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Brains:
    """Pure functions of all agents; every array but the parameters has a leading axis of agents.

    Attributes
    ----------
    functions : StepFunctions
        Of one agent.
    agents : int or None
        None: the step has no batch axis, and there is one agent.
    states : pytree
        The model's states where episodes begin.
    restarts : Carry of bool
        Which leaves of a carry an episode's end puts back.
    """

    functions: StepFunctions
    agents: int | None
    states: Any
    restarts: Carry

    @property
    def count(self) -> int:
        return self.agents or 1

    @classmethod
    def of(cls, run: Executor) -> Brains:
        """Of a step as it is compiled now, with its initial states."""
        run.follow_environment()
        _check(run)
        agents = run.compiled.causal.model.examples
        states = run.initial_carry().states
        flags, tree = [False] * len(jax.tree.leaves(states)), jax.tree.structure(states)
        functions = run.functions
        if agents is not None:
            flags = batch_leaves(run.compiled.analysis)[0]
        if agents is not None and agents > 1:
            with run.at_batch(1) as one:
                functions = one.functions
        number = agents or 1
        leaves = [
            v[:, None] if along else _for_each(v, number)
            for v, along in zip(jax.tree.leaves(states), flags, strict=True)
        ]
        states = _apart(run, jax.tree.unflatten(tree, leaves), number)
        traces = functions.causal.init_traces_shapes()
        return cls(functions, agents, states, _restarts(run, states, traces))

    def initial(self) -> Carry:
        """The carry where episodes begin: initial states, and traces of zeros."""
        traces = self.functions.causal.init_traces()
        return Carry(self.states, jax.tree.map(lambda v: _for_each(v, self.count), traces))

    def outputs(self, params: Any, carry: Carry, observations: Any) -> tuple[Any, Carry]:
        """Outputs of a step on these observations, and what it leaves."""

        def one(carry: Carry, observation: Any) -> tuple[Any, Carry]:
            after, out = self.functions.apply(params, carry, self._inputs(observation))
            return self._of_one(out), after

        return jax.vmap(one)(carry, observations)

    def gradients(
        self, objective: Any, params: Any, carry: Carry, observations: Any, *targets: Any
    ) -> tuple[Any, Carry]:
        """Online gradients of ``objective(out, *targets)``, one for each agent, of a step on these observations."""
        loss = Loss.plain(lambda out, *given: objective(self._of_one(out), *given))

        def one(carry: Carry, observation: Any, *given: Any) -> tuple[Any, Carry]:
            item = (given, None, ()), None
            _, grads, after = self.functions.value_and_grad(
                loss, params, carry, self._inputs(observation), item, {}
            )
            return grads, after

        return jax.vmap(one)(carry, observations, *targets)

    def restarted(self, ended: Array, carry: Carry) -> Carry:
        """The carry with states and traces as at the start for the agents whose episode ended."""

        def put(back: bool, start: Any, now: Any) -> Any:
            return where_agent(ended, start, now) if back else now

        return jax.tree.map(put, self.restarts, self.initial(), carry)

    def _inputs(self, observation: Any) -> tuple[Any, ...]:
        if self.agents is not None:
            observation = jax.tree.map(lambda v: v[None], observation)
        return observation if self.functions.model.input_count > 1 else (observation,)

    def _of_one(self, out: Any) -> Any:
        return out if self.agents is None else jax.tree.map(lambda v: v[0], out)


def where_agent(which: Array, a: Any, b: Any) -> Any:
    """A for the agents that are told, b for the others."""
    return jnp.where(which.reshape(-1, *(1,) * (a.ndim - 1)), a, b)


def _for_each(value: Any, number: int) -> Any:
    value = jnp.asarray(value)
    return jnp.broadcast_to(value, (number, *value.shape))


def _apart(run: Executor, states: Any, number: int) -> Any:
    """Random keys of the model made different for each agent."""
    keys = {p for p, s in run.live.state_objects.items() if isinstance(s, brainstate.random.RandomState)}
    if not keys:
        return states
    by_path = run.live.by_state(states)
    drawn = {p: jax.vmap(jax.random.fold_in)(by_path[p], jnp.arange(number)) for p in keys}
    return {p: drawn.get(p, v) for p, v in by_path.items()}


def _restarts(run: Executor, states: Any, traces: Any) -> Carry:
    """True where a reset of the step would put a leaf back."""
    lasting = {e.name for e in run.compiled.program.equations if outlasts(e)}
    initial = run.live.initial
    everything = not isinstance(states, dict) or not isinstance(initial, dict)

    def back(tree: Any, yes: bool) -> Any:
        return jax.tree.map(lambda _: yes, tree)

    of_states = back(states, True) if everything else {k: back(v, k in initial) for k, v in states.items()}
    return Carry(of_states, {k: back(v, k not in lasting) for k, v in traces.items()})


def _check(run: Executor) -> None:
    """Raise unless agents can learn with this step."""
    run.require_arrays()
    program = run.compiled.program
    check_end(program)
    run.functions.require_kept("learn_td")
    if program.window is not None:
        raise UnsupportedError(
            f"{program.name} has gradients at the end of a window, and an agent needs one at every step.",
            got=f"algo={program.name!r}",
            expected="a rule that runs forward in time, such as d_rtrl",
        )
    if read := keywords_of(program):
        raise OptionError(
            f"{program.name} reads a {', '.join(sorted(read))}, which learn_td does not give.",
            got=f"algo={program.name!r}",
            expected="a rule whose learning signal is made of the loss",
            hint="learn_td multiplies the rule's gradients by the agent's error, so d_rtrl learns from rewards as it is.",
        )
    if run.placement.mesh is not None:
        raise UnsupportedError(
            "learn_td runs on one device.",
            got=f"a schedule with mesh={dict(run.placement.mesh.shape)}",
            expected="a schedule without a mesh",
        )
    if run.model.environment.inputs:
        named = ", ".join(repr(entry.name) for entry in run.model.environment.inputs)
        raise UnsupportedError(
            f"the model reads {named} of brainstate.environ at every step, and learn_td takes steps of its own.",
            got=f"a model that reads {named}",
            expected="a model of observations and states alone; dt is no such entry",
            hint="make it part of the observation.",
        )
