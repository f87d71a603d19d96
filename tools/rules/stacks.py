"""Layers in sequence whose recurrence is element-wise: no weight joins units within a layer, weights join layers.

A layer's weight, with the bias as its last row, gives the drive y of a cell; a cell takes its old states and y to the new
states, unit by unit; what it shows is what the next layer, or the readout, reads. All stacks are plain functions of weights and
states, so that one definition serves the compiler, plain backpropagation and the approximation of ``cross_layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from models import spike

__all__ = ["KINDS", "Kind", "Stack", "with_one"]

Array = Any
#: The states of a layer, each [examples, units]; the parts of y alike.
Parts = tuple[Array, ...]


@dataclass(frozen=True)
class Kind:
    """One kind of layer.

    Attributes
    ----------
    name, title : str
    states, drives : int
        How many states a unit has, and how many parts of y it reads.
    cell : callable
        ``(constants, states, drives) -> states``
    shown : callable
        ``states -> [examples, states * units]``: a value of each state, entry by entry.
    gain : float
        Of the weights at the start, over the square root of what they read.
    bias : float
        Of the first part of y.
    """

    name: str
    title: str
    states: int
    drives: int
    cell: Callable[[Mapping[str, Array], Parts, Parts], Parts]
    shown: Callable[[Parts], Array]
    gain: float
    bias: float = 0.0


def _lru(c: Mapping[str, Array], h: Parts, y: Parts) -> Parts:
    (re, im), (a, b) = h, y
    cos, sin = c["radius"] * jnp.cos(c["angle"]), c["radius"] * jnp.sin(c["angle"])
    gain = jnp.sqrt(1 - c["radius"] ** 2)
    return cos * re - sin * im + gain * a, sin * re + cos * im + gain * b


def _rg_lru(c: Mapping[str, Array], h: Parts, y: Parts) -> Parts:
    (old,), (value, keep, let_in) = h, y
    a = jnp.exp(2 * jnp.log(c["radius"]) * jax.nn.sigmoid(keep))
    return (a * old + jnp.sqrt(1 - a**2) * jax.nn.sigmoid(let_in) * value,)


def _lif(c: Mapping[str, Array], h: Parts, y: Parts) -> Parts:
    (v,), (current,) = h, y
    return (0.9 * v * (1 - spike(v - 1.0)) + current,)


KINDS = {
    k.name: k
    for k in (
        Kind("lru", "LRU", 2, 2, _lru, lambda h: jnp.tanh(jnp.concatenate(h, -1)), 1.5),
        Kind("rg_lru", "RG-LRU", 1, 3, _rg_lru, lambda h: jnp.tanh(2 * h[0]), 1.5),
        Kind("lif", "LIF", 1, 1, _lif, lambda h: spike(h[0] - 1.0), 1.5, 0.15),
    )
}


def with_one(u: Array) -> Array:
    """What a layer reads, and a 1 for its bias."""
    return jnp.concatenate([u, jnp.ones((*u.shape[:-1], 1), u.dtype)], axis=-1)


@dataclass(frozen=True)
class Stack:
    """So many layers of a kind with as many units each, and a readout of the last."""

    kind: Kind
    depth: int
    units: int
    inputs: int
    outputs: int

    def start(self, seed: int) -> dict[str, Array]:
        """The weights of a seed: one for each layer, and the readout's."""
        rng = np.random.default_rng(seed)
        weights = {}
        for layer in range(self.depth + 1):
            reads = self.reads(layer)
            last = layer == self.depth
            columns = self.outputs if last else self.kind.drives * self.units
            gain = 0.3 if last else self.kind.gain
            w = gain * rng.normal(size=(reads + 1, columns)) / np.sqrt(reads if layer else self.inputs / 2)
            w[-1] = 0.0
            if not last:
                w[-1, : self.units] = self.kind.bias
            weights[self.names[layer]] = jnp.asarray(w, jnp.float32)
        return weights

    @property
    def names(self) -> list[str]:
        """Names of the weights, from the bottom; the readout's is the last."""
        return [*(f"layer{k}" for k in range(self.depth)), "readout"]

    def reads(self, layer: int) -> int:
        """How many values a layer reads, its bias apart; the readout counts as the last layer."""
        return self.units * self.kind.states if layer else self.inputs

    def constants(self, layer: int) -> dict[str, np.ndarray]:
        """How long units remember, from a few steps to a hundred; and how fast they turn. The same for all seeds."""
        rng = np.random.default_rng(layer)
        radius = np.sqrt(rng.uniform(0.5**2, 0.99**2, self.units))
        angle = rng.uniform(0, np.pi / 5, self.units)
        return {"radius": radius.astype(np.float32), "angle": angle.astype(np.float32)}

    def zeros(self, examples: int) -> dict[str, Array]:
        """States before the first step."""
        return {
            f"h{k}_{s}": jnp.zeros((examples, self.units))
            for k in range(self.depth)
            for s in range(self.kind.states)
        }

    def states_of(self, state: Mapping[str, Array], layer: int) -> Parts:
        return tuple(state[f"h{layer}_{s}"] for s in range(self.kind.states))

    def drives(self, w: Array, u: Array) -> Parts:
        """The parts of y of a layer that reads u."""
        return tuple(jnp.split(with_one(u) @ w, self.kind.drives, axis=-1))

    def new_states(self, layer: int, old: Parts, drives: Parts) -> Parts:
        return self.kind.cell(self.constants(layer), old, drives)

    def step(
        self, weights: Mapping[str, Array], state: Mapping[str, Array], x: Array
    ) -> tuple[dict[str, Array], Array]:
        """One time step: the new states and the outputs."""
        new: dict[str, Array] = {}
        u = x
        for layer, name in enumerate(self.names[:-1]):
            drives = self.drives(weights[name], u)
            made = self.new_states(layer, self.states_of(state, layer), drives)
            new |= {f"h{layer}_{s}": h for s, h in enumerate(made)}
            u = self.kind.shown(made)
        return new, with_one(u) @ weights["readout"]

    def losses(
        self,
        weights: Mapping[str, Array],
        xs: Array,
        ys: Array,
        loss: Callable[[Array, Array], Array],
    ) -> Array:
        """The summed loss of whole sequences."""

        def body(state: Any, item: tuple[Array, Array]) -> tuple[Any, Array]:
            state, out = self.step(weights, state, item[0])
            return state, loss(out, item[1])

        return jnp.sum(jax.lax.scan(body, self.zeros(xs.shape[1]), (xs, ys))[1])

    def outputs_of(self, weights: Mapping[str, Array], xs: Array) -> Array:
        """The outputs of every step."""
        return jax.lax.scan(lambda state, x: self.step(weights, state, x), self.zeros(xs.shape[1]), xs)[1]

    def activity(self, weights: Mapping[str, Array], xs: Array) -> Sequence[float]:
        """The mean of the absolute value of what each layer shows."""

        def body(state: Any, x: Array) -> tuple[Any, list[Array]]:
            state, _ = self.step(weights, state, x)
            shown = [self.kind.shown(self.states_of(state, k)) for k in range(self.depth)]
            return state, [jnp.mean(jnp.abs(u)) for u in shown]

        return [float(jnp.mean(a)) for a in jax.lax.scan(body, self.zeros(xs.shape[1]), xs)[1]]
