"""The first pass over a chunk: its states, and with them what was computed at a price; no derivatives."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.analysis.index_rules import CHEAP
from etcompile.frontend.jaxpr import bind, read
from etcompile.lowering.derivatives import LoweredModel

__all__ = ["FirstPass", "Passed"]

Array = Any


@dataclasses.dataclass(frozen=True)
class Passed:
    """What the first pass leaves.

    Attributes
    ----------
    states : list of arrays
        After the chunk.
    before : list of arrays
        Before each of its steps, time on axis 0.
    costly : dict of int to array
        Variables of the step that are not worth computing again: products, convolutions, random numbers; and the new states, or
        XLA would compute them once more in every loop and product that reads an output. Time on axis 0.
    """

    states: list[Array]
    before: list[Array]
    costly: dict[int, Array]


class FirstPass:
    """The model alone, step by step."""

    def __init__(self, model: LoweredModel) -> None:
        self._model = model

    def __call__(self, weights: list[Array], states: list[Array], inputs: list[Array]) -> Passed:
        """Run it; ``inputs`` have time on axis 0."""
        graph = self._model.analysis.split.body
        after = self._model.analysis.model.new_state_vars

        def forward(now: list[Array], x: list[Array]) -> tuple[list[Array], Any]:
            env: dict[int, Array] = dict(zip(graph.inputs, [*weights, *now, *x], strict=True))
            for operation in graph.operations:
                results = bind(operation, [read(env, v) for v in operation.inputs])
                env.update(zip(operation.outputs, results, strict=True))
            return [read(env, v) for v in after], (now, {v: env[v] for v in self._costly})

        last, (before, costly) = lax.scan(forward, states, inputs)
        return Passed(last, before, costly)

    @cached_property
    def bytes_of_a_step(self) -> int:
        """What one step holds in a chunk, about: its values, and as much for their derivatives."""
        graph = self._model.analysis.split.body
        made = [graph.avals[v] for operation in graph.operations for v in operation.outputs]
        return max(1, 2 * sum(a.size * a.dtype.itemsize for a in made))

    @cached_property
    def _costly(self) -> tuple[int, ...]:
        """Variables on the way to the new states whose operations are worth keeping, and what comes from outside."""
        graph = self._model.analysis.split.body
        needed = {v for v in self._model.analysis.model.new_state_vars if isinstance(v, int)}
        costly: list[int] = []
        for operation in reversed(graph.operations):
            if needed.isdisjoint(operation.outputs):
                continue
            needed.update(v for v in operation.inputs if isinstance(v, int))
            plain = all(
                not jnp.issubdtype(graph.avals[v].dtype, jax.dtypes.extended) for v in operation.outputs
            )
            if operation.name not in CHEAP and plain:
                costly += operation.outputs
        new = [
            v
            for v in self._model.analysis.model.new_state_vars
            if isinstance(v, int) and not jnp.issubdtype(graph.avals[v].dtype, jax.dtypes.extended)
        ]
        return tuple(dict.fromkeys([*costly, *new, *(self._model.effects or ())]))
