"""States of more axes than what is projected onto them: linear attention, state-space models, gates that units share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from .base import case
from .written import weights, written

sigmoid = jax.nn.sigmoid
HEADS, KEYS, VALUES = 2, 2, 3
QKV = {"q": (3, HEADS * KEYS), "k": (3, HEADS * KEYS), "v": (3, HEADS * VALUES), "out": (HEADS * VALUES, 2)}
MEMORY = {"S": (HEADS, KEYS, VALUES)}


def heads(y, size):
    return y.reshape(*y.shape[:-1], HEADS, size)


def merged(y):
    return y.reshape(*y.shape[:-2], -1)


def outer(k, v):
    return k[..., :, None] * v[..., None, :]


def read(q, S):
    return merged(jnp.einsum("...k,...kv->...v", q, S))


@case("matrix")
def linear_attention(batch, dtype):
    """With the feature map of elu, and its normaliser as a second state."""

    def body(p, s, x, *, cut, put):
        q, k = (heads(jax.nn.elu(x @ p[name]) + 1, KEYS) for name in "qk")
        S = put("S", s["S"] + outer(k, heads(x @ p["v"], VALUES)))
        z = put("z", s["z"] + k)
        share = jnp.sum(q * z, -1, keepdims=True)
        h = jnp.einsum("...k,...kv->...v", q, S) / (1 + share**2)
        return {"S": S, "z": z}, merged(h) @ p["out"]

    states = {**MEMORY, "z": (HEADS, KEYS)}
    groups = (("S",), ("z",))
    return written(body, weights(**QKV), states, groups=groups, exact=True, batch=batch, dtype=dtype)


@case("matrix")
def gated_linear_attention(batch, dtype):
    def body(p, s, x, *, cut, put):
        a = heads(sigmoid(x @ p["a"] + p["b"]), KEYS)
        k, v = heads(x @ p["k"], KEYS), heads(x @ p["v"], VALUES)
        S = put("S", a[..., None] * s["S"] + outer(k, v))
        return {"S": S}, read(heads(x @ p["q"], KEYS), S) @ p["out"]

    params = weights(**QKV, a=(3, HEADS * KEYS), b=(HEADS * KEYS,))
    return written(body, params, MEMORY, exact=True, batch=batch, dtype=dtype)


def rotated(y, angle):
    """Pairs of elements turned by an angle each."""
    a, b = jnp.split(y, 2, -1)
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], -1
    )


@case("matrix")
def retnet(batch, dtype):
    """Decays of the heads are constants; keys and queries are turned by the position."""
    decay = (1 - 2.0 ** (-1 - np.arange(HEADS)))[:, None, None]

    def body(p, s, x, *, cut, put):
        t = s["t"] + 1
        q, k = (rotated(heads(x @ p[name], KEYS), 0.3 * t[..., None, None]) for name in "qk")
        S = put("S", decay * s["S"] + outer(k, heads(x @ p["v"], VALUES)))
        return {"S": S, "t": t}, read(q, S) @ p["out"]

    states = {**MEMORY, "t": ()}
    return written(body, weights(**QKV), states, groups=(("S",),), exact=True, batch=batch, dtype=dtype)


@case("matrix")
def one_projection(batch, dtype):
    """Query, key, value and a gate for each head from one product, with a bias."""

    def body(p, s, x, *, cut, put):
        n = HEADS * KEYS
        q, k, v, a = jnp.split(x @ p["w"] + p["b"], [n, 2 * n, 2 * n + HEADS * VALUES], -1)
        S = sigmoid(a)[..., None, None] * s["S"] + outer(heads(k, KEYS), heads(jnp.tanh(v), VALUES))
        S = put("S", S)
        return {"S": S}, read(heads(q, KEYS), S) @ p["out"]

    width = 2 * HEADS * KEYS + HEADS * VALUES + HEADS
    params = weights(w=(3, width), b=(width,), out=QKV["out"])
    return written(body, params, MEMORY, exact=True, batch=batch, dtype=dtype, functional=True)


@case("matrix")
def mlstm(batch, dtype):
    """Without the running maximum that keeps large gates apart."""

    def body(p, s, x, *, cut, put):
        q, k, v = heads(x @ p["q"], KEYS), heads(x @ p["k"], KEYS), heads(x @ p["v"], VALUES)
        i, f = jnp.exp(x @ p["i"]), sigmoid(x @ p["f"] + p["b"])
        C = put("C", f[..., None, None] * s["C"] + i[..., None, None] * outer(k, v))
        n = put("n", f[..., None] * s["n"] + i[..., None] * k)
        share = jnp.sum(q * n, -1, keepdims=True)
        h = jnp.einsum("...k,...kv->...v", q, C) / (1 + share**2)
        return {"C": C, "n": n}, (sigmoid(x @ p["o"]) * merged(h)) @ p["out"]

    params = weights(**QKV, i=(3, HEADS), f=(3, HEADS), b=(HEADS,), o=(3, HEADS * VALUES))
    states = {"C": MEMORY["S"], "n": (HEADS, KEYS)}
    groups = (("C",), ("n",))
    return written(body, params, states, groups=groups, exact=True, batch=batch, dtype=dtype)


@case("matrix")
def mlstm_with_running_maximum(batch, dtype):
    """The logarithm of the largest gate so far, one number for each head, is read by all of its memory."""

    def body(p, s, x, *, cut, put):
        q, k, v = heads(x @ p["q"], KEYS), heads(x @ p["k"], KEYS), heads(x @ p["v"], VALUES)
        i, f = x @ p["i"], jax.nn.log_sigmoid(x @ p["f"] + p["b"])
        m = put("m", jnp.maximum(f + s["m"], i))
        i, f = jnp.exp(i - m), jnp.exp(f + s["m"] - m)
        C = put("C", f[..., None, None] * s["C"] + i[..., None, None] * outer(k, v))
        n = put("n", f[..., None] * s["n"] + i[..., None] * k)
        share = jnp.maximum(jnp.abs(jnp.sum(q * n, -1)), jnp.exp(-m))[..., None]
        h = jnp.einsum("...k,...kv->...v", q, C) / share
        return {"C": C, "n": n, "m": m}, (sigmoid(x @ p["o"]) * merged(h)) @ p["out"]

    params = weights(**QKV, i=(3, HEADS), f=(3, HEADS), b=(HEADS,), o=(3, HEADS * VALUES))
    states = {"C": MEMORY["S"], "n": (HEADS, KEYS), "m": (HEADS,)}
    return written(body, params, states, exact=True, batch=batch, dtype=dtype)


@case("matrix")
def mamba(batch, dtype):
    """The recurrence of Mamba: a step size for each channel, input and output matrices from the input."""

    def body(p, s, x, *, cut, put):
        step = jax.nn.softplus(x @ p["step"] + p["bias"])
        kept = jnp.exp(-step[..., None] * jnp.exp(p["A"]))
        h = put("h", kept * s["h"] + outer(step * x, x @ p["B"]))
        return {"h": h}, (jnp.einsum("...dn,...n->...d", h, x @ p["C"]) + p["D"] * x) @ p["out"]

    params = weights(step=(3, 3), bias=(3,), A=(3, 2), B=(3, 2), C=(3, 2), D=(3,), out=(3, 2))
    return written(body, params, {"h": (3, 2)}, exact=True, batch=batch, dtype=dtype)


@case("matrix")
def rg_lru(batch, dtype):
    """Gates that two units share each."""

    def body(p, s, x, *, cut, put):
        r, i = (jnp.repeat(sigmoid(x @ p[name] + p["b" + name]), 2, -1) for name in "ri")
        a = jnp.exp(-2 * jax.nn.softplus(p["a"]) * r)
        h = put("h", a * s["h"] + jnp.sqrt(1 - a**2) * (i * (x @ p["in"])))
        return {"h": h}, h @ p["out"]

    params = weights(r=(3, 2), br=(2,), i=(3, 2), bi=(2,), a=(4,), **{"in": (3, 4)}, out=(4, 2))
    return written(body, params, {"h": (4,)}, exact=True, batch=batch, dtype=dtype)


@case("matrix")
def min_gru(batch, dtype):
    def body(p, s, x, *, cut, put):
        z = sigmoid(x @ p["z"])
        h = put("h", (1 - z) * s["h"] + z * (x @ p["c"]))
        return {"h": h}, h @ p["out"]

    return written(
        body, weights(z=(3, 4), c=(3, 4), out=(4, 2)), {"h": (4,)}, exact=True, batch=batch, dtype=dtype
    )


@case("matrix")
def min_lstm(batch, dtype):
    def body(p, s, x, *, cut, put):
        f, i = sigmoid(x @ p["f"]), sigmoid(x @ p["i"])
        h = put("h", (f * s["h"] + i * (x @ p["c"])) / (f + i))
        return {"h": h}, h @ p["out"]

    params = weights(f=(3, 4), i=(3, 4), c=(3, 4), out=(4, 2))
    return written(body, params, {"h": (4,)}, exact=True, batch=batch, dtype=dtype)


@case("matrix")
def delta_net(batch, dtype):
    """What a key finds is taken out before the new value is written: rows of the state mix."""

    keys = 5  # rows of a few elements would be one unit

    def body(p, s, x, *, cut, put):
        k = heads(x @ p["k"], keys)
        k = k * jax.lax.rsqrt(cut(jnp.sum(k * k, -1, keepdims=True)) + 0.1)
        found = cut(jnp.einsum("...k,...kv->...v", k, s["S"]))
        b = sigmoid(x @ p["b"])[..., None]
        S = put("S", s["S"] + outer(b * k, heads(x @ p["v"], VALUES) - found))
        return {"S": S}, read(heads(x @ p["q"], keys), S) @ p["out"]

    params = weights(**{**QKV, "q": (3, HEADS * keys), "k": (3, HEADS * keys)}, b=(3, HEADS))
    return written(body, params, {"S": (HEADS, keys, VALUES)}, exact=False, batch=batch, dtype=dtype)


@case("matrix")
def two_layers_of_linear_attention(batch, dtype):
    def layer(p, S, x, name, put):
        k, v = heads(x @ p[f"k{name}"], KEYS), heads(x @ p[f"v{name}"], VALUES)
        return put(f"S{name}", 0.8 * S + outer(k, v))

    def body(p, s, x, *, cut, put):
        first = layer(p, s["S1"], x, 1, put)
        below = read(heads(x @ p["q1"], KEYS), first)
        second = layer(p, s["S2"], cut(below), 2, put)
        return {"S1": first, "S2": second}, read(heads(below @ p["q2"], KEYS), second) @ p["out"]

    below = HEADS * VALUES
    params = weights(
        q1=QKV["q"], k1=QKV["k"], v1=QKV["v"], q2=(below, HEADS * KEYS), k2=(below, HEADS * KEYS),
        v2=(below, HEADS * VALUES), out=QKV["out"],
    )  # fmt: skip
    states = {"S1": MEMORY["S"], "S2": MEMORY["S"]}
    groups = (("S1",), ("S2",))
    return written(body, params, states, groups=groups, exact=False, batch=batch, dtype=dtype)
