"""SnAp: an influence kept on a sparse pattern.

Weights of a site act on the layer through y. Elements of y that share their weights (over examples and places) are
one *channel*. The pattern lists the pairs (channel, hidden element) such that the channel reaches the element within
n steps; the influence is an array ``[examples, pairs, contracted]``. The transition is needed at a few entries only:
columns of H that do not meet in a row are pushed through the step together, so that a sparse network needs few
products and never a dense Jacobian.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.analysis.components import color_columns
from etcompile.analysis.layers import Layer
from etcompile.analysis.sparsity import dependence_table
from etcompile.ir.header import Effect
from etcompile.ir.program import Equation
from etcompile.lowering.layers import at_once, full_geometry, other_states, push_from

if TYPE_CHECKING:
    from etcompile.lowering.derivatives import LoweredModel, StepDerivatives
    from etcompile.lowering.evaluate import Context

__all__ = ["SnapPattern", "advance", "contract_snap", "snap_immediate", "snap_pattern", "snap_shape"]

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class SnapPattern:
    """The pattern of one effect, for one example.

    Attributes
    ----------
    channel, unit : arrays [pairs]
        The channel of y and the element of the layer of each pair.
    entries : arrays (row, column) [entries of H]
        Entries of H that some pair needs.
    terms : arrays (pair, entry, source pair) [terms]
        ``J'[pair] += H[entry] * J[source pair]``.
    colors : array [elements]
        Columns of H of one color are pushed together.
    direct : arrays (y, unit, pair) [direct entries of dh/dy]
    direct_colors : array [elements of y]
    """

    channel: Array
    unit: Array
    entries: tuple[Array, Array]
    terms: tuple[Array, Array, Array]
    colors: Array
    direct: tuple[Array, Array, Array]
    direct_colors: Array


def snap_pattern(model: LoweredModel, effect: Effect, order: int) -> SnapPattern:
    """The pattern of order ``order``, made once for each model."""
    key = (effect.name, order)
    if key not in model.patterns:
        model.patterns[key] = _pattern(model, effect, order)
    return model.patterns[key]


def _pattern(model: LoweredModel, effect: Effect, order: int) -> SnapPattern:
    layer = model.analysis.layer(effect.layer)
    reach = _transition_table(model, layer)
    direct = _direct_table(model, effect, layer)  # [units, elements of y]
    channels = _channels(model, effect)
    count = int(channels.max(initial=-1)) + 1
    first = np.zeros((len(reach), count), bool)
    for y, c in enumerate(channels):
        first[:, c] |= direct[:, y]
    reached = first
    for _ in range(order - 1):
        grown = first | (reach.astype(np.float32) @ reached.astype(np.float32) > 0)
        if (grown == reached).all():
            break
        reached = grown
    channel, unit = np.nonzero(reached.T)
    number = np.full(reached.shape, -1)
    number[unit, channel] = np.arange(len(unit))
    pairs, columns, sources = _terms(reach, reached, number)
    needed = np.zeros_like(reach)
    needed[unit[pairs], columns] = True
    rows, cols = np.nonzero(needed)
    entry = np.full(reach.shape, -1)
    entry[rows, cols] = np.arange(len(rows))
    terms = (pairs, entry[unit[pairs], columns], sources)
    y, u = np.nonzero(direct.T)
    return SnapPattern(
        channel,
        unit,
        (rows, cols),
        terms,
        color_columns(_conflict(needed, reach)),
        (y, u, number[u, channels[y]]),
        color_columns(_conflict(direct, direct)),
    )


def _terms(reach: Array, reached: Array, number: Array) -> tuple[Array, Array, Array]:
    """For each pair (c, s) the pairs (c, s') with H[s, s'] possible: pair, column s', source pair."""
    pairs, columns, sources = [], [], []
    for c in range(reached.shape[1]):
        units = np.flatnonzero(reached[:, c])
        to, via = np.nonzero(reach[np.ix_(units, units)])
        pairs.append(number[units[to], c])
        columns.append(units[via])
        sources.append(number[units[via], c])
    empty = np.zeros(0, np.int64)
    return tuple(np.concatenate([empty, *x]).astype(np.int64) for x in (pairs, columns, sources))  # type: ignore[return-value]


def _conflict(needed: Array, possible: Array) -> Array:
    """Columns that cannot be told apart when pushed together: a needed entry of one meets a possible one of the other."""
    a, b = needed.astype(np.float32), possible.astype(np.float32)
    meet = a.T @ b > 0
    return meet | meet.T


# -- structure, for one example ---------------------------------------------------------------------------------------


def _one_example(shape: tuple[int, ...], examples: int | None) -> int:
    return int(np.prod(shape, dtype=np.int64)) // (examples or 1)


def _sources(model: LoweredModel, variables: Sequence[int], along: Sequence[bool]) -> dict[int, Array]:
    """Elements of the first example as numbered sources."""
    avals = [model.analysis.split.body.avals[v] for v in variables]
    sizes = [
        _one_example(a.shape, model.examples if one else None) for a, one in zip(avals, along, strict=True)
    ]
    starts = np.cumsum([0, *sizes])
    found = {}
    for v, a, size, start in zip(variables, avals, sizes, starts, strict=False):
        table = np.zeros((a.size, int(starts[-1])), bool)
        table[np.arange(size), int(start) + np.arange(size)] = True
        found[v] = table.reshape(*a.shape, int(starts[-1]))
    return found


def _rows(model: LoweredModel, layer: Layer, tables: dict[int, Array]) -> Array:
    """Tables of the layer's new states for one example, one under the other.

    Sources of the first example reach that one alone; others may belong to any, or to all.
    """
    new = [model.analysis.model.new_state_vars[s] for s in layer.states]
    return np.concatenate([_by_example(model, tables[v], tables[v].shape[-1:]).any(axis=0) for v in new])


def _by_example(model: LoweredModel, value: Array, tail: tuple[int, ...] = ()) -> Array:
    """An array over a state and ``tail`` as [examples, elements, *tail]."""
    rows = model.examples or 1
    return value.reshape(rows, value.size // max(1, rows * math.prod(tail)), *tail)


def _transition_table(model: LoweredModel, layer: Layer) -> Array:
    analysis = model.analysis
    old = [analysis.model.state_vars[s] for s in layer.states]
    new = [analysis.model.new_state_vars[s] for s in layer.states]
    sources = _sources(model, old, [True] * len(old))
    return _rows(
        model, layer, dependence_table(analysis, sources, new, other_states(model, layer), model.examples)
    )


def _direct_table(model: LoweredModel, effect: Effect, layer: Layer) -> Array:
    analysis = model.analysis
    y = analysis.site(effect.site).y
    new = [analysis.model.new_state_vars[s] for s in layer.states]
    sources = _sources(model, [y], [y in model.batch.along])
    return _rows(
        model, layer, dependence_table(analysis, sources, new, other_states(model, layer), model.examples)
    )


def _channels(model: LoweredModel, effect: Effect) -> Array:
    """For each element of y (of one example) the number of its channel: its index along the axes that the weight has too."""
    geometry = full_geometry(model, effect)
    shape = model.sites[effect.site].y.shape
    along = model.analysis.site(effect.site).y in model.batch.along
    kept = geometry.kept
    index = np.zeros(shape, np.int64)
    for axis in kept:
        if along and axis == 0:
            continue  # one weight for each example: the example axis numbers them
        step = np.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        index = index * shape[axis] + step
    return (index[0] if along else index).ravel()


# -- arrays -----------------------------------------------------------------------------------------------------------


def snap_shape(model: LoweredModel, name: str, order: int) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of an influence: [examples, pairs, contracted]."""
    effect = model.analysis.effect(name)
    pattern = snap_pattern(model, effect, order)
    contracted = full_geometry(model, effect).contracted
    size = int(np.prod(contracted, dtype=np.int64))
    states = [model.analysis.model.states[s].aval.dtype for s in model.analysis.layer(effect.layer).states]
    dtype = jnp.result_type(*states, model.sites[effect.site].y.dtype)
    return (model.examples or 1, len(pattern.unit), size), dtype


def _flat(model: LoweredModel, values: Sequence[Array]) -> Array:
    """Values of a layer's states as [examples, elements]."""
    return jnp.concatenate([_by_example(model, v) for v in values], axis=1)


def snap_immediate(context: Context, equation: Equation, args: Sequence[Any]) -> Array:
    """F on the pattern: dh/dy at its possible entries times x, summed over the elements of y of a channel."""
    step, model = context.step, context.model
    assert step is not None
    analysis = model.analysis
    effect = analysis.effect(equation.type.of)
    pattern = snap_pattern(model, effect, equation.type.shape[0])
    layer, site = analysis.layer(effect.layer), analysis.site(effect.site)
    y, units, pairs = pattern.direct
    slopes = _compressed(step, layer, site.y, pattern.direct_colors)[
        pattern.direct_colors[y], :, units
    ]  # [direct, E]
    geometry = full_geometry(model, effect)
    factor = model.sites[site.name].factor(step.presynaptic(site.name))
    x = geometry.logical(factor)
    n_y = len(model.sites[site.name].y.shape)
    shape = model.sites[site.name].y.shape
    along = site.y in model.batch.along
    x = x.reshape(*x.shape[:n_y], math.prod(x.shape[n_y:]))
    rows = jnp.broadcast_to(x, (*[n if x.shape[a] > 1 else 1 for a, n in enumerate(shape)], x.shape[-1]))
    index = _indices(y, shape[1:] if along else shape)
    if along:
        index = (slice(None), *(i if rows.shape[a + 1] > 1 else 0 * i for a, i in enumerate(index)))
        taken = rows[index] if len(index) > 1 else rows[:, None]
        taken = jnp.moveaxis(taken, 1, 0)  # [direct, E or 1, contracted]
    else:
        index = tuple(i if rows.shape[a] > 1 else 0 * i for a, i in enumerate(index))
        taken = rows[index][:, None] if index else jnp.broadcast_to(rows, (len(y), rows.shape[-1]))[:, None]
    terms = slopes[:, :, None] * taken
    total = jax.ops.segment_sum(terms, pairs, len(pattern.unit))
    full, dtype = snap_shape(model, effect.name, equation.type.shape[0])
    return jnp.moveaxis(total, 0, 1).astype(dtype).reshape(full)


def _indices(flat: Array, shape: tuple[int, ...]) -> tuple[Array, ...]:
    """Along each axis, of which there may be none."""
    return np.unravel_index(flat, shape) if shape else ()


def _compressed(step: StepDerivatives, layer: Layer, variable: int | None, colors: Array) -> Array:
    """Columns of dh/dv pushed together by color, ``[colors, examples, elements]``; v None: the old states."""
    model = step.model
    names = model.analysis.model
    new = [names.new_state_vars[s] for s in layer.states]
    sources = [names.state_vars[s] for s in layer.states] if variable is None else [variable]
    avals = [step.tape.graph.avals[v] for v in sources]
    others = other_states(model, layer)
    along = variable is None or variable in model.batch.along
    sizes = [_one_example(a.shape, model.examples if along else None) for a in avals]
    ends = np.cumsum(sizes)[:-1].tolist()

    def push(color: Array) -> Array:
        mark = jnp.split(jnp.asarray(colors) == color, ends)
        tangents = {}
        for v, a, m in zip(sources, avals, mark, strict=True):
            rows = (model.examples or 1) if along else 1
            tangents[v] = jnp.broadcast_to(m, (rows, m.size)).reshape(a.shape).astype(a.dtype)
        return _flat(model, push_from(step, tangents, new, others))

    count = int(colors.max(initial=-1)) + 1
    return at_once(step, push, jnp.arange(count), count)


def advance(
    context: Context, equation: Equation, step: StepDerivatives, layer: Layer, influence: Array
) -> Array:
    """The part of H J that lies on the pattern."""
    model = context.model
    pattern = snap_pattern(model, model.analysis.effect(equation.type.of), equation.type.shape[0])
    key = ("snap", equation.type.of, equation.type.shape)
    if key not in context.reached:
        rows, columns = pattern.entries
        pushed = _compressed(step, layer, None, pattern.colors)
        context.reached[key] = pushed[pattern.colors[columns], :, rows].T  # [examples, entries of H]
    entries = context.reached[key]
    pairs, entry, sources = pattern.terms
    terms = entries[:, entry, None] * influence[:, sources]
    total = jax.ops.segment_sum(jnp.moveaxis(terms, 1, 0), pairs, len(pattern.unit))
    return jnp.moveaxis(total, 0, 1)


def contract_snap(
    context: Context, name: str, order: int, signal: Sequence[Array], influence: Array
) -> Array:
    """A weight gradient: the signal of each pair's element times its influence, summed by channel."""
    model = context.model
    effect = model.analysis.effect(name)
    pattern = snap_pattern(model, effect, order)
    geometry = full_geometry(model, effect)
    shape = model.sites[effect.site].y.shape
    per_pair = _flat(model, signal)[:, pattern.unit, None] * influence
    along = model.analysis.site(effect.site).y in model.batch.along
    each = along and 0 in geometry.kept
    kept = [shape[a] for a in geometry.kept if not (each and a == 0)]
    channels = int(np.prod(kept, dtype=np.int64))
    summed = per_pair if each else per_pair.sum(axis=0, keepdims=True)
    total = jax.ops.segment_sum(
        jnp.moveaxis(summed, 1, 0), pattern.channel, channels
    )  # [channels, E or 1, contracted]
    total = jnp.moveaxis(total, 0, 1)
    lead = (shape[0],) if each else ()
    return geometry.to_weight(total.reshape(*lead, *kept, *geometry.contracted), geometry.of_weight)
