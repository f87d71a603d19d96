"""What a program carries from step to step: shapes, what of a value is kept, and in which precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from etcompile.analysis.headers import group_dtype
from etcompile.errors import OptionError
from etcompile.frontend.jaxpr import full_dtype
from etcompile.ir.kinds import KINDS
from etcompile.ir.ops import OPS
from etcompile.ir.program import Equation, TraceProgram
from etcompile.ir.support import carried_rows
from etcompile.ir.types import Type
from etcompile.lowering.deferred import DeferredTrace, deferrals
from etcompile.lowering.derivatives import LoweredModel
from etcompile.lowering.layers import list_shapes, rows_shape
from etcompile.lowering.snap import snap_shape
from etcompile.schedule import Schedule
from etcompile.sites.operation import WeightOperation

__all__ = ["CarriedValues", "Traces", "entry", "outlasts"]

Array = Any

#: Carried values by name, those of structurally zero entries None.
Traces = dict[str, Any]

#: Shape and dtype of one entry of a value; lists of them where it is several arrays.
Entry = tuple[Any, Any]


def entry(model: LoweredModel, kind: Type) -> Entry:
    """Shape and dtype of one entry of a value, for one hidden state where it has rows: as its type says, or :data:`LAYOUTS`."""
    if kind.kind in LAYOUTS:
        return LAYOUTS[kind.kind](model, kind)
    return kind.shape[KINDS[kind.kind].rows :], full_dtype(kind.dtype)


def outlasts(equation: Equation) -> bool:
    """Whether what is carried of it goes on where traces end: at a reset, and with a sequence whose traces are not kept."""
    return KINDS[equation.type.kind].counts or OPS[equation.op].lasts


def _relation_dtype(model: LoweredModel, kind: Type) -> Any:
    geometry, analysis = model.traces[kind.of], model.analysis
    return jnp.result_type(geometry.dtype, group_dtype(analysis, analysis.group(geometry.relation.group)))


def _outputs_each(model: LoweredModel) -> int:
    """Real numbers among the outputs of one example; a complex output is two."""
    avals = [leaf.aval for leaf in model.analysis.model.outputs]
    sizes = [a.size * (1 + jnp.issubdtype(a.dtype, jnp.complexfloating)) for a in avals if a.differentiable]
    return sum(sizes) // (model.examples or 1)


def _of_trace(model: LoweredModel, kind: Type) -> Entry:
    return model.traces[kind.of].shape, _relation_dtype(model, kind)


def _of_immediate(model: LoweredModel, kind: Type) -> Entry:
    return model.traces[kind.of].relation.shape, _relation_dtype(model, kind)


def _of_feedback(model: LoweredModel, kind: Type) -> Entry:
    units = model.analysis.group(kind.of).size // (model.examples or 1)
    return (_outputs_each(model), units), full_dtype(kind.dtype)


def _of_vector(model: LoweredModel, kind: Type) -> Entry:
    return (model.examples or 1, _outputs_each(model)), full_dtype(kind.dtype)


def _of_presynaptic(model: LoweredModel, kind: Type) -> Entry:
    reads = model.sites[kind.of].reads
    return [a.shape for a in reads], [a.dtype for a in reads]


def _of_gradient(model: LoweredModel, kind: Type) -> Entry:
    weight = model.sites[kind.of].weight
    return weight.shape, weight.dtype


def _of_each(model: LoweredModel, kind: Type) -> Entry:
    shape, dtype = _of_gradient(model, kind)
    return (model.examples or 1, *shape), dtype


def _by_state(model: LoweredModel, kind: Type) -> Entry:
    return list_shapes(model, kind.kind, kind.of)


def _of_sensitivity(model: LoweredModel, kind: Type) -> Entry:
    units = model.analysis.layer(kind.of).record.size // (model.examples or 1)
    return (units, units), full_dtype(kind.dtype)


def _by_row(model: LoweredModel, kind: Type) -> Entry:
    return rows_shape(model, kind.of, kind.kind), full_dtype(kind.dtype)


def _of_pattern(model: LoweredModel, kind: Type) -> Entry:
    return snap_shape(model, kind.of, kind.shape[0])


#: Kinds that lie in memory otherwise than their type says.
LAYOUTS: dict[str, Callable[[LoweredModel, Type], Entry]] = {
    "trace": _of_trace,
    "immediate": _of_immediate,
    "feedback": _of_feedback,
    "vector": _of_vector,
    "presynaptic": _of_presynaptic,
    "gradient": _of_gradient,
    "each": _of_each,
    "hidden": _by_state,
    "sensitivity": _of_sensitivity,
    "influence": _by_state,
    "response": _by_state,
    "rows": _by_row,
    "row_factor": _by_row,
    "unit_factor": _by_row,
    "snap": _of_pattern,
}


class CarriedValues:
    """The values that a program carries, as its schedule wants them stored.

    Raises
    ------
    OptionError
        If its ``trace_dtype`` is wider than the dtype of every trace.
    """

    def __init__(self, program: TraceProgram, model: LoweredModel, schedule: Schedule) -> None:
        self._program, self._model = program, model
        #: Whether they go on from call to call; otherwise every sequence starts with zeros.
        self.keeps = schedule.keep_traces
        self._rows = carried_rows(program)
        #: Sites of those that are too large to be stored.
        self.too_large = self._too_large()
        if not self.keeps:
            self._rows.update(self._without_too_large())
        self._narrow = {} if schedule.trace_dtype is None else self._narrowed(jnp.dtype(schedule.trace_dtype))
        #: How traces are written that are not written at every step.
        self.deferred = (
            deferrals(program, model, schedule, self._rows, self._entry, self._stored_as)
            if schedule.writes_later
            else {}
        )

    def entries(self) -> dict[str, Entry]:
        """Shape and dtype of one entry of each."""
        return {name: self._entry(self._program.equation(name)) for name in self._rows}

    def zeros(self) -> Traces:
        """Before the first step."""
        return self.stored(dict.fromkeys(self._rows))

    def shapes(self) -> Traces:
        """Of all values in their own dtypes, those that are too large to be stored among them: arrays are never made of these."""
        rows = carried_rows(self._program)
        return jax.eval_shape(
            lambda: {name: self._kept(self._program.equation(name), of, None) for name, of in rows.items()}
        )

    def outlasting(self, traces: Traces) -> Traces:
        """What of them goes on to the next call; counts always do, or random numbers would be drawn again."""
        if self.keeps:
            return traces
        return {name: v for name, v in traces.items() if outlasts(self._program.equation(name))}

    def wide(self, traces: Traces) -> Traces:
        """In the dtypes in which they are computed with, those that are written later written."""
        return self.read(self.all_written(traces))

    def read(self, traces: Traces) -> Traces:
        """In the dtypes in which they are computed with; those that are written later as they stand."""
        own = {name: self._entry(self._program.equation(name))[1] for name in self._narrow}
        return {
            name: _cast(value, own[name]) if name in own and not isinstance(value, DeferredTrace) else value
            for name, value in traces.items()
        }

    def at_next_step(self, traces: Traces) -> Traces:
        """:meth:`read` for a step that advances them: those are written that have to be."""

        def ready(name: str, value: Any) -> Any:
            return self.deferred[name].at_next_step(value) if isinstance(value, DeferredTrace) else value

        return self.read({name: ready(name, value) for name, value in traces.items()})

    def all_written(self, traces: Traces) -> Traces:
        """What is carried, were all of it written at every step."""
        return {name: self.written(name, value) for name, value in traces.items()}

    def written(self, name: str, value: Any) -> Any:
        """What a carried value would be, were it written at every step."""
        return self.deferred[name].whole(value) if isinstance(value, DeferredTrace) else value

    def later(self, traces: Traces) -> frozenset[str]:
        """Outer products that these traces are not given at once."""
        return frozenset(
            outer
            for name, value in traces.items()
            if isinstance(value, DeferredTrace)
            for outer in value.added
        )

    def stored(self, values: Mapping[str, Any]) -> Traces:
        """What is carried of the values of a step: rounded once, where it is stored narrower."""
        return {name: self._as_carried(name, values[name]) for name in self._rows}

    def _as_carried(self, name: str, value: Any) -> Any:
        if isinstance(value, DeferredTrace):
            return self.deferred[name].after_step(value)
        rows = _cast(self.kept(name, value), self._narrow.get(name))
        return self.deferred[name].begun(rows) if name in self.deferred else rows

    def kept(self, name: str, value: Any) -> Any:
        """What of one value is carried, in its own dtype."""
        return self._kept(self._program.equation(name), self._rows[name], value)

    def _stored_as(self, name: str) -> Any:
        """The dtype in which one entry is stored."""
        return self._narrow.get(name, self._entry(self._program.equation(name))[1])

    def _narrowed(self, dtype: Any) -> dict[str, Any]:
        """Per carried value that is stored in ``dtype`` rather than its own: one dtype, or one for each of its arrays."""
        own = {
            name: self._entry(self._program.equation(name))[1]
            for name in self._rows
            if KINDS[self._program.equation(name).type.kind].large
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
            made = self._program.equation(name).type
            kind = KINDS[made.kind]
            if kind.trace or kind.filtered:
                site = self._model.traces[made.of].site if kind.trace else self._model.sites[made.of]
                if site.too_large:
                    found[name] = site
        return found

    def _without_too_large(self) -> dict[str, Any]:
        """Rows of the traces that are too large: none is carried, since one chunk starts with zero and leaves nothing."""
        return {
            name: jax.tree.map(lambda _: False, self._rows[name])
            for name in self.too_large
            if KINDS[self._program.equation(name).type.kind].trace
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

    def _entry(self, equation: Equation) -> Entry:
        return entry(self._model, equation.type)


def _cast(value: Any, dtype: Any) -> Any:
    """The arrays of a carried value in another dtype, or in a list of them; None: as they are."""
    if dtype is None or value is None:
        return value
    if isinstance(dtype, list):
        return tuple(v.astype(d) for v, d in zip(value, dtype, strict=True))
    return jax.tree.map(lambda v: v.astype(dtype), value)
