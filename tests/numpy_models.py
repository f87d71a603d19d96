"""Five small models written twice: as a user writes them, and in plain numpy with derivatives by hand.

The numpy side knows nothing of etcompile and uses no autodiff. Its result is one `StepTables` per step, in which every
array is dense and flat, so that a learning rule is a few matrix products (`numpy_rules`). Units of all states
are numbered batch first; a *position* is one unit of a group, a *row* one of the group's states.

Sizes: S numbers in all states, K states of a group, P positions, Y elements of a site's result y, E elements of the
effective weight that the site reads (a bias is broadcast over the batch first), W elements of the weight itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

import etcompile

Array = np.ndarray
Arrays = dict[str, Array]

BATCH, LENGTH = 3, 6


# --- Tables ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Hidden states that feed each other unit by unit.

    Attributes
    ----------
    states : tuple of str
    index : int array [K, P]
        Where each state's units stand among all S.
    shape : tuple of int
        Batch, then the units' own axes.
    transition : array [K, K, P]
        D_t: recurrent matrix products and convolutions cut.
    show : array [K, P]
        Derivative of what the rest of the network reads (h, or the spike z) by each new state.
    signal : array [K, P] or None
        L_t: the new states independent of each other.
    shown : array [P] or None
        What the rest of the network reads.
    """

    states: tuple[str, ...]
    index: Array
    shape: tuple[int, ...]
    transition: Array
    show: Array
    signal: Array | None = None
    shown: Array | None = None

    @property
    def units(self) -> int:
        return int(np.prod(self.shape[1:]))


@dataclass(frozen=True)
class Site:
    """Where a weight meets data.

    Attributes
    ----------
    x : array [Y, E]
        dy/d(effective weight): the presynaptic values, each where it belongs.
    x_pattern : array [Y, E] of bool
        Which entries of `x` can differ from zero.
    raw : array [E, W]
        d(effective weight)/d(weight): ones for a plain weight, a broadcast, a mask.
    shape : tuple of int
        Of the weight.
    row : int array [Y]
        Elements of y with the same number meet the same presynaptic vector (an example; a pixel of one).
    elementwise : bool
        The effective weight is y itself.
    group : str or None
        The group that y reaches unit by unit.
    immediate : array [K, Y], at : int array [Y]
        f_t, and the position that each element of y belongs to.
    credit : array [Y] or None
        q_t = dloss_t/dy_t, old states constant.
    """

    x: Array
    x_pattern: Array
    raw: Array
    shape: tuple[int, ...]
    row: Array
    elementwise: bool = False
    group: str | None = None
    immediate: Array | None = None
    at: Array | None = None
    credit: Array | None = None


@dataclass(frozen=True)
class StepTables:
    """Everything a learning rule may want to know of one step.

    Attributes
    ----------
    error : array [B, outputs] or None
        dloss_t/dout_t; None at a step without a loss.
    recurrence : array [S, S]
        H_t = dh_t/dh_{t-1}, nothing cut.
    influence : dict of array [S, E]
        F_t = dh_t/d(effective weight), old states constant.
    by_y : dict of array [S, Y]
        dh_t/dy_t, old states constant.
    past : array [S] or None
        dloss_t/dh_{t-1}, in total.
    layers : dict of int array
        Indices of the states that feed each other across steps (strongly connected).
    layer_of : dict of str
        The first layer that each weight reaches.
    readout : str, read : str
        The readout's matrix, and the group that it reads.
    """

    out: Array
    states: Arrays
    weights: Arrays
    groups: dict[str, Group]
    sites: dict[str, Site]
    recurrence: Array
    recurrence_pattern: Array
    influence: Arrays
    influence_pattern: Arrays
    by_y: Arrays
    layers: dict[str, Array]
    layer_of: dict[str, str]
    readout: str
    read: str
    target: Array | None = None
    loss: float | None = None
    error: Array | None = None
    past: Array | None = None

    @property
    def batch(self) -> int:
        return self.out.shape[0]

    def one_step(self, name: str) -> Array:
        """Gradient [E] of this step's loss, old states constant."""
        return self.sites[name].credit @ self.sites[name].x

    @property
    def traced(self) -> list[str]:
        """Weights with a relation."""
        return [name for name, site in self.sites.items() if site.group is not None]

    def each_traced(self) -> Iterator[tuple[str, Site, Group]]:
        """Weights with a relation, with their site and group."""
        for name in self.traced:
            yield name, self.sites[name], self.groups[self.sites[name].group]


@dataclass
class Parts:
    """What a model derives by hand; `assemble` does the bookkeeping.

    ``within`` [S, S] is the derivative of the final new states by each group's own: the identity, and what later layers make
    of earlier ones within the step. ``mixing[w]`` [Y, S] is dy/dh_{t-1} at a site that reads old states. ``shown``
    [S, B * outputs] is dout/dh_t, the new states independent.
    """

    states: Arrays
    out: Array
    groups: dict[str, Group]
    sites: dict[str, Site]
    mixing: Arrays
    shown: Array
    readout: str
    read: str
    within: Array | None = None
    layers: dict[str, list[str]] = field(default_factory=dict)


def assemble(parts: Parts, weights: Arrays, target: Array | None, loss: Loss | None) -> StepTables:
    """The chain rule, once for all models."""
    offset, total = {}, 0
    for name, value in parts.states.items():
        offset[name] = np.arange(total, total + value.size)
        total += value.size
    within = np.eye(total) if parts.within is None else parts.within

    local = np.zeros((total, total))
    for g in parts.groups.values():
        for k in range(len(g.states)):
            for j in range(len(g.states)):
                local[g.index[k], g.index[j]] += g.transition[k, j]
    by_y = {}
    for name, site in parts.sites.items():
        if site.group is None:
            continue
        own = np.zeros((total, site.x.shape[0]))
        for k, row in enumerate(parts.groups[site.group].index):
            own[row[site.at], np.arange(own.shape[1])] += site.immediate[k]
        by_y[name] = own
    mixed = local + sum(by_y[name] @ m for name, m in parts.mixing.items())
    # No entry cancels by chance, so that non-zero means structurally non-zero here.
    pattern = within @ ((local != 0) | sum((by_y[n] != 0) @ (m != 0) for n, m in parts.mixing.items())) != 0
    by_y = {name: within @ m for name, m in by_y.items()}
    recurrence = within @ mixed
    influence = {name: m @ parts.sites[name].x for name, m in by_y.items()}
    influence_pattern = {
        name: ((m != 0).astype(int) @ parts.sites[name].x_pattern.astype(int)) != 0
        for name, m in by_y.items()
    }

    groups, sites, extra = dict(parts.groups), dict(parts.sites), {}
    if loss is not None:
        value, error = loss.numpy(parts.out, target)
        final = parts.shown @ error.ravel()
        seen = final @ within
        groups = {n: replace(g, signal=seen[g.index]) for n, g in groups.items()}
        for name, site in sites.items():
            sites[name] = replace(site, credit=final @ by_y[name] if name in by_y else error.ravel())
        extra = dict(target=target, loss=value, error=error, past=final @ recurrence)
    layers = parts.layers or {g: list(group.states) for g, group in parts.groups.items()}
    layer_of = {
        name: next(layer for layer, names in layers.items() if parts.groups[site.group].states[0] in names)
        for name, site in parts.sites.items()
        if site.group is not None
    }
    return StepTables(
        parts.out,
        parts.states,
        weights,
        groups,
        sites,
        recurrence,
        pattern,
        influence,
        influence_pattern,
        by_y,
        {layer: np.concatenate([offset[n] for n in names]) for layer, names in layers.items()},
        layer_of,
        parts.readout,
        parts.read,
        **extra,
    )


# --- Losses -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """A loss for both sides: ``jax(out, target)``, and ``numpy(out, target)`` with its derivative by `out`."""

    jax: Callable[[Any, Any], Any]
    numpy: Callable[[Array, Array], tuple[float, Array]]


def _squared(out, target):
    return jnp.sum((out - target) ** 2)


def _cross_entropy(out, label):
    return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(out), label[..., None], -1))


def _cross_entropy_numpy(out: Array, label: Array) -> tuple[float, Array]:
    weight = np.exp(out - out.max(-1, keepdims=True))
    p = weight / weight.sum(-1, keepdims=True)
    hot = np.eye(out.shape[-1])[label]
    return -float(np.sum(hot * np.log(p))), p - hot


SQUARED = Loss(_squared, lambda out, target: (float(np.sum((out - target) ** 2)), 2 * (out - target)))
CROSS_ENTROPY = Loss(_cross_entropy, _cross_entropy_numpy)


# --- Pieces ---------------------------------------------------------------------------------------------------------------


def matrix_site(x: Array, w: Array, mask: Array | None = None) -> Site:
    """``y = x @ w``, or ``x @ (w * mask)``: y[b, o] meets w[:, o] with x[b]."""

    def spread(v: Array) -> Array:
        return np.einsum("bi,op->boip", v, np.eye(w.shape[1])).reshape(v.shape[0] * w.shape[1], w.size)

    raw = np.eye(w.size) if mask is None else np.diag(mask.ravel())
    return Site(
        spread(x), spread(np.ones_like(x)) != 0, raw, w.shape, np.repeat(np.arange(len(x)), w.shape[1])
    )


def spread_site(y: Array, w: Array) -> Site:
    """``w`` broadcast over the batch (and space) to the shape of `y`, and used element by element."""
    raw = np.broadcast_to(np.eye(w.size).reshape(*w.shape, w.size), (*y.shape, w.size)).reshape(
        y.size, w.size
    )
    return Site(
        np.eye(y.size),
        np.eye(y.size) != 0,
        raw.copy(),
        w.shape,
        np.repeat(np.arange(len(y)), y.size // len(y)),
        elementwise=True,
    )


def product_by_input(w: Array, batch: int) -> Array:
    """dy/dx of ``y = x @ w``: [batch * outputs, batch * inputs]."""
    return np.kron(np.eye(batch), w.T)


def reaching(site: Site, group: str, immediate: list[Array], at: Array) -> Site:
    return replace(site, group=group, immediate=np.stack([f.ravel() for f in immediate]), at=at.ravel())


def positions(*shape: int) -> Array:
    return np.arange(int(np.prod(shape))).reshape(shape)


def group_of(
    states: Arrays, names: tuple[str, ...], transition: list[list[Array]], show: list[Array]
) -> Group:
    """A group of states of one shape, from D and the derivative of what it shows as arrays over units (or numbers)."""
    shape = states[names[0]].shape
    start = np.cumsum([0, *(v.size for v in states.values())])[list(states).index(names[0])]
    size = int(np.prod(shape))
    index = start + np.arange(len(names))[:, None] * size + np.arange(size)

    def full(v):
        return np.broadcast_to(v, shape).reshape(size)

    return Group(
        names,
        index,
        shape,
        np.array([[full(v) for v in row] for row in transition]),
        np.array([full(v) for v in show]),
    )


def shown_through(states: Arrays, name: str, v: Array, slope: Any = 1.0) -> Array:
    """dout/dh_t, [S, B * outputs], of ``out = (state, or a function of it with that slope) @ v``; other states zero."""
    batch, total = states[name].shape[0], sum(s.size for s in states.values())
    start = sum(s.size for s in list(states.values())[: list(states).index(name)])
    full = np.zeros((total, batch * v.shape[1]))
    slope = np.broadcast_to(slope, states[name].shape).reshape(-1, 1)
    full[start : start + states[name].size] = slope * np.kron(np.eye(batch), v)
    return full


def sigmoid(v: Array) -> Array:
    return 1 / (1 + np.exp(-v))


def untouched(name: str, value: Array) -> Array:
    return value


Hook = Callable[[str, Array], Array]


# --- Models ---------------------------------------------------------------------------------------------------------------


class Model:
    """One model with random weights, states and data.

    Attributes
    ----------
    weights, states : dict of array
        By the flattened path of etcompile's gradients; states have a batch axis even where the model has none.
    xs, targets : array [T, B, ...]
    """

    name = ""
    features: tuple[int, ...] = (3,)
    outputs = 2
    seed = 0

    def __init__(self, batch: int | None = BATCH, length: int = LENGTH) -> None:
        self.batch, self.rows = batch, batch or 1
        self._rng = np.random.default_rng([self.seed, sum(map(ord, self.name))])
        self.weights: Arrays = self.make_weights(self.draw)
        self.states: Arrays = self.make_states(lambda *shape: self.draw(self.rows, *shape, scale=0.5))
        self.xs = self.draw(length, self.rows, *self.features)
        self.targets = self.draw(length, self.rows, self.outputs)
        self.labels = self._rng.integers(0, self.outputs, (length, self.rows))

    def draw(self, *shape: int, scale: float = 1.0) -> Array:
        return scale * self._rng.standard_normal(shape)

    def make_weights(self, draw: Callable[..., Array]) -> Arrays:
        raise NotImplementedError

    def make_states(self, draw: Callable[..., Array]) -> Arrays:
        raise NotImplementedError

    # the user's side

    def fn(self, params: Mapping[str, Any], state: Mapping[str, Any], x: Any) -> tuple[dict, Any]:
        """The step as a user writes it."""
        raise NotImplementedError

    def build(self) -> Any:
        """A fresh model for `etcompile.compile`."""
        states = {k: jnp.asarray(self.outside(v)) for k, v in self.states.items()}
        return etcompile.from_function(self.fn, {k: jnp.asarray(v) for k, v in self.weights.items()}, states)

    def outside(self, value: Array) -> Array:
        """A value of one step as the model has it: without the batch axis where it has none."""
        return value[0] if self.batch is None else value

    def read_states(self, model: Any) -> Arrays:
        """States of a built model, with a batch axis."""
        return {k: np.asarray(v).reshape(self.states[k].shape) for k, v in model.state.items()}

    # the numpy side

    def forward(
        self,
        w: Arrays,
        states: Arrays,
        x: Array,
        *,
        mixed: Arrays | None = None,
        y: Hook = untouched,
        put: Hook = untouched,
        show: Hook = untouched,
    ) -> tuple[Arrays, Array]:
        """New states and output. For finite differences: `mixed` are the old states that cut uses read, `y` sees every site's
        result, `put` every new state on its way out of its group, `show` what a group shows."""
        raise NotImplementedError

    def parts(self, w: Arrays, states: Arrays, x: Array) -> Parts:
        """The derivatives by hand."""
        raise NotImplementedError

    def tables(
        self, w: Arrays, states: Arrays, x: Array, target: Array | None = None, loss: Loss | None = None
    ) -> StepTables:
        shown: Arrays = {}

        def look(name: str, value: Array) -> Array:
            shown[name] = value.ravel()
            return value

        self.forward(w, states, x, show=look)
        parts = self.parts(w, states, x)
        groups = {name: replace(group, shown=shown[name]) for name, group in parts.groups.items()}
        return assemble(replace(parts, groups=groups), dict(w), target, loss)

    def readout_site(self, shown: Array, w: Arrays) -> dict[str, Site]:
        return {
            self.readout: matrix_site(shown.reshape(self.rows, -1), w[self.readout]),
            self.offset: spread_site(np.zeros((self.rows, self.outputs)), w[self.offset]),
        }

    readout, offset = "V", "c"


class Rate(Model):
    """h' = tanh(x Wx + h Wh + b), out = h' V + c."""

    name = "rate"
    units = 4
    mask: Array | None = None

    def make_weights(self, draw):
        n = self.units
        return dict(
            Wx=draw(3, n, scale=0.6),
            Wh=draw(n, n, scale=0.7),
            b=draw(n, scale=0.3),
            V=draw(n, 2, scale=0.7),
            c=draw(2, scale=0.3),
        )

    def make_states(self, draw):
        return dict(h=draw(self.units))

    def fn(self, params, state, x):
        wh = params["Wh"] if self.mask is None else params["Wh"] * self.mask
        h = jnp.tanh(x @ params["Wx"] + state["h"] @ wh + params["b"])
        return {"h": h}, h @ params["V"] + params["c"]

    def _recurrent(self, w):
        return w["Wh"] if self.mask is None else w["Wh"] * self.mask

    def forward(self, w, states, x, *, mixed=None, y=untouched, put=untouched, show=untouched):
        mixed = mixed or states
        b = np.broadcast_to(w["b"], states["h"].shape)
        h = put("h", np.tanh(y("Wx", x @ w["Wx"]) + y("Wh", mixed["h"] @ self._recurrent(w)) + y("b", b)))
        return {"h": h}, y("V", show("g", h) @ w["V"]) + y("c", w["c"] + np.zeros((self.rows, 1)))

    def parts(self, w, states, x):
        new, out = self.forward(w, states, x)
        h = new["h"]
        slope, at = 1 - h**2, positions(*h.shape)
        sites = {
            "Wx": reaching(matrix_site(x, w["Wx"]), "g", [slope], at),
            "Wh": reaching(matrix_site(states["h"], w["Wh"], self.mask), "g", [slope], at),
            "b": reaching(spread_site(h, w["b"]), "g", [slope], at),
            **self.readout_site(h, w),
        }
        return Parts(
            new,
            out,
            {"g": group_of(new, ("h",), [[0.0]], [1.0])},
            sites,
            {"Wh": product_by_input(self._recurrent(w), self.rows)},
            shown_through(new, "h", w["V"]),
            "V",
            "g",
        )


class SparseRate(Rate):
    """`Rate` with a constant mask on Wh."""

    name = "sparse_rate"
    mask = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]], float)


class _LSTM(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = brainstate.nn.LSTMCell(3, 4)
        self.readout = brainstate.nn.Linear(4, 2)

    def update(self, x):
        return self.readout(self.cell(x))


class LSTM(Model):
    """Gates i, g, f, o from one matrix; c' = s(f + 1) c + s(i) tanh(g), h' = s(o) tanh(c'); a stock brainstate cell."""

    name = "lstm"
    units = 4
    W, b, readout, offset = (
        "cell.W.weight.weight",
        "cell.W.weight.bias",
        "readout.weight.weight",
        "readout.weight.bias",
    )

    def make_weights(self, draw):
        n = self.units
        return {
            self.W: draw(3 + n, 4 * n, scale=0.6),
            self.b: draw(4 * n, scale=0.4),
            self.readout: draw(n, 2, scale=0.7),
            self.offset: draw(2, scale=0.3),
        }

    def make_states(self, draw):
        return dict(c=draw(self.units), h=draw(self.units))

    def fn(self, params, state, x):
        """The same step without brainstate, for `jax.grad`."""
        u = jnp.concatenate([x, state["h"]], -1) @ params[self.W] + params[self.b]
        i, g, f, o = jnp.split(u, 4, -1)
        c = jax.nn.sigmoid(f + 1) * state["c"] + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return dict(c=c, h=h), h @ params[self.readout] + params[self.offset]

    def build(self):
        model = _LSTM()
        brainstate.nn.init_all_states(model, batch_size=self.batch)
        for path, state in (("cell.W.weight", model.cell.W.weight), ("readout.weight", model.readout.weight)):
            state.value = {k: jnp.asarray(self.weights[f"{path}.{k}"]) for k in ("weight", "bias")}
        model.cell.c.value = jnp.asarray(self.outside(self.states["c"]))
        model.cell.h.value = jnp.asarray(self.outside(self.states["h"]))
        return model

    def read_states(self, model):
        pair = dict(c=model.cell.c.value, h=model.cell.h.value)
        return {k: np.asarray(v).reshape(self.states[k].shape) for k, v in pair.items()}

    def _gates(self, w, states, x, mixed, y):
        xh = np.concatenate([x, mixed["h"]], -1)
        bias = np.broadcast_to(w[self.b], (self.rows, 4 * self.units))
        u = y(self.W, xh @ w[self.W]) + y(self.b, bias)
        i, g, f, o = np.split(u, 4, -1)
        return xh, sigmoid(i), np.tanh(g), sigmoid(f + 1), sigmoid(o)

    def forward(self, w, states, x, *, mixed=None, y=untouched, put=untouched, show=untouched):
        _, i, g, f, o = self._gates(w, states, x, mixed or states, y)
        c = f * states["c"] + i * g
        new = dict(c=put("c", c), h=put("h", o * np.tanh(c)))
        offset = y(self.offset, w[self.offset] + np.zeros((self.rows, 1)))
        return new, y(self.readout, show("g", new["h"]) @ w[self.readout]) + offset

    def parts(self, w, states, x):
        new, out = self.forward(w, states, x)
        xh, i, g, f, o = self._gates(w, states, x, states, untouched)
        c = new["c"]
        to_h = o * (1 - np.tanh(c) ** 2)  # dh'/dc'
        by_gate = [i * (1 - i) * g, i * (1 - g**2), f * (1 - f) * states["c"]]  # dc'/d(i, g, f)
        nothing = np.zeros_like(c)
        rows = [
            np.concatenate([*by_gate, nothing], -1),
            np.concatenate([*(to_h * v for v in by_gate), o * (1 - o) * np.tanh(c)], -1),
        ]
        at = np.concatenate([positions(*c.shape)] * 4, -1)
        sites = {
            self.W: reaching(matrix_site(xh, w[self.W]), "g", rows, at),
            self.b: reaching(spread_site(rows[0], w[self.b]), "g", rows, at),
            **self.readout_site(new["h"], w),
        }
        recurrent = product_by_input(w[self.W][3:], self.rows)
        return Parts(
            new,
            out,
            {"g": group_of(new, ("c", "h"), [[f, 0.0], [to_h * f, 0.0]], [0.0, 1.0])},
            sites,
            {self.W: np.concatenate([np.zeros_like(recurrent), recurrent], 1)},
            shown_through(new, "h", w[self.readout]),
            self.readout,
            "g",
        )


STEEP, GAIN = 3.0, 0.8


@jax.custom_jvp
def _spike(u):
    return (u > 0).astype(u.dtype)


@_spike.defjvp
def _spike_jvp(primals, tangents):
    (u,), (du,) = primals, tangents
    return _spike(u), du * GAIN / (1 + STEEP * jnp.abs(u)) ** 2


class Spiking(Model):
    """Current i, membrane v and adaptation a per unit; z = 1 where v exceeds 1 + BETA a; soft reset.

    i' = ALPHA i + x Wx + z Wr + b;  v' = LEAK v + i' - z;  a' = RHO a + z;  out = z(v', a') V + c
    """

    name = "spiking"
    units = 5
    seed = 2
    ALPHA, LEAK, RHO, BETA = 0.6, 0.8, 0.85, 0.3
    #: With a primitive of the surrogate slope in the place of the step, finite differences can check the derivatives.
    smooth = False

    def make_weights(self, draw):
        n = self.units
        return dict(
            Wx=draw(3, n, scale=0.5),
            Wr=draw(n, n, scale=0.5),
            b=0.15 + draw(n, scale=0.2),
            V=draw(n, 2, scale=0.7),
            c=draw(2, scale=0.3),
        )

    def make_states(self, draw):
        return dict(i=draw(self.units), v=0.6 + draw(self.units), a=np.abs(draw(self.units)))

    def fn(self, params, state, x):
        z = _spike(state["v"] - 1 - self.BETA * state["a"])
        i = self.ALPHA * state["i"] + x @ params["Wx"] + z @ params["Wr"] + params["b"]
        v = self.LEAK * state["v"] + i - z
        a = self.RHO * state["a"] + z
        return dict(i=i, v=v, a=a), _spike(v - 1 - self.BETA * a) @ params["V"] + params["c"]

    def spikes(self, states):
        u = states["v"] - 1 - self.BETA * states["a"]
        return GAIN * u / (1 + STEEP * np.abs(u)) if self.smooth else (u > 0).astype(float)

    def slope(self, states):
        return GAIN / (1 + STEEP * np.abs(states["v"] - 1 - self.BETA * states["a"])) ** 2

    def forward(self, w, states, x, *, mixed=None, y=untouched, put=untouched, show=untouched):
        z, sent = self.spikes(states), self.spikes(mixed or states)
        b = np.broadcast_to(w["b"], z.shape)
        i = self.ALPHA * states["i"] + y("Wx", x @ w["Wx"]) + y("Wr", sent @ w["Wr"]) + y("b", b)
        v = self.LEAK * states["v"] + i - z
        a = self.RHO * states["a"] + z
        new = dict(i=put("i", i), v=put("v", v), a=put("a", a))
        return new, y("V", show("g", self.spikes(new)) @ w["V"]) + y("c", w["c"] + np.zeros((self.rows, 1)))

    def parts(self, w, states, x):
        new, out = self.forward(w, states, x)
        z, before, after = self.spikes(states), self.slope(states), self.slope(new)
        dv, da = before, -self.BETA * before  # dz/dv, dz/da
        transition = [
            [self.ALPHA, 0.0, 0.0],
            [self.ALPHA, self.LEAK - dv, -da],
            [0.0, dv, self.RHO + da],
        ]
        one, at = np.ones_like(z), positions(*z.shape)
        rows = [one, one, 0 * one]  # v' takes the new current
        sites = {
            "Wx": reaching(matrix_site(x, w["Wx"]), "g", rows, at),
            "Wr": reaching(matrix_site(z, w["Wr"]), "g", rows, at),
            "b": reaching(spread_site(z, w["b"]), "g", rows, at),
            **self.readout_site(self.spikes(new), w),
        }
        recurrent = product_by_input(w["Wr"], self.rows)
        mixing = np.concatenate([0 * recurrent, recurrent * dv.ravel(), recurrent * da.ravel()], 1)
        shown = shown_through(new, "v", w["V"], after) + shown_through(new, "a", w["V"], -self.BETA * after)
        return Parts(
            new,
            out,
            {"g": group_of(new, ("i", "v", "a"), transition, [0.0, after, -self.BETA * after])},
            sites,
            {"Wr": mixing},
            shown,
            "V",
            "g",
        )


class Conv(Model):
    """h' = LEAK h + (1 - LEAK) tanh(conv(x, Kx) + conv(h, Kh) + b) on 5 pixels, out = flat(h') V + c."""

    name = "conv"
    pixels, channels, taps = 5, 2, 3
    features = (5, 2)
    LEAK = 0.7

    def make_weights(self, draw):
        c = self.channels
        return dict(
            Kx=draw(self.taps, 2, c, scale=0.6),
            Kh=draw(self.taps, c, c, scale=0.6),
            b=draw(c, scale=0.3),
            V=draw(self.pixels * c, 2, scale=0.6),
            c=draw(2, scale=0.3),
        )

    def make_states(self, draw):
        return dict(h=draw(self.pixels, self.channels))

    def fn(self, params, state, x):
        def conv(v, k):
            return jax.lax.conv_general_dilated(v, k, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))

        u = conv(x, params["Kx"]) + conv(state["h"], params["Kh"]) + params["b"]
        h = self.LEAK * state["h"] + (1 - self.LEAK) * jnp.tanh(u)
        return {"h": h}, h.reshape(h.shape[0], -1) @ params["V"] + params["c"]

    def _patches(self, v):
        """[B, pixel, tap, channel]: what each pixel sees, zeros beyond the ends."""
        wide = np.pad(v, ((0, 0), (1, 1), (0, 0)))
        return np.stack([wide[:, k : k + self.pixels] for k in range(self.taps)], 2)

    def _conv(self, v, k):
        return np.einsum("bpki,kio->bpo", self._patches(v), k)

    def _conv_site(self, v, k):
        def spread(patches):
            full = np.einsum("bpki,oq->bpokiq", patches, np.eye(k.shape[2]))
            return full.reshape(self.rows * self.pixels * k.shape[2], k.size)

        rows = np.repeat(np.arange(self.rows * self.pixels), k.shape[2])
        # Taps that see padding at a border count as seen: weights of one output channel share their pattern.
        pattern = spread(np.ones_like(self._patches(v))) != 0
        return Site(spread(self._patches(v)), pattern, np.eye(k.size), k.shape, rows)

    def _conv_by_input(self, k):
        columns = [
            self._conv(e[None], k).ravel()
            for e in np.eye(self.pixels * k.shape[1]).reshape(-1, self.pixels, k.shape[1])
        ]
        return np.kron(np.eye(self.rows), np.stack(columns, 1))

    def forward(self, w, states, x, *, mixed=None, y=untouched, put=untouched, show=untouched):
        mixed = mixed or states
        u = y("Kx", self._conv(x, w["Kx"])) + y("Kh", self._conv(mixed["h"], w["Kh"]))
        u = u + y("b", np.broadcast_to(w["b"], u.shape))
        h = put("h", self.LEAK * states["h"] + (1 - self.LEAK) * np.tanh(u))
        flat = show("g", h).reshape(self.rows, -1)
        return {"h": h}, y("V", flat @ w["V"]) + y("c", w["c"] + np.zeros((self.rows, 1)))

    def parts(self, w, states, x):
        new, out = self.forward(w, states, x)
        h = new["h"]
        rate = (h - self.LEAK * states["h"]) / (1 - self.LEAK)
        slope, at = (1 - self.LEAK) * (1 - rate**2), positions(*h.shape)
        sites = {
            "Kx": reaching(self._conv_site(x, w["Kx"]), "g", [slope], at),
            "Kh": reaching(self._conv_site(states["h"], w["Kh"]), "g", [slope], at),
            "b": reaching(spread_site(h, w["b"]), "g", [slope], at),
            **self.readout_site(h, w),
        }
        return Parts(
            new,
            out,
            {"g": group_of(new, ("h",), [[self.LEAK]], [1.0])},
            sites,
            {"Kh": self._conv_by_input(w["Kh"])},
            np.kron(np.eye(self.rows), w["V"]),
            "V",
            "g",
        )


class TwoLayer(Model):
    """h1' = LEAK h1 + tanh(x W1 + h1 R1 + b1);  h2' = lam h2 + tanh(h1' W2 + h2 R2 + b2);  out = h2' V + c."""

    name = "two_layer"
    LEAK = 0.6
    first, second = 4, 3

    def make_weights(self, draw):
        n, m = self.first, self.second
        return dict(
            W1=draw(3, n, scale=0.6),
            R1=draw(n, n, scale=0.5),
            b1=draw(n, scale=0.3),
            lam=0.5 + draw(m, scale=0.2),
            W2=draw(n, m, scale=0.6),
            R2=draw(m, m, scale=0.5),
            b2=draw(m, scale=0.3),
            V=draw(m, 2, scale=0.7),
            c=draw(2, scale=0.3),
        )

    def make_states(self, draw):
        return dict(h1=draw(self.first), h2=draw(self.second))

    def fn(self, params, state, x):
        h1 = self.LEAK * state["h1"] + jnp.tanh(x @ params["W1"] + state["h1"] @ params["R1"] + params["b1"])
        h2 = params["lam"] * state["h2"] + jnp.tanh(
            h1 @ params["W2"] + state["h2"] @ params["R2"] + params["b2"]
        )
        return dict(h1=h1, h2=h2), h2 @ params["V"] + params["c"]

    def forward(self, w, states, x, *, mixed=None, y=untouched, put=untouched, show=untouched):
        mixed = mixed or states

        def spread(name, like):
            return y(name, np.broadcast_to(w[name], like.shape))

        old1, old2 = states["h1"], states["h2"]
        u1 = y("W1", x @ w["W1"]) + y("R1", mixed["h1"] @ w["R1"]) + spread("b1", old1)
        h1 = put("h1", self.LEAK * old1 + np.tanh(u1))
        u2 = y("W2", show("g1", h1) @ w["W2"]) + y("R2", mixed["h2"] @ w["R2"]) + spread("b2", old2)
        h2 = put("h2", spread("lam", old2) * old2 + np.tanh(u2))
        return dict(h1=h1, h2=h2), y("V", show("g2", h2) @ w["V"]) + y("c", w["c"] + np.zeros((self.rows, 1)))

    def parts(self, w, states, x):
        new, out = self.forward(w, states, x)
        lam = np.broadcast_to(w["lam"], new["h2"].shape)
        slope1 = 1 - (new["h1"] - self.LEAK * states["h1"]) ** 2
        slope2 = 1 - (new["h2"] - lam * states["h2"]) ** 2
        at1, at2 = positions(*slope1.shape), positions(*slope2.shape)
        sites = {
            "W1": reaching(matrix_site(x, w["W1"]), "g1", [slope1], at1),
            "R1": reaching(matrix_site(states["h1"], w["R1"]), "g1", [slope1], at1),
            "b1": reaching(spread_site(slope1, w["b1"]), "g1", [slope1], at1),
            "lam": reaching(spread_site(slope2, w["lam"]), "g2", [states["h2"]], at2),
            "W2": reaching(matrix_site(new["h1"], w["W2"]), "g2", [slope2], at2),
            "R2": reaching(matrix_site(states["h2"], w["R2"]), "g2", [slope2], at2),
            "b2": reaching(spread_site(slope2, w["b2"]), "g2", [slope2], at2),
            **self.readout_site(new["h2"], w),
        }
        size1, size2 = slope1.size, slope2.size
        within = np.eye(size1 + size2)
        within[size1:, :size1] = slope2.reshape(-1, 1) * product_by_input(w["W2"], self.rows)
        recurrent1, recurrent2 = product_by_input(w["R1"], self.rows), product_by_input(w["R2"], self.rows)
        return Parts(
            new,
            out,
            {
                "g1": group_of(new, ("h1",), [[self.LEAK]], [1.0]),
                "g2": group_of(new, ("h2",), [[lam]], [1.0]),
            },
            sites,
            {
                "R1": np.concatenate([recurrent1, np.zeros((size1, size2))], 1),
                "R2": np.concatenate([np.zeros((size2, size1)), recurrent2], 1),
            },
            shown_through(new, "h2", w["V"]),
            "V",
            "g2",
            within,
        )


class Diagonal(Model):
    """No mixing at all: h' = LEAK h + x W + b with a constant leak; out = tanh(h') V + c."""

    name = "leaky"
    units = 4
    LEAK = 0.8

    def make_weights(self, draw):
        n = self.units
        return dict(
            W=draw(3, n, scale=0.6), b=draw(n, scale=0.3), V=draw(n, 2, scale=0.7), c=draw(2, scale=0.3)
        )

    def make_states(self, draw):
        return dict(h=draw(self.units))

    def fn(self, params, state, x):
        h = self.LEAK * state["h"] + x @ params["W"] + params["b"]
        return {"h": h}, jnp.tanh(h) @ params["V"] + params["c"]

    def forward(self, w, states, x, *, mixed=None, y=untouched, put=untouched, show=untouched):
        b = np.broadcast_to(w["b"], states["h"].shape)
        h = put("h", self.LEAK * states["h"] + y("W", x @ w["W"]) + y("b", b))
        return {"h": h}, y("V", show("g", np.tanh(h)) @ w["V"]) + y("c", w["c"] + np.zeros((self.rows, 1)))

    def parts(self, w, states, x):
        new, out = self.forward(w, states, x)
        h = new["h"]
        one, at, slope = np.ones_like(h), positions(*h.shape), 1 - np.tanh(h) ** 2
        sites = {
            "W": reaching(matrix_site(x, w["W"]), "g", [one], at),
            "b": reaching(spread_site(h, w["b"]), "g", [one], at),
            **self.readout_site(np.tanh(h), w),
        }
        return Parts(
            new,
            out,
            {"g": group_of(new, ("h",), [[self.LEAK]], [slope])},
            sites,
            {},
            shown_through(new, "h", w["V"], slope),
            "V",
            "g",
        )


MODELS: dict[str, type[Model]] = {m.name: m for m in (Rate, LSTM, Spiking, Conv, TwoLayer)}
EXTRA: dict[str, type[Model]] = {m.name: m for m in (SparseRate, Diagonal)}
