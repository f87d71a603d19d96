"""The causal program as pure jax functions: one step forward, and the gradients of one step's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from etcompile.analysis.analysis import Analysis
from etcompile.analysis.groups import HiddenGroup
from etcompile.analysis.headers import group_dtype
from etcompile.errors import OptionError
from etcompile.frontend.jaxpr import full_dtype
from etcompile.ir.kinds import KINDS
from etcompile.ir.program import Equation, TraceProgram
from etcompile.ir.support import carried_rows
from etcompile.ir.verifier import depends_on_loss
from etcompile.lowering.derivatives import LoweredModel, StepDerivatives
from etcompile.lowering.evaluate import Context, evaluate
from etcompile.lowering.feedback import check_feedback
from etcompile.lowering.layers import list_shapes, rows_shape
from etcompile.lowering.losses import LossCotangents, LossValue
from etcompile.lowering.placement import Placement, placement_of
from etcompile.lowering.snap import snap_shape
from etcompile.lowering.update_order import updated_in_order
from etcompile.schedule import Schedule
from etcompile.sites.operation import WeightOperation

__all__ = ["CausalProgram"]

Array = Any
Traces = dict[str, Any]


def _made_of_traces(program: TraceProgram) -> set[str]:
    """Traces and all that is made of this step's traces."""
    found: set[str] = set()
    for e in program.equations:
        if e.type.kind == "trace" or any(r.delay == 0 and r.name in found for r in e.refs):
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
        self.functions = functions or {}
        late = depends_on_loss(program)
        self.early = [e for e in program.equations if e.name not in late]
        self.late = [e for e in program.equations if e.name in late]
        self._advanced = _made_of_traces(program)
        #: Whether the traces go on from call to call; otherwise every sequence starts with traces of zero.
        self.keeps = schedule.keep_traces
        self._rows = carried_rows(program)
        #: Sites of carried values that are too large to be stored.
        self.too_large = self._too_large()
        if not self.keeps:
            self._rows.update(self._without_too_large())
        dtype = schedule.trace_dtype
        self._narrow = {} if dtype is None else self._narrowed(jnp.dtype(dtype))
        check_feedback(self.model, program)
        self.placement = Placement()
        if schedule.mesh is not None:
            entries = {name: self._entry(program.equation(name))[0] for name in self._rows}
            self.placement = placement_of(self.model, program, schedule, entries)

    def init_traces(self) -> Traces:
        """What goes from call to call, all zero; ``None`` where an entry is structurally zero or never read."""
        return self.outlasting(self.fresh_traces())

    def fresh_traces(self) -> Traces:
        """Carried values of the program before the first step."""
        return self._rounded(dict.fromkeys(self._rows))

    def outlasting(self, traces: Traces) -> Traces:
        """What of the carried values goes on to the next call; counts always do, or random numbers would be drawn again."""
        if self.keeps:
            return traces
        return {name: v for name, v in traces.items() if KINDS[self.program.equation(name).type.kind].counts}

    def init_traces_shapes(self) -> Traces:
        """Shapes and dtypes of :meth:`init_traces`, without allocating anything."""
        # Sparse patterns are found by working on numbers, which is not possible inside a trace.
        for name in self._rows:
            self._entry(self.program.equation(name))
        return jax.eval_shape(self.init_traces)

    def forward(
        self,
        weights: list[Array],
        states: list[Array],
        traces: Traces,
        inputs: list[Array],
        done: Mapping[int, Array] | None = None,
    ) -> tuple[StepDerivatives, Traces, dict]:
        """Run one step of the model and advance the traces; ``done`` as found by :meth:`LoweredModel.perform` before.

        Returns the step with its derivatives, the new traces, and all values that do not need the loss.
        """
        place = self.placement
        held = place.hold_states(states), place.hold_batch(inputs)
        step = self.model.step(weights, *held, known=done, quiet=done is not None)
        context = Context(self.program, self.model, step, None, self.functions)
        values = evaluate(context, self.early, {}, self.wide(traces))
        return step, self.stored(values), values

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
        traces = self.wide(traces)
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
        quiet = Context(self.program, self.model, step, None, self.functions)
        context = Context(self.program, self.model, step, after, self.functions)
        old = self.wide(traces)
        values = evaluate(quiet, [e for e in self.early if e.name not in self._advanced], {}, old)
        values = evaluate(context, [e for e in self.late if e.name not in self._advanced], values, old)
        updated = updated_in_order(context, values, old)
        values.update(updated)
        left = self._advanced - updated.keys()
        values = evaluate(quiet, [e for e in self.early if e.name in left], values, old)
        values = evaluate(context, [e for e in self.late if e.name in left], values, old)
        return value, cotangents, self._totals(values, old), step, self.stored(values)

    def _totals(self, full: dict[str, Any], traces: Traces) -> dict[str, Array]:
        """Site gradients from the values of a step."""
        total: dict[str, Array] = {}
        for gradient in self.program.gradients:
            ref = gradient.value
            value = traces.get(ref.name) if ref.delay == -1 else full[ref.name]
            if value is not None:
                total[gradient.site] = value if gradient.site not in total else total[gradient.site] + value
        return total

    def kept(self, equation: Equation, value: Any) -> Any:
        """What of a value is carried to the next step."""
        return self.placement.hold_trace(
            equation.name, self._kept(equation, self._rows[equation.name], value)
        )

    # -- carried values -----------------------------------------------------------------------------------------

    def wide(self, traces: Traces) -> Traces:
        """Carried values in the dtypes in which they are computed with."""
        own = {name: self._entry(self.program.equation(name))[1] for name in self._narrow}
        return {name: _cast(value, own[name]) if name in own else value for name, value in traces.items()}

    def stored(self, values: Mapping[str, Any]) -> Traces:
        """What is carried to the next step of the values of this one: rounded once, where it is stored narrower."""
        return self.placement.hold_traces(self._rounded(values))

    def _rounded(self, values: Mapping[str, Any]) -> Traces:
        kept = {
            name: self._kept(self.program.equation(name), rows, values[name])
            for name, rows in self._rows.items()
        }
        return {name: _cast(value, self._narrow.get(name)) for name, value in kept.items()}

    def _narrowed(self, dtype: Any) -> dict[str, Any]:
        """Per carried value that is stored in ``dtype`` rather than its own: one dtype, or one for each of its arrays."""
        own = {
            name: self._entry(self.program.equation(name))[1]
            for name in self._rows
            if KINDS[self.program.equation(name).type.kind].large
        }
        widest = max((jnp.dtype(d) for d in jax.tree.leaves(own)), key=lambda d: d.itemsize, default=dtype)
        if dtype.itemsize > widest.itemsize:
            raise OptionError(
                "trace_dtype is wider than the traces are.",
                got=f"trace_dtype={dtype.name}",
                expected=f"at most {widest.name}, or None: as the model",
            )
        narrow = jax.tree.map(lambda d: dtype if jnp.dtype(d).itemsize > dtype.itemsize else d, own)
        return {name: d for name, d in narrow.items() if d != own[name]}

    def _too_large(self) -> dict[str, WeightOperation]:
        found = {}
        for name in self._rows:
            kind, of = (e := self.program.equation(name)).type.kind, e.type.of
            site = self.model.traces[of].site if kind == "trace" else self.model.sites.get(of)
            if kind in ("trace", "factor") and site is not None and site.too_large:
                found[name] = site
        return found

    def _without_too_large(self) -> dict[str, Any]:
        """Rows of the traces that are too large: none is carried, since one chunk starts with zero and leaves nothing."""
        return {
            name: jax.tree.map(lambda _: False, self._rows[name])
            for name in self.too_large
            if self.program.equation(name).type.kind == "trace"
        }

    def _zeros(self, equation: Equation, rows: Any) -> Any:
        if isinstance(rows, tuple):
            return tuple(self._zeros(equation, r) for r in rows)
        if not rows:
            return None
        shape, dtype = self._entry(equation)
        if isinstance(shape, list):
            return tuple(jnp.zeros(s, d) for s, d in zip(shape, dtype, strict=True))
        return jnp.zeros(shape, dtype)

    def _kept(self, equation: Equation, rows: Any, value: Any) -> Any:
        if isinstance(rows, tuple):
            entries = value if value is not None else (None,) * len(rows)
            return tuple(self._kept(equation, r, v) for r, v in zip(rows, entries, strict=True))
        if not rows:
            return None
        if value is None:
            return self._zeros(equation, rows)
        shape, dtype = self._entry(equation)
        if isinstance(shape, list):
            return tuple(v.astype(d) for v, d in zip(value, dtype, strict=True))
        return jnp.broadcast_to(value, shape).astype(dtype)

    def _entry(self, equation: Equation) -> tuple[Any, Any]:
        """Shape and dtype of one entry of a carried value."""
        kind, of = equation.type.kind, equation.type.of
        analysis = self.model.analysis
        if kind in ("trace", "immediate"):
            geometry = self.model.traces[of]
            dtype = jnp.result_type(
                geometry.dtype, group_dtype(analysis, analysis.group(geometry.relation.group))
            )
            return (geometry.shape if kind == "trace" else geometry.relation.shape), dtype
        if kind in ("state", "transition", "drive", "feedback"):
            group = analysis.group(of)
            dtype = group_dtype(analysis, group)
            return (self._feedback_shape(group) if kind == "feedback" else group.shape), dtype
        if kind in ("hidden", "influence", "response"):
            return list_shapes(self.model, kind, of)
        if kind in ("row_factor", "rows"):
            return rows_shape(self.model, of, kind), full_dtype(equation.type.dtype)
        if kind == "snap":
            return snap_shape(self.model, of, equation.type.shape[0])
        if kind == "vector":
            return (self.model.examples or 1, self._outputs_each()), full_dtype(equation.type.dtype)
        if KINDS[kind].owner != "site":
            return equation.type.shape[KINDS[kind].rows :], full_dtype(equation.type.dtype)
        site = self.model.sites[of]
        if kind == "presynaptic":
            return [a.shape for a in site.reads], [a.dtype for a in site.reads]
        if kind == "factor":
            return equation.type.shape, site.y.dtype
        return (site.y.shape, site.y.dtype) if kind == "credit" else (site.weight.shape, site.weight.dtype)

    def _outputs_each(self) -> int:
        """Floating outputs of one example."""
        avals = [leaf.aval for leaf in self.model.analysis.model.outputs]
        sizes = [a.size for a in avals if jnp.issubdtype(a.dtype, jnp.floating)]
        return sum(sizes) // (self.model.examples or 1)

    def _feedback_shape(self, group: HiddenGroup) -> tuple[int, int]:
        return self._outputs_each(), group.size // (self.model.examples or 1)


def _cast(value: Any, dtype: Any) -> Any:
    """The arrays of a carried value in another dtype, or in a list of them; None: as they are."""
    if dtype is None or value is None:
        return value
    if isinstance(dtype, list):
        return tuple(v.astype(d) for v, d in zip(value, dtype, strict=True))
    return jax.tree.map(lambda v: v.astype(dtype), value)
