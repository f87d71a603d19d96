"""Run a program on random inputs: how the pass manager checks what a pass declares about the gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from etcompile.analysis.analysis import Analysis
from etcompile.frontend.jaxpr import Aval
from etcompile.ir.program import TraceProgram
from etcompile.lowering.causal import CausalProgram
from etcompile.lowering.losses import Loss, LossValue
from etcompile.lowering.schedules.base import Loop, Run
from etcompile.lowering.schedules.windowed import window_gradients, windows_refusal
from etcompile.lowering.sums import added, by_parameters, zero_sums

__all__ = ["backpropagation_at_random", "gradients_at_random"]

_STEPS = 4


def gradients_at_random(
    program: TraceProgram, analysis: Analysis, functions: Mapping[str, Callable], seed: int = 0
) -> dict[str, Any]:
    """Gradients by parameter path, summed over a few steps of a loss with random coefficients."""
    causal = CausalProgram(program, analysis, functions)
    drawn = _drawn(analysis, seed)
    if program.window is not None and windows_refusal(causal) is None:
        return _in_windows(causal, drawn)
    model = analysis.model
    params, states, inputs, cotangents = drawn

    def run(params: list, states: list, inputs: list, cotangents: list) -> list:
        weights = causal.model.hoist(params)
        zeros = {name: jnp.zeros(g.weight.shape, g.weight.dtype) for name, g in causal.model.sites.items()}

        def body(loop: tuple, item: tuple) -> tuple[tuple, None]:
            states, traces, total = loop
            x, cotangent = item
            step, new_traces, values = causal.forward(weights, states, traces, x)
            of_outputs, of_states = cotangent[: len(model.outputs)], cotangent[len(model.outputs) :]
            call = {"target": of_outputs, "modulator": 0.7}
            found, _ = causal.gradients(step, traces, values, of_outputs, of_states, call)
            total = {name: v + found[name] if name in found else v for name, v in total.items()}
            return (step.new_states, new_traces, total), None

        (_, _, total), _ = lax.scan(body, (states, causal.init_traces(), zeros), (inputs, cotangents))
        return causal.model.unhoist(params, total)

    gradients = jax.jit(run)(params, states, inputs, cotangents)
    return {leaf.path: g for leaf, g in zip(model.params, gradients, strict=True)}


def _in_windows(causal: CausalProgram, drawn: tuple[list, list, list, list]) -> dict[str, Any]:
    """:func:`gradients_at_random` in windows: in two of them, so that traces count; in one where the program keeps none."""
    model = causal.model.analysis.model
    params, states, inputs, cotangents = drawn
    size = _STEPS // 2 if causal.program.window or causal.program.carried else _STEPS

    def loss(outputs: list, states: list, _params: list, _carried: Any, coefficients: list) -> LossValue:
        return LossValue(_weighed([*outputs, *states], coefficients), None, ())

    def gradients_of(params: list, states: list, inputs: list, cotangents: list) -> list:
        run = Run(causal, params, causal.model.hoist(params), Loss.plain(lambda out: out), loss, lambda _: {})
        loop = Loop(states, causal.init_traces(), zero_sums(causal, run.loss), ())
        for steps in (slice(first, first + size) for first in range(0, _STEPS, size)):
            x, item = [v[steps] for v in inputs], [v[steps] for v in cotangents]
            found = window_gradients(run, loop, x, item)
            loop = Loop(found.states, found.traces, added(loop.sums, found.sites), ())
        return by_parameters(causal, params, loop.sums)

    gradients = jax.jit(gradients_of)(params, states, inputs, cotangents)
    return {leaf.path: g for leaf, g in zip(model.params, gradients, strict=True)}


def _weighed(results: list, coefficients: list) -> Any:
    """The loss of a step."""
    products = [
        jnp.sum(r * c).real
        for r, c in zip(results, coefficients, strict=True)
        if jnp.issubdtype(r.dtype, jnp.inexact)
    ]
    return sum(products)


def backpropagation_at_random(analysis: Analysis, seed: int = 0) -> dict[str, Any]:
    """The gradients of the same loss by backpropagation through the same steps: what an exact program gives."""
    model = analysis.model
    params, states, inputs, cotangents = _drawn(analysis, seed)
    moving = [k for k, leaf in enumerate(model.params) if leaf.aval.differentiable]

    def total(some: list) -> Any:
        full = list(params)
        for k, v in zip(moving, some, strict=True):
            full[k] = v

        def body(now: list, item: tuple[list, list]) -> tuple[list, Any]:
            results = model.graph.evaluate(*full, *now, *item[0])
            return results[len(model.outputs) :], _weighed(results, item[1])

        return lax.scan(body, states, (inputs, cotangents))[1].sum()

    gradients = jax.jit(jax.grad(total))([params[k] for k in moving])
    return {model.params[k].path: g for k, g in zip(moving, gradients, strict=True)}


def _drawn(analysis: Analysis, seed: int) -> tuple[list, list, list, list]:
    """Random parameters, states, inputs and coefficients of the loss."""
    rng = np.random.default_rng(seed)
    model = analysis.model
    params = [_random(leaf.aval, rng) for leaf in model.params]
    states = [_random(leaf.aval, rng) for leaf in model.states]
    inputs = [_stacked(leaf.aval, rng) for leaf in model.inputs]
    cotangents = [_stacked(leaf.aval, rng) for leaf in (*model.outputs, *model.states)]
    return params, states, inputs, cotangents


def _stacked(aval: Aval, rng: np.random.Generator) -> Any:
    """Random values of one kind for every step."""
    return jnp.stack([_random(aval, rng) for _ in range(_STEPS)])


def _random(aval: Aval, rng: np.random.Generator) -> Any:
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.zeros((*aval.shape, 2), jnp.uint32))
    if jnp.issubdtype(aval.dtype, jnp.complexfloating):
        return jnp.asarray(rng.normal(size=aval.shape) + 1j * rng.normal(size=aval.shape), aval.dtype)
    if aval.differentiable:
        return jnp.asarray(0.5 * rng.normal(size=aval.shape), aval.dtype)
    return jnp.zeros(aval.shape, aval.dtype)
