"""The executable program: pure functions of parameters, carry and inputs, over the user's own trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.errors import OptionError, UnsupportedError
from etcompile.frontend.step_model import StepModel
from etcompile.lowering.causal import CausalProgram, Traces
from etcompile.lowering.chunks import ChunkProgram
from etcompile.lowering.losses import StepLoss, checked_loss, loss_and_cotangents
from etcompile.lowering.windows import check_end, check_windows, window_gradients

__all__ = ["Carry", "StepFunctions", "Sums"]

Array = Any

#: What a call may give beside inputs and targets: ``target`` and ``modulator``.
Call = dict[str, Any]

#: Gradients by the effective weights of the sites, by name of the site, summed over steps.
Sums = dict[str, Array]


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
        self.placement = causal.placement
        self._refuse_too_large()
        self._apply = jax.custom_vjp(self._primal)
        self._apply.defvjp(self._forward, self._backward)

    def _refuse_too_large(self) -> None:
        """Raise :class:`UnsupportedError` where a trace that cannot be stored would have to be."""
        causal = self.causal
        for name, site in causal.too_large.items():
            if causal.program.equation(name).type.kind != "trace" or causal.program.window is not None:
                raise site.cannot_store("train this parameter by d_rtrl in whole sequences, or exclude it.")
            if causal.keeps:
                raise site.cannot_store(
                    "schedule=etcompile.Schedule(keep_traces=False) learns from whole sequences without storing it; "
                    "or write the operation as a matmul or convolution."
                )
            _ = self._chunks  # raises where the rule's traces cannot be chunked

    # -- one step -----------------------------------------------------------------------------------------------

    def apply(
        self, params: Any, carry: Carry, inputs: tuple[Any, ...], call: Call | None = None
    ) -> tuple[Carry, Any]:
        """One time step: ``(params, carry, inputs) -> (carry, outputs)``; ``call`` as in :class:`CausalProgram`."""
        model = self.model
        states, traces = self._enter(carry)
        outputs, states, traces = self._apply(
            self._leaves(params), states, traces, model.flatten_inputs(inputs), call or {}
        )
        outputs = self.placement.hold_batch(outputs)
        return self._leave(states, traces), jax.tree.unflatten(model.output_tree, outputs)

    def _primal(
        self, params: list, states: list, traces: Traces, inputs: list, call: Call
    ) -> tuple[list, list, Traces]:
        weights = self.causal.model.hoist(params)
        if not self.causal.keeps:
            step = self.causal.model.step(weights, states, inputs)
            return step.outputs, step.new_states, traces
        step, new_traces, _ = self.causal.forward(weights, states, traces, inputs)
        return step.outputs, step.new_states, new_traces

    def _forward(
        self, params: list, states: list, traces: Traces, inputs: list, call: Call
    ) -> tuple[tuple, tuple]:
        return self._primal(params, states, traces, inputs, call), (params, states, traces, inputs, call)

    def _backward(self, residuals: tuple, cotangents: tuple) -> tuple:
        check_end(self.causal.program)
        self.require_kept("the gradient of one step")
        params, states, traces, inputs, call = residuals
        outputs, new_states, _ = cotangents
        step, _, values = self.causal.forward(self.causal.model.hoist(params), states, traces, inputs)
        sites, loss = self.causal.gradients(step, traces, values, _live(outputs), _live(new_states), call)
        gradients = self.causal.model.unhoist(params, sites)
        moved = [
            c if c is not None else _zero_cotangent(x) for c, x in zip(loss.inputs(), inputs, strict=True)
        ]
        return (
            [g if jnp.issubdtype(g.dtype, jnp.inexact) else None for g in gradients],
            [_zero_cotangent(s) for s in states],
            jax.tree.map(_zero_cotangent, traces),
            moved,
            jax.tree.map(lambda v: _zero_cotangent(jnp.asarray(v)), call),
        )

    def require_kept(self, what: str) -> None:
        """Raise :class:`OptionError` where no traces go on from call to call."""
        if not self.causal.keeps:
            raise OptionError(
                f"{what} needs the traces of the steps before it.",
                got="schedule with keep_traces=False",
                expected="a schedule that keeps them",
                hint="use scan_value_and_grad on whole sequences.",
            )

    # -- one step with its gradient -----------------------------------------------------------------------------

    def step_with_sites(
        self,
        weights: list,
        states: list,
        traces: Traces,
        inputs: list,
        loss_fn: Callable,
        targets: tuple,
        call: Call,
    ) -> tuple[Array, dict[str, Array], list, Traces]:
        """Loss, gradients of the sites' weights, new states and traces of one step."""
        loss, sites, step, traces = self.causal.forward_with_gradients(
            weights,
            states,
            traces,
            inputs,
            lambda outputs: loss_and_cotangents(self._step_loss(loss_fn), outputs, targets),
            {"target": targets, **call},
        )
        return loss, sites, step.new_states, traces

    def value_and_grad(
        self, loss_fn: Callable, params: Any, carry: Carry, inputs: tuple, targets: tuple, call: Call
    ) -> tuple[Array, Any, Carry]:
        """Loss and parameter gradients of one online step, and the new carry."""
        model = self.model
        leaves = self._leaves(params)
        loss, sites, states, traces = self.step_with_sites(
            self.causal.model.hoist(leaves),
            *self._enter(carry),
            model.flatten_inputs(inputs),
            loss_fn,
            targets,
            call,
        )
        return self.placement.hold_whole(loss), self._gradients(leaves, sites), self._leave(states, traces)

    def scan_value_and_grad(
        self,
        loss_fn: Callable,
        params: Any,
        carry: Carry,
        xs: tuple,
        targets: tuple,
        call: Call,
        sums: Sums | None = None,
    ) -> tuple[Array, Any, Carry]:
        """Losses per step and summed gradients over a sequence, step by step with the weights fixed.

        ``call`` has time on axis 0 like inputs and targets; numbers in it hold for every step. With ``sums``, the gradients of
        the sites over earlier steps, the second result is those sums with these steps added; see :meth:`gradients`.
        """
        model = self.model
        leaves = self._leaves(params)
        per_step = not all(s.hoisted for s in self.causal.program.header.sites)
        weights = self.causal.model.hoist(leaves)

        def body(loop: tuple, item: tuple) -> tuple[tuple, Array]:
            states, traces, total = loop
            x, target, moving = item
            now = self.causal.model.hoist(leaves) if per_step else weights
            loss, sites, states, traces = self.step_with_sites(
                now, states, traces, model.flatten_inputs(x), loss_fn, target, join(moving)
            )
            total = {k: v + sites[k] if k in sites else v for k, v in total.items()}
            return (states, traces, total), loss

        moving, join = _moving(call)
        start = (*self._enter(carry), self.zero_sums() if sums is None else sums)
        (states, traces, total), losses = lax.scan(body, start, (xs, targets, moving))
        found = self._gradients(leaves, total) if sums is None else total
        return self.placement.hold_whole(losses), found, self._leave(states, traces)

    def windows_value_and_grad(
        self,
        loss_fn: Callable,
        window: int,
        params: Any,
        carry: Carry,
        xs: tuple,
        targets: tuple,
        sums: Sums | None = None,
    ) -> tuple[Array, Any, Carry]:
        """Losses per step and summed gradients over a sequence in windows; the last may be shorter. 0: one window.

        ``sums`` as in :meth:`scan_value_and_grad`.
        """
        model = self.model
        leaves = self._leaves(params)
        weights = self.causal.model.hoist(leaves)
        check_windows(self.causal)

        loss = self._step_loss(loss_fn)

        def one(loop: tuple, item: tuple) -> tuple[tuple, Array]:
            states, traces, total = loop
            losses, sites, states, traces, _ = window_gradients(
                self.causal, loss, weights, states, traces, *item
            )
            total = {k: v + sites[k] if k in sites else v for k, v in total.items()}
            return (states, traces, total), losses

        items = (jax.vmap(model.flatten_inputs)(xs), targets)
        state = (*self._enter(carry), self.zero_sums() if sums is None else sums)
        (states, traces, total), losses = _in_parts(one, state, items, window)
        found = self._gradients(leaves, total) if sums is None else total
        return self.placement.hold_whole(losses), found, self._leave(states, traces)

    def chunks_value_and_grad(
        self,
        loss_fn: Callable,
        chunk: int,
        params: Any,
        carry: Carry,
        xs: tuple,
        targets: tuple,
        call: Call,
        sums: Sums | None = None,
    ) -> tuple[Array, Any, Carry]:
        """As :meth:`scan_value_and_grad`, many steps at once; the last chunk may be shorter."""
        model = self.model
        leaves = self._leaves(params)
        weights = self.causal.model.hoist(leaves)
        program = self._chunks
        moving, join = _moving(call)

        of_targets = self._step_loss(loss_fn)

        def loss(outputs: list, item: tuple) -> Array:
            return of_targets(outputs, item[0])

        def brought(item: tuple) -> Call:
            return {"target": item[0], **join(item[1])}

        def one(loop: tuple, item: tuple) -> tuple[tuple, Array]:
            states, traces, total = loop
            x, extra = item
            traces = self.causal.wide(traces)
            losses, sites, states, traces = program.run(loss, weights, states, traces, x, extra, brought)
            traces = self.causal.stored(traces)
            total = {k: v + sites[k] if k in sites else v for k, v in total.items()}
            return (states, traces, total), losses

        items = (jax.vmap(model.flatten_inputs)(xs), (targets, moving))
        state = (*self._enter(carry), self.zero_sums() if sums is None else sums)
        (states, traces, total), losses = _in_parts(one, state, items, chunk)
        found = self._gradients(leaves, total) if sums is None else total
        return self.placement.hold_whole(losses), found, self._leave(states, traces)

    @cached_property
    def _chunks(self) -> ChunkProgram:
        return ChunkProgram(self.causal)

    def chunk_size(self, wanted: int | str, steps: int, memory: int) -> int:
        """Steps to handle together; ``"auto"`` is one by one where the program cannot be chunked."""
        if self.causal.too_large:
            if isinstance(wanted, int) and wanted < steps:
                site = next(iter(self.causal.too_large.values()))
                raise site.cannot_store("chunk='auto': the whole sequence is one chunk.")
            return steps
        if isinstance(wanted, int):
            return min(wanted, steps)
        try:
            return self._chunks.size(steps, memory)
        except UnsupportedError:
            return 1

    def _step_loss(self, loss_fn: Callable) -> StepLoss:
        """The user's loss on output leaves: (leaves, targets) -> scalar."""
        return lambda leaves, targets: checked_loss(
            loss_fn(jax.tree.unflatten(self.model.output_tree, leaves), *targets)
        )

    def zero_sums(self) -> Sums:
        """Gradients of the sites over no steps at all."""
        sites = self.causal.model.sites
        zeros = {name: jnp.zeros(g.weight_shape, g.weight_dtype) for name, g in sites.items()}
        return self.placement.hold_weights(zeros)

    def scan(self, params: Any, carry: Carry, xs: tuple) -> tuple[Any, Carry]:
        """Outputs of every step; the traces advance."""

        def body(loop: Carry, x: tuple) -> tuple[Carry, Any]:
            return self.apply(params, loop, x)

        carry, outputs = lax.scan(body, carry, xs)
        return outputs, carry

    def gradients(self, params: Any, sums: Sums) -> Any:
        """Parameter gradients from the summed gradients of the sites."""
        return self._gradients(self.model.flatten_params(params), sums)

    def _gradients(self, leaves: list, sites: Mapping[str, Array]) -> Any:
        found = self.causal.model.unhoist(leaves, self.placement.hold_weights(sites))
        return jax.tree.unflatten(self.model.param_tree, self.placement.hold_params(found))

    # -- where arrays lie ---------------------------------------------------------------------------------------

    def _leaves(self, params: Any) -> list[Array]:
        """Leaves of the parameters, in place."""
        return self.placement.hold_params(self.model.flatten_params(params))

    def _enter(self, carry: Carry) -> tuple[list[Array], Traces]:
        """States and traces of a carry, in place; new traces where none are kept."""
        states = self.placement.hold_states(self.model.flatten_states(carry.states))
        traces = carry.traces if self.causal.keeps else {**self.causal.fresh_traces(), **carry.traces}
        return states, self.placement.hold_traces(traces)

    def _leave(self, states: list[Array], traces: Traces) -> Carry:
        """The carry of states and traces, in place."""
        held = self.placement.hold_states(states)
        kept = self.causal.outlasting(traces)
        return Carry(self.model.unflatten_states(held), self.placement.hold_traces(kept))


def _in_parts(
    one: Callable[[Any, Any], tuple[Any, Array]], state: Any, items: Any, size: int
) -> tuple[Any, Array]:
    """Run ``one(state, items of a part) -> (state, losses)`` over parts of ``size`` steps (0: all) and what remains."""
    steps = jax.tree.leaves(items)[0].shape[0]
    size = min(size or steps, steps)
    whole = steps // size

    def part(first: Any, count: int) -> Any:
        """Some steps; a slice of the call's own arrays, which are never copied whole."""
        return jax.tree.map(lambda v: lax.dynamic_slice_in_dim(v, first, count), items)

    parts = []
    if whole > 1:
        state, losses = lax.scan(lambda s, k: one(s, part(k * size, size)), state, jnp.arange(whole))
        parts.append(losses.reshape(-1))
    else:
        state, losses = one(state, part(0, size))
        parts.append(losses)
    if whole * size < steps:
        state, losses = one(state, part(whole * size, steps - whole * size))
        parts.append(losses)
    return state, jnp.concatenate(parts)


def _moving(call: Call) -> tuple[list[Array], Callable[[list[Array]], Call]]:
    """What of a call changes from step to step, and how to join one step's share with the numbers that do not."""
    leaves, tree = jax.tree.flatten(call)
    fixed = [jnp.ndim(v) == 0 for v in leaves]

    def join(moving: list[Array]) -> Call:
        rest = iter(moving)
        return jax.tree.unflatten(tree, [v if f else next(rest) for v, f in zip(leaves, fixed, strict=True)])

    return [v for v, f in zip(leaves, fixed, strict=True) if not f], join


def _live(cotangents: list) -> list:
    """Drop the symbolic zeros that jax passes for integer values."""
    return [None if c is None or c.dtype == jax.dtypes.float0 else c for c in cotangents]


def _zero_cotangent(value: Any) -> Any:
    return jnp.zeros_like(value) if jnp.issubdtype(value.dtype, jnp.inexact) else None
