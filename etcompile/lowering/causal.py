"""The causal program as pure jax functions: one step forward, and the gradients of one step's loss."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from etcompile.analysis.analysis import Analysis
from etcompile.ir.kinds import KINDS
from etcompile.ir.ops import OPS
from etcompile.ir.program import TraceProgram
from etcompile.ir.verifier import computed_with_loss
from etcompile.lowering.carried import CarriedValues, Traces
from etcompile.lowering.derivatives import LoweredModel, StepDerivatives
from etcompile.lowering.evaluate import Context, evaluate
from etcompile.lowering.feedback import check_feedback
from etcompile.lowering.losses import LossCotangents, LossValue
from etcompile.lowering.placement import Placement, placement_of
from etcompile.lowering.unwritten import pushed_in_steps
from etcompile.lowering.update_order import updated_in_order
from etcompile.schedule import Schedule

__all__ = ["CausalProgram", "Traces"]

Array = Any


def _chosen(first: Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(first, x, y), a, b)


def _made_of_traces(program: TraceProgram) -> set[str]:
    """Traces and all that is made of this step's traces."""
    found: set[str] = set()
    for e in program.equations:
        if KINDS[e.type.kind].trace or any(r.delay == 0 and r.name in found for r in e.refs):
            found.add(e.name)
    return found


class CausalProgram:
    """A trace program bound to its model.

    Parameters
    ----------
    program : TraceProgram
    analysis : Analysis
    functions : mapping of str to callable
        Functions of ``map`` ops that are not importable by name.
    schedule : Schedule, optional
        Says what is split over devices, and what traces and other values of a weight's size for every unit are stored in from
        step to step, where that is narrower than their own dtype, in which everything is computed.

    Raises
    ------
    OptionError
        If its ``trace_dtype`` is wider than the dtype of every trace.
    """

    def __init__(
        self,
        program: TraceProgram,
        analysis: Analysis,
        functions: Mapping[str, Callable] | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self.program = program
        schedule = schedule or Schedule()
        self.schedule = schedule
        self.model = LoweredModel(analysis, schedule.mesh is not None)
        if not self.model.divided:
            self.model = self.model.pushing(pushed_in_steps(program, analysis))
        self.functions = functions or {}
        late = computed_with_loss(program)
        self.early = [e for e in program.equations if e.name not in late]
        self.late = [e for e in program.equations if e.name in late]
        self._advanced = _made_of_traces(program)
        #: What goes on at steps with a loss alone.
        self.learning = tuple(name for name in program.carried if OPS[program.equation(name).op].learns)
        self.carried = CarriedValues(program, self.model, schedule)
        check_feedback(self.model, program)
        self.placement = Placement()
        if schedule.mesh is not None:
            shapes = {name: shape for name, (shape, _) in self.carried.entries().items()}
            self.placement = placement_of(self.model, program, schedule, shapes, self.carried.deferred)

    def on(self, model: LoweredModel) -> CausalProgram:
        """The same program on another lowering of the same model."""
        other = copy.copy(self)
        other.model, other.carried = model, CarriedValues(self.program, model, self.schedule)
        return other

    def without_traces(self) -> CausalProgram:
        """The same program for sequences that leave no traces; without a mesh."""
        other = copy.copy(self)
        other.schedule = dataclasses.replace(self.schedule, keep_traces=False, write_every="auto")
        other.carried = CarriedValues(self.program, self.model, other.schedule)
        return other

    @property
    def keeps(self) -> bool:
        """Whether the traces go on from call to call; otherwise every sequence starts with traces of zero."""
        return self.carried.keeps

    def forward(
        self,
        weights: list[Array],
        states: list[Array],
        traces: Traces,
        inputs: list[Array],
        done: Mapping[int, Array] | None = None,
        call: Mapping[str, Any] | None = None,
    ) -> tuple[StepDerivatives, Traces, dict]:
        """Run one step of the model and advance the traces; ``done`` as found by :meth:`LoweredModel.perform` before.

        ``call`` as of :meth:`gradients`. What learns stays as it is.

        Returns the step with its derivatives, the new traces, and all values that do not need the loss.
        """
        place = self.placement
        held = place.hold_states(states), place.hold_batch(inputs)
        step = self.model.step(weights, *held, known=done, quiet=done is not None)
        old = self.carried.at_next_step(traces)
        context = Context(self.program, self.model, step, None, self.functions, call, self.carried.later(old))
        values = evaluate(context, self.early, {}, old)
        return step, self.stored({**values, **{name: old[name] for name in self.learning}}), values

    def gradients(
        self,
        step: StepDerivatives,
        traces: Traces,
        values: dict,
        outputs: list[Array | None],
        new_states: list[Array | None],
        call: Mapping[str, Any] | None = None,
    ) -> tuple[dict[str, Array], Any]:
        """Site gradients of a loss given by its cotangents of the outputs and new states.

        ``call`` holds what some rules read beside them: ``target`` and ``modulator``.
        """
        loss = step.with_loss(outputs, new_states, call)
        context = Context(self.program, self.model, step, loss, self.functions)
        traces = self.carried.read(traces)
        return self._totals(evaluate(context, self.late, values, traces), traces), loss

    def forward_with_gradients(
        self,
        weights: list[Array],
        states: list[Array],
        traces: Traces,
        inputs: list[Array],
        loss: Callable[[list[Array], list[Array]], tuple[LossValue, LossCotangents]],
        call: Mapping[str, Any],
    ) -> tuple[LossValue, LossCotangents, dict[str, Array], StepDerivatives, Traces]:
        """One step with the gradients of its loss: loss and its derivatives, site gradients, the step, the new traces.

        ``loss`` is given the outputs and the new states.

        The same as :meth:`forward` and :meth:`gradients`, in an order that lets every trace be updated in place: what reads the
        old one goes first.
        """
        place = self.placement
        step = self.model.step(weights, place.hold_states(states), place.hold_batch(inputs))
        value, cotangents = loss(step.outputs, step.new_states)
        after = step.with_loss(cotangents.outputs, cotangents.states, call)
        old = self.carried.at_next_step(traces)
        later = self.carried.later(old)
        quiet = Context(self.program, self.model, step, None, self.functions, call, later)
        context = Context(self.program, self.model, step, after, self.functions, later=later)
        values = evaluate(quiet, [e for e in self.early if e.name not in self._advanced], {}, old)
        values = evaluate(context, [e for e in self.late if e.name not in self._advanced], values, old)
        updated = updated_in_order(context, values, old)
        values.update(updated)
        left = self._advanced - updated.keys()
        values = evaluate(quiet, [e for e in self.early if e.name in left], values, old)
        values = evaluate(context, [e for e in self.late if e.name in left], values, old)
        sites, new = self._totals(values, old), self.stored(values)
        if self.learning and call.get("mask") is not None:
            counts = jnp.any(call["mask"] != 0)
            sites = {name: jnp.where(counts, g, jnp.zeros_like(g)) for name, g in sites.items()}
            still = self.stored({**values, **{name: old[name] for name in self.learning}})
            new.update({n: _chosen(counts, new[n], still[n]) for n in self.learning})
        return value, cotangents, sites, step, new

    def _totals(self, full: dict[str, Any], traces: Traces) -> dict[str, Array]:
        """Site gradients from the values of a step."""
        total: dict[str, Array] = {}
        for gradient in self.program.gradients:
            ref = gradient.value
            value = traces.get(ref.name) if ref.delay == -1 else full[ref.name]
            if value is not None:
                total[gradient.site] = value if gradient.site not in total else total[gradient.site] + value
        return total

    # -- carried values, held in their places ---------------------------------------------------------------------

    def init_traces(self) -> Traces:
        """What goes from call to call, all zero; ``None`` where an entry is structurally zero or never read."""
        return self.carried.outlasting(self.carried.zeros())

    def init_traces_shapes(self) -> Traces:
        """Shapes and dtypes of :meth:`init_traces`, without allocating anything."""
        self.carried.entries()  # sparse patterns are found by working on numbers, which is not possible inside a trace
        return jax.eval_shape(self.init_traces)

    def stored(self, values: Mapping[str, Any]) -> Traces:
        """What is carried to the next step of the values of this one."""
        return self.placement.hold_traces(self.carried.stored(values))

    def kept(self, name: str, value: Any) -> Any:
        """What of one value is carried, in its own dtype."""
        return self.placement.hold_trace(name, self.carried.kept(name, value))
