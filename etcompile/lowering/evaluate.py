"""How each op is computed.

Values of a group have one entry per hidden state, ``None`` where it is structurally zero; a transition is a matrix of such
entries, a credit or gradient is one array or ``None``.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import reduce
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.errors import ProgramError, UnsupportedError
from etcompile.frontend.jaxpr import full_dtype
from etcompile.ir.kinds import KINDS
from etcompile.ir.program import Argument, Equation, Ref, Symbol, TraceProgram
from etcompile.lowering.begun import once_begun
from etcompile.lowering.deferred import DeferredTrace, Outer
from etcompile.lowering.derivatives import LoweredModel, StepDerivatives
from etcompile.lowering.estimates import ESTIMATES
from etcompile.lowering.feedback import FEEDBACK
from etcompile.lowering.layers import LAYERS, Operator, args_by_rows, contract_layer, operate, pull_rows
from etcompile.lowering.pushed import PushedTransition
from etcompile.lowering.sensitivities import SENSITIVITIES
from etcompile.lowering.snap import advance, contract_snap, snap_immediate
from etcompile.sites.operation import Span

__all__ = ["EVALUATE", "Context", "Loss", "covered", "evaluate", "register_evaluator", "resolve_function"]

Value = Any


class Loss(Protocol):
    """What the ops of a loss ask: of one step, or of a window."""

    outputs: list[Any]
    call: Mapping[str, Any]

    def start(self, name: str) -> tuple[Any, ...]: ...

    def layer_start(self, name: str) -> tuple[Any, ...]: ...

    def one_step(self, name: str) -> Any: ...


class Context:
    """What op rules may ask: the lowered model, the step's derivatives, the loss's derivatives, and registered functions.

    ``call`` is what came with the call, beside inputs; with a loss it is the loss's. ``later`` are outer products that are not
    multiplied out, since the traces that they are added to are written later.
    """

    def __init__(
        self,
        program: TraceProgram,
        model: LoweredModel,
        step: StepDerivatives | None,
        loss: Loss | None,
        functions: Mapping[str, Callable],
        call: Mapping[str, Any] | None = None,
        later: Collection[str] = (),
    ) -> None:
        self.later = later
        self.program, self.model, self.step, self.loss, self.functions = program, model, step, loss, functions
        self.call: Mapping[str, Any] = (loss.call if loss is not None else call) or {}
        self.reached: dict[Any, Any] = {}


Rule = Callable[[Context, Equation, Sequence[Value]], Value]


def evaluate(
    context: Context, equations: Sequence[Equation], known: dict[str, Value], previous: Mapping[str, Value]
) -> dict[str, Value]:
    """Compute ``equations`` in order, given values known already and those carried from the step before."""
    values = dict(known)

    def get(argument: Argument) -> Value:
        if isinstance(argument, Ref):
            return previous.get(argument.name) if argument.delay == -1 else values[argument.name]
        return argument

    for equation in equations:
        values[equation.name] = EVALUATE[equation.op](context, equation, [get(a) for a in equation.args])
    return values


def resolve_function(functions: Mapping[str, Callable], name: str) -> Callable:
    """The function that a ``map`` op names: one given with the program, or an importable one."""
    if name in functions:
        return functions[name]
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        raise ProgramError(
            f"the function {name} of a map op cannot be found.",
            hint="define it at the top level of an importable module, or build the program in this process.",
        ) from None


def rows(fn: Callable[[Any, Any], Any], a: Value, b: Value) -> Value:
    """Apply to entries, ``None`` being zero."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        left = a if isinstance(a, tuple) else (None,) * len(b)
        right = b if isinstance(b, tuple) else (None,) * len(left)
        return tuple(rows(fn, x, y) for x, y in zip(left, right, strict=True))
    return fn(a, b)


def _add(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    return rows(lambda a, b: a if b is None else b if a is None else a + b, *args)


def _sub(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    return rows(lambda a, b: a if b is None else -b if a is None else a - b, *args)


def _mul(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    a, b = args_by_rows(context, equation, args)
    numbers = [_is_number(context, v) for v in equation.args]
    if any(numbers):
        factor, value = (a, b) if numbers[0] else (b, a)
        if factor is None:
            return None
        if isinstance(value, PushedTransition):
            return value.scaled(factor)
        return each(lambda v: None if v is None else v * jnp.asarray(factor, _of_number(v, equation)), value)
    return rows(lambda x, y: None if x is None or y is None else x * y, a, b)


def _div(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    value, number = args_by_rows(context, equation, args)
    if not _is_number(context, equation.args[1]):
        return rows(lambda x, y: None if x is None else x / y, value, number)
    if isinstance(value, PushedTransition):
        return value.scaled(1.0 / number)
    return each(lambda v: None if v is None else v / jnp.asarray(number, _of_number(v, equation)), value)


def _is_number(context: Context, argument: Argument) -> bool:
    return not isinstance(argument, Ref) or context.program.equation(argument.name).type.kind == "number"


def _of_number(value: Any, equation: Equation) -> Any:
    """Dtype that a number takes beside a value; among numbers it keeps its own."""
    return None if equation.type.kind == "number" else value.dtype


def each(fn: Callable[[Any], Any], value: Value) -> Value:
    return tuple(each(fn, v) for v in value) if isinstance(value, tuple) else fn(value)


def _outer(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    f, x = args
    if equation.name in context.later:
        return Outer(equation.name, f, x)
    geometry = context.model.traces[equation.type.of]
    spread = geometry.presynaptic(x)
    return tuple(
        None
        if row is None
        else jnp.broadcast_to(geometry.spread(row) * spread.astype(_common(row, spread)), geometry.shape)
        for row in f
    )


def _common(row: Value, x: Value) -> Any:
    return jnp.result_type(row, x)


def _matmul(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    left, right = equation.args
    assert isinstance(left, Ref) and isinstance(right, Ref)
    a, b = args
    if b is None:
        return None
    kind = context.program.equation(right.name).type.kind
    if isinstance(a, PushedTransition) or isinstance(b, PushedTransition):
        return _pushed(context, equation, a, b)
    if isinstance(a, Operator) or isinstance(b, Operator):
        if equation.type.kind == "snap":
            return None if b is None else advance(context, equation, a.step, a.layer, b)
        found = operate(context, equation, a, b)
        return once_begun(found, b) if isinstance(a, Operator) and context.model.analysis.steep else found
    if kind == "transition":
        columns = range(len(b))
        if context.program.equation(left.name).type.kind == "state":
            return tuple(_dot(a, [row[j] for row in b]) for j in columns)
        return tuple(tuple(_dot(line, [row[j] for row in b]) for j in columns) for line in a)
    geometry = context.model.traces[equation.type.of]
    if isinstance(b, DeferredTrace):
        return b.decayed(geometry, a)

    def to_row(d: Value, v: Value) -> Value:
        if d is None or v is None:
            return None
        return geometry.spread(geometry.factor(d, v)) if kind == "trace" else geometry.from_positions(d)

    return tuple(_dot([to_row(d, v) for d, v in zip(line, b, strict=True)], b) for line in a)


def _pushed(context: Context, equation: Equation, a: Value, b: Value) -> Value:
    """A product with a transition that is not written down."""
    if not isinstance(a, PushedTransition):
        return None if a is None else b.of_signal(a)
    if isinstance(b, PushedTransition):
        raise UnsupportedError(
            f"{equation.name} is a product of two transitions between units of many elements, which are not written down.",
            got=f"{equation.name} = {equation.op}(...) : {equation.type}",
            expected="a transition times a trace, or a signal times a transition",
        )
    geometry = context.model.traces[equation.type.of]
    if equation.type.kind != "trace":
        return a.of_immediate(geometry, b)
    found = a.of_trace(geometry, b)
    return once_begun(found, b) if geometry.steep else found


def _scale(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    units, value = args
    if value is None or units is None:
        return None
    if KINDS[equation.type.kind].by_state:
        return tuple(
            u.reshape(*u.shape, *(1,) * (v.ndim - u.ndim)) * v for u, v in zip(units, value, strict=True)
        )
    geometry = context.model.traces[equation.type.of]
    is_trace = equation.type.kind == "trace"

    def one(number: Value, row: Value) -> Value:
        if number is None or row is None:
            return None
        placed = geometry.from_positions(number).astype(row.dtype)
        return (geometry.spread(placed) if is_trace else placed) * row

    of_row = units if isinstance(units, tuple) else (units,) * len(value)
    return tuple(map(one, of_row, value))


def _name(argument: Argument) -> str:
    assert isinstance(argument, Ref)
    return argument.name


def _dot(a: Sequence[Value], b: Sequence[Value]) -> Value:
    terms = [x * y for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return reduce(operator.add, terms) if terms else None


def _contract(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    signal, trace = args
    if trace is None:
        return None
    if (
        equation.type.kind == "credit"
        or context.program.equation(_name(equation.args[0])).type.kind == "hidden"
    ):
        made_of = context.program.equation(_name(equation.args[1])).type
        if made_of.kind == "snap":
            signal = once_begun(signal, trace) if context.model.analysis.steep else signal
            return contract_snap(context, made_of.of, made_of.shape[0], signal, trace)
        return contract_layer(context, equation, signal, trace)
    ref = equation.args[1]
    assert isinstance(ref, Ref)
    geometry = context.model.traces[context.program.equation(ref.name).type.of]
    if isinstance(trace, DeferredTrace):
        return trace.contracted(geometry, signal)
    pairs = [
        (geometry.factor(s, e), e)
        for s, e in zip(signal, trace, strict=True)
        if s is not None and e is not None
    ]
    return geometry.contract(pairs) if pairs else None


def _back(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    signal, f = args
    ref = equation.args[1]
    assert isinstance(ref, Ref)
    geometry = context.model.traces[context.program.equation(ref.name).type.of]
    total = _dot(
        [
            None if s is None or v is None else geometry.from_positions(s)
            for s, v in zip(signal, f, strict=True)
        ],
        f,
    )
    return None if total is None else geometry.place(total)


def _outside(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    (credit,) = args
    if credit is None:
        return None
    site = equation.type.of
    covered = np.zeros(context.model.sites[site].y.shape, bool)
    for relation in context.model.analysis.relations:
        if relation.site == site:
            reached = relation.position >= 0
            covered[relation.slices] |= reached.any(axis=-1) if relation.fan else reached
    return None if covered.all() else jnp.where(covered, jnp.zeros((), credit.dtype), credit)


def _pullback(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    x, credit = args
    made_of = context.program.equation(_name(equation.args[0])).type
    if made_of.kind in ("row_factor", "unit_factor") and credit is not None:
        return pull_rows(context, made_of.of, x, credit)
    if credit is None:
        return None
    if context.model.analysis.steep and made_of.kind == "factor":
        credit = once_begun(credit, x)
    site, span = context.model.sites[equation.type.of], covered(context, equation.args[1])
    return site.pullback(x, credit) if span is None else site.pulled_within(x, credit, span, steps=False)


def covered(context: Context, credit: Argument) -> Span | None:
    """The span of y outside of which a credit is zero, if it is known: what a relation's trace covers."""
    if not isinstance(credit, Ref):
        return None
    e = context.program.equation(credit.name)
    if e.op != "back" or not isinstance(e.args[1], Ref):
        return None
    return context.model.traces[context.program.equation(e.args[1].name).type.of].relation.span


def _map(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    name, *values = args
    fn = resolve_function(context.functions, name.name)

    def apply(*entries: Value) -> Value:
        if any(isinstance(e, tuple) for e in entries):
            width = max(len(e) for e in entries if isinstance(e, tuple))
            return tuple(apply(*[e[k] if isinstance(e, tuple) else e for e in entries]) for k in range(width))
        return None if all(e is None for e in entries) else fn(*[0.0 if e is None else e for e in entries])

    return apply(*values)


def _factor(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    assert context.step is not None
    name = equation.type.of
    return context.model.sites[name].factor(context.step.presynaptic(name))


def _gain(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    symbol, response, state = args
    assert isinstance(symbol, Symbol)
    geometry = context.model.traces[symbol.name]
    found = context.model.analysis.constants[symbol.name]
    row = jnp.asarray(np.where(found.number == response, found.scale, 0).astype(found.scale.dtype))
    full = jnp.broadcast_to(row, geometry.relation.shape)
    return tuple(full if k == state else None for k in range(len(geometry.relation.rows)))


def _row(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    f, state = args
    return tuple(v if k == state else None for k, v in enumerate(f))


def _from_step(method: str) -> Rule:
    def rule(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
        (symbol,) = args
        assert isinstance(symbol, Symbol)
        return getattr(context.step, method)(symbol.name)

    return rule


def _from_loss(method: str) -> Rule:
    def rule(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
        (symbol,) = args
        assert isinstance(symbol, Symbol)
        return getattr(context.loss, method)(symbol.name)

    return rule


def _number(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    return jnp.asarray(args[0], full_dtype(equation.type.dtype))


def _changed(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    dtype = full_dtype(equation.type.dtype)
    leaves = jax.tree.leaves(args[0])
    return reduce(jnp.maximum, [jnp.any(v != 0).astype(dtype) for v in leaves], jnp.zeros((), dtype))


def register_evaluator(op: str, rule: Rule) -> None:
    """Say how an op is computed: ``rule(context, equation, args) -> value``."""
    if op in EVALUATE:
        raise ProgramError(f"how {op!r} is computed is defined twice.")
    EVALUATE[op] = rule


EVALUATE: dict[str, Rule] = {
    "transition": _from_step("transition"),
    "immediate": _from_step("immediate"),
    "gain": _gain,
    "row": _row,
    "presynaptic": _from_step("presynaptic"),
    "factor": _factor,
    "state": _from_step("state"),
    "signal": _from_loss("signal"),
    "shown_signal": _from_loss("shown_signal"),
    "bypass": _from_loss("bypass"),
    "start": _from_loss("start"),
    "one_step": _from_loss("one_step"),
    "outer": _outer,
    "matmul": _matmul,
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "scale": _scale,
    "div": _div,
    "number": _number,
    "changed": _changed,
    "contract": _contract,
    "back": _back,
    "outside": _outside,
    "pullback": _pullback,
    "map": _map,
    "copy": lambda context, equation, args: args[0],
    "lasting": lambda context, equation, args: args[0],
    "learn": lambda context, equation, args: args[0],
    **FEEDBACK,
    **LAYERS,
    **ESTIMATES,
    **SENSITIVITIES,
    "snap_immediate": snap_immediate,
}
