"""What a chunk of a GRU does element by element, whole or in blocks of steps: ``python tools/bench/blocks.py``.

Beside its products a chunk has the credit's recurrence and what is element by element around it (``hand.py``): from the learning
signal and the gates, the credit and the products of D after each step, and both times the immediate Jacobians. Whole, each is one
pass over arrays of [steps, batch, units], which two threads share; in blocks, all of a few steps is made at once while a cache
holds it. By hand, apart from the products: what a schedule that works in blocks could gain of a step.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from clock import shortest
from jax import lax

__all__ = ["given", "in_blocks", "whole"]

Array = jax.Array
#: Learning signal, update gate, candidate and old state of a chunk, time on axis 0.
Given = tuple[Array, Array, Array, Array]


def given(steps: int, batch: int, units: int) -> Given:
    """Random numbers, the gates between 0 and 1."""
    signal, gate, candidate, old = (
        jax.random.normal(key, (steps, batch, units)) for key in jax.random.split(jax.random.key(0), 4)
    )
    return signal, jax.nn.sigmoid(gate), jnp.tanh(candidate), jnp.tanh(old)


def whole(some: Given) -> Any:
    """Credit and products of D at the chunk's start; and what meets x in products, for gradient and traces of two weights."""
    return _made(some, _ends(some))


def in_blocks(some: Given, size: int) -> Any:
    """The same in blocks of so many steps, the last first."""
    signal, gate, candidate, old = (v.reshape(-1, size, *v.shape[1:]) for v in some)
    cut = signal, gate, candidate, old
    left, made = lax.scan(lambda after, block: _made(block, after), _ends(some), cut, reverse=True)
    return left, [v.reshape(-1, *v.shape[2:]) for v in made]


def _ends(some: Given) -> tuple[Array, Array]:
    shape = some[0].shape[1:]
    return jnp.zeros(shape), jnp.ones(shape)


def _made(some: Given, after: tuple[Array, Array]) -> tuple[tuple[Array, Array], list[Array]]:
    signal, gate, candidate, old = some

    def earlier(state: tuple[Array, Array], now: tuple[Array, Array]) -> tuple[Any, tuple[Array, Array]]:
        (credit, rest), (signal, decay) = state, now
        credit = credit + signal
        return (decay * credit, decay * rest), (credit, rest)

    left, (credit, rest) = lax.scan(earlier, after, (signal, 1 - gate), reverse=True)
    immediate = gate * (1 - gate) * (candidate - old), gate * (1 - candidate**2)
    return left, [f * c for c in (credit, rest) for f in immediate]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tools/bench/blocks.py", description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2, 5, 10, 25], help="steps of a block")
    parser.add_argument("--rounds", type=int, default=30, help="runs of each, in turns; the shortest counts")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    for batch, units in [(8, 256), (16, 256), (16, 512)]:
        some = given(options.steps, batch, units)
        runs: dict[str, Any] = {"whole": jax.jit(whole)}
        runs |= {f"blocks of {k}": jax.jit(partial(in_blocks, size=k)) for k in options.sizes}
        told = ", ".join(
            f"{k} {1e6 * seconds / options.steps:.3g} us"
            for k, seconds in shortest(runs, some, options.rounds).items()
        )
        print(f"batch {batch}, {units} units, each step: {told}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
