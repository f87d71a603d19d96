"""Losses of all steps of a chunk: what such a loss writes from step to step, and its gradients by parameters that it reads."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.lowering.losses import replaced
from etcompile.lowering.mapped import mapped
from etcompile.lowering.schedules.base import Run
from etcompile.lowering.schedules.first_pass import Passed

__all__ = ["loss_by_params", "results_of_steps", "written_by_loss"]

Array = Any


def results_of_steps(run: Run, passed: Passed, inputs: list[Array]) -> tuple[list[Array], list[Array]]:
    """Outputs and new states of all steps, which a loss is made of."""

    def results(old: list[Array], costly: dict[int, Array], x: list[Array]) -> Any:
        step = run.causal.model.one_of_many(run.weights, old, x, costly)
        return step.outputs, step.new_states

    return mapped(results, passed.before, passed.costly, inputs)


def written_by_loss(run: Run, carried: Any, made: Any, given: Any) -> tuple[Any, Any]:
    """What the loss writes goes from step to step: found first, one by one. After all steps, and before each."""

    def write(now: Any, step: Any) -> tuple[Any, Any]:
        (outputs, new), (item, _) = step
        return run.of_step(outputs, new, run.params, now, item).carried, now

    return lax.scan(write, carried, (made, given))


def loss_by_params(run: Run, made: Any, given: Any, before: Any) -> dict[int, Array]:
    """The chunk's losses by parameters that the loss itself reads: summed over time before anything is as large as these."""
    reads = run.loss.program

    def total(some: list[Array]) -> Array:
        full = replaced(run.params, reads.params, some)

        def at_step(of_step: Any, given: Any, now: Any) -> Array:
            outputs, new = of_step
            return run.of_step(outputs, new, full, now, given[0]).value

        return jnp.sum(mapped(at_step, made, given, before))

    return dict(zip(reads.params, jax.grad(total)([run.params[k] for k in reads.params]), strict=True))
