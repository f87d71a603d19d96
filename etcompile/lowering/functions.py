"""The executable program: pure functions of parameters, carry and inputs, over the user's own trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.errors import InputError
from etcompile.frontend.step_model import StepModel
from etcompile.lowering.causal import CausalProgram, Traces

__all__ = ["Carry", "StepFunctions"]

Array = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """What goes from one step to the next: the model's states and the traces of the program."""

    states: Any
    traces: Traces


class StepFunctions:
    """Pure functions around one causal program.

    ``apply`` is differentiable: its derivative with respect to the parameters is the online gradient of the step, its
    derivative with respect to the carry is zero (credit for earlier steps is in the traces).
    """

    def __init__(self, causal: CausalProgram) -> None:
        self.causal = causal
        self.model: StepModel = causal.model.analysis.model
        self._apply = jax.custom_vjp(self._primal)
        self._apply.defvjp(self._forward, self._backward)

    # -- one step -----------------------------------------------------------------------------------------------

    def apply(self, params: Any, carry: Carry, inputs: tuple[Any, ...]) -> tuple[Carry, Any]:
        """One time step: ``(params, carry, inputs) -> (carry, outputs)``."""
        model = self.model
        outputs, states, traces = self._apply(
            model.flatten_params(params),
            model.flatten_states(carry.states),
            carry.traces,
            model.flatten_inputs(inputs),
        )
        return Carry(model.unflatten_states(states), traces), jax.tree.unflatten(model.output_tree, outputs)

    def _primal(self, params: list, states: list, traces: Traces, inputs: list) -> tuple[list, list, Traces]:
        step, new_traces, _ = self.causal.forward(self.causal.model.hoist(params), states, traces, inputs)
        return step.outputs, step.new_states, new_traces

    def _forward(self, params: list, states: list, traces: Traces, inputs: list) -> tuple[tuple, tuple]:
        return self._primal(params, states, traces, inputs), (params, states, traces, inputs)

    def _backward(self, residuals: tuple, cotangents: tuple) -> tuple:
        params, states, traces, inputs = residuals
        outputs, new_states, _ = cotangents
        step, _, values = self.causal.forward(self.causal.model.hoist(params), states, traces, inputs)
        sites, loss = self.causal.gradients(step, traces, values, _live(outputs), _live(new_states))
        gradients = self.causal.model.unhoist(params, sites)
        moved = [
            c if c is not None else _zero_cotangent(x) for c, x in zip(loss.inputs(), inputs, strict=True)
        ]
        return (
            [g if jnp.issubdtype(g.dtype, jnp.inexact) else None for g in gradients],
            [_zero_cotangent(s) for s in states],
            jax.tree.map(_zero_cotangent, traces),
            moved,
        )

    # -- one step with its gradient -----------------------------------------------------------------------------

    def step_with_sites(
        self, weights: list, states: list, traces: Traces, inputs: list, loss_fn: Callable, targets: tuple
    ) -> tuple[Array, dict[str, Array], list, Traces]:
        """Loss, gradients of the sites' weights, new states and traces of one step."""
        step, new_traces, values = self.causal.forward(weights, states, traces, inputs)
        moving = [k for k, o in enumerate(step.outputs) if jnp.issubdtype(o.dtype, jnp.inexact)]

        def of_outputs(moved: list) -> Array:
            leaves = list(step.outputs)
            for k, v in zip(moving, moved, strict=True):
                leaves[k] = v
            return checked_loss(loss_fn(jax.tree.unflatten(self.model.output_tree, leaves), *targets))

        loss, pull = jax.vjp(of_outputs, [step.outputs[k] for k in moving])
        cotangents: list[Array | None] = [None] * len(step.outputs)
        (pulled,) = pull(jnp.ones_like(loss))
        for k, c in zip(moving, pulled, strict=True):
            cotangents[k] = c
        sites, _ = self.causal.gradients(step, traces, values, cotangents, [None] * len(states))
        return loss, sites, step.new_states, new_traces

    def value_and_grad(
        self, loss_fn: Callable, params: Any, carry: Carry, inputs: tuple, targets: tuple
    ) -> tuple[Array, Any, Carry]:
        """Loss and parameter gradients of one online step, and the new carry."""
        model = self.model
        leaves = model.flatten_params(params)
        loss, sites, states, traces = self.step_with_sites(
            self.causal.model.hoist(leaves),
            model.flatten_states(carry.states),
            carry.traces,
            model.flatten_inputs(inputs),
            loss_fn,
            targets,
        )
        return loss, self._gradients(leaves, sites), Carry(model.unflatten_states(states), traces)

    def scan_value_and_grad(
        self, loss_fn: Callable, params: Any, carry: Carry, xs: tuple, targets: tuple
    ) -> tuple[Array, Any, Carry]:
        """Losses per step and summed gradients over a sequence, step by step with the weights fixed."""
        model = self.model
        leaves = model.flatten_params(params)
        per_step = not all(s.hoisted for s in self.causal.program.header.sites)
        weights = self.causal.model.hoist(leaves)
        geometries = self.causal.model.sites.values()
        zeros = {
            s.name: jnp.zeros(g.weight_shape, g.weight_dtype)
            for s, g in zip(self.causal.model.analysis.sites, geometries, strict=True)
        }

        def body(loop: tuple, item: tuple) -> tuple[tuple, Array]:
            states, traces, total = loop
            x, target = item
            now = self.causal.model.hoist(leaves) if per_step else weights
            loss, sites, states, traces = self.step_with_sites(
                now, states, traces, model.flatten_inputs(x), loss_fn, target
            )
            total = {k: v + sites[k] if k in sites else v for k, v in total.items()}
            return (states, traces, total), loss

        start = (model.flatten_states(carry.states), carry.traces, zeros)
        (states, traces, total), losses = lax.scan(body, start, (xs, targets))
        return losses, self._gradients(leaves, total), Carry(model.unflatten_states(states), traces)

    def scan(self, params: Any, carry: Carry, xs: tuple) -> tuple[Any, Carry]:
        """Outputs of every step; the traces advance."""

        def body(loop: Carry, x: tuple) -> tuple[Carry, Any]:
            return self.apply(params, loop, x)

        carry, outputs = lax.scan(body, carry, xs)
        return outputs, carry

    def _gradients(self, leaves: list, sites: Mapping[str, Array]) -> Any:
        return jax.tree.unflatten(self.model.param_tree, self.causal.model.unhoist(leaves, sites))


def checked_loss(loss: Any) -> Array:
    """A loss must be one real number."""
    try:
        value = jnp.asarray(loss)
    except (TypeError, ValueError) as error:
        raise InputError(
            "the loss function must return one number.", got=type(loss).__name__, expected="a scalar array"
        ) from error
    if value.shape != ():
        raise InputError(
            "the loss function must return one number per step.",
            got=f"shape {value.shape}",
            expected="shape ()",
            hint="take the mean or sum over the batch.",
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise InputError(
            "the loss must be a real floating-point number.",
            got=str(value.dtype),
            expected="float32 or another float",
        )
    return value


def _live(cotangents: list) -> list:
    """Drop the symbolic zeros that jax passes for integer values."""
    return [None if c is None or c.dtype == jax.dtypes.float0 else c for c in cotangents]


def _zero_cotangent(value: Any) -> Any:
    return jnp.zeros_like(value) if jnp.issubdtype(value.dtype, jnp.inexact) else None
