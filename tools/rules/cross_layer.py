"""An approximation of how a layer's weights act on the layers above, made of filtered traces, for stacks of element-wise layers.

With e^l the trace of layer l (that of ``d_rtrl``), one filter for each layer above, with the mean of its decays: OTPE in the
form of its paper, with decays taken from the model. What a unit shows is differentiated at its own time, the layers above at
the present one::

    R^{l+1} = mean(D^{l+1}) R^{l+1} + s'(h^l) e^l        R^m = mean(D^m) R^m + R^{m-1}        grad = (dloss/dshown^l) R^last
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from stacks import Stack, with_one
from training import loss

__all__ = ["filtered", "filtered_bytes", "trace_bytes"]

Array = Any


@dataclass(frozen=True)
class _Layer:
    """What one step says of a layer: D [examples, units, states, states], f [.., states, drives], x, and what it shows.

    ``slope`` is dshown/dh, ``signal`` dloss/dh and ``read`` dloss/dshown, all [examples, units, states] and within the step.
    """

    decay: Array
    immediate: Array
    x: Array
    slope: Array
    signal: Array
    read: Array


def _tables(
    stack: Stack, weights: Mapping[str, Array], state: Any, x: Array, target: Array
) -> tuple[Any, list[_Layer]]:
    """The new states, and what the step says of each layer."""
    kind, layers, made, u = stack.kind, [], [], x
    for k in range(stack.depth):
        old, w = stack.states_of(state, k), weights[stack.names[k]]
        drives = stack.drives(w, u)
        new, pull = jax.vjp(lambda o, y, k=k: stack.new_states(k, o, y), old, drives)
        ones, zero = jnp.ones_like(new[0]), jnp.zeros_like(new[0])
        rows = [pull(tuple(ones if r == s else zero for r in range(kind.states))) for s in range(kind.states)]
        decay = jnp.stack([jnp.stack(d, -1) for d, _ in rows], -2)
        immediate = jnp.stack([jnp.stack(f, -1) for _, f in rows], -2)
        shown, slopes = jax.vjp(kind.shown, new)
        slope = jnp.stack(slopes(jnp.ones_like(shown))[0], -1)
        layers.append((decay, immediate, with_one(u), slope))
        made.append(new)
        u = shown

    def from_shown(layer: int, value: Array) -> Array:
        for k in range(layer + 1, stack.depth):
            new = stack.new_states(k, stack.states_of(state, k), stack.drives(weights[stack.names[k]], value))
            value = kind.shown(new)
        return loss(with_one(value) @ weights["readout"], target)

    tables = []
    for k, (decay, immediate, read_by, slope) in enumerate(layers):
        shown, pull = jax.vjp(kind.shown, made[k])
        read = jax.grad(lambda v, k=k: from_shown(k, v))(shown)
        signal = jnp.stack(pull(read)[0], -1)
        of_states = jnp.stack(jnp.split(read, kind.states, axis=-1), -1)
        tables.append(_Layer(decay, immediate, read_by, slope, signal, of_states))
    new_state = {f"h{k}_{s}": h for k, new in enumerate(made) for s, h in enumerate(new)}
    return new_state, tables


def _advanced(e: Array, t: _Layer) -> Array:
    """d_rtrl's trace, [examples, units, states, drives, inputs]."""
    new = t.immediate[..., None] * t.x[:, None, None, None, :]
    return jnp.einsum("bosr,bordi->bosdi", t.decay, e) + new


def _as_weight(stack: Stack, gradient: Array) -> Array:
    """[units, drives, inputs] as the weight is laid out."""
    return jnp.transpose(gradient, (2, 1, 0)).reshape(gradient.shape[2], stack.kind.drives * stack.units)


def _trace_zeros(stack: Stack, examples: int, layer: int) -> Array:
    kind = stack.kind
    return jnp.zeros((examples, stack.units, kind.states, kind.drives, stack.reads(layer) + 1))


def filtered(stack: Stack, weights: Mapping[str, Array], xs: Array, ys: Array) -> dict[str, Array]:
    """The summed gradient of a sequence, by layer."""
    examples, depth = xs.shape[1], stack.depth

    def body(now: Any, item: tuple[Array, Array]) -> tuple[Any, None]:
        state, traces, filters, total = now
        state, tables = _tables(stack, weights, state, *item)
        traces = [_advanced(e, t) for e, t in zip(traces, tables, strict=True)]
        filters = [_filter(tables, k, traces[k], filters[k]) for k in range(depth)]
        grads = []
        for k, t in enumerate(tables):
            by = (t.signal, traces[k]) if k == depth - 1 else (t.read, filters[k][-1])
            grads.append(jnp.einsum("bos,bosdi->odi", *by))
        return (state, traces, filters, jax.tree.map(jnp.add, total, grads)), None

    traces = [_trace_zeros(stack, examples, k) for k in range(depth)]
    filters = [[jnp.zeros_like(e)] * (depth - 1 - k) for k, e in enumerate(traces)]
    total = [jnp.zeros(e.shape[1:2] + e.shape[3:]) for e in traces]
    start = (stack.zeros(examples), traces, filters, total)
    found = jax.lax.scan(body, start, (xs, ys))[0][3]
    return {stack.names[k]: _as_weight(stack, g) for k, g in enumerate(found)}


def _filter(tables: Sequence[_Layer], layer: int, trace: Array, filters: list[Array]) -> list[Array]:
    """The filters of a layer's trace, one for each layer above, a step later."""
    inject = tables[layer].slope[..., None, None] * trace
    new = []
    for old, t in zip(filters, tables[layer + 1 :], strict=True):
        mean = jnp.mean(jnp.diagonal(t.decay, axis1=2, axis2=3), axis=(1, 2))
        inject = mean[:, None, None, None, None] * old + inject
        new.append(inject)
    return new


def filtered_bytes(stack: Stack, examples: int) -> int:
    """What is carried: the traces, and the filters."""
    return 4 * sum((stack.depth - k) * _trace_zeros(stack, examples, k).size for k in range(stack.depth))


def trace_bytes(stack: Stack, examples: int) -> int:
    """What ``d_rtrl`` carries."""
    return 4 * sum(_trace_zeros(stack, examples, k).size for k in range(stack.depth))
