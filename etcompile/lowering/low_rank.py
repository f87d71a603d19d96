"""Singular values of many small sums of products at once, without a library of linear algebra.

Sums have a few terms, and there may be as many of them as elements of y. Batches of such decompositions by LAPACK are slow, and
two of them in a loop, on a processor of few cores, may wait for each other's threads for ever.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["decomposed", "nearest"]

Array = Any

#: Rounds in which each pair of terms is turned once; convergence is quadratic.
_ROUNDS = 6


def decomposed(left: Array, right: Array) -> tuple[Array, Array, Array]:
    """The singular values of sums of outer products, the largest first, and their vectors.

    Parameters
    ----------
    left, right : array [rows, n, r], [rows, m, r]
        For each row the sum is ``left @ right.T``.

    Returns
    -------
    array [rows, n, r], array [rows, r], array [rows, m, r]
        ``a``, ``d`` and ``b`` with ``left @ right.T = (a * d) @ b.T``; where a value is zero, its vectors may be.

    Notes
    -----
    With right = W T, W of orthonormal columns, the sum is Y W^T for Y = left T^T. Turning columns of Y by pairs until all are
    orthogonal (one-sided Jacobi, M. Hestenes 1958), and those of W with them, gives its singular vectors.
    """
    w, t = _orthonormal(jnp.moveaxis(right, -1, 0))
    y = jnp.einsum("krn,ckr->crn", jnp.moveaxis(left, -1, 0), t)
    y, w = _turned(y, w)
    sizes = _norm(y)
    order = jnp.argsort(-sizes, axis=0)
    sizes = jnp.take_along_axis(sizes, order, axis=0)[..., None]
    y, w = (jnp.take_along_axis(v, order[..., None], axis=0) for v in (y, w))
    a = y / jnp.where(sizes > 0, sizes, 1)
    return jnp.moveaxis(a, 0, -1), jnp.moveaxis(sizes[..., 0], 0, -1), jnp.moveaxis(w, 0, -1)


def nearest(left: Array, right: Array) -> tuple[Array, Array]:
    """A sum of r + 1 outer products as the nearest one of r, which drops the smallest singular value.

    Parameters
    ----------
    left, right : array [rows, n, r + 1], [rows, m, r + 1]
        For each row the sum is ``left @ right.T``.

    Returns
    -------
    array [rows, n, r], array [rows, m, r]
    """
    a, d, b = decomposed(left, right)
    return a[..., :-1], b[..., :-1] * d[..., None, :-1]


def _orthonormal(columns: Array) -> tuple[Array, Array]:
    """W and T with columns = W T, as [terms, rows, m] and T as [row of T, column of T, rows]; of what is dependent W is zero."""
    tiny = 16 * jnp.finfo(columns.dtype).eps
    found: list[Array] = []
    weights: list[list[Array]] = []
    for column in columns:
        rest, before = column, [jnp.zeros(column.shape[:1], column.dtype) for _ in found]
        for _ in range(2):  # once more, for what rounding leaves
            for k, w in enumerate(found):
                share = jnp.sum(jnp.conj(w) * rest, axis=-1)
                before[k] = before[k] + share
                rest = rest - share[:, None] * w
        size, whole = _norm(rest), _norm(column)
        new = size > tiny * whole
        found.append(jnp.where(new[:, None], rest / jnp.where(new, size, 1)[:, None], 0))
        weights.append([*before, jnp.where(new, size, 0).astype(column.dtype)])
    zero = jnp.zeros_like(weights[0][0])
    table = [[c[k] if k < len(c) else zero for c in weights] for k in range(len(found))]
    return jnp.stack(found), jnp.stack([jnp.stack(row) for row in table])


def _turned(y: Array, w: Array) -> tuple[Array, Array]:
    """Columns of y made orthogonal by turning pairs, and w with them, so that the sum of y w^T stays."""
    rounds = 1 if len(y) < 3 else _ROUNDS  # a pair alone is done at once
    pairs = np.array(list(itertools.combinations(range(len(y)), 2)) * rounds, np.int32).reshape(-1, 2)
    places = jnp.asarray(pairs)

    def turn(k: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        y, w = now
        p, q = places[k, 0], places[k, 1]
        a, b = y[p], y[q]
        both = jnp.sum(jnp.conj(a) * b, axis=-1)
        size = jnp.abs(both)
        some = size > 0
        phase = jnp.where(some, both / jnp.where(some, size, 1), 1)
        half = (_square(b) - _square(a)) / (2 * jnp.where(some, size, 1))
        tangent = jnp.where(half < 0, -1, 1) / (jnp.abs(half) + jnp.sqrt(1 + half**2))
        cos = jnp.where(some, 1 / jnp.sqrt(1 + tangent**2), 1)
        sin = jnp.where(some, tangent * cos, 0)

        def turned(v: Array, phase: Array) -> Array:
            first, second = v[p], phase[:, None] * v[q]
            v = v.at[p].set(cos[:, None] * first - sin[:, None] * second)
            return v.at[q].set(sin[:, None] * first + cos[:, None] * second)

        return turned(y, jnp.conj(phase)), turned(w, phase)

    return lax.fori_loop(0, len(pairs), turn, (y, w))


def _square(v: Array) -> Array:
    return jnp.sum(jnp.real(v * jnp.conj(v)), axis=-1)


def _norm(v: Array) -> Array:
    return jnp.sqrt(_square(v))
