"""D-RTRL of a GRU in chunks, written by hand for this one model: what a compiler may cost is measured by it.

With D = 1 - z, the credit g_t = L_t + D_{t+1} g_{t+1} from the chunk's end, and R_t = D_C ... D_{t+1}; see *In chunks* in
docs/theory.md. The reset gate acts through another weight, and has the gradient within its step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
from models import Data, loss_fn
from plain import PureStep
from run import Run

__all__ = ["gradient", "sequence", "start"]

Array = jax.Array
Tree = dict[str, dict[str, Array]]


def sequence(data: Data, model: brainstate.nn.Module, chunk: int) -> Run:
    """Losses and summed gradients over a sequence from the initial states, for the clock; what comes after it is made as well."""
    params = PureStep(data, model).params
    run, carry = jax.jit(partial(gradient, chunk=chunk)), start(params, data.batch)
    return Run(lambda xs, ys: run(params, carry, xs, ys)[1:], lambda xs, ys: run.lower(params, carry, xs, ys))


def start(params: Tree, batch: int) -> Any:
    """The hidden state, and the traces of update gate and candidate with their biases, at zero."""
    rows, units = params["cell.Wh.weight"]["weight"].shape
    trace = {"weight": jnp.zeros((batch, rows, units)), "bias": jnp.zeros((batch, units))}
    return jnp.zeros((batch, units)), trace, trace


def gradient(params: Tree, carry: Any, xs: Array, ys: Array, chunk: int) -> tuple[Any, Array, Tree]:
    """Carry, losses and summed gradients after a sequence, of which ``chunk`` steps are handled together."""
    cut = [v.reshape(-1, chunk, *v.shape[1:]) for v in (xs, ys)]

    def one(state: tuple[Any, Tree], part: list[Array]) -> tuple[tuple[Any, Tree], Array]:
        carry, losses, grads = _chunk(params, state[0], *part)
        return (carry, jax.tree.map(jnp.add, state[1], grads)), losses

    (carry, grads), losses = jax.lax.scan(one, (carry, jax.tree.map(jnp.zeros_like, params)), cut)
    return carry, losses.reshape(-1), grads


def _chunk(params: Tree, carry: Any, xs: Array, ys: Array) -> tuple[Any, Array, Tree]:
    gates, candidate = params["cell.Wrz.weight"], params["cell.Wh.weight"]
    first, *traces = carry
    from_x = [xs @ w["weight"][: xs.shape[-1]] + w["bias"] for w in (gates, candidate)]
    of_gates, of_candidate = (w["weight"][xs.shape[-1] :] for w in (gates, candidate))

    def step(h: Array, given: list[Array]) -> tuple[Array, tuple[Array, ...]]:
        r, z = jnp.split(jax.nn.sigmoid(given[0] + h @ of_gates), 2, -1)
        c = jnp.tanh(given[1] + (r * h) @ of_candidate)
        new = (1 - z) * h + z * c
        return new, (h, r, z, c, new)

    h, (old, r, z, c, hs) = jax.lax.scan(step, first, from_x)

    def read(readout: dict[str, Array], hs: Array) -> Array:
        return jax.vmap(loss_fn)(hs @ readout["weight"] + readout["bias"], ys)

    losses, back = jax.vjp(read, params["readout.weight"], hs)
    readout, signal = back(jnp.ones_like(losses))

    def later(state: tuple[Array, Array], given: tuple[Array, Array]) -> tuple[Any, tuple[Array, Array]]:
        credit, rest = state[0] + given[0], state[1]
        return (given[1] * credit, given[1] * rest), (credit, rest)

    ends = (jnp.zeros_like(h), jnp.ones_like(h))
    (left, decay), (credit, rest) = jax.lax.scan(later, ends, (signal, 1 - z), reverse=True)
    immediate = (z * (1 - z) * (c - old), z * (1 - c**2))
    within = (signal * immediate[1]) @ of_candidate.T * old * r * (1 - r)
    sources = (jnp.concatenate([xs, old], -1), jnp.concatenate([xs, r * old], -1))

    def of_weight(x: Array, y: Array) -> dict[str, Array]:
        return {"weight": jnp.einsum("tbi,tbo->io", x, y), "bias": y.sum((0, 1))}

    found, after = [], []
    for x, f, trace in zip(sources, immediate, traces, strict=True):
        kept = {
            "weight": jnp.einsum("bio,bo->io", trace["weight"], left),
            "bias": (trace["bias"] * left).sum(0),
        }
        found.append(jax.tree.map(jnp.add, of_weight(x, f * credit), kept))
        more = {"weight": jnp.einsum("tbi,tbo->bio", x, f * rest), "bias": (f * rest).sum(0)}
        decays = {"weight": decay[:, None], "bias": decay}
        after.append(jax.tree.map(lambda d, e, new: d * e + new, decays, trace, more))
    joined = jax.tree.map(lambda *v: jnp.concatenate(v, -1), of_weight(sources[0], within), found[0])
    grads = {"cell.Wrz.weight": joined, "cell.Wh.weight": found[1], "readout.weight": readout}
    return (h, *after), losses, {name: grads[name] for name in params}
