"""What compiled loops measure for observers, and what is made of it on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import saiunit as u
from jax import lax

from etcompile.lowering.activity import Activity
from etcompile.runtime.executor import Executor
from etcompile.runtime.observing.observer import Observation, Observer

__all__ = ["Measures", "Wanted", "observation"]

Array = Any


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What shall be measured; a key of compiled loops."""

    activity: bool = False
    gradient_norms: bool = False

    @classmethod
    def by(cls, observers: Sequence[Observer]) -> Wanted:
        return cls(any(o.wants_activity for o in observers), any(o.wants_gradient_norms for o in observers))


@dataclasses.dataclass(frozen=True, eq=False)
class Measures:
    """Measures inside of a compiled loop. What is not wanted is an empty tree, so that nothing is computed for it."""

    wanted: Wanted
    run: Executor

    def activity_of_step(self, x: Any) -> dict[str, Array]:
        """Before a step with these inputs is taken."""
        if not self.wanted.activity:
            return {}
        return self._activity(self.run.live.states(), self.run.with_environment(x))[0]

    def activity_of_steps(self, xs: Any, steps: int) -> dict[str, Array]:
        """Before a chunk is taken, whose weights are the same at every step: time is axis 0."""
        if not self.wanted.activity:
            return {}

        def one(states: Any, x: Any) -> tuple[Any, dict[str, Array]]:
            measured, new = self._activity(states, x)
            return new, measured

        return lax.scan(one, self.run.live.states(), self.run.with_environment(xs, steps))[1]

    def _activity(self, states: Any, x: Any) -> tuple[dict[str, Array], Any]:
        model = self.run.model
        part = Activity.of(self.run.compiled.causal.model)
        params = model.flatten_params(self.run.live.params())
        measured, new = part.measure([*params, *model.flatten_states(states), *model.flatten_inputs(x)])
        return measured, model.unflatten_states(new)

    def norms(self, gradients: Mapping[str, Any], updated: Any) -> dict[str, Any]:
        """Of the gradients by parameter, and whether the optimiser is given them."""
        if not self.wanted.gradient_norms:
            return {}
        model = self.run.model
        paths = jax.tree.unflatten(model.param_tree, [leaf.path for leaf in model.params])
        named = zip(
            jax.tree.leaves(self.run.live.by_param_state(paths)), jax.tree.leaves(gradients), strict=True
        )
        return {"of": {path: _norm(g) for path, g in named}, "updated": updated}


def _norm(gradient: Array) -> Array:
    return jnp.linalg.norm(jnp.abs(gradient).astype(jnp.float32).ravel())


def observation(
    measured: Mapping[str, Any], losses: Array, steps: int, total: int, at: int, seconds: float
) -> Observation:
    """What observers are told of a piece, from what its loop measured; time is axis 0."""
    activity, spiking = {}, set()
    for group, values in measured["activity"].items():
        means, binary = np.moveaxis(np.asarray(values), -1, 0)  # [steps, values shown] each
        spikes = (binary == 1).all(0)
        activity[group] = float(means[:, int(np.argmax(spikes))].mean())
        if spikes.any():
            spiking.add(group)
    norms = measured["norms"]
    updated = np.asarray(norms["updated"]) if norms else np.zeros(0, bool)
    of = {path: np.asarray(values)[updated] for path, values in norms["of"].items()} if norms else {}
    return Observation(
        steps, total, at, np.asarray(losses), seconds, activity, frozenset(spiking), of, _seconds_of_step()
    )


def _seconds_of_step() -> float | None:
    """``dt`` of the environment in seconds, if it is a time."""
    dt = brainstate.environ.get("dt", None)
    if not isinstance(dt, u.Quantity) or not u.have_same_dim(dt, u.second):
        return None
    return float(dt.to_decimal(u.second))
