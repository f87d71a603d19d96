"""How the trace of one relation is laid out, what one step adds to it, and how it becomes a weight gradient.

A trace row has, logically, the axes of y's span followed by the contracted axes of the weight; between them one over the
positions that an element of y reaches, where these are many. That one, and axes of y that are no axes of
the weight (batch, time folded in, space) are *summed* when a trace becomes a gradient. In memory the summed axes come first,
then the contracted ones, then the axes that y shares with the weight: for a matrix ``[batch, input, output]``. D and f of one
example are then in the nearest cache while its part of the trace goes by, and the sum over the batch adds whole arrays.
Where more numbers are summed than kept, as over the places of a convolution, the summed axes come last: long rows again.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from functools import cached_property, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from etcompile.analysis.analysis import Analysis
from etcompile.analysis.relations import Relation
from etcompile.lowering.begun import once_begun
from etcompile.lowering.in_place import computed_once, in_rows, large_ones, sum_products
from etcompile.lowering.places import as_places, columns_taken, taken
from etcompile.precision import accumulator
from etcompile.sites.operation import WeightOperation

__all__ = ["TraceGeometry", "gather_positions", "trace_geometry"]

Array = Any


def gather_positions(position: np.ndarray, shape: tuple[int, ...]) -> Callable[[Array], Array]:
    """A function from arrays over the group's positions to arrays over a span of y."""
    found = _in_whole_axes(position, shape)
    if found is not None:
        return found
    columns = _columns(position, shape)
    if columns is not None:
        places = as_places(columns, shape[-1])  # one array for all calls: it may be large
        return lambda v: columns_taken(v, places)
    places = as_places(np.maximum(position, 0), int(np.prod(shape)))
    return lambda v: taken(v, places)


def _in_whole_axes(position: np.ndarray, shape: tuple[int, ...]) -> Callable[[Array], Array] | None:
    """Such a function without a gather of elements: most correspondences are the identity or repeat one axis (fused gates)."""
    clipped = np.maximum(position, 0)
    size = int(np.prod(shape))
    moved = _moved_axes(clipped, size)
    if moved is not None:
        sizes, order = moved
        return lambda v: v.reshape(sizes).transpose(order).reshape(position.shape)
    if clipped.size == size and (clipped.ravel() == np.arange(size)).all():
        return lambda v: v.reshape(position.shape)
    columns = _columns(position, shape)
    if columns is not None:
        repeats, rest = divmod(columns.size, shape[-1])
        if rest == 0 and (columns == np.tile(np.arange(shape[-1]), repeats)).all():
            return lambda v: jnp.concatenate([v] * repeats, axis=-1)
        start = int(columns[0])
        if (columns == np.arange(start, start + columns.size)).all():
            return lambda v: v[..., start : start + columns.size]
        return None
    if (
        clipped.ndim == len(shape) + 1
        and clipped.shape[1:] == shape
        and (clipped.reshape(clipped.shape[0], -1) == np.arange(size)).all()
    ):
        return lambda v: jnp.broadcast_to(v, clipped.shape)
    return None


def _moved_axes(position: np.ndarray, size: int) -> tuple[list[int], list[int]] | None:
    """Axes into which positions are divided, and their order in ``position``, where this holds all of them, moved as whole axes.

    None where nothing is moved.
    """
    flat = position.ravel()
    if flat.size != size or size < 2 or (flat == np.arange(size)).all():
        return None
    digits: list[tuple[int, int]] = []  # (stride, size), the last axis first
    while flat.size > 1:
        stride = int(flat[1] - flat[0])
        steps = np.flatnonzero(np.diff(flat) != stride)
        length = int(steps[0]) + 1 if steps.size else flat.size
        if stride <= 0 or flat.size % length:
            return None
        digits.append((stride, length))
        flat = flat.reshape(-1, length)[:, 0]
    by_stride = sorted(digits)
    expected = np.cumprod([1, *(length for _, length in by_stride[:-1])])
    if [stride for stride, _ in by_stride] != expected.tolist():
        return None
    sizes = [length for _, length in reversed(by_stride)]
    order = [len(digits) - 1 - by_stride.index(digit) for digit in reversed(digits)]
    whole = np.arange(size).reshape(sizes).transpose(order).ravel()
    return (sizes, order) if (whole == position.ravel()).all() else None


def _columns(position: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """The units along the last axis, where they are the same for all that stands before it; None elsewhere."""
    clipped, size = np.maximum(position, 0), int(np.prod(shape))
    if not (len(shape) >= 1 and clipped.ndim == len(shape) and clipped.shape[:-1] == shape[:-1] and size):
        return None
    rows = clipped.reshape(-1, clipped.shape[-1]) - np.arange(size // shape[-1])[:, None] * shape[-1]
    return rows[0] if (rows == rows[0]).all() and rows.min() >= 0 and rows.max() < shape[-1] else None


@dataclasses.dataclass(frozen=True, eq=False)
class TraceGeometry:
    """Layout and arithmetic of the trace of one relation.

    ``order`` is the memory order of the logical axes (y's span, many positions of an element, contracted); ``summed`` are
    those that are no axes of the weight. ``divided``: arrays are split over devices. ``steep``: factors may be infinite.
    """

    relation: Relation
    site: WeightOperation
    summed: tuple[int, ...]
    order: tuple[int, ...]
    group_shape: tuple[int, ...]
    divided: bool
    steep: bool = False

    @property
    def contracted(self) -> tuple[int, ...]:
        return self.site.contracted

    @property
    def kept(self) -> tuple[int, ...]:
        """Axes of y that are axes of the weight."""
        return self.site.kept

    @property
    def logical_shape(self) -> tuple[int, ...]:
        return (*self.relation.shape, *self.contracted)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row in memory."""
        return tuple(self.logical_shape[a] for a in self.order)

    @property
    def dtype(self) -> Any:
        return self.site.y.dtype

    def store(self, value: Array) -> Array:
        if self.order == tuple(range(len(self.order))):
            return value
        stored = jnp.transpose(value, self.order)
        y_axes = [a for a in self.order if a < len(self.relation.shape)]
        # Turned around once, or XLA would do it again for each number of the contracted axes.
        return stored if y_axes == sorted(y_axes) else computed_once(stored, stored)

    def spread(self, value: Array) -> Array:
        """An array over y's span as one that broadcasts over a trace row in memory."""
        return self.store(value.reshape(*value.shape, *(1,) * len(self.contracted)))

    def from_positions(self, value: Array) -> Array:
        """An array over the group's positions as one over y's span."""
        return self._gather(value)

    def factor(self, value: Array, row: Array) -> Array:
        """An array over positions as one over the span of y, to be multiplied with a row of the trace."""
        placed = self.from_positions(value)
        return once_begun(placed, row, self._begun) if self.steep else placed

    def _begun(self, row: Array) -> Array:
        """Over the span of y, where a row of the trace has anything but zeros."""
        logical = jnp.transpose(row, np.argsort(self.order).tolist())
        return jnp.any(logical != 0, axis=tuple(range(len(self.relation.shape), logical.ndim)))

    @cached_property
    def _gather(self) -> Callable[[Array], Array]:
        return gather_positions(self.relation.position, self.group_shape)

    @cached_property
    def scattered(self) -> bool:
        """Whether the positions of y's span are found one by one, as for the weights of a sparse product."""
        return _in_whole_axes(self.relation.position, self.group_shape) is None

    def span(self, value: Array) -> Array:
        """The span of an array over all of y."""
        return value[self.relation.slices] if self.relation.shape != value.shape else value

    def place(self, value: Array) -> Array:
        """Credits over the span as those of all of y, zero outside: the sum over the positions that an element reaches."""
        full = self.site.y.shape
        if self.relation.fan:
            value = jnp.sum(value, axis=-1, dtype=accumulator(value.dtype)).astype(value.dtype)
        if value.shape == full:
            return value
        pads = [(start, size - stop, 0) for (start, stop), size in zip(self.relation.span, full, strict=True)]
        return lax.pad(value, jnp.zeros((), value.dtype), pads)

    def presynaptic(self, x: tuple[Array, ...] | Array) -> Array:
        """A presynaptic value or factor as one that broadcasts over a trace row in memory."""
        return self.store(self.logical(x if not isinstance(x, tuple) else self.site.factor(x)))

    def logical(self, factor: Array) -> Array:
        """A factor as one that broadcasts over y's span and the contracted axes."""
        full = self.site.logical(factor)
        slices = tuple(
            slice(None) if size == 1 else s for s, size in zip(self.relation.slices, full.shape, strict=False)
        )
        inside = full if all(s == slice(None) for s in slices) else full[slices]
        return jnp.expand_dims(inside, len(self.relation.span)) if self.relation.fan else inside

    def accumulate(self, credits: Array, x: tuple[Array, ...] | Array) -> Array:
        """The sum over time of credits over the span times presynaptic values, as a trace row in memory."""
        n_y, n_c = len(self.relation.shape), len(self.contracted)
        axes = list(range(1, 1 + n_y + n_c))
        out = [axes[a] for a in self.order]
        if not jax.tree.leaves(x):
            return jnp.einsum(credits, [0, *axes[:n_y]], [axes[a] for a in self.order])
        if isinstance(x, tuple) and not self.site.closed:
            return self._accumulate_jacobians(credits, x)
        if isinstance(x, tuple):
            spread = jax.vmap(lambda x: self.logical(self.site.factor(x)))(x)
        else:
            spread = jax.vmap(self.logical)(x)
        wide = [a for a in axes if spread.shape[a] > 1 or a > n_y]
        narrow = tuple(a for a in axes if a not in wide)
        dtype = accumulator(credits.dtype)
        if not wide:  # one number for each step: as a product XLA would turn the credits around
            return self.store(jnp.sum(credits * spread, axis=0, dtype=dtype))
        spread = jnp.squeeze(spread, narrow)
        if self.relation.fan:  # products with as many axes have no 16-bit form on every device
            credits, spread = credits.astype(dtype), spread.astype(dtype)
        # Examples before time: XLA multiplies them where they lie, and would turn each of them around else.
        both = [a for a in wide if a <= n_y]
        return jnp.einsum(
            *_led_by(both, spread, [0, *wide]),
            *_led_by(both, credits, [0, *axes[:n_y]]),
            out,
            preferred_element_type=dtype,
        )

    def _accumulate_jacobians(self, credits: Array, x: tuple[Array, ...]) -> Array:
        """:meth:`accumulate` where the presynaptic value is a Jacobian: one at a time, so that one has to be stored."""
        steps, whole = self.site.by_step(x)

        def add(total: Array, now: tuple[Array, tuple[Array, ...]]) -> tuple[Array, None]:
            credit, own = now
            factor = self.store(self.logical(self.site.factor(whole(own))))
            return total + self.spread(credit) * factor, None

        zeros = jnp.zeros(self.shape, accumulator(jnp.result_type(credits, self.dtype)))
        return lax.scan(add, zeros, (credits, steps))[0]

    def contract(self, rows: Sequence[tuple[Array, Array]]) -> Array:
        """Sum over states and summed axes of (array over the span) x (trace row): a gradient of the weight."""
        pairs = [(self.spread(credit), row) for credit, row in rows]
        dtype = accumulator(jnp.result_type(*[v for pair in pairs for v in pair]))
        left = [a for a in self.order if a not in self.summed]
        axes = tuple(a for a, logical in enumerate(self.order) if logical in self.summed)
        if self.divided:  # folded into one axis, examples and places would have to be sent about
            products = [(credit * row).astype(dtype) for credit, row in pairs]
            return self.to_weight(jnp.sum(reduce(operator.add, products), axis=axes), left)
        first = axes[0] if axes else len(self.contracted)
        sizes = tuple(self.logical_shape[a] for a in self.summed)
        folded = [tuple(_folded(v, first, first + len(axes), sizes) for v in pair) for pair in pairs]
        found = sum_products(folded, first, dtype)
        if large_ones([row for _, row in rows]):
            # Traces are overwritten once this is known, so it must not be computed of them again.
            found = computed_once(found, found)
        return self.to_weight(found, left)

    @property
    def of_weight(self) -> list[int]:
        """Axes of a trace that are axes of the weight: kept ones, then contracted ones."""
        n_y = len(self.relation.shape)
        return [*self.kept, *range(n_y, n_y + len(self.contracted))]

    def to_weight(self, value: Array, axes: Sequence[int]) -> Array:
        """From the span to all of the weight, in its own layout; ``axes`` are those of ``value``."""
        full = self.site.y.shape
        pads = [
            (self.relation.span[a][0], full[a] - self.relation.span[a][1], 0) if a < len(full) else (0, 0, 0)
            for a in axes
        ]
        if any(low or high for low, high, _ in pads):
            value = lax.pad(value, jnp.zeros((), value.dtype), pads)
        logical = self.of_weight
        order = [axes.index(logical[k]) for k in np.argsort(self.site.weight_axes)]
        return jnp.transpose(value, order).astype(self.site.weight.dtype)

    def of_span(self, gradient: Array) -> Array:
        """The part of a gradient of the weight that the span reaches."""
        slices = [slice(None)] * gradient.ndim
        for of_y, of_weight in self.site.shared:
            slices[of_weight] = slice(*self.relation.span[of_y])
        return gradient[tuple(slices)]


def _led_by(first: Sequence[int], value: Array, axes: Sequence[int]) -> tuple[Array, list[int]]:
    """An array with these of its axes in front, and its axes then."""
    order = [*first, *(a for a in axes if a not in first)]
    return jnp.transpose(value, [axes.index(a) for a in order]), order


def _folded(value: Array, first: int, last: int, sizes: tuple[int, ...]) -> Array:
    """The axes from ``first`` to ``last``, of these sizes or 1, as one."""
    full = jnp.broadcast_to(value, (*value.shape[:first], *sizes, *value.shape[last:]))
    return full.reshape(*value.shape[:first], math.prod(sizes), *value.shape[last:])


def trace_geometry(analysis: Analysis, relation: Relation, divided: bool) -> TraceGeometry:
    site = analysis.site(relation.site).does
    n_y, n_c = len(relation.shape), len(site.contracted)
    kept = site.kept
    summed = tuple(a for a in range(n_y) if a not in kept)
    sizes = relation.shape
    many, few = (math.prod(sizes[a] for a in axes) for axes in (summed, kept))
    contracted = tuple(range(n_y, n_y + n_c))
    order = (*contracted, *kept, *summed) if many > few and in_rows(many) else (*summed, *contracted, *kept)
    group = analysis.group(relation.group)
    return TraceGeometry(relation, site, summed, order, group.shape, divided, analysis.steep)
