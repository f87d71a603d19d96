"""Run a program on random inputs: how the pass manager checks what a pass declares about the gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.analysis.analysis import Analysis
from etcompile.frontend.jaxpr import Aval
from etcompile.ir.program import TraceProgram
from etcompile.lowering.causal import CausalProgram

__all__ = ["trial_gradients"]

_STEPS = 4


def trial_gradients(
    program: TraceProgram, analysis: Analysis, functions: Mapping[str, Callable], seed: int = 0
) -> dict[str, Any]:
    """Gradients by parameter path, summed over a few steps of a loss with random coefficients."""
    rng = np.random.default_rng(seed)
    model = analysis.model
    causal = CausalProgram(program, analysis, functions)
    params = [_random(leaf.aval, rng) for leaf in model.params]
    states = [_random(leaf.aval, rng) for leaf in model.states]
    inputs = [[_random(leaf.aval, rng) for leaf in model.inputs] for _ in range(_STEPS)]
    cotangents = [
        [_random(leaf.aval, rng) for leaf in (*model.outputs, *model.states)] for _ in range(_STEPS)
    ]

    def run(params: list, states: list, inputs: list, cotangents: list) -> list:
        weights = causal.model.hoist(params)
        traces = causal.init_traces()
        total: dict[str, Any] = {}
        for x, c in zip(inputs, cotangents, strict=True):
            step, new_traces, values = causal.forward(weights, states, traces, x)
            of_states = c[len(model.outputs) :]
            found, _ = causal.gradients(step, traces, values, c[: len(model.outputs)], of_states)
            total = {k: total.get(k, 0) + v for k, v in found.items()} | {
                k: v for k, v in total.items() if k not in found
            }
            states, traces = step.new_states, new_traces
        return causal.model.unhoist(params, total)

    gradients = jax.jit(run)(params, states, inputs, cotangents)
    return {leaf.path: g for leaf, g in zip(model.params, gradients, strict=True)}


def _random(aval: Aval, rng: np.random.Generator) -> Any:
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.zeros((*aval.shape, 2), jnp.uint32))
    if jnp.issubdtype(aval.dtype, jnp.complexfloating):
        return jnp.asarray(rng.normal(size=aval.shape) + 1j * rng.normal(size=aval.shape), aval.dtype)
    if aval.differentiable:
        return jnp.asarray(0.5 * rng.normal(size=aval.shape), aval.dtype)
    return jnp.zeros(aval.shape, aval.dtype)
