"""Ops of how a layer's units answer to each other: a matrix over all states of one example, the same for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from etcompile.frontend.jaxpr import full_dtype
from etcompile.ir.program import Equation
from etcompile.lowering.layers import list_shapes

if TYPE_CHECKING:
    from etcompile.lowering.evaluate import Context

__all__ = ["SENSITIVITIES"]

Array = Any
Value = Any


def _rows(context: Context, value: Value) -> Array:
    """All states of an example in one row."""
    examples = context.model.examples or 1
    return jnp.concatenate([v.reshape(examples, -1) for v in value], axis=1)


def _by_state(context: Context, layer: str, rows: Array) -> Value:
    shapes, dtypes = list_shapes(context.model, "hidden", layer)
    examples = context.model.examples or 1
    ends = np.cumsum([int(np.prod(s, dtype=np.int64)) // examples for s in shapes])[:-1].tolist()
    parts = jnp.split(rows, ends, axis=1)
    return tuple(p.reshape(s).astype(d) for p, s, d in zip(parts, shapes, dtypes, strict=True))


def _identity(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    layer = context.model.analysis.layer(equation.type.of).record
    return jnp.eye(layer.size // (context.model.examples or 1), dtype=full_dtype(equation.type.dtype))


def _relate(back: bool) -> Callable[[Context, Equation, Sequence[Value]], Value]:
    def rule(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
        value, matrix = args if back else args[::-1]
        if value is None or matrix is None:
            return None
        rows = _rows(context, value)
        return _by_state(context, equation.type.of, rows @ (matrix if back else matrix.T))

    return rule


def _correlate(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    if any(a is None for a in args):
        return None
    a, b = (_rows(context, v) for v in args)
    return (a.T @ b / a.shape[0]).astype(full_dtype(equation.type.dtype))


def _over_examples(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    (value,) = args
    if value is None or not context.model.examples:
        return value
    return tuple(jnp.broadcast_to(jnp.mean(v, axis=0, keepdims=True), v.shape) for v in value)


def _of_layer(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    symbol, value = args
    if value is None:
        return None
    assert context.step is not None
    group, analysis = context.model.analysis.group(symbol.name), context.model.analysis
    made = context.program.equation(equation.refs[0].name).type.of
    states = list(analysis.layer(made).states)
    found = []
    for k, state in enumerate(group.states):
        array = value[states.index(state)]
        if (elements := group.maps[k]) is None:
            found.append(array.reshape(group.shape))
        else:
            there = jnp.where(elements >= 0, array.reshape(-1)[np.maximum(elements, 0)], 0)
            found.append(there.reshape(group.shape).astype(array.dtype))
    return tuple(found)


SENSITIVITIES: dict[str, Callable[[Any, Equation, Sequence[Value]], Value]] = {
    "identity": _identity,
    "relate": _relate(back=False),
    "relate_back": _relate(back=True),
    "correlate": _correlate,
    "over_examples": _over_examples,
    "of_layer": _of_layer,
}
