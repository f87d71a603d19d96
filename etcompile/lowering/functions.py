"""The executable program: pure functions of parameters, carry and inputs, over the user's own trees."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.errors import OptionError, UnsupportedError
from etcompile.frontend.host_calls import graph_asks_host
from etcompile.frontend.step_model import StepModel
from etcompile.lowering.causal import CausalProgram, Traces
from etcompile.lowering.losses import Loss, LossValue
from etcompile.lowering.schedules.base import (
    Call,
    Item,
    Loop,
    Plan,
    Run,
    Steps,
    in_parts,
)
from etcompile.lowering.schedules.choose import choose, schedules_for
from etcompile.lowering.schedules.too_large import refuse_too_large
from etcompile.lowering.schedules.windowed import check_end
from etcompile.lowering.sums import Sums, by_parameters, zero_sums
from etcompile.precision import promoting
from etcompile.schedule import Schedule

__all__ = ["Call", "Carry", "Item", "StepFunctions", "Sums"]

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
        self.placement = causal.placement
        self.asks_host = graph_asks_host(self.model.graph.operations)
        refuse_too_large(causal)
        self.schedules = schedules_for(causal, causal.schedule)
        self._apply = jax.custom_vjp(self._primal)
        self._apply.defvjp(self._forward, self._backward)

    @property
    def bytes_of_a_step(self) -> int:
        """What each of many steps that are handled together holds, about; 0 where they cannot be."""
        return max(
            (schedule.bytes_of_a_step for schedule in self.schedules if not schedule.refusal()), default=0
        )

    @property
    def held_back(self) -> str:
        """Why long sequences do not run by a schedule that would be for them but for what a step does beside its results."""
        return next(filter(None, (schedule.held_back for schedule in self.schedules)), "")

    @property
    def events(self) -> dict[str, float]:
        """Parameters that are summed by events in sequences, with the part of their synapses that a step may take so."""
        found = {name: share for schedule in self.schedules for name, share in schedule.shares.items()}
        sites = self.causal.model.sites
        return {path: share for name, share in found.items() for path in sites[name].params}

    # -- one step -----------------------------------------------------------------------------------------------

    @promoting
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

    @promoting
    def _primal(
        self, params: list, states: list, traces: Traces, inputs: list, call: Call, done: Any
    ) -> tuple[list, list, Traces]:
        weights = self.causal.model.hoist(params)
        if not self.causal.keeps:
            step = self.causal.model.step(weights, states, inputs, done, quiet=done is not None)
            return step.outputs, step.new_states, traces
        step, new_traces, _ = self.causal.forward(weights, states, traces, inputs, done, call)
        return step.outputs, step.new_states, new_traces

    @promoting
    def _forward(
        self, params: list, states: list, traces: Traces, inputs: list, call: Call, done: Any
    ) -> tuple[tuple, tuple]:
        given = (params, states, traces, inputs, call, done)
        return self._primal(*given), given

    @promoting
    def _backward(self, residuals: tuple, cotangents: tuple) -> tuple:
        check_end(self.causal.program)
        self.require_kept("the gradient of one step")
        self._require_quiet()
        params, states, traces, inputs, call, done = residuals
        outputs, new_states, _ = cotangents
        weights = self.causal.model.hoist(params)
        step, _, values = self.causal.forward(weights, states, traces, inputs, done, call)
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

    def _require_quiet(self) -> None:
        """Refuse a derivative of :meth:`apply` that would have to write what it cannot return."""
        if self.causal.learning:
            raise UnsupportedError(
                f"{self.causal.program.name} carries values that depend on the loss, and a derivative of step.apply cannot "
                "advance them.",
                got=f"learning carries {', '.join(self.causal.learning)}",
                expected="step.value_and_grad(loss_fn) or step.scan_value_and_grad(loss_fn)",
            )

    # -- with gradients -----------------------------------------------------------------------------------------

    @promoting
    def value_and_grad(
        self, loss: Loss, params: Any, carry: Carry, inputs: tuple, item: Item, call: Call
    ) -> tuple[LossValue, Any, Carry]:
        """Loss and parameter gradients of one online step, and the new carry."""
        leaves = self._leaves(params)
        run, _ = Run.of(self.causal, leaves, loss, {})
        run = dataclasses.replace(run, join=lambda moving: call)
        found, sums, states, traces = run.step_gradients(
            run.weights, *self._enter(carry), loss.carried, Steps(inputs, item, [])
        )
        return self._held(found), self._gradients(leaves, sums), self._leave(states, traces)

    def plan(
        self, schedule: Schedule, steps: int, wanted: int | str | None = None, ordered: bool = False
    ) -> Plan:
        """How ``steps`` steps are run: see :func:`choose`."""
        return choose(self.schedules, schedule, steps, wanted, ordered)

    @promoting
    def sequence(
        self,
        plan: Plan,
        loss: Loss,
        params: Any,
        carry: Carry,
        xs: tuple,
        items: Item,
        call: Call,
        sums: Sums | None = None,
    ) -> tuple[LossValue, Any, Carry]:
        """Losses per step and summed gradients over a sequence with the weights fixed, by any schedule; and the new carry.

        ``call`` has time on axis 0 like inputs and targets; numbers in it hold for every step. With ``sums``, the gradients of
        the sites over earlier steps, the second result is those sums with these steps added; see :meth:`gradients`.
        """
        leaves = self._leaves(params)
        run, moving = Run.of(self.causal, leaves, loss, call)
        loop = Loop(*self._enter(carry), self.zero_sums(loss) if sums is None else sums, loss.carried)
        loop, (losses, aux) = plan.over(run, loop, Steps(xs, items, moving))
        gradients = self._gradients(leaves, loop.sums) if sums is None else loop.sums
        return (
            self._held(LossValue(losses, aux, loop.carried)),
            gradients,
            self._leave(loop.states, loop.traces),
        )

    @promoting
    def zero_sums(self, loss: Loss) -> Sums:
        """The sums of no steps at all."""
        return zero_sums(self.causal, loss)

    def forward_plan(self, steps: int) -> Plan | None:
        """How ``steps`` steps are run without a loss; None: one after the other."""
        sizes = ((how, how.forward_size(self.causal.schedule, steps)) for how in self.schedules)
        return next((Plan(how, size) for how, size in sizes if size), None)

    @promoting
    def scan(self, plan: Plan | None, params: Any, carry: Carry, xs: tuple) -> tuple[Any, Carry]:
        """Outputs of every step; the traces advance.

        Differentiated, it is a scan of :meth:`apply`, however many steps are handled together.
        """
        if plan is None:
            return self._one_by_one(params, carry, xs)

        def forward(*given: Any) -> tuple[Any, Any]:
            return self._in_parts(plan, *given), given

        def backward(given: Any, cotangents: Any) -> Any:
            return jax.vjp(self._one_by_one, *given)[1](cotangents)

        run = jax.custom_vjp(lambda *given: self._in_parts(plan, *given))
        run.defvjp(forward, backward)
        return run(params, carry, xs)

    @promoting
    def _one_by_one(self, params: Any, carry: Carry, xs: tuple) -> tuple[Any, Carry]:
        def body(loop: Carry, x: tuple) -> tuple[Carry, Any]:
            return self.apply(params, loop, x)

        carry, outputs = lax.scan(body, carry, xs)
        return outputs, carry

    @promoting
    def _in_parts(self, plan: Plan, params: Any, carry: Carry, xs: tuple) -> tuple[Any, Carry]:
        weights = self.causal.model.hoist(self._leaves(params))

        def part(loop: Loop, steps: Steps) -> tuple[Loop, list[Array]]:
            return plan.how.forward(weights, loop, jax.vmap(self.model.flatten_inputs)(steps.inputs))

        start = Loop(*self._enter(carry), {}, ())
        loop, outputs = in_parts(part, start, Steps(xs, ((), None), []), plan.size)
        outputs = jax.vmap(self.placement.hold_batch)(outputs)
        return jax.tree.unflatten(self.model.output_tree, outputs), self._leave(loop.states, loop.traces)

    @promoting
    def gradients(self, params: Any, sums: Sums) -> Any:
        """Parameter gradients from the summed gradients of the sites."""
        return self._gradients(self.model.flatten_params(params), sums)

    def _gradients(self, leaves: list, sums: Sums) -> Any:
        return jax.tree.unflatten(self.model.param_tree, by_parameters(self.causal, leaves, sums))

    def _held(self, found: LossValue) -> LossValue:
        return found._replace(value=self.placement.hold_whole(found.value))

    # -- where arrays lie ---------------------------------------------------------------------------------------

    def _leaves(self, params: Any) -> list[Array]:
        """Leaves of the parameters, in place."""
        return self.placement.hold_params(self.model.flatten_params(params))

    def _enter(self, carry: Carry) -> tuple[list[Array], Traces]:
        """States and traces of a carry, in place; new traces where none are kept."""
        states = self.placement.hold_states(self.model.flatten_states(carry.states))
        traces = carry.traces if self.causal.keeps else {**self.causal.carried.zeros(), **carry.traces}
        return states, self.placement.hold_traces(traces)

    def _leave(self, states: list[Array], traces: Traces) -> Carry:
        """The carry of states and traces, in place."""
        held = self.placement.hold_states(states)
        kept = self.causal.carried.outlasting(traces)
        return Carry(self.model.unflatten_states(held), self.placement.hold_traces(kept))


def _live(cotangents: list) -> list:
    """Drop the symbolic zeros that jax passes for integer values."""
    return [None if c is None or c.dtype == jax.dtypes.float0 else c for c in cotangents]


def _zero_cotangent(value: Any) -> Any:
    return jnp.zeros_like(value) if jnp.issubdtype(value.dtype, jnp.inexact) else None
