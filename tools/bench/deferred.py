"""Traces written once in k steps beside traces written at every step: ``python tools/bench/deferred.py``.

With c the product of D since the last write, at s,

    grad_t = contract(L_t c_t, e_s) + sum_{s<tau<=t} (L_t D_t ... D_{tau+1} f_tau) (x) x_tau

and the sum is one product over (tau, batch). By hand, for one matrix without the network around it, with an update of the
weight at every step: what a schedule that defers writes could gain. The write comes first in a step, so that nothing reads
the old trace after it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from clock import shortest
from jax import lax

from etcompile.lowering.in_place import Moment, computed_once, known_after

__all__ = ["at_every_step", "deferred", "given"]

Array = jax.Array
#: D, f, x and L of some steps, time on axis 0.
Given = tuple[Array, Array, Array, Array]
Learned = Callable[[Given], Array]

_RATE = 1e-3


def given(inputs: int, batch: int, units: int, steps: int) -> Given:
    """D between 0 and 1, and random numbers."""
    keys, shape = jax.random.split(jax.random.key(0), 4), (steps, batch, units)
    f, signal = (jax.random.normal(key, shape) for key in keys[:2])
    return (
        jax.random.uniform(keys[2], shape),
        f,
        jax.random.normal(keys[3], (steps, batch, inputs)),
        signal,
    )


def at_every_step(inputs: int, batch: int, units: int) -> Learned:
    """The weight after some steps, of the program that etcompile makes: contract, then update in place."""

    def step(carry: tuple[Array, Array], now: Given) -> tuple[tuple[Array, Array], None]:
        weight, trace = carry
        decay, f, x, signal = now
        old = _contracted(signal * decay, trace)
        old = computed_once(old, old)
        decay, after = (computed_once(v, v) for v in (decay, known_after(f, Moment([old]))))
        trace = decay[:, None] * trace + x[:, :, None] * after[:, None]
        return (weight - _RATE * (old + x.T @ (signal * f)), trace), None

    def run(some: Given) -> Array:
        start = jnp.zeros((inputs, units)), jnp.zeros((batch, inputs, units))
        return lax.scan(step, start, some)[0][0]

    return jax.jit(run)


def deferred(inputs: int, batch: int, units: int, every: int) -> Learned:
    """The same with the trace written once in ``every`` steps."""

    def write(trace: Array, c: Array, fs: Array, xs: Array) -> Array:
        parts = [xs[j][:, :, None] * fs[j][:, None] for j in range(every)]
        return reduce(add, parts, c[:, None] * trace)

    def product(pairs: int) -> Callable[[Array, Array, Array], Array]:
        def of_pairs(signal: Array, fs: Array, xs: Array) -> Array:
            credits = (signal * fs[:pairs]).reshape(-1, units)
            return xs[:pairs].reshape(-1, inputs).T @ credits

        return of_pairs

    def step(carry: Any, now: Given) -> tuple[Any, None]:
        weight, trace, c, fs, xs, count = carry
        decay, f, x, signal = now
        full = count == every
        trace = lax.cond(full, write, lambda trace, *_: trace, trace, c, fs, xs)
        count = jnp.where(full, 0, count)
        c, fs = jnp.where(full, 1, c) * decay, lax.dynamic_update_index_in_dim(fs * decay, f, count, 0)
        xs = lax.dynamic_update_index_in_dim(xs, x, count, 0)
        pairs = lax.switch(count, [product(j + 1) for j in range(every)], signal, fs, xs)
        gradient = _contracted(signal * c, trace) + pairs
        return (weight - _RATE * gradient, trace, c, fs, xs, count + 1), None

    def run(some: Given) -> Array:
        pairs = jnp.zeros((every, batch, units)), jnp.zeros((every, batch, inputs))
        of_steps = jnp.zeros((batch, inputs, units)), jnp.ones((batch, units)), *pairs
        start = jnp.zeros((inputs, units)), *of_steps, jnp.zeros((), jnp.int32)
        return lax.scan(step, start, some)[0][0]

    return jax.jit(run)


def _contracted(credit: Array, trace: Array) -> Array:
    return reduce(add, [credit[b] * trace[b] for b in range(len(credit))])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tools/bench/deferred.py", description=__doc__)
    parser.add_argument("--every", nargs="+", type=int, default=[2, 4, 8], help="steps between writes")
    parser.add_argument("--rounds", type=int, default=100, help="runs of each, in turns; the shortest counts")
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    for inputs, batch, units in [(320, 16, 256), (576, 8, 512), (576, 16, 512), (1024, 16, 1024)]:
        sizes = (inputs, batch, units)
        some = given(*sizes, options.steps)
        runs = {1: at_every_step(*sizes), **{k: deferred(*sizes, k) for k in options.every}}
        best = {
            k: 1e3 * seconds / options.steps for k, seconds in shortest(runs, some, options.rounds).items()
        }
        told = ", ".join(f"every {k} steps {ms:.3g} ms ({best[1] / ms:.2f})" for k, ms in best.items())
        print(f"{inputs} -> {units}, batch {batch}, {4e-6 * inputs * batch * units:.3g} MB: {told}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
