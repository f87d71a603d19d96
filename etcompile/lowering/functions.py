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
from etcompile.frontend.host_calls import graph_asks_host
from etcompile.frontend.step_model import StepModel
from etcompile.lowering.causal import CausalProgram, Traces
from etcompile.lowering.in_place import accumulator
from etcompile.lowering.losses import Loss, LossValue, StepLoss, loss_and_cotangents, masked
from etcompile.lowering.schedules.chunked import ChunkProgram
from etcompile.lowering.schedules.windowed import check_end, check_windows, window_gradients

__all__ = ["Carry", "Item", "StepFunctions", "Sums"]

Array = Any

#: What belongs to one step's loss: its arguments, the targets first, and the mask of the step; None: no mask.
Item = tuple[tuple[Any, ...], Any]

#: What a call may give beside inputs and targets: ``target`` and ``modulator``.
Call = dict[str, Any]

#: Gradients by the effective weights of the sites, by name of the site, summed over steps; and those by the parameters that a
#: loss reads itself, by :func:`_own`.
Sums = dict[str, Array]


def _own(leaf: int) -> str:
    """The name in :data:`Sums` of what the loss itself adds to a parameter's gradient."""
    return f"param {leaf}"


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
        self.asks_host = graph_asks_host(self.model.graph.operations)
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
        leaves, flat = self._leaves(params), model.flatten_inputs(inputs)
        done = None
        if (
            self.causal.model.effects is not None
        ):  # here, since what is below may run again to be differentiated
            done = self.causal.model.perform(self.causal.model.hoist(leaves), states, flat)
        outputs, states, traces = self._apply(leaves, states, traces, flat, call or {}, done)
        outputs = self.placement.hold_batch(outputs)
        return self._leave(states, traces), jax.tree.unflatten(model.output_tree, outputs)

    def _primal(
        self, params: list, states: list, traces: Traces, inputs: list, call: Call, done: Any
    ) -> tuple[list, list, Traces]:
        weights = self.causal.model.hoist(params)
        if not self.causal.keeps:
            step = self.causal.model.step(weights, states, inputs, done, quiet=done is not None)
            return step.outputs, step.new_states, traces
        step, new_traces, _ = self.causal.forward(weights, states, traces, inputs, done)
        return step.outputs, step.new_states, new_traces

    def _forward(
        self, params: list, states: list, traces: Traces, inputs: list, call: Call, done: Any
    ) -> tuple[tuple, tuple]:
        given = (params, states, traces, inputs, call, done)
        return self._primal(*given), given

    def _backward(self, residuals: tuple, cotangents: tuple) -> tuple:
        check_end(self.causal.program)
        self.require_kept("the gradient of one step")
        params, states, traces, inputs, call, done = residuals
        outputs, new_states, _ = cotangents
        weights = self.causal.model.hoist(params)
        step, _, values = self.causal.forward(weights, states, traces, inputs, done)
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
            jax.tree.map(_zero_cotangent, done),
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
        leaves: list,
        states: list,
        traces: Traces,
        inputs: list,
        loss: Loss,
        item: Item,
        call: Call,
    ) -> tuple[LossValue, Sums, list, Traces]:
        """Loss, gradients of the sites' weights and of parameters that the loss reads, new states and traces of one step."""
        of_step = self.step_loss(loss)
        found, cotangents, sites, step, traces = self.causal.forward_with_gradients(
            weights,
            states,
            traces,
            inputs,
            lambda outputs, new: loss_and_cotangents(
                of_step, loss.program, outputs, new, leaves, loss.carried, item
            ),
            {"target": item[0][0], **call},
        )
        own = {_own(k): v for k, v in cotangents.params.items()}
        return found, {**sites, **own}, step.new_states, traces

    def value_and_grad(
        self, loss: Loss, params: Any, carry: Carry, inputs: tuple, item: Item, call: Call
    ) -> tuple[LossValue, Any, Carry]:
        """Loss and parameter gradients of one online step, and the new carry."""
        model = self.model
        leaves = self._leaves(params)
        found, sums, states, traces = self.step_with_sites(
            self.causal.model.hoist(leaves),
            leaves,
            *self._enter(carry),
            model.flatten_inputs(inputs),
            loss,
            item,
            call,
        )
        return self._held(found), self._gradients(leaves, sums), self._leave(states, traces)

    def scan_value_and_grad(
        self,
        loss: Loss,
        params: Any,
        carry: Carry,
        xs: tuple,
        items: Item,
        call: Call,
        sums: Sums | None = None,
    ) -> tuple[LossValue, Any, Carry]:
        """Losses per step and summed gradients over a sequence, step by step with the weights fixed.

        ``call`` has time on axis 0 like inputs and targets; numbers in it hold for every step. With ``sums``, the gradients of
        the sites over earlier steps, the second result is those sums with these steps added; see :meth:`gradients`.
        """
        model = self.model
        leaves = self._leaves(params)
        per_step = not all(s.hoisted for s in self.causal.program.header.sites)
        weights = self.causal.model.hoist(leaves)

        def body(loop: tuple, given: tuple) -> tuple[tuple, Any]:
            states, traces, total, carried = loop
            x, item, moving = given
            now = self.causal.model.hoist(leaves) if per_step else weights
            found, added, states, traces = self.step_with_sites(
                now,
                leaves,
                states,
                traces,
                model.flatten_inputs(x),
                dataclasses.replace(loss, carried=carried),
                item,
                join(moving),
            )
            return (states, traces, _added(total, added), found.carried), (found.value, found.aux)

        moving, join = _moving(call)
        start = (*self._enter(carry), self.zero_sums(loss) if sums is None else sums, loss.carried)
        (states, traces, total, carried), (losses, aux) = lax.scan(body, start, (xs, items, moving))
        gradients = self._gradients(leaves, total) if sums is None else total
        return self._held(LossValue(losses, aux, carried)), gradients, self._leave(states, traces)

    def windows_value_and_grad(
        self,
        loss: Loss,
        window: int,
        params: Any,
        carry: Carry,
        xs: tuple,
        items: Item,
        sums: Sums | None = None,
    ) -> tuple[LossValue, Any, Carry]:
        """Losses per step and summed gradients over a sequence in windows; the last may be shorter. 0: one window.

        ``sums`` as in :meth:`scan_value_and_grad`.
        """
        model = self.model
        leaves = self._leaves(params)
        weights = self.causal.model.hoist(leaves)
        check_windows(self.causal)
        of_step = self.step_loss(loss)

        def one(loop: tuple, given: tuple) -> tuple[tuple, Any]:
            (states, traces, total, carried), (xs, items) = loop, given
            done = window_gradients(
                self.causal, of_step, loss.program, weights, leaves, states, traces, xs, items, carried
            )
            total = self.added(total, done.sites, done.params)
            return (done.states, done.traces, total, done.loss.carried), (done.loss.value, done.loss.aux)

        given = (jax.vmap(model.flatten_inputs)(xs), items)
        state = (*self._enter(carry), self.zero_sums(loss) if sums is None else sums, loss.carried)
        (states, traces, total, carried), (losses, aux) = _in_parts(one, state, given, window)
        gradients = self._gradients(leaves, total) if sums is None else total
        return self._held(LossValue(losses, aux, carried)), gradients, self._leave(states, traces)

    def chunks_value_and_grad(
        self,
        loss: Loss,
        chunk: int,
        params: Any,
        carry: Carry,
        xs: tuple,
        items: Item,
        call: Call,
        sums: Sums | None = None,
    ) -> tuple[LossValue, Any, Carry]:
        """As :meth:`scan_value_and_grad`, many steps at once; the last chunk may be shorter."""
        model = self.model
        leaves = self._leaves(params)
        weights = self.causal.model.hoist(leaves)
        program = self._chunks
        moving, join = _moving(call)
        of_step = self.step_loss(loss)

        def of_item(outputs: list, states: list, params: list, carried: Any, item: tuple) -> LossValue:
            return of_step(outputs, states, params, carried, item[0])

        def brought(item: tuple) -> Call:
            return {"target": item[0][0][0], **join(item[1])}

        def one(loop: tuple, given: tuple) -> tuple[tuple, Any]:
            states, traces, total, carried = loop
            x, extra = given
            traces = self.causal.wide(traces)
            found, own, sites, states, traces = program.run(
                of_item, loss.program, weights, leaves, states, traces, x, extra, carried, brought
            )
            traces = self.causal.stored(traces)
            total = self.added(total, sites, own)
            return (states, traces, total, found.carried), (found.value, found.aux)

        given = (jax.vmap(model.flatten_inputs)(xs), (items, moving))
        state = (*self._enter(carry), self.zero_sums(loss) if sums is None else sums, loss.carried)
        (states, traces, total, carried), (losses, aux) = _in_parts(one, state, given, chunk)
        gradients = self._gradients(leaves, total) if sums is None else total
        return self._held(LossValue(losses, aux, carried)), gradients, self._leave(states, traces)

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

    def step_loss(self, loss: Loss) -> StepLoss:
        """The user's loss on leaves, as the compiler has them."""
        model = self.model

        def of_step(outputs: list, states: list, params: list, carried: Any, item: Item) -> LossValue:
            args, mask = item

            def run(outputs: list, states: list, params: list, carried: Any) -> LossValue:
                (value, aux), after = loss.program.run(
                    jax.tree.unflatten(model.output_tree, outputs),
                    model.unflatten_states(states),
                    jax.tree.unflatten(model.param_tree, params),
                    loss.fixed,
                    carried,
                    args,
                )
                return LossValue(value, aux, after)

            given = outputs, states, params, carried
            return run(*given) if mask is None else masked(run, mask, *given)

        return of_step

    def zero_sums(self, loss: Loss | None = None) -> Sums:
        """Gradients of the sites, and of parameters that the loss reads, over no steps at all."""
        sites = self.causal.model.sites
        zeros = {name: jnp.zeros(g.weight_shape, accumulator(g.weight_dtype)) for name, g in sites.items()}
        own = {} if loss is None else {_own(k): self.model.params[k].aval for k in loss.program.params}
        return {
            **self.placement.hold_weights(zeros),
            **{k: jnp.zeros(a.shape, a.dtype) for k, a in own.items()},
        }

    def added(self, total: Sums, sites: Mapping[str, Array], own: Mapping[int, Array]) -> Sums:
        """Sums with the gradients of more steps: of the sites, and of parameters that the loss reads."""
        return _added(total, {**sites, **{_own(k): v for k, v in own.items()}})

    def scan(self, params: Any, carry: Carry, xs: tuple) -> tuple[Any, Carry]:
        """Outputs of every step; the traces advance."""

        def body(loop: Carry, x: tuple) -> tuple[Carry, Any]:
            return self.apply(params, loop, x)

        carry, outputs = lax.scan(body, carry, xs)
        return outputs, carry

    def gradients(self, params: Any, sums: Sums) -> Any:
        """Parameter gradients from the summed gradients of the sites."""
        return self._gradients(self.model.flatten_params(params), sums)

    def _gradients(self, leaves: list, sums: Sums) -> Any:
        sites = {name: v for name, v in sums.items() if name in self.causal.model.sites}
        found = self.causal.model.unhoist(leaves, self.placement.hold_weights(sites))
        found = [g + sums[_own(k)] if _own(k) in sums else g for k, g in enumerate(found)]
        return jax.tree.unflatten(self.model.param_tree, self.placement.hold_params(found))

    def _held(self, found: LossValue) -> LossValue:
        return dataclasses.replace(found, value=self.placement.hold_whole(found.value))

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
    one: Callable[[Any, Any], tuple[Any, Any]], state: Any, items: Any, size: int
) -> tuple[Any, Any]:
    """Run ``one(state, items of a part) -> (state, results)`` over parts of ``size`` steps (0: all) and what remains."""
    steps = jax.tree.leaves(items)[0].shape[0]
    size = min(size or steps, steps)
    whole = steps // size

    def part(first: Any, count: int) -> Any:
        """Some steps; a slice of the call's own arrays, which are never copied whole."""
        return jax.tree.map(lambda v: lax.dynamic_slice_in_dim(v, first, count), items)

    parts = []
    if whole > 1:
        state, losses = lax.scan(lambda s, k: one(s, part(k * size, size)), state, jnp.arange(whole))
        parts.append(jax.tree.map(lambda v: v.reshape(whole * size, *v.shape[2:]), losses))
    else:
        state, losses = one(state, part(0, size))
        parts.append(losses)
    if whole * size < steps:
        state, losses = one(state, part(whole * size, steps - whole * size))
        parts.append(losses)
    return state, parts[0] if len(parts) == 1 else jax.tree.map(lambda *v: jnp.concatenate(v), *parts)


def _added(total: Sums, sums: Mapping[str, Array]) -> Sums:
    return {k: v + sums[k].astype(v.dtype) if k in sums else v for k, v in total.items()}


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
