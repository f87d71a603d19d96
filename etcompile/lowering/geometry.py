"""Arrays of one relation: how a trace is laid out, what one step adds to it, and how it becomes a weight gradient.

A trace row has, logically, the axes of y's window followed by the contracted axes of the weight. Axes of y that are no axes of
the weight (batch, time folded in, space) are *summed* when a trace becomes a gradient. In memory the contracted axes
come first, then the summed ones, then the axes that y shares with the weight: for a matrix ``[input, batch, output]``.
The update of a trace and its contraction then run as one pass over contiguous rows, and the sum over the batch adds whole rows.
Where more numbers are summed than kept, as over the places of a convolution, the summed axes come last: long rows again.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from etcompile.analysis.analysis import Analysis
from etcompile.analysis.headers import contracted_shape
from etcompile.analysis.relations import Relation
from etcompile.analysis.sites import Site
from etcompile.errors import UnsupportedError
from etcompile.frontend.jaxpr import Graph, Operation, bind, read
from etcompile.lowering.convolution import kernel_gradient, patches
from etcompile.lowering.in_place import accumulator, computed_once, in_rows, sum_products

__all__ = ["SiteGeometry", "TraceGeometry", "gather_positions", "site_geometry"]

Array = Any

#: A trace for an operation without a closed form keeps y x weight numbers per state; more than this is refused.
GENERIC_LIMIT = 1 << 26


def gather_positions(position: np.ndarray, shape: tuple[int, ...]) -> Any:
    """A function from arrays over the group's positions to arrays over a window of y.

    Most correspondences are the identity or repeat one axis (the gates of a fused weight); those need no gather.
    """
    clipped = np.maximum(position, 0)
    size = int(np.prod(shape))
    if clipped.size == size and (clipped.ravel() == np.arange(size)).all():
        return lambda v: v.reshape(position.shape)
    if len(shape) >= 1 and clipped.ndim == len(shape) and clipped.shape[:-1] == shape[:-1] and size:
        rows = clipped.reshape(-1, clipped.shape[-1]) - np.arange(size // shape[-1])[:, None] * shape[-1]
        if (rows == rows[0]).all() and rows.min() >= 0 and rows.max() < shape[-1]:
            columns = rows[0]
            repeats, rest = divmod(columns.size, shape[-1])
            if rest == 0 and (columns == np.tile(np.arange(shape[-1]), repeats)).all():
                return lambda v: jnp.concatenate([v] * repeats, axis=-1)
            start = int(columns[0])
            if (columns == np.arange(start, start + columns.size)).all():
                return lambda v: v[..., start : start + columns.size]
            return lambda v: jnp.take(v, columns, axis=-1)
    if (
        clipped.ndim == len(shape) + 1
        and clipped.shape[1:] == shape
        and (clipped.reshape(clipped.shape[0], -1) == np.arange(size)).all()
    ):
        return lambda v: jnp.broadcast_to(v, clipped.shape)
    return lambda v: jnp.take(v.reshape(-1), clipped)


@dataclasses.dataclass(frozen=True, eq=False)
class SiteGeometry:
    """Presynaptic value and pullback of one site."""

    site: Site
    operation: Operation | None
    weight_shape: tuple[int, ...]
    weight_dtype: Any
    y_shape: tuple[int, ...]
    y_dtype: Any
    other_dtype: Any
    kept: tuple[int, ...]

    @property
    def weight_axes(self) -> tuple[int, ...]:
        """The weight's axes in the order of a gradient that a trace gives: axes that y keeps, then contracted ones."""
        operation, n = self.operation, len(self.weight_shape)
        if operation is not None and self.site.kind == "dot_general":
            contract, batch = operation.params["dimension_numbers"]
            w = self.site.operand
            free = (d for d in range(n) if d not in contract[w] and d not in batch[w])
            return (*batch[w], *free, *contract[w])
        if operation is not None and self.site.kind == "conv":
            rhs = operation.params["dimension_numbers"].rhs_spec
            return (rhs[0], rhs[1], *rhs[2:])
        return (*range(1, n), 0) if self.site.kind == "embedding" else tuple(range(n))

    def presynaptic(self, env: dict[int, Array]) -> tuple[Array, ...]:
        """The operands beside the weight; where the operation may not be linear in the weight, the weight itself too."""
        if self.operation is None:
            return ()
        others = tuple(read(env, v) for k, v in enumerate(self.operation.inputs) if k != self.site.operand)
        return others if self.linear else (*others, read(env, self.operation.inputs[self.site.operand]))

    @property
    def linear(self) -> bool:
        return self.site.kind in ("direct", "opaque", "dot_general", "conv", "embedding")

    def apply(self, weight: Array, x: tuple[Array, ...]) -> Array:
        """y, as the operation computes it."""
        operation = self.operation
        assert operation is not None
        values = list(x)
        values.insert(self.site.operand, weight)
        return bind(operation, values)[0]

    def factor(self, x: tuple[Array, ...]) -> Array:
        """The presynaptic value as one array in which y is linear."""
        kind = self.site.kind
        if self.operation is None:
            return jnp.ones((), self.y_dtype)
        if kind in ("dot_general", "conv"):
            return x[0]
        if kind == "embedding":
            return jax.nn.one_hot(x[0][..., 0], self.weight_shape[0], dtype=self.y_dtype)
        return self.jacobian(x)

    @property
    def too_large(self) -> bool:
        """Whether a trace has no closed form, and more numbers than one would want to store."""
        return not self.linear and self._jacobian_size > GENERIC_LIMIT

    @property
    def _jacobian_size(self) -> int:
        return int(np.prod(self.y_shape)) * int(np.prod(self.weight_shape))

    def cannot_store(self, hint: str) -> UnsupportedError:
        """What to raise where a trace that is too large would be stored."""
        return UnsupportedError(
            f"the trace of {'+'.join(self.site.params)} at {self.site.primitive} has no closed form: it cannot be stored.",
            where=self.site.source,
            got=f"{self._jacobian_size:,} numbers per state",
            expected=f"at most {GENERIC_LIMIT:,}",
            hint=hint,
        )

    def jacobian(self, x: tuple[Array, ...]) -> Array:
        """dy/dw of an operation without a closed form, ``[y, weight]``."""
        if self.too_large:
            raise self.cannot_store("write the operation as a matmul or convolution.")
        *others, weight = x

        def fn(w: Array) -> Array:
            return self.apply(w, tuple(others))

        try:
            return jax.jacrev(fn)(weight)
        except NotImplementedError:  # as in `mapped`
            y, pull = jax.vjp(fn, weight)
            rows = jax.lax.map(pull, jnp.eye(y.size, dtype=y.dtype).reshape(y.size, *y.shape))[0]
            return rows.reshape(*y.shape, *weight.shape)

    def pullback(self, x: tuple[Array, ...] | Array, credit: Array) -> Array:
        """Weight gradient of a credit of y; ``x`` is a presynaptic value or a factor."""
        if not isinstance(x, tuple):
            return self._pull_factor(x, credit)
        if self.operation is None:
            return credit.astype(self.weight_dtype)
        if not self.linear:
            *others, weight = x
            return jax.vjp(lambda w: self.apply(w, tuple(others)), weight)[1](credit.astype(self.y_dtype))[0]
        if self._by_patches:
            return self._pull_patches(x[0][None], credit[None])
        zeros = jax.ShapeDtypeStruct(self.weight_shape, self.weight_dtype)
        transposed = jax.linear_transpose(lambda w: self.apply(w, x), zeros)
        return transposed(credit.astype(self.y_dtype))[0]

    @property
    def _by_patches(self) -> bool:
        return self.site.kind == "conv" and jax.default_backend() == "cpu"

    def _pull_patches(self, x: Array, credit: Array) -> Array:
        """:meth:`pullback_of_steps` of a convolution as a product of patches."""
        assert self.operation is not None
        kernel = jax.ShapeDtypeStruct(self.weight_shape, self.weight_dtype)
        return kernel_gradient(self.operation, x, credit.astype(self.y_dtype), kernel)

    def respond(self, v: Array, x: tuple[Array, ...] | Array) -> Array:
        """What a variation of the weight does to y, which is linear in it: the transpose of :meth:`pullback`."""
        if self.operation is None:
            return v if isinstance(x, tuple) else (x * v).astype(self.y_dtype)
        if not isinstance(x, tuple):
            kind = self.site.kind
            if kind in ("dot_general", "conv"):
                return self.apply(v, (self._operand(x),))
            axes = ([x.ndim - 1], [0]) if kind == "embedding" else v.ndim
            return jnp.tensordot(x, v, axes=axes).astype(self.y_dtype)
        return self.apply(v, x)

    def pullback_of_steps(self, x: tuple[Array, ...] | Array, credit: Array) -> Array:
        """:meth:`pullback` summed over steps, along a leading axis of both: one product over time and batch.

        The weight is the same in all of them.
        """
        if not jax.tree.leaves(x):  # the weight is y itself
            return jnp.sum(credit, axis=0).astype(self.weight_dtype)
        if self._by_patches:
            values = x[0] if isinstance(x, tuple) else self._operand(x)
            return self._pull_patches(values, credit)
        try:
            return self._pulled_at_once(x, credit)
        except NotImplementedError:  # as in `mapped`
            zeros = jnp.zeros(self.weight_shape, accumulator(self.weight_dtype))
            add = lambda total, now: (total + self.pullback(*now).astype(total.dtype), None)  # noqa: E731
            return lax.scan(add, zeros, (x, credit))[0].astype(self.weight_dtype)

    def _pulled_at_once(self, x: tuple[Array, ...] | Array, credit: Array) -> Array:
        if isinstance(x, tuple) and not self.linear:
            *others, weights = x
            forward = jax.vmap(lambda w, now: self.apply(w, now), in_axes=(None, 0))
            pull = jax.vjp(lambda w: forward(w, tuple(others)), weights[0])[1]
        else:
            weight = jax.ShapeDtypeStruct(self.weight_shape, self.weight_dtype)
            pull = jax.linear_transpose(lambda v: jax.vmap(lambda now: self.respond(v, now))(x), weight)
        return pull(credit.astype(self.y_dtype))[0]

    def _operand(self, factor: Array) -> Array:
        """A factor, which has y's dtype, in that of the operand: real values stay real beside a complex y."""
        real = jnp.issubdtype(factor.dtype, jnp.complexfloating) and not jnp.issubdtype(
            self.other_dtype, jnp.complexfloating
        )
        return (factor.real if real else factor).astype(self.other_dtype)

    def _pull_factor(self, x: Array, credit: Array) -> Array:
        kind = self.site.kind
        if self.operation is None:
            return (x * credit).astype(self.weight_dtype)
        if kind in ("dot_general", "conv"):
            return self.pullback((self._operand(x),), credit)
        n_y = credit.ndim
        if kind == "embedding":
            n_rows = x.ndim - 1
            found = jnp.tensordot(x, credit, axes=(list(range(n_rows)), list(range(n_rows))))
            return found.astype(self.weight_dtype)
        return jnp.tensordot(credit, x, axes=(list(range(n_y)), list(range(n_y)))).astype(self.weight_dtype)


def site_geometry(analysis: Analysis, site: Site) -> SiteGeometry:
    body = analysis.split.body
    operation = None if site.operation < 0 else body.operations[site.operation]
    weight, y = body.avals[site.weight], body.avals[site.y]
    other = y.dtype
    if site.kind in ("dot_general", "conv"):
        assert operation is not None
        other = body.aval(operation.inputs[1 - site.operand]).dtype
    kept = _kept_axes(body, site, len(y.shape))
    return SiteGeometry(site, operation, weight.shape, weight.dtype, y.shape, y.dtype, other, kept)


@dataclasses.dataclass(frozen=True, eq=False)
class TraceGeometry:
    """Layout and arithmetic of the trace of one relation.

    ``order`` is the memory order of the logical axes (y's window, then contracted); ``kept`` are the axes of y that are
    axes of the weight, ``summed`` the others. ``divided``: arrays are split over devices.
    """

    relation: Relation
    site: SiteGeometry
    y_axes: tuple[int, ...]
    contracted: tuple[int, ...]
    kept: tuple[int, ...]
    summed: tuple[int, ...]
    order: tuple[int, ...]
    group_shape: tuple[int, ...]
    divided: bool

    @property
    def logical_shape(self) -> tuple[int, ...]:
        return (*self.relation.shape, *self.contracted)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row in memory."""
        return tuple(self.logical_shape[a] for a in self.order)

    @property
    def dtype(self) -> Any:
        return self.site.y_dtype

    def store(self, value: Array) -> Array:
        if self.order == tuple(range(len(self.order))):
            return value
        stored = jnp.transpose(value, self.order)
        y_axes = [a for a in self.order if a < len(self.y_axes)]
        # Turned around once, or XLA would do it again for each number of the contracted axes.
        return stored if y_axes == sorted(y_axes) else computed_once(stored, stored)

    def spread(self, value: Array) -> Array:
        """An array over y's window as one that broadcasts over a trace row in memory."""
        return self.store(value.reshape(*value.shape, *(1,) * len(self.contracted)))

    def from_positions(self, value: Array) -> Array:
        """An array over the group's positions as one over y's window."""
        return gather_positions(self.relation.position, self.group_shape)(value)

    def window(self, value: Array) -> Array:
        """The window of an array over all of y."""
        return value[self.relation.slices] if self.relation.shape != value.shape else value

    def place(self, value: Array) -> Array:
        """An array over the window as one over all of y, zero outside."""
        full = self.site.y_shape
        if value.shape == full:
            return value
        pads = [
            (start, size - stop, 0) for (start, stop), size in zip(self.relation.window, full, strict=True)
        ]
        return lax.pad(value, jnp.zeros((), value.dtype), pads)

    def presynaptic(self, x: tuple[Array, ...] | Array) -> Array:
        """A presynaptic value or factor as one that broadcasts over a trace row in memory."""
        return self.store(self.logical(x if not isinstance(x, tuple) else self.site.factor(x)))

    def logical(self, x: Array) -> Array:
        """A factor as one that broadcasts over y's window and the contracted axes."""
        site = self.site
        kind = site.site.kind
        n_y, n_c = len(self.relation.shape), len(self.contracted)
        if kind == "direct":
            return x.reshape((1,) * n_y)
        operation = site.operation
        assert operation is not None
        if kind == "dot_general":
            return self._dot_presynaptic(operation, x)
        if kind == "conv":
            return self._conv_presynaptic(operation, x)
        if kind == "embedding":
            tail = len(site.weight_shape) - 1
            full = x.reshape(*x.shape[:-1], *(1,) * tail, site.weight_shape[0])
            return self._window_broadcast(full)
        return x[(*self.relation.slices, *(slice(None),) * n_c)]

    def _window_broadcast(self, value: Array) -> Array:
        """Restrict the y axes of a broadcastable array to the window."""
        slices = tuple(
            slice(None) if size == 1 else s for s, size in zip(self.relation.slices, value.shape, strict=False)
        )  # fmt: skip
        return value[slices]

    def _dot_presynaptic(self, operation: Operation, x: Array) -> Array:
        contract, batch = operation.params["dimension_numbers"]
        w, other = self.site.site.operand, 1 - self.site.site.operand
        free = [d for d in range(x.ndim) if d not in contract[other] and d not in batch[other]]
        moved = jnp.transpose(x, [*batch[other], *free, *contract[other]])
        n_batch, n_free = len(batch[w]), len(free)
        n_weight = len(self.site.weight_shape) - n_batch - len(contract[w])
        head, middle, tail = (
            moved.shape[:n_batch],
            moved.shape[n_batch : n_batch + n_free],
            moved.shape[n_batch + n_free :],
        )
        ones = (1,) * n_weight
        shape = (*head, *middle, *ones, *tail) if other == 0 else (*head, *ones, *middle, *tail)
        return self._window_broadcast(moved.reshape(shape).astype(self.site.y_dtype))

    def _conv_presynaptic(self, operation: Operation, x: Array) -> Array:
        numbers, groups = operation.params["dimension_numbers"], operation.params["feature_group_count"]
        rhs, weight = numbers.rhs_spec, self.site.weight_shape
        seen = patches(operation, x, tuple(weight[d] for d in rhs[2:]))
        n = len(rhs) - 2
        batch, places, kernel = seen.shape[0], seen.shape[1 : 1 + n], seen.shape[1 + n : -1]
        split = seen.reshape(batch, *places, *kernel, groups, -1)
        wide = jnp.repeat(split, weight[rhs[0]] // groups, axis=-2) if groups > 1 else split
        # y's own order (batch, output channel, places), then the contracted axes (channel, kernel)
        mine = (0, 1 + 2 * n, *range(1, 1 + n))
        y_order = [mine[k] for k in np.argsort(numbers.out_spec)]
        logical = jnp.transpose(wide, [*y_order, 2 + 2 * n, *range(1 + n, 1 + 2 * n)])
        return self._window_broadcast(logical.astype(self.site.y_dtype))

    def accumulate(self, credits: Array, x: tuple[Array, ...] | Array) -> Array:
        """The sum over time of credits over the window times presynaptic values, as a trace row in memory."""
        n_y, n_c = len(self.relation.shape), len(self.contracted)
        axes = list(range(1, 1 + n_y + n_c))
        out = [axes[a] for a in self.order]
        if not jax.tree.leaves(x):
            return jnp.einsum(credits, [0, *axes[:n_y]], [axes[a] for a in self.order])
        if isinstance(x, tuple) and not self.site.linear:
            return self._accumulate_jacobians(credits, x)
        if isinstance(x, tuple):
            spread = jax.vmap(lambda x: self.logical(self.site.factor(x)))(x)
        else:
            spread = jax.vmap(self.logical)(x)
        wide = [a for a in axes if spread.shape[a] > 1 or a > n_y]
        narrow = tuple(a for a in axes if a not in wide)
        dtype = accumulator(credits.dtype)
        return jnp.einsum(
            credits,
            [0, *axes[:n_y]],
            jnp.squeeze(spread, narrow),
            [0, *wide],
            out,
            preferred_element_type=dtype,
        )

    def _accumulate_jacobians(self, credits: Array, x: tuple[Array, ...]) -> Array:
        """:meth:`accumulate` where the presynaptic value is a Jacobian: one at a time, so that one has to be stored."""
        *others, weights = x

        def add(total: Array, now: tuple[Array, tuple[Array, ...]]) -> tuple[Array, None]:
            credit, other = now
            factor = self.store(self.logical(self.site.factor((*other, weights[0]))))
            return total + self.spread(credit) * factor, None

        zeros = jnp.zeros(self.shape, accumulator(jnp.result_type(credits, self.dtype)))
        return lax.scan(add, zeros, (credits, tuple(others)))[0]

    def contract(self, rows: Sequence[tuple[Array, Array]]) -> Array:
        """Sum over states and summed axes of (array over the window) x (trace row): a gradient of the weight."""
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
        return self.to_weight(sum_products(folded, first, dtype), left)

    @property
    def of_weight(self) -> list[int]:
        """Axes of a trace that are axes of the weight: kept ones, then contracted ones."""
        n_y = len(self.relation.shape)
        return [*self.kept, *range(n_y, n_y + len(self.contracted))]

    def to_weight(self, value: Array, axes: Sequence[int]) -> Array:
        """From the window to all of the weight, in its own layout; ``axes`` are those of ``value``."""
        full, n_y = self.site.y_shape, len(self.relation.shape)
        pads = [
            (self.relation.window[a][0], full[a] - self.relation.window[a][1], 0) if a < n_y else (0, 0, 0)
            for a in axes
        ]
        if any(low or high for low, high, _ in pads):
            value = lax.pad(value, jnp.zeros((), value.dtype), pads)
        logical = self.of_weight
        order = [axes.index(logical[k]) for k in np.argsort(self.site.weight_axes)]
        return jnp.transpose(value, order).astype(self.site.weight_dtype)


def _folded(value: Array, first: int, last: int, sizes: tuple[int, ...]) -> Array:
    """The axes from ``first`` to ``last``, of these sizes or 1, as one."""
    full = jnp.broadcast_to(value, (*value.shape[:first], *sizes, *value.shape[last:]))
    return full.reshape(*value.shape[:first], math.prod(sizes), *value.shape[last:])


def trace_geometry(analysis: Analysis, relation: Relation, divided: bool) -> TraceGeometry:
    site = analysis.site(relation.site)
    geometry = site_geometry(analysis, site)
    contracted = contracted_shape(analysis, site) or ()
    n_y, n_c = len(geometry.y_shape), len(contracted)
    kept = geometry.kept
    summed = tuple(a for a in range(n_y) if a not in kept)
    sizes = relation.shape
    many, few = (math.prod(sizes[a] for a in axes) for axes in (summed, kept))
    rows = (*kept, *summed) if many > few and in_rows(many) else (*summed, *kept)
    order = (*range(n_y, n_y + n_c), *rows)
    group = analysis.group(relation.group)
    return TraceGeometry(
        relation, geometry, tuple(range(n_y)), contracted, kept, summed, order, group.shape, divided
    )


def _kept_axes(body: Graph, site: Site, n_y: int) -> tuple[int, ...]:
    if site.operation < 0:
        return tuple(range(n_y))
    operation = body.operations[site.operation]
    if site.kind == "dot_general":
        contract, batch = operation.params["dimension_numbers"]
        n_batch = len(batch[0])
        n_free = len(body.avals[site.weight].shape) - n_batch - len(contract[site.operand])
        first = n_batch if site.operand == 0 else n_y - n_free
        return (*range(n_batch), *range(first, first + n_free))
    if site.kind == "conv":
        return (operation.params["dimension_numbers"].out_spec[1],)
    if site.kind == "embedding":
        n_tail = len(body.avals[site.weight].shape) - 1
        return tuple(range(n_y - n_tail, n_y))
    return ()  # generic: the contracted axes are the whole weight
