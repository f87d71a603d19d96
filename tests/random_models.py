"""Random recurrent models with their instrumented steps, for hypothesis.

A :class:`Recipe` is plain data, so that hypothesis can print and shrink it. :func:`body` reads it as a step in the
convention of `oracles`: every place where credit ends in the local version wears `cut`, put there by the rule that a
value which spreads over several units is cut at the use closest to the new state.

A model has one or two layers of one or two states. A new state is

    h' = phi(decay(h) + sum of couplings + sum of drives), or a gated mixture of that with h

where couplings are elementwise in other states of the layer (old, or new ones computed before), and a drive is a weight
on the input, on an encoded input, on states or on the layer below, moved about and normalised on its way.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

#: At least four: a weight of one column would not spread a value, and two parts of two columns must fit.
UNITS = (4, 5)
INPUTS, OUTPUTS = 2, 2

ACTIVATIONS = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "sin": jnp.sin,
    "identity": lambda v: v,
    "softsign": lambda v: v / (1.0 + jnp.sqrt(1.0 + v * v)),
    "swish": lambda v: v * jax.nn.sigmoid(v),
    "bump": lambda v: jnp.exp(-v * v),
}
#: Effective weights: functions of raw parameters alone.
WEIGHTS = ("plain", "tanh", "masked", "sum", "scaled", "low_rank", "normed", "transposed")
#: Where the elements of a drive go before they reach the state; none of these spreads.
MOVES = ("none", "roll", "reverse", "permute", "slice", "stride", "concatenate", "gate", "transposed")
#: What happens to a drive with one value per unit; the last four spread credit, and cut it.
TAILS = ("none", "gain", "square", "centred", "rms", "softmax", "smoothed")
SOURCES = ("input", "encoded", "old", "new", "below", "mean", "neighbour")
DECAYS = ("constant", "vector", "scalar", "forget", "state", "quadratic")
MIXES = ("sum", "gated", "product")


@dataclasses.dataclass(frozen=True)
class Drive:
    """A weight on `source`; `which` picks the state where the source is one."""

    source: str
    which: int = 0
    weight: str = "plain"
    move: str = "none"
    tail: str = "none"
    bias: bool = False
    activation: str = "identity"


@dataclasses.dataclass(frozen=True)
class Coupling:
    """Elementwise influence of another state of the layer, old or new."""

    which: int
    new: bool
    parameter: bool
    activation: str = "identity"


@dataclasses.dataclass(frozen=True)
class StateRecipe:
    decay: str
    activation: str
    mix: str
    drives: tuple[Drive, ...]
    couplings: tuple[Coupling, ...] = ()


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model; `readout_old` lets the result read an old state too, past the new ones."""

    layers: tuple[tuple[StateRecipe, ...], ...]
    batch: int | None
    readout: str = "tanh"
    readout_old: bool = False
    tied: bool = False
    state_in_output: bool = False
    seed: int = 0


# --- drawing --------------------------------------------------------------------------------------------------------------


@st.composite
def drives(draw, layer: int, first: bool) -> Drive:
    sources = [s for s in SOURCES if s != "below" or layer]
    source = ("below" if layer else "input") if first else draw(st.sampled_from(sources))
    return Drive(
        source,
        draw(st.integers(0, 1)),
        draw(st.sampled_from(WEIGHTS)),
        draw(st.sampled_from(MOVES)),
        draw(st.sampled_from(TAILS)),
        draw(st.booleans()),
        draw(st.sampled_from(sorted(ACTIVATIONS))),
    )


@st.composite
def states(draw, layer: int, number: int, count: int) -> StateRecipe:
    amount = draw(st.integers(0 if number else 1, 2 if not (number or layer) else 1))
    couplings = []
    if count > 1:
        for _ in range(draw(st.integers(0, 1))):
            which = draw(st.integers(0, count - 1))
            couplings.append(
                Coupling(which, draw(st.booleans()) and which < number, draw(st.booleans()), draw(st.sampled_from(sorted(ACTIVATIONS))))
            )  # fmt: skip
    return StateRecipe(
        draw(st.sampled_from(DECAYS)),
        draw(st.sampled_from(sorted(ACTIVATIONS))),
        draw(st.sampled_from(MIXES)),
        tuple(draw(drives(layer, first=k == 0)) for k in range(amount)),
        tuple(couplings),
    )


@st.composite
def recipes(draw) -> Recipe:
    layers = []
    for layer in range(draw(st.integers(1, 2))):
        count = draw(st.integers(1, 2 if not layer else 1))
        layers.append(tuple(draw(states(layer, k, count)) for k in range(count)))
    return Recipe(
        tuple(layers),
        draw(st.sampled_from([None, 2])),
        draw(st.sampled_from(sorted(ACTIVATIONS))),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 9)),
    )


# --- running --------------------------------------------------------------------------------------------------------------


class Parameters:
    """Hands out parameters by name: draws them on the first run of the body, then reads them from a dict."""

    def __init__(self, given: dict | None, seed: int = 0):
        self.given, self.drawn = given, {}
        self.rng = np.random.default_rng(seed)

    def __call__(self, name: str, *shape: int):
        if self.given is not None:
            return self.given[name]
        if name not in self.drawn:
            scale = 0.8 / np.sqrt(shape[0]) if len(shape) > 1 else 0.6
            self.drawn[name] = self.rng.normal(size=shape) * scale
        return self.drawn[name]


def effective(p: Parameters, kind: str, name: str, rows: int, columns: int):
    w = p(f"{name}.w", *((columns, rows) if kind == "transposed" else (rows, columns)))
    if kind == "tanh":
        return jnp.tanh(w)
    if kind == "masked":
        return w * (np.add.outer(np.arange(rows), np.arange(columns)) % 3 != 1)
    if kind == "sum":
        return w + p(f"{name}.w2", rows, columns)
    if kind == "scaled":
        return w * p(f"{name}.scale", columns)
    if kind == "low_rank":
        return w + p(f"{name}.a", rows, 1) @ p(f"{name}.b", 1, columns)
    if kind == "normed":
        return w / jnp.sqrt(jnp.sum(w * w, 0) + 0.1)
    if kind == "transposed":
        return w.T
    return w


def moved(p: Parameters, kind: str, z, weight: str, name: str, units: int):
    """`z` times a weight, and its elements brought to the units."""
    rows = z.shape[-1]
    wide = {"slice": units + 2, "stride": 2 * units, "gate": 3 * units, "transposed": 2 * units}.get(
        kind, units
    )
    if kind == "concatenate":
        two = z @ effective(p, weight, name, rows, 2)
        return jnp.concatenate([two, z @ effective(p, weight, f"{name}.rest", rows, units - 2)], -1)
    y = z @ effective(p, weight, name, rows, wide)
    if kind == "roll":
        return jnp.roll(y, 1, -1)
    if kind == "reverse":
        return y[..., ::-1]
    if kind == "permute":
        return y[..., np.random.default_rng(units).permutation(units)]
    if kind == "slice":
        return y[..., 1 : units + 1]
    if kind == "stride":
        return y[..., ::2]
    if kind == "gate":
        a, b, c = jnp.split(y, 3, -1)
        return jax.nn.sigmoid(a) * jnp.tanh(b) - 0.5 * c
    if kind == "transposed":
        pairs = jnp.swapaxes(y.reshape(*y.shape[:-1], units, 2), -1, -2)
        return pairs[..., 0, :] * jnp.tanh(pairs[..., 1, :])
    return y


def tailed(p: Parameters, kind: str, y, name: str, cut):
    if kind == "gain":
        return y * p(f"{name}.gain", y.shape[-1])
    if kind == "square":
        return y + 0.3 * y * y
    if kind == "centred":
        return y - cut(jnp.mean(y, -1, keepdims=True))
    if kind == "rms":
        return y / jnp.sqrt(cut(jnp.mean(y * y, -1, keepdims=True)) + 0.5)
    if kind == "softmax":
        e = jnp.exp(y)
        return e / (cut(jnp.sum(e, -1, keepdims=True)) + 0.5)
    if kind == "smoothed":
        return y + 0.3 * jnp.roll(cut(y), 1, -1)
    return y


def body(recipe: Recipe, p: Parameters, old: dict, x, cut, put):
    """The step of `recipe`; returns (new states, result)."""
    new: dict = {}
    below = x
    for layer, cells in enumerate(recipe.layers):
        units = UNITS[layer]
        names = [f"h{layer}{k}" for k in range(len(cells))]
        for number, cell in enumerate(cells):
            own = names[number]
            h = old[own]

            def source(drive: Drive, name: str, number=number, names=names, below=below, layer=layer, h=h):
                which = names[drive.which % len(names)]
                if drive.source == "input":
                    return x
                if drive.source == "encoded":
                    return cut(jnp.tanh(x @ p(f"{name}.encoder", INPUTS, 2)))
                if drive.source == "below":
                    return cut(below) if layer else below
                if drive.source == "new" and drive.which % len(names) < number:
                    return cut(jnp.tanh(new[which]))
                if drive.source == "mean":
                    return cut(jnp.mean(old[which], -1, keepdims=True))
                if drive.source == "neighbour":
                    return cut(jnp.roll(h, 1, -1))  # h reaches its own position too: that use is kept
                return cut(old[which])

            terms = []
            for k, drive in enumerate(cell.drives):
                name = f"{own}.d{k}"
                weight_name = "tied" if recipe.tied and (drive.source, drive.weight, drive.move, layer) == ("input", "plain", "none", 0) else name  # fmt: skip
                z = source(drive, name)
                if drive.source in ("mean", "neighbour"):  # elementwise weights on what the neighbours do
                    y = z * p(f"{name}.w", units)
                else:
                    y = moved(p, drive.move, z, drive.weight, weight_name, units)
                if drive.bias:
                    y = y + p(f"{name}.bias", units)
                terms.append(ACTIVATIONS[drive.activation](tailed(p, drive.tail, y, name, cut)))
            for k, coupling in enumerate(cell.couplings):
                other = names[coupling.which]
                v = ACTIVATIONS[coupling.activation](new[other] if coupling.new else old[other])
                terms.append(v * (p(f"{own}.c{k}", units) if coupling.parameter else 0.4))
            drive_sum = sum(terms[1:], start=terms[0]) if terms else p(f"{own}.bias", units)

            if cell.decay == "vector":
                kept = p(f"{own}.decay", units) * h
            elif cell.decay == "scalar":
                kept = jnp.tanh(p(f"{own}.decay")) * h
            elif cell.decay == "forget":
                kept = (
                    jax.nn.sigmoid(x @ p(f"{own}.f", INPUTS, units) + cut(h) @ p(f"{own}.g", units, units))
                    * h
                )
            elif cell.decay == "state":
                kept = 0.5 * h * jax.nn.sigmoid(h)
            elif cell.decay == "quadratic":
                kept = 0.6 * h - 0.2 * h * h * p(f"{own}.q", units)
            else:
                kept = 0.7 * h
            phi = ACTIVATIONS[cell.activation]
            if cell.mix == "gated":
                z = jax.nn.sigmoid(x @ p(f"{own}.z", INPUTS, units))
                value = (1.0 - z) * kept + z * phi(drive_sum)
            elif cell.mix == "product":
                value = jnp.tanh(kept + phi(drive_sum) * (0.5 + 0.3 * h))
            else:
                value = phi(kept + drive_sum) + 0.2 * h
            new[own] = put(own, value)
        below = new[names[-1]]
    read = jnp.concatenate([new[n] for n in sorted(new)], -1)
    y = ACTIVATIONS[recipe.readout](read) @ p("readout", read.shape[-1], OUTPUTS)
    if recipe.readout_old:
        y = y + jnp.sin(old["h00"]) @ p("readout_old", UNITS[0], OUTPUTS)
    if recipe.state_in_output:
        return new, {"y": y, "h": below}
    return new, y


def loss_fn(out, target):
    if isinstance(out, dict):
        return jnp.sum((out["y"] - target) ** 2) + 0.1 * jnp.sum(out["h"] ** 3)
    return jnp.sum((out - target) ** 2)


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """A recipe with numbers: see `zoo.Built`, which it resembles."""

    recipe: Recipe
    params: dict
    state: dict
    groups: tuple[tuple[str, ...], ...]
    exact: bool
    xs: jax.Array
    targets: jax.Array

    def step(self, params, state, x, *, cut, put):
        return body(self.recipe, Parameters(params), state, x, cut, put)

    def plain(self, params, state, x):
        return body(self.recipe, Parameters(params), state, x, lambda v: v, lambda name, v: v)


def build(recipe: Recipe, length: int = 4) -> RandomModel:
    rng = np.random.default_rng(recipe.seed + 100)
    head = () if recipe.batch is None else (recipe.batch,)
    state = {
        f"h{layer}{k}": jnp.asarray(0.6 * rng.normal(size=(*head, UNITS[layer])))
        for layer, cells in enumerate(recipe.layers)
        for k in range(len(cells))
    }
    xs = jnp.asarray(rng.normal(size=(length, *head, INPUTS)))
    targets = jnp.asarray(rng.normal(size=(length, *head, OUTPUTS)))
    draws, cuts = Parameters(None, recipe.seed), []

    def counted(value):
        cuts.append(value)
        return value

    jax.eval_shape(lambda x: body(recipe, draws, state, x, counted, lambda name, v: v), xs[0])
    drawn = jax.tree.map(jnp.asarray, draws.drawn)
    return RandomModel(recipe, drawn, state, groups_of(recipe), not cuts, xs, targets)


def groups_of(recipe: Recipe) -> tuple[tuple[str, ...], ...]:
    """States of one layer that feed each other elementwise."""
    groups = []
    for layer, cells in enumerate(recipe.layers):
        owner = list(range(len(cells)))
        for number, cell in enumerate(cells):
            for coupling in cell.couplings:
                a, b = owner[number], owner[coupling.which]
                owner = [a if o == b else o for o in owner]
        for o in dict.fromkeys(owner):
            groups.append(tuple(f"h{layer}{k}" for k in range(len(cells)) if owner[k] == o))
    return tuple(groups)
