"""Stock brainstate layers between the weights and the state: norms, embedding, convolution, dropout."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp

from .base import case, cat, from_module, linear, shape
from .structure import convolution

nn = brainstate.nn


class Recurrent(nn.Module):
    """``h' = 0.6 h + tanh(layer(W [x, h]))`` for a stock `layer`; `encode` may come before."""

    def __init__(self, layer, encode=None, n_in=3):
        super().__init__()
        self.encode = encode
        self.W = nn.Linear(n_in + 4, 4)
        self.layer = layer
        self.readout = nn.Linear(4, 2)

    def init_state(self, batch_size=None, **kwargs):
        self.h = brainstate.HiddenState(jnp.zeros(shape(batch_size, 4)))

    def update(self, x):
        if self.encode is not None:
            x = self.encode(x)
        y = self.layer(self.W(cat(x, self.h.value)))
        self.h.value = 0.6 * self.h.value + jnp.tanh(y)
        return self.readout(self.h.value)


def statistics(y):
    mean = jnp.mean(y, -1, keepdims=True)
    return mean, jnp.mean(y * y, -1, keepdims=True)


def recurrent_step(layer, encode=None):
    def step(params, state, x, *, cut, put):
        if encode is not None:
            x = encode(params, x)
        y = layer(params, linear(params["W.weight"], cut(cat(x, state["h"]))), cut)
        h = put("h", 0.6 * state["h"] + jnp.tanh(y))
        return {**state, "h": h}, linear(params["readout.weight"], h)

    return step


@case("stock", "norm")
def stock_layer_norm(batch, dtype):
    def layer(params, y, cut):
        mean, square = statistics(y)
        w = params["layer.weight"]
        return (y - cut(mean)) * (jax.lax.rsqrt(cut(square - mean**2) + 1e-6) * w["scale"]) + w["bias"]

    return from_module(
        Recurrent(nn.LayerNorm((4,))),
        recurrent_step(layer),
        groups=(("h",),),
        exact=False,
        batch=batch,
        dtype=dtype,
    )


@case("stock", "norm")
def stock_rms_norm(batch, dtype):
    def layer(params, y, cut):
        _, square = statistics(y)
        return y * (jax.lax.rsqrt(cut(square) + 1e-6) * params["layer.scale"]["scale"])

    return from_module(
        Recurrent(nn.RMSNorm((4,))),
        recurrent_step(layer),
        groups=(("h",),),
        exact=False,
        batch=batch,
        dtype=dtype,
    )


class Embedded(Recurrent):
    """Tokens in; nothing between the weight and the state."""

    def __init__(self):
        super().__init__(lambda y: y, encode=nn.Embedding(5, 3))


@case("stock", "gather")
def stock_embedding(batch, dtype):
    return from_module(
        Embedded(),
        recurrent_step(lambda params, y, cut: y, lambda params, x: params["encode.weight"][x]),
        groups=(("h",),),
        exact=False,
        batch=batch,
        dtype=dtype,
        x_shape=(),
        x_integers=5,
    )


class Convolutional(nn.Module):
    """A stock convolution drives leaky units."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d((5, 2), 3, 3)
        self.decay = brainstate.ParamState(jnp.full((5, 3), 0.5))
        self.readout = nn.Linear(15, 2)

    def init_state(self, batch_size=None, **kwargs):
        self.h = brainstate.HiddenState(jnp.zeros(shape(batch_size, 5, 3)))

    def update(self, x):
        self.h.value = self.decay.value * self.h.value + jnp.tanh(self.conv(x))
        return self.readout(self.h.value.reshape(*x.shape[:-2], 15))


def build_convolutional(batch, dtype):
    def step(params, state, x, *, cut, put):
        w = params["conv.weight"]
        batched = x if x.ndim == 3 else x[None]
        y = convolution(batched, w["weight"]).reshape(*x.shape[:-1], 3) + w.get("bias", 0.0)
        h = put("h", params["decay"] * state["h"] + jnp.tanh(y))
        return {**state, "h": h}, linear(params["readout.weight"], h.reshape(*x.shape[:-2], 15))

    return from_module(
        Convolutional(),
        step,
        groups=(("h",),),
        exact=True,
        batch=batch,
        dtype=dtype,
        x_shape=(5, 2),
    )


case("stock", "convolution", batch=2, name="stock_conv1d")(build_convolutional)
case("stock", "convolution", "no_batch", batch=None, name="stock_conv1d_no_batch")(build_convolutional)


class Dropped(nn.Module):
    """Stock dropout on the input of an IndRNN and on its output."""

    def __init__(self):
        super().__init__()
        self.W = nn.Linear(3, 4)
        self.u = brainstate.ParamState(jnp.full(4, 0.5))
        self.dropout = nn.Dropout(0.7)
        self.readout = nn.Linear(4, 2)

    def init_state(self, batch_size=None, **kwargs):
        self.h = brainstate.HiddenState(jnp.zeros(shape(batch_size, 4)))

    def update(self, x):
        with brainstate.environ.context(fit=True):
            self.h.value = jnp.tanh(self.W(self.dropout(x)) + self.u.value * self.h.value)
            return self.readout(self.dropout(self.h.value))


@case("stock", "random")
def stock_dropout(batch, dtype):
    def drop(key, v):
        key, draw = jax.random.split(key)
        return key, jnp.where(jax.random.bernoulli(draw, 0.7, v.shape), v / 0.7, 0.0)

    def step(params, state, x, *, cut, put):
        key, x = drop(state["rng"], x)
        h = put("h", jnp.tanh(linear(params["W.weight"], x) + params["u"] * state["h"]))
        key, kept = drop(key, h)
        return {**state, "h": h, "rng": key}, linear(params["readout.weight"], kept)

    return from_module(
        Dropped(), step, groups=(("h",),), exact=True, batch=batch, dtype=dtype, rng_state=True
    )
