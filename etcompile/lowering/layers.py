"""Ops of rules that follow every path of a layer: its transition as an operator, influences by weight, responses by y.

Values of a layer's states are tuples with one array per hidden state, in the state's own shape. An influence has the
axes of the weight behind those of the state, a response those of y (without the example axis where y has it: examples
do not mix).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from etcompile.analysis.layers import Layer
from etcompile.analysis.relations import Relation
from etcompile.ir.header import Effect
from etcompile.ir.program import Equation, Ref
from etcompile.lowering.begun import once_begun
from etcompile.lowering.geometry import TraceGeometry, trace_geometry
from etcompile.lowering.mapped import mapped
from etcompile.precision import accumulator

if TYPE_CHECKING:
    from etcompile.lowering.derivatives import LoweredModel, StepDerivatives
    from etcompile.lowering.evaluate import Context

__all__ = [
    "LAYERS", "Operator", "args_by_rows", "at_once", "contract_layer", "full_geometry", "list_shapes", "operate", "other_states",
    "pull_rows", "push_from", "random_signs", "rows_shape",
]  # fmt: skip

Array = Any
Value = Any

#: Columns or rows of a Jacobian that are taken through a step at once.
_AT_ONCE = 512


class Operator:
    """H_t of a layer: tangents of its old states to tangents of its new ones, and cotangents back."""

    def __init__(self, step: StepDerivatives, layer: Layer) -> None:
        self.step, self.layer = step, layer
        model = step.model.analysis.model
        self._new = [model.new_state_vars[s] for s in layer.states]
        self._old = [model.state_vars[s] for s in layer.states]
        self._others = other_states(step.model, layer)

    def push(self, tangents: Sequence[Array]) -> tuple[Array, ...]:
        found = self.step.tape.push(self._as_values(self._old, tangents), self._new, self._others, zeros=True)
        return tuple(self.step.filled(v, found) for v in self._new)

    def pull(self, cotangents: Sequence[Array]) -> tuple[Array, ...]:
        seeds = self._as_values(self._new, cotangents)
        found = self.step.tape.pull(seeds, set(self._old), independent=self._others)
        return tuple(self.step.filled(v, found) for v in self._old)

    def _as_values(self, variables: Sequence[int], values: Sequence[Array]) -> dict[int, Array]:
        """In the precision of each state."""
        avals = self.step.tape.graph.avals
        return {v: value.astype(avals[v].dtype) for v, value in zip(variables, values, strict=True)}


def other_states(model: LoweredModel, layer: Layer) -> frozenset[int]:
    """New states of other layers: a layer's derivatives take them as given."""
    analysis = model.analysis
    hidden = {s for g in analysis.groups for s in g.states}
    return frozenset(analysis.model.new_state_vars[s] for s in hidden - set(layer.states))


def operate(context: Context, equation: Equation, a: Value, b: Value) -> Value:
    """``H @ v`` or ``v @ H``."""
    if isinstance(b, Operator):
        return None if a is None else b.pull(a)
    if b is None:
        return None
    if equation.type.kind == "hidden":
        return a.push(b)
    shapes = [v.shape for v in _states(context, equation)]
    tails = [v.shape[len(s) :] for v, s in zip(b, shapes, strict=True)]
    count = int(np.prod(tails[0], dtype=np.int64))
    columns = [jnp.moveaxis(v.reshape(*s, count), -1, 0) for v, s in zip(b, shapes, strict=True)]
    pushed = at_once(a.step, a.push, [jnp.real(c) for c in columns], count)
    if any(jnp.iscomplexobj(c) for c in columns):  # of a complex weight: states are real
        turned = at_once(a.step, a.push, [jnp.imag(c) for c in columns], count)
        pushed = tuple(p + 1j * t for p, t in zip(pushed, turned, strict=True))
    return tuple(
        jnp.moveaxis(v, 0, -1).reshape(*s, *t) for v, s, t in zip(pushed, shapes, tails, strict=True)
    )


def _states(context: Context, equation: Equation) -> list[Array]:
    """Current values of the states of the layer that an effect belongs to; only their shapes count."""
    assert context.step is not None
    layer = context.model.analysis.layer(context.model.analysis.effect(equation.type.of).layer)
    variables = context.model.analysis.model.state_vars
    return [context.step.tape.values[variables[s]] for s in layer.states]


def at_once(step: StepDerivatives, fn: Callable[[Any], Any], columns: Any, count: int) -> Any:
    """``fn`` over the leading axis, a limited number of entries at a time; ``fn`` takes them through the step."""

    def apart(some: Any) -> Any:  # nothing made in one loop is for another
        with step.tape.inner():
            return fn(some)

    def together(some: Any) -> Any:
        with step.tape.shared():
            return fn(some)

    if count <= _AT_ONCE:
        return mapped(together, columns, in_turn=apart)
    whole = count // _AT_ONCE * _AT_ONCE
    parts = jax.tree.map(lambda v: v[:whole].reshape(-1, _AT_ONCE, *v.shape[1:]), columns)
    found = lax.map(lambda part: mapped(apart, part), parts)
    found = jax.tree.map(lambda v: v.reshape(whole, *v.shape[2:]), found)
    if whole == count:
        return found
    rest = mapped(apart, jax.tree.map(lambda v: v[whole:], columns))
    return jax.tree.map(lambda *v: jnp.concatenate(v), found, rest)


# -- derivatives of a step --------------------------------------------------------------------------------------------


def _transition(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    assert context.step is not None
    return Operator(context.step, context.model.analysis.layer(equation.type.of))


def _immediate(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    """F by one vector-Jacobian product for each element of the layer's states."""
    step = context.step
    assert step is not None
    analysis = context.model.analysis
    effect = analysis.effect(equation.type.of)
    layer, site = analysis.layer(effect.layer), analysis.site(effect.site)
    new = [analysis.model.new_state_vars[s] for s in layer.states]
    avals = [step.tape.graph.avals[v] for v in new]
    others = other_states(context.model, layer)
    x = step.presynaptic(site.name)
    geometry = context.model.sites[site.name]

    def row(cotangents: Sequence[Array]) -> Array:
        found = step.tape.pull(dict(zip(new, cotangents, strict=True)), {site.y}, independent=others)
        return geometry.pullback(x, step.filled(site.y, found))

    sizes = [a.size for a in avals]
    identity = _identity(sum(sizes), sizes, [a.shape for a in avals], [a.dtype for a in avals])
    rows = at_once(step, row, identity, sum(sizes))
    parts = jnp.split(rows, np.cumsum(sizes)[:-1].tolist())
    return tuple(p.reshape(*a.shape, *geometry.weight.shape) for p, a in zip(parts, avals, strict=True))


def _identity(total: int, sizes: list[int], shapes: list[tuple[int, ...]], dtypes: list[Any]) -> list[Array]:
    starts = np.cumsum([0, *sizes])
    return [
        jnp.eye(total, size, -int(start), dtype=dtype).reshape(total, *shape)
        for start, size, shape, dtype in zip(starts, sizes, shapes, dtypes, strict=False)
    ]


def _response(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    """dh/dy by one Jacobian-vector product for each element of y (of one example: all examples at once)."""
    step = context.step
    assert step is not None
    analysis = context.model.analysis
    effect = analysis.effect(equation.type.of)
    layer, site = analysis.layer(effect.layer), analysis.site(effect.site)
    new = [analysis.model.new_state_vars[s] for s in layer.states]
    others = other_states(context.model, layer)
    aval = step.tape.graph.avals[site.y]
    tail = _tail(context.model, effect)
    count = int(np.prod(tail, dtype=np.int64))

    def column(unit: Array) -> tuple[Array, ...]:
        tangent = jnp.broadcast_to(unit.reshape(tail), aval.shape)
        return push_from(step, {site.y: tangent}, new, others)

    columns = at_once(step, column, jnp.eye(count, dtype=aval.dtype), count)
    return tuple(jnp.moveaxis(v, 0, -1).reshape(*v.shape[1:], *tail) for v in columns)


def push_from(
    step: StepDerivatives, tangents: dict[int, Array], targets: Sequence[int], others: frozenset[int]
) -> tuple[Array, ...]:
    """Derivatives of real variables along tangents; by a complex variable z they are those r with dh = Re(r dz)."""
    found = step.tape.push(tangents, targets, others)
    along = tuple(step.filled(v, found) for v in targets)
    if not any(jnp.iscomplexobj(t) for t in tangents.values()):
        return along
    turned = step.tape.push({v: 1j * t for v, t in tangents.items()}, targets, others)
    return tuple(a - 1j * step.filled(v, turned) for a, v in zip(along, targets, strict=True))


def _reach(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    step = context.step
    assert step is not None
    symbol, cotangents = args
    analysis = context.model.analysis
    effect = analysis.effect(symbol.name)
    if cotangents is None:
        return None
    ref = equation.args[1]
    assert isinstance(ref, Ref)
    key = (effect.layer, ref)
    if key not in context.reached:  # one product serves all effects of the layer
        layer = analysis.layer(effect.layer)
        new = [analysis.model.new_state_vars[s] for s in layer.states]
        targets = {analysis.site(e.site).y for e in analysis.effects if e.layer == layer.name}
        context.reached[key] = step.tape.pull(
            dict(zip(new, cotangents, strict=True)), targets, independent=other_states(context.model, layer)
        )
    return context.reached[key].get(analysis.site(effect.site).y)


def _from_loss(method: str) -> Callable[[Context, Equation, Sequence[Value]], Value]:
    return lambda context, equation, args: getattr(context.loss, method)(equation.type.of)


def _to_layer(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    """Signals over positions as arrays over the elements of each state."""
    assert context.step is not None
    analysis = context.model.analysis
    layer = analysis.layer(equation.type.of)
    found: dict[int, Array] = {}
    for name, rows in zip(layer.record.groups, args[1:], strict=True):
        group = analysis.group(name)
        for k, s in enumerate(group.states):
            aval = context.step.tape.graph.avals[analysis.model.state_vars[s]]
            row = None if rows is None else rows[k]
            if row is None:
                found[s] = jnp.zeros(aval.shape, aval.dtype)
            elif (elements := group.maps[k]) is None:
                found[s] = row.reshape(aval.shape)
            else:
                flat = jnp.where(elements >= 0, row.reshape(-1), 0)
                summed = jnp.zeros(aval.size, row.dtype).at[np.maximum(elements, 0)].add(flat)
                found[s] = summed.reshape(aval.shape)
    return tuple(found[s] for s in layer.states)


# -- contraction and rows ---------------------------------------------------------------------------------------------


def contract_layer(context: Context, equation: Equation, signal: Value, trace: Value) -> Value:
    """Sum over a layer's states: of an influence a weight gradient, of a response a credit of y."""
    if signal is None:
        return None
    if context.model.analysis.steep:
        signal = tuple(once_begun(s, e, partial(_begun, s.ndim)) for s, e in zip(signal, trace, strict=True))
    if equation.type.kind == "gradient":
        parts = [jnp.tensordot(s, e, axes=s.ndim) for s, e in zip(signal, trace, strict=True)]
        return reduce(jnp.add, parts)
    ref = equation.args[1]
    assert isinstance(ref, Ref)
    effect = context.model.analysis.effect(context.program.equation(ref.name).type.of)
    if _along(context.model, effect):
        one = jax.vmap(lambda s, e: jnp.tensordot(s, e, axes=s.ndim))
        return reduce(jnp.add, [one(s, e) for s, e in zip(signal, trace, strict=True)])
    return reduce(jnp.add, [jnp.tensordot(s, e, axes=s.ndim) for s, e in zip(signal, trace, strict=True)])


def _begun(ndim: int, trace: Array) -> Array:
    """Of which elements of a state, its first axes, a trace has anything but zeros."""
    return jnp.any(trace != 0, axis=tuple(range(ndim, trace.ndim)))


def _along(model: LoweredModel, effect: Effect) -> bool:
    """Whether y of an effect has the example axis."""
    return model.analysis.site(effect.site).y in model.batch.along


def _tail(model: LoweredModel, effect: Effect) -> tuple[int, ...]:
    """Axes of y in a response."""
    shape = model.sites[effect.site].y.shape
    return shape[1:] if _along(model, effect) else shape


def full_geometry(model: LoweredModel, effect: Effect) -> TraceGeometry:
    """The trace geometry of a site over all of y."""
    site = model.sites[effect.site]
    window = tuple((0, n) for n in site.y.shape)
    position = np.arange(int(np.prod(site.y.shape, dtype=np.int64))).reshape(site.y.shape)
    group = model.analysis.groups[0].name
    return trace_geometry(
        model.analysis, Relation(effect.name, effect.site, group, window, position, (), {}), model.divided
    )


def _row_factor(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    assert context.step is not None
    effect = context.model.analysis.effect(equation.type.of)
    x = context.step.presynaptic(effect.site)
    factor = context.model.sites[effect.site].factor(x)
    return (
        full_geometry(context.model, effect).logical(factor).astype(context.model.sites[effect.site].y.dtype)
    )


def _unit_factor(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    rows = _row_factor(context, equation, args)
    return jnp.broadcast_to(rows, rows_shape(context.model, equation.type.of, "unit_factor"))


def pull_rows(context: Context, name: str, x: Array, credit: Array) -> Array:
    """The weight gradient of a credit of y where a row factor plays the part of the presynaptic value."""
    geometry = full_geometry(context.model, context.model.analysis.effect(name))
    return geometry.contract([(credit, geometry.store(x))])


def rows_shape(model: LoweredModel, name: str, kind: str = "rows") -> tuple[int, ...]:
    effect = model.analysis.effect(name)
    geometry = full_geometry(model, effect)
    site = model.sites[effect.site]
    reads = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in site.reads)
    shape = jax.eval_shape(lambda x: geometry.logical(site.factor(x)), reads).shape
    if kind == "unit_factor":
        return (*site.y.shape, *shape[len(site.y.shape) :])
    return shape if kind == "row_factor" else shape[: len(site.y.shape)]


def _row_norm(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    (value,) = args
    name = equation.type.of
    effect = context.model.analysis.effect(name)
    shape = rows_shape(context.model, name)
    if not isinstance(value, tuple):  # a row factor
        contracted = tuple(range(len(shape), value.ndim))
        return jnp.sqrt(jnp.sum(_square(value), axis=contracted)).astype(jnp.real(value).dtype)
    along, tail = _along(context.model, effect), _tail(context.model, effect)
    total: Array = 0.0
    for v in value:
        states = v.ndim - len(tail)
        total = total + jnp.sum(_square(v), axis=tuple(range(1 if along else 0, states)))
    narrow = tuple(k for k, n in enumerate(shape) if n == 1)
    norm = jnp.sqrt(jnp.sum(total, axis=narrow, keepdims=True))
    return norm.astype(jnp.result_type(*[jnp.real(v).dtype for v in value]))


def args_by_rows(context: Context, equation: Equation, args: Sequence[Value]) -> list[Value]:
    """Numbers per row spread over the entries of the value that they meet."""
    kinds = [context.program.equation(a.name).type if isinstance(a, Ref) else None for a in equation.args]
    target = equation.type
    found = []
    for value, kind in zip(args, kinds, strict=True):
        if kind is None or kind.kind != "rows" or target.kind == "rows" or value is None:
            found.append(value)
        elif target.kind == "row_factor":
            shape = rows_shape(context.model, target.of, "row_factor")
            found.append(value.reshape(*value.shape, *(1,) * (len(shape) - value.ndim)))
        else:
            effect = context.model.analysis.effect(target.of)
            along = _along(context.model, effect)
            ranks = [v.ndim for v in _states(context, equation)]
            head = (value.shape[0],) if along else ()
            rest = value.shape[1:] if along else value.shape
            found.append(tuple(value.reshape(*head, *(1,) * (rank - len(head)), *rest) for rank in ranks))
    return found


# -- numbers and random signs -----------------------------------------------------------------------------------------


def _norm(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    leaves = jax.tree.leaves(list(args))
    return jnp.sqrt(reduce(jnp.add, [jnp.sum(_square(v)) for v in leaves], jnp.zeros(())))


def _square(v: Array) -> Array:
    """|v|², wide enough to be summed."""
    wide = v.astype(accumulator(v.dtype))
    return jnp.real(wide * jnp.conj(wide))


def _dot(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    a, b = args
    if a is None or b is None:
        return jnp.zeros(())
    return reduce(jnp.add, [jnp.vdot(x, y) for x, y in zip(a, b, strict=True)])


def random_signs(seed: int, count: Array, number: int, shape: tuple[int, ...], dtype: Any) -> Array:
    """Random signs that depend on a seed, the count of the step, and the number of the array."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), count), number)
    return jax.random.rademacher(key, shape, jnp.int8).astype(dtype)


def _rademacher(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    _, seed, count = args
    analysis = context.model.analysis
    avals = [analysis.model.states[s].aval for s in analysis.layer(equation.type.of).states]
    return tuple(random_signs(int(seed), count, k, a.shape, a.dtype) for k, a in enumerate(avals))


def _row_signs(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    _, seed, count = args
    name = equation.type.of
    number = 1000 + [e.name for e in context.model.analysis.effects].index(name)
    dtype = context.model.sites[context.model.analysis.effect(name).site].y.dtype
    return random_signs(int(seed), count, number, rows_shape(context.model, name), dtype)


def _tick(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    return (jnp.zeros((), jnp.uint32) if args[0] is None else args[0]) + jnp.uint32(1)


def list_shapes(model: LoweredModel, kind: str, of: str) -> tuple[list[tuple[int, ...]], list[Any]]:
    """Shapes and dtypes of the arrays of a value that has one for each state of a layer."""
    analysis = model.analysis
    if kind == "hidden":
        avals = [analysis.model.states[s].aval for s in analysis.layer(of).states]
        return [a.shape for a in avals], [a.dtype for a in avals]
    effect = analysis.effect(of)
    site = model.sites[effect.site]
    influence = kind == "influence"
    tail = site.weight.shape if influence else _tail(model, effect)
    avals = [analysis.model.states[s].aval for s in analysis.layer(effect.layer).states]
    dtypes = [jnp.result_type(a.dtype, site.weight.dtype if influence else site.y.dtype) for a in avals]
    return [(*a.shape, *tail) for a in avals], dtypes


LAYERS: dict[str, Callable[[Any, Equation, Sequence[Value]], Value]] = {
    "layer_transition": _transition,
    "layer_immediate": _immediate,
    "layer_response": _response,
    "layer_signal": _from_loss("layer_signal"),
    "layer_bypass": _from_loss("layer_bypass"),
    "layer_start": _from_loss("layer_start"),
    "to_layer": _to_layer,
    "reach": _reach,
    "row_factor": _row_factor,
    "unit_factor": _unit_factor,
    "row_norm": _row_norm,
    "norm": _norm,
    "dot": _dot,
    "rademacher": _rademacher,
    "row_signs": _row_signs,
    "tick": _tick,
}
