"""A function of states, run for several values of its states at once.

The networks here are so small that a training step is mostly overhead: twenty trainings side by side cost a few times as
much as one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import brainstate
import jax
import jax.numpy as jnp

__all__ = ["Replicas"]


class Replicas:
    """``fn(*args)``, which reads and writes brainstate states, side by side for many values of them.

    ``args`` are an example without the leading axis of replicas that :meth:`__call__` expects on every argument.
    """

    def __init__(self, fn: Callable[..., Any], *args: Any):
        stateful = brainstate.transform.StatefulFunction(fn, return_only_write=False)
        stateful.make_jaxpr(*args)
        self.states: list[brainstate.State] = list(stateful.get_states(*args))
        self._run: Any = jax.jit(jax.vmap(stateful.jaxpr_call))
        self._values: Any = None

    def start(self, given: Sequence[Mapping[brainstate.State, Any]]) -> None:
        """One replica for each mapping from a state to its value; other states keep theirs."""
        each = [[one.get(state, state.value) for state in self.states] for one in given]
        self._values = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *each)

    def values(self, state: brainstate.State) -> Any:
        """What a state holds in all replicas, along a leading axis."""
        return next(v for s, v in zip(self.states, self._values, strict=True) if s is state)

    def __call__(self, *args: Any) -> Any:
        new, out = self._run(self._values, *args)
        self._values = [b if a is None else a for a, b in zip(new, self._values, strict=True)]
        return out
