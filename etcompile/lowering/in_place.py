"""Order where XLA would choose another: traces are large, and must be updated in place after they were read.

JAX has no way to say that one computation comes after another without using its result. On a CPU, XLA drops optimization barriers
before it decides about copies, and then copies a whole trace wherever it cannot prove that its last reader is done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = [
    "Moment",
    "alike_at_every_size",
    "all_known_after",
    "changed_if",
    "computed_once",
    "in_rows",
    "known_after",
    "large_ones",
    "spread_once",
    "sum_products",
]

Array = Any

_AT_EVERY_SIZE: ContextVar[bool] = ContextVar("alike_at_every_size", default=False)

#: Rows summed in one kernel.
_TOGETHER = 32
#: More rows than this go to XLA's own reduction.
_MOST = 2048
#: Numbers of a result that what must come after it reads: of a sparse weight a row is all of it.
_FIRST = 16
#: Bytes from which on an array that is copied, or held too early, costs more than what keeps it from that.
_LARGE = 1 << 14


@dataclasses.dataclass(frozen=True, eq=False)
class Moment:
    """When results are there, each made by :func:`computed_once`: one for all who wait for the same ones.

    Attributes
    ----------
    results : sequence of arrays
    """

    results: Sequence[Array]

    @cached_property
    def zero(self) -> Array | None:
        """A zero that no compiler can know before; None where there is no order to keep.

        It is taken from a product with the first numbers of each: products are computed from finished arrays. On a CPU only.
        """
        rows = [_first(result) for result in self.results if result.ndim and result.size and _orders(result)]
        if not rows:
            return None
        # Added, and not joined: of a product with joined rows XLA makes one with each, a kernel more.
        row = reduce(add, rows).reshape(1, -1)
        return _hidden_zero(lax.dot(row, jnp.ones_like(row).reshape(-1)).reshape(()))


def known_after(value: Array, moment: Moment) -> Array:
    """``value`` itself, but made so that no compiler can know it before a moment."""
    if not _orders(value) or moment.zero is None:
        return value
    return value + moment.zero.astype(value.dtype)


def all_known_after(tree: Any, moment: Moment) -> Any:
    """:func:`known_after` for each large array of a tree."""
    return jax.tree.map(lambda value: known_after(value, moment) if _large(value) else value, tree)


def large_ones(tree: Any) -> list[Array]:
    """The arrays of a tree that are worth an order: what tells it has kernels of its own, to be compiled and run."""
    return [value for value in jax.tree.leaves(tree) if _large(value)]


def _large(value: Array) -> bool:
    return _AT_EVERY_SIZE.get() or value.size * value.dtype.itemsize >= _LARGE


def computed_once(value: Array, other: Array) -> Array:
    """``value`` itself, divided by ones made of ``other``, which has its shape.

    XLA computes again for each reader what is cheap; a division is not, unless it is by one number, which becomes a product.
    """
    if value.shape != other.shape or not (value.ndim and _orders(value) and _orders(other)):
        return value
    return value / (1 + _hidden_zero(other).astype(value.dtype))


def spread_once(value: Array) -> Array:
    """``value``, or XLA would compute it again for each contracted number of a trace that it is spread over."""
    return computed_once(value, value)


def changed_if(wanted: Array, change: Callable[[Any, Any], Any], value: Any, given: Any) -> Any:
    """``change(value, given)`` if it is wanted, in place; else ``value``.

    It is a loop of one round or none. A conditional of XLA's CPU compiler runs on one thread, and copies what it leaves alone.
    From JAX 0.12 on a loop in which all is element by element runs on one thread, too, however large its arrays are; not one
    that sorts something. What of a loop's body depends on nothing that changes in it is computed before the loop, wanted or
    not; so what is given does.
    """

    def once(now: tuple[Array, Any]) -> tuple[Array, Any]:
        lower, higher = lax.sort(jnp.stack([now[0], ~now[0]]).astype(jnp.int32))
        again = lower > higher  # it is not, and no compiler knows
        return again, change(
            now[1], jax.tree.map(lambda v: jnp.where(again, jnp.zeros((), v.dtype), v), given)
        )

    return lax.while_loop(lambda now: now[0], once, (wanted, value))[1]


def _first(value: Array) -> Array:
    """The first numbers of the first row, as many for every array."""
    starts, stops = (0,) * value.ndim, (*(1,) * (value.ndim - 1), min(_FIRST, value.shape[-1]))
    row = lax.slice(value, starts, stops).reshape(-1)
    return lax.pad(row, jnp.zeros((), row.dtype), [(0, _FIRST - row.size, 0)])


def _orders(value: Array) -> bool:
    return jax.default_backend() == "cpu" and jnp.issubdtype(value.dtype, jnp.floating)


def _hidden_zero(value: Array) -> Array:
    """The sign bits, shifted out: zero for every number, and XLA does not look that far."""
    width = 8 * value.dtype.itemsize
    bits = lax.bitcast_convert_type(value, jnp.dtype(f"uint{width}"))
    return (bits >> (width - 1)) >> 1


@contextmanager
def alike_at_every_size() -> Iterator[None]:
    """Meanwhile sums by rows are traced as one operation each, and arrays of any size in the order of large ones.

    For a look at the program that is the same at every batch size.
    """
    token = _AT_EVERY_SIZE.set(True)
    try:
        yield
    finally:
        _AT_EVERY_SIZE.reset(token)


def in_rows(count: int) -> int:
    """The length of the rows, side by side, in which so many numbers are summed; 0: they do not divide into such rows."""
    return next((n for n in (16, *range(32, 7, -1)) if count % n == 0), 0)


def sum_products(pairs: Sequence[tuple[Array, Array]], axis: int, dtype: Any) -> Array:
    """The sum of products, over pairs and over one axis; the first of a pair may have ones to broadcast.

    XLA's reduction on a CPU goes along the summed axis one number at a time; adding whole rows is much
    faster. Rows are taken before they are multiplied, so that no product is ever written to memory.
    """
    n = pairs[0][1].shape[axis]
    if jax.default_backend() == "cpu" and axis == pairs[0][1].ndim - 1 and n > (width := in_rows(n)) > 0:
        split = [tuple(_split_last(v, width) for v in pair) for pair in pairs]
        found = sum_products(split, axis, dtype)
        return jnp.dot(found, jnp.ones(width, dtype), preferred_element_type=dtype)

    def rows(start: int, stop: int) -> Array:
        def some(v: Array) -> Array:
            return v if v.shape[axis] == 1 else lax.slice_in_dim(v, start, stop, axis=axis)

        return reduce(add, [(some(a) * some(b)).astype(dtype) for a, b in pairs])

    if jax.default_backend() != "cpu" or not 0 < n <= _MOST or axis == pairs[0][1].ndim - 1:
        return jnp.sum(rows(0, n), axis=axis)
    if (
        _AT_EVERY_SIZE.get()
    ):  # a function of its own: lax.add would make it the reduction that is avoided here
        return lax.reduce(rows(0, n), jnp.zeros((), dtype), lambda a, b: a + b, (axis,))
    whole = n // _TOGETHER if n > _TOGETHER else 0
    parts = []
    if whole:
        folded = reduce(add, [rows(k * _TOGETHER, (k + 1) * _TOGETHER) for k in range(whole)])
        parts += [lax.index_in_dim(folded, k, axis, keepdims=False) for k in range(_TOGETHER)]
    parts += [lax.index_in_dim(rows(k, k + 1), 0, axis, keepdims=False) for k in range(whole * _TOGETHER, n)]
    return reduce(add, parts)


def _split_last(value: Array, width: int) -> Array:
    return value.reshape(*value.shape[:-1], -1, width if value.shape[-1] > 1 else 1)
