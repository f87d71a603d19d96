"""Ops of estimates of the influence: directions in the space of weights, subsets of states, sums of products of lower rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.ir.program import Equation
from etcompile.lowering.layers import list_shapes, other_states, random_signs, rows_shape
from etcompile.lowering.low_rank import decomposed, nearest
from etcompile.precision import accumulator

if TYPE_CHECKING:
    from etcompile.lowering.evaluate import Context

__all__ = ["ESTIMATES", "fewer_terms"]

Array = Any
Value = Any

#: Where the numbers of arrays begin, by which random numbers differ: below them those of states and of rows of effects.
_DIRECTIONS, _SUBSETS, _TERMS = 10_000, 20_000, 30_000


# -- one direction ----------------------------------------------------------------------------------------------------


def _direction(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    """Random signs; of a complex weight one for each part."""
    _, seed, count = args
    name = equation.type.of
    weight = context.model.sites[name].weight
    number = _DIRECTIONS + 2 * [s.name for s in context.model.analysis.sites].index(name)
    signs = random_signs(int(seed), count, number, weight.shape, weight.dtype)
    if not jnp.issubdtype(weight.dtype, jnp.complexfloating):
        return signs
    return signs + 1j * random_signs(int(seed), count, number + 1, weight.shape, weight.dtype)


def _along(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    """F u: y moves by what the operation makes of u, since its pullback is linear; then one push through the step."""
    step, (symbol, direction) = context.step, args
    assert step is not None
    analysis = context.model.analysis
    effect = analysis.effect(symbol.name)
    layer, site = analysis.layer(effect.layer), analysis.site(effect.site)
    new = [analysis.model.new_state_vars[s] for s in layer.states]
    if direction is None:
        shapes, dtypes = list_shapes(context.model, "hidden", layer.name)
        return tuple(map(jnp.zeros, shapes, dtypes))
    geometry, x = context.model.sites[site.name], step.presynaptic(site.name)
    y = jax.ShapeDtypeStruct(geometry.y.shape, geometry.y.dtype)
    forward = jax.linear_transpose(lambda credit: geometry.pullback(x, credit), y)
    # dloss = Re(g u) for the gradient g as JAX has it, so that of u what stands in the gradient is the conjugate
    (tangent,) = forward(jnp.conj(direction).astype(geometry.weight.dtype))
    found = step.tape.push({site.y: tangent}, new, other_states(context.model, layer))
    return tuple(step.filled(v, found) for v in new)


# -- a subset of states -----------------------------------------------------------------------------------------------


def _subset(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    """1 for some units, the same of all examples, else 0; with a count, new at each step and so large that the mean is 1."""
    _, size, seed, *count = args
    analysis, layer = context.model.analysis, equation.type.of
    shapes, dtypes = list_shapes(context.model, "hidden", layer)
    found = []
    for state, shape, dtype in zip(analysis.layer(layer).states, shapes, dtypes, strict=True):
        group = next(k for k, g in enumerate(analysis.groups) if state in g.states)
        units = shape[1:] if context.model.examples else shape
        number = math.prod(units)
        key = jax.random.fold_in(jax.random.key(int(seed)), count[0] if count else 0)
        # States of one group that are alike keep the same units.
        order = jax.random.permutation(jax.random.fold_in(key, _SUBSETS + group), number)
        kept = (order < size).astype(dtype).reshape(units)
        found.append(jnp.broadcast_to(kept * (max(1.0, number / size) if count else 1.0), shape))
    return tuple(found)


# -- sums of products ---------------------------------------------------------------------------------------


def fewer_terms(left: Array, right: Array, signs: Array) -> tuple[Array, Array]:
    """A sum of r + 1 outer products as one of r, right on average, with the least variance.

    Parameters
    ----------
    left, right : array [rows, n, r + 1], [rows, m, r + 1]
        For each row the sum is ``left @ right.T``.
    signs : array [rows, r + 1]
        Random signs.

    Returns
    -------
    array [rows, n, r], array [rows, m, r]
        With X = Σ_i d_i a_i b_i^T by singular values, what is large enough is kept as it is, and the others share the terms that
        are left: with probabilities p_i = min(1, d_i / τ), Σ p_i = r, and z = sqrt(1 - p), a unit vector, the new factors are
        those of S (I - z z^T) S in the space of the singular vectors, S = diag(sign_i sqrt(d_i / p_i)).
    """
    terms = left.shape[-1]
    a, d, b = decomposed(left, right)
    # Singular vectors have no sign of their own: the largest entry on the left decides.
    largest = jnp.take_along_axis(a, jnp.argmax(jnp.abs(a), axis=-2)[..., None, :], axis=-2)
    phase = jnp.where(largest == 0, 1, largest / jnp.where(largest == 0, 1, jnp.abs(largest)))
    a, b = a / phase, b * phase
    # What is zero but for rounding would be mixed as its square root.
    d = jnp.where(d <= terms * jnp.finfo(d.dtype).eps * d[..., :1], 0, d)
    keep, limit = _probabilities(d)
    scale = signs * jnp.sqrt(jnp.where(keep < 1, limit, d))
    z = jnp.sqrt(jnp.maximum(1 - keep, 0))
    mirror = (z / jnp.linalg.norm(z, axis=-1, keepdims=True)).at[..., -1].add(1)
    # The reflection that takes the last axis to -z: its other columns are a basis of what is orthogonal to z.
    outer = mirror[..., :, None] * mirror[..., None, :]
    basis = jnp.eye(terms, dtype=d.dtype) - outer * (2 / jnp.sum(mirror**2, axis=-1))[..., None, None]
    mixed = (scale[..., None] * basis[..., :-1]).astype(a.dtype)
    return a @ mixed, b @ mixed


def _probabilities(d: Array) -> tuple[Array, Array]:
    """Of each of r + 1 values, the largest first, min(1, d / τ), which add up to r; and τ for all of a row."""
    fewer = d.shape[-1] - 1
    place = np.arange(d.shape[-1])
    after = jnp.flip(jnp.cumsum(jnp.flip(d, -1), -1), -1)[..., :-1]
    limits = after / (fewer - place[:-1])
    chosen = jnp.argmax(d[..., :-1] <= limits, axis=-1)[..., None]
    limit = jnp.take_along_axis(limits, chosen, axis=-1)
    shared = jnp.where(limit > 0, d / jnp.where(limit > 0, limit, 1), place < fewer)
    return jnp.where(place < chosen, 1, jnp.minimum(shared, 1)), limit


#: What makes of the terms of a sum one less, from its factors row by row.
Fewer = Callable[[Array, Array], tuple[Array, Array]]


def _kronecker(side: int) -> Callable[[Context, Equation, Sequence[Value]], Value]:
    """One of the factors of :func:`fewer_terms`, which is computed once for all."""

    def rule(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
        number, seed, count, *terms = args
        key = ("kronecker", seed, *equation.args[2:])
        if key not in context.reached:
            name = equation.type.of
            first = _TERMS + [e.name for e in context.model.analysis.effects].index(name)

            def fewer(left: Array, right: Array) -> tuple[Array, Array]:
                shape = (left.shape[0], left.shape[-1])
                real = jnp.finfo(left.dtype).dtype
                return fewer_terms(left, right, random_signs(int(seed), count, first, shape, real))

            shape = rows_shape(context.model, name)
            context.reached[key] = _reduced(context, name, shape, terms, fewer)
        return context.reached[key][side][number]

    return rule


def _nearest(side: int) -> Callable[[Context, Equation, Sequence[Value]], Value]:
    """One of the factors of :func:`~etcompile.lowering.low_rank.nearest`, which is computed once for all."""

    def rule(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
        number, *terms = args
        key = ("nearest", *equation.args[1:])
        if key not in context.reached:
            name = equation.type.of
            shape = context.model.sites[context.model.analysis.effect(name).site].y.shape
            context.reached[key] = _reduced(context, name, shape, terms, nearest)
        return context.reached[key][side][number]

    return rule


def _reduced(
    context: Context, name: str, shape: tuple[int, ...], terms: Sequence[Value], fewer: Fewer
) -> tuple[list[Array], list[tuple[Array, ...]]]:
    """Both factors of each term of a sum with one less; ``shape`` is that of the rows which have a sum of their own."""
    model = context.model
    half = len(terms) // 2
    rows = math.prod(shape)
    layout = [_Rows(model, name, shape, k) for k in range(len(_states(model, name)))]
    dtype = accumulator(jnp.result_type(*jax.tree.leaves(list(terms))))
    # What is carried is zero before the first step.
    zero = [t for t in terms if t is not None]
    lefts = [jnp.zeros_like(zero[0]) if t is None else t for t in terms[:half]]
    rights = [jax.tree.map(jnp.zeros_like, zero[-1]) if t is None else t for t in terms[half:]]
    left = jnp.stack([u.reshape(rows, math.prod(u.shape[len(shape) :])) for u in lefts], -1).astype(dtype)
    right = jnp.stack(
        [jnp.concatenate([r.gathered(v) for r, v in zip(layout, a, strict=True)], -1) for a in rights], -1
    ).astype(dtype)
    nothing = 0 in (*left.shape, *right.shape)
    a, b = (left[..., :-1], right[..., :-1]) if nothing else fewer(left, right)
    ends = np.cumsum([r.size for r in layout])[:-1].tolist()
    found = []
    for k in range(half - 1):
        parts = jnp.split(b[..., k], ends, axis=-1)
        found.append(
            tuple(r.placed(v).astype(old.dtype) for r, v, old in zip(layout, parts, rights[-1], strict=True))
        )
    return [a[..., k].reshape(lefts[-1].shape).astype(lefts[-1].dtype) for k in range(half - 1)], found


def _states(model: Any, name: str) -> list[tuple[int, ...]]:
    return list_shapes(model, "response", name)[0]


class _Rows:
    """One state's array of a response as a row for each row of x, and back."""

    def __init__(self, model: Any, name: str, shape: tuple[int, ...], state: int) -> None:
        whole = _states(model, name)[state]
        y = model.sites[model.analysis.effect(name).site].y.shape
        head = 1 if model.analysis.site(model.analysis.effect(name).site).y in model.batch.along else 0
        tail = len(whole) - (len(y) - head)
        # Axes of the array that number rows: the examples, and those of y that x depends on.
        first = [*range(head), *(tail + k for k, n in enumerate(shape[head:]) if n > 1)]
        self._order = (*first, *(k for k in range(len(whole)) if k not in first))
        self._shape = tuple(whole[k] for k in self._order)
        self._rows = math.prod(shape)
        self.size = math.prod(whole[k] for k in self._order[len(first) :])

    def gathered(self, value: Array) -> Array:
        return jnp.transpose(value, self._order).reshape(self._rows, self.size)

    def placed(self, rows: Array) -> Array:
        return jnp.transpose(rows.reshape(self._shape), np.argsort(self._order).tolist())


ESTIMATES: dict[str, Callable[[Any, Equation, Sequence[Value]], Value]] = {
    "direction": _direction,
    "along": _along,
    "subset": _subset,
    "kronecker_left": _kronecker(0),
    "kronecker_right": _kronecker(1),
    "nearest_left": _nearest(0),
    "nearest_right": _nearest(1),
}
