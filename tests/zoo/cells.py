"""Stock brainstate cells with linear readouts, alone, stacked, and behind an encoder."""

from __future__ import annotations

import dataclasses

import brainstate
import jax
import jax.numpy as jnp

from .base import case, cat, from_module, linear

nn = brainstate.nn
sigmoid = jax.nn.sigmoid


# Each cell by hand: (params of the cell by name, old states, x, cut, put) -> (new states, output).


def vanilla_cell(p, s, x, cut, put, activation=jax.nn.relu):
    h = put("h", activation(linear(p("W.weight"), cut(cat(x, s["h"])))))
    return {"h": h}, h


def gru_cell(p, s, x, cut, put):
    h = s["h"]
    r, z = jnp.split(sigmoid(linear(p("Wrz.weight"), cut(cat(x, h)))), 2, axis=-1)
    candidate = jnp.tanh(linear(p("Wh.weight"), cut(cat(x, r * h))))
    h = put("h", (1 - z) * h + z * candidate)
    return {"h": h}, h


def mgu_cell(p, s, x, cut, put):
    h = s["h"]
    f = sigmoid(linear(p("Wf.weight"), cut(cat(x, h))))
    candidate = jnp.tanh(linear(p("Wh.weight"), cut(cat(x, f * h))))
    h = put("h", (1 - f) * h + f * candidate)
    return {"h": h}, h


def lstm_cell(p, s, x, cut, put):
    i, g, f, o = jnp.split(linear(p("W.weight"), cut(cat(x, s["h"]))), 4, axis=-1)
    c = put("c", sigmoid(f + 1.0) * s["c"] + sigmoid(i) * jnp.tanh(g))
    h = put("h", sigmoid(o) * jnp.tanh(c))
    return {"c": c, "h": h}, h


def urlstm_cell(p, s, x, cut, put):
    f, r, u, o = jnp.split(linear(p("W.weight"), cut(cat(x, s["h"]))), 4, axis=-1)
    f, r = sigmoid(f + p("bias")), sigmoid(r - p("bias"))
    g = 2 * r * f + (1 - 2 * r) * f**2
    c = put("c", g * s["c"] + (1 - g) * jnp.tanh(u))
    h = put("h", sigmoid(o) * jnp.tanh(c))
    return {"c": c, "h": h}, h


CELLS = {
    "vanilla": (nn.ValinaRNNCell, vanilla_cell, ("h",)),
    "gru": (nn.GRUCell, gru_cell, ("h",)),
    "mgu": (nn.MGUCell, mgu_cell, ("h",)),
    "lstm": (nn.LSTMCell, lstm_cell, ("c", "h")),
    "urlstm": (nn.URLSTMCell, urlstm_cell, ("c", "h")),
}


def run_cell(kind, prefix, params, state, x, cut, put):
    """One cell whose parameters and states live under `prefix`; returns its new states by full path."""
    _, cell, names = CELLS[kind]
    old = {n: state[f"{prefix}.{n}"] for n in names}
    new, out = cell(
        lambda name: params[f"{prefix}.{name}"], old, x, cut, lambda name, v: put(f"{prefix}.{name}", v)
    )
    return {f"{prefix}.{n}": v for n, v in new.items()}, out


def states_of(kind, prefix):
    return tuple(f"{prefix}.{n}" for n in CELLS[kind][2])


class OneCell(nn.Module):
    def __init__(self, cell, n_hidden, n_out):
        super().__init__()
        self.cell = cell
        self.readout = nn.Linear(n_hidden, n_out)

    def update(self, x):
        return self.readout(self.cell(x))


def one_cell_step(kind):
    def step(params, state, x, *, cut, put):
        new, h = run_cell(kind, "cell", params, state, x, cut, put)
        return {**state, **new}, linear(params["readout.weight"], h)

    return step


def build_one_cell(kind, batch, dtype, n_in=3, n_hidden=4, n_out=2):
    module = OneCell(CELLS[kind][0](n_in, n_hidden), n_hidden, n_out)
    return from_module(
        module,
        one_cell_step(kind),
        groups=(states_of(kind, "cell"),),
        exact=False,
        batch=batch,
        dtype=dtype,
        n_in=n_in,
        n_out=n_out,
    )


for _kind in CELLS:
    case("cell", "stock", name=_kind)(lambda batch, dtype, kind=_kind: build_one_cell(kind, batch, dtype))

case("cell", "no_batch", batch=None, name="gru_no_batch")(lambda b, d: build_one_cell("gru", b, d))
case("cell", "no_batch", batch=None, name="lstm_no_batch")(lambda b, d: build_one_cell("lstm", b, d))
case("cell", batch=1, name="gru_batch_1")(lambda b, d: build_one_cell("gru", b, d))
case("cell", batch=5, name="lstm_odd_sizes")(lambda b, d: build_one_cell("lstm", b, d, 1, 7, 1))


class Stack(nn.Module):
    """Cells one on the other under the names layer0, layer1, ..., and a readout of the last."""

    def __init__(self, cells, n_hidden, n_out):
        super().__init__()
        self.depth = len(cells)
        for i, cell in enumerate(cells):
            setattr(self, f"layer{i}", cell)
        self.readout = nn.Linear(n_hidden, n_out)

    def update(self, x):
        for i in range(self.depth):
            x = getattr(self, f"layer{i}")(x)
        return self.readout(x)


def build_stack(kinds, batch, dtype, sizes=(3, 4, 3, 5)):
    cells = [CELLS[k][0](sizes[i], sizes[i + 1]) for i, k in enumerate(kinds)]

    def step(params, state, x, *, cut, put):
        new_state = dict(state)
        for i, kind in enumerate(kinds):
            new, x = run_cell(kind, f"layer{i}", params, state, x, cut, put)
            new_state.update(new)
        return new_state, linear(params["readout.weight"], x)

    return from_module(
        Stack(cells, sizes[len(kinds)], 2),
        step,
        groups=tuple(states_of(k, f"layer{i}") for i, k in enumerate(kinds)),
        exact=False,
        batch=batch,
        dtype=dtype,
    )


@case("cell", "stacked")
def gru_gru(batch, dtype):
    return build_stack(("gru", "gru"), batch, dtype)


@case("cell", "stacked")
def lstm_gru(batch, dtype):
    return build_stack(("lstm", "gru"), batch, dtype)


@case("cell", "stacked")
def vanilla_mgu_lstm(batch, dtype):
    return build_stack(("vanilla", "mgu", "lstm"), batch, dtype)


class Encoded(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(5, 4)
        self.cell = nn.GRUCell(4, 4)
        self.readout = nn.Linear(4, 2)

    def update(self, x):
        x = jnp.tanh(self.first(x))
        x = jax.nn.softplus(self.second(x))
        return self.readout(self.cell(x))


@case("cell")
def mlp_encoder_gru(batch, dtype):
    def step(params, state, x, *, cut, put):
        x = jnp.tanh(linear(params["first.weight"], x))
        x = jax.nn.softplus(linear(params["second.weight"], cut(x)))
        new, h = run_cell("gru", "cell", params, state, x, cut, put)
        return {**state, **new}, linear(params["readout.weight"], h)

    return from_module(Encoded(), step, groups=(("cell.h",),), exact=False, batch=batch, dtype=dtype)


@case("cell", "stock")
def gru_of_one_unit(batch, dtype):
    """With a single unit a matrix spreads nothing, so even the recurrent weights are learned exactly."""
    built = build_one_cell("gru", batch, dtype, 3, 1, 2)

    def uncut(params, state, x, *, cut, put):
        return built.step(params, state, x, cut=lambda v: v, put=put)

    return dataclasses.replace(built, step=uncut, exact=True)
