"""Primitives that say several things at once, or one thing in a general way, as the simpler ones that they are.

So nothing that comes after the tracing has to know of these forms: no rule of the analysis, no derivative, no estimate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import numpy as np
from jax import lax

__all__ = ["simple_form"]

_JAXLIB = tuple(int(part) for part in metadata.version("jaxlib").split(".")[:2])

#: What a primitive does, as a function of its operands that gives its results.
Form = Callable[..., list[Any]]


def simple_form(eqn: Any, known: Sequence[Any]) -> Form | None:
    """An equation of a jaxpr in simpler primitives; None where it is simple.

    ``known`` has the values of those operands that are constant, and None for the others.
    """
    form = _FORMS.get(eqn.primitive.name)
    return None if form is None else form(eqn, known)


def _reshape(eqn: Any, known: Sequence[Any]) -> Form | None:
    """One that moves axes first, as ``order="F"`` makes it, is a transposition and a reshape."""
    order = eqn.params["dimensions"]
    if order is None:
        return None
    params = {**eqn.params, "dimensions": None}
    return lambda v: [eqn.primitive.bind(lax.transpose(v, tuple(order)), **params)]


def _device_put(eqn: Any, known: Sequence[Any]) -> Form | None:
    """Of several arrays it is one of each: none depends on another, and JAX cannot map all mixtures."""
    if len(known) == 1:
        return None
    each = [
        {**eqn.params, **{name: (eqn.params[name][k],) for name in ("devices", "srcs", "copy_semantics")}}
        for k in range(len(known))
    ]
    return lambda *values: [
        eqn.primitive.bind(v, **params)[0] for v, params in zip(values, each, strict=True)
    ]


def _gather(eqn: Any, known: Sequence[Any]) -> Form | None:
    """One of a single part at a known place, such as ``jnp.take(v, 0, axis)``, is a slice."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = known
    if operand is not None or indices is None or np.ndim(indices) != 1 or numbers.operand_batching_dims:
        return None
    shape, result = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    first = [0] * len(shape)
    for axis, start in zip(numbers.start_index_map, np.asarray(indices).tolist(), strict=True):
        first[axis] = start
    last = [start + size for start, size in zip(first, sizes, strict=True)]
    if any(start < 0 or stop > size for start, stop, size in zip(first, last, shape, strict=True)):
        return None
    return lambda v, _: [lax.reshape(lax.slice(v, first, last), result)]


def _dynamic_slice(eqn: Any, known: Sequence[Any]) -> Form | None:
    """One of all there is starts at zero, wherever it is said to start."""
    whole = tuple(eqn.params["slice_sizes"]) == eqn.invars[0].aval.shape
    return (lambda v, *_: [v]) if whole else None


def _dynamic_update_slice(eqn: Any, known: Sequence[Any]) -> Form | None:
    """One of all there is leaves nothing of what was there."""
    whole = eqn.invars[1].aval.shape == eqn.invars[0].aval.shape
    return (lambda _, new, *__: [new]) if whole else None


def _split(eqn: Any, known: Sequence[Any]) -> Form | None:
    """In 64 bits with jaxlib 0.10, slices: its transpose joins arrays, of which that computes some wrong (docs/models.md)."""
    if _JAXLIB >= (0, 11) or eqn.invars[0].aval.dtype != np.float64:
        return None
    axis, ends = eqn.params["axis"], np.cumsum([0, *eqn.params["sizes"]]).tolist()
    return lambda v: [lax.slice_in_dim(v, a, b, axis=axis) for a, b in itertools.pairwise(ends)]


def _scatter_sub(eqn: Any, known: Sequence[Any]) -> Form | None:
    """To subtract is to add the negative, number by number."""
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    params = {name: eqn.params[name] for name in names}
    return lambda v, at, new: [lax.scatter_add(v, at, lax.neg(new), **params)]


_FORMS: dict[str, Callable[[Any, Sequence[Any]], Form | None]] = {
    "device_put": _device_put,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "reshape": _reshape,
    "scatter-sub": _scatter_sub,
    "split": _split,
}
