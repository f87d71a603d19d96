"""Random steps whose units lie anywhere: packed, paired, turned, delayed, as rows of a matrix; as tapped steps (`units.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

INPUTS, OUTPUTS = 3, 2

#: How several parts of one shape lie in memory: alone, or in one array.
PACKS = ("arrays", "dict", "tuple", "stack_last", "stack_first", "stack_middle", "concatenate", "interleave")

#: Of long delays: few that are told apart slot by slot, which are slow to compile where they feed back.
SLOTS = (33, 34, 40, 64, 48, 20)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One recurrence. ``options`` are draws that the kind reads as it likes."""

    kind: str
    pack: str
    options: tuple[int, ...]
    recurrent: bool


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Layers one after another, and what the output reads: new states, and perhaps old ones."""

    layers: tuple[Layer, ...]
    batch: int | None
    early: bool
    old: bool
    seed: int


def drawn(seed: int) -> Recipe:
    """The recipe of a number: kinds take turns, all else is random."""
    rng = np.random.default_rng(seed)
    kinds = [list(KINDS)[seed % len(KINDS)]]
    if rng.integers(4) == 0:
        kinds.append(rng.choice(list(KINDS)))
    layers = tuple(
        Layer(
            str(k),
            str(rng.choice(PACKS)),
            tuple(int(v) for v in rng.integers(60, size=8)),
            bool(rng.integers(6) == 0),
        )
        for k in kinds
    )
    batch = [None, 1, 2][rng.integers(3)]
    return Recipe(layers, batch, bool(rng.integers(2)), bool(rng.integers(3) == 0), seed)


class Draw:
    """What a layer is made with: its weights by name, its states by name, and how they are read and put."""

    def __init__(self, recipe: Recipe, number: int) -> None:
        self.recipe, self.number = recipe, number
        self.layer = recipe.layers[number]
        self.head = () if recipe.batch is None else (recipe.batch,)
        self.rng = np.random.default_rng([recipe.seed, number])
        self.params: dict[str, Any] = {}
        self.state: dict[str, Any] = {}
        self.width = 0
        self.slots = 0

    @property
    def last(self) -> bool:
        """Whether no weights follow: a single element of y would pass them, joined with none."""
        return self.number == len(self.recipe.layers) - 1 and not self.layer.recurrent

    def of(self, n: int, *choices):
        """The n-th draw of the layer, as one of the choices."""
        return choices[self.layer.options[n] % len(choices)]

    def name(self, what: str) -> str:
        return f"{what}{self.number}"

    def normal(self, *shape: int, scale: float = 0.6):
        return jnp.asarray(scale * self.rng.normal(size=shape))

    def weight(self, what: str, *shape: int) -> None:
        self.params.setdefault(self.name(what), self.normal(*shape))


class Run:
    """One step of a layer: its operations, and its states before and after."""

    def __init__(self, draw: Draw, state, op, put) -> None:
        self.draw, self.state, self.new, self.op, self.put = draw, state, {}, op, put

    def product(self, what: str, u):
        """A dense weight times u: (head, n)."""
        return self.op(self.draw.name(what), lambda w, u: u @ w, u)

    def number(self, what: str):
        """A weight used element by element."""
        return self.op(self.draw.name(what), lambda w: w)

    def old(self, what: str):
        return self.state[self.draw.name(what)]

    def set(self, what: str, value):
        name = self.draw.name(what)
        self.new[name] = self.put(name, value)
        return self.new[name]


# --- packing ----------------------------------------------------------------------------------------------------------


def packed(parts: Sequence[Any], how: str) -> Any:
    """Parts of one shape as a tree."""
    if how == "dict":
        return {f"p{n}": p for n, p in enumerate(parts)}
    if how == "tuple":
        return tuple(parts)
    if how == "concatenate":
        return jnp.concatenate(parts, -1)
    if how == "interleave":
        whole = jnp.stack(parts, -1)
        return whole.reshape(*whole.shape[:-2], -1)
    return jnp.stack(parts, AXES[how])


AXES = {"stack_last": -1, "stack_first": 0, "stack_middle": -2}


def unpacked(whole: Any, how: str, count: int) -> list[Any]:
    """The parts again."""
    if how == "dict":
        return [whole[f"p{n}"] for n in range(count)]
    if how == "tuple":
        return list(whole)
    if how == "concatenate":
        return jnp.split(whole, count, -1)
    if how == "interleave":
        return [whole[..., n::count] for n in range(count)]
    axis = AXES[how]
    return [lax.index_in_dim(whole, n, axis % whole.ndim, keepdims=False) for n in range(count)]


def start(draw: Draw, count: int, *shape: int) -> None:
    begin(draw, [draw.normal(*draw.head, *shape) for _ in range(count)])


def begin(draw: Draw, parts: Sequence[Any]) -> None:
    if draw.layer.pack == "arrays":
        draw.state.update({draw.name(f"p{n}_"): p for n, p in enumerate(parts)})
    else:
        draw.state[draw.name("s")] = packed(parts, draw.layer.pack)


def before(run: Run, count: int) -> list[Any]:
    if run.draw.layer.pack == "arrays":
        return [run.old(f"p{n}_") for n in range(count)]
    return unpacked(run.old("s"), run.draw.layer.pack, count)


def after(run: Run, parts: Sequence[Any]) -> list[Any]:
    """The new parts put; what goes on is read of the packed state, or of the parts themselves."""
    if run.draw.layer.pack == "arrays":
        return [run.set(f"p{n}_", p) for n, p in enumerate(parts)]
    how = run.draw.layer.pack
    whole = packed(parts, how)
    gone_on = run.set("s", whole)
    same = gone_on is whole and run.draw.recipe.early
    return list(parts) if same else unpacked(gone_on, how, len(parts))


# --- kinds ------------------------------------------------------------------------------------------------------------
# Each makes its weights and states, and gives a function from what the layer is fed, (head, n), to what it shows, (head, m).


def fed(draw: Draw, width: int) -> None:
    draw.weight("w", draw.width, width)


def activation(draw: Draw, n: int) -> Callable:
    return draw.of(n, jnp.tanh, lambda v: v, jnp.sin, jax.nn.softplus)


def neuron(draw: Draw):
    """A membrane and what adapts, perhaps a third; in any packing."""
    units, count = draw.of(0, 2, 3), draw.of(1, 2, 2, 3)
    fed(draw, units)
    start(draw, count, units)
    draw.weight("k", *draw.of(2, (units,), (), (1,)))
    curve, coupled = activation(draw, 3), draw.of(4, True, True, False)

    def step(run: Run, u):
        v, a, *rest = before(run, count)
        v = run.number("k") * v + run.product("w", u) - (0.5 * a if coupled else 0)
        a = 0.9 * a + 0.2 * curve(v)
        parts = after(run, [v, a, *(0.8 * r + jnp.sin(a) * v for r in rest)])
        return curve(parts[0]) + parts[-1]

    return step


def pair(draw: Draw):
    """Real and imaginary parts: as complex numbers, or side by side."""
    units, as_complex = draw.of(0, 2, 3), draw.of(1, True, False)
    fed(draw, 2 * units if draw.of(2, True, False) else units)
    draw.weight("t", *draw.of(3, (units,), ()))
    if as_complex:
        draw.state[draw.name("z")] = lax.complex(
            draw.normal(*draw.head, units), draw.normal(*draw.head, units)
        )
    else:
        start(draw, 2, units)

    def step(run: Run, u):
        y, angle = run.product("w", u), run.number("t")
        re_in, im_in = (y[..., :units], y[..., units:]) if y.shape[-1] > units else (y, 0.3 * y)
        if as_complex:
            z = 0.9 * jnp.exp(1j * angle) * run.old("z") + lax.complex(re_in, im_in)
            z = run.set("z", z)
            return z.real * 1.0 + z.imag**2
        re, im = before(run, 2)
        c, s = 0.9 * jnp.cos(angle), 0.9 * jnp.sin(angle)
        re, im = after(run, [c * re - s * im + re_in, s * re + c * im + im_in])
        return re + im**2

    return step


def rotation(draw: Draw):
    """A 2x2 matrix turns pairs that lie side by side: a constant, weights, or computed from angles, inputs or the pairs themselves."""
    units = draw.of(0, 2, 3) if draw.head else 2  # as many as inputs would be taken for examples
    how = draw.of(1, "constant", "free", "angle", "angles", "turned by inputs", "normed", "swapped")
    fed(draw, 2 * units)
    draw.state[draw.name("s")] = draw.normal(*draw.head, units, 2)
    if how == "free":
        draw.weight("t", 2, 2)
    elif how in ("angle", "angles", "swapped"):
        draw.weight("t", *((units,) if how == "angles" else ()))
    elif how == "turned by inputs":
        draw.weight("t", draw.width, units)
    constant = np.array([[0.8, -0.5], [0.5, 0.8]])
    by = draw.of(2, "einsum", "matmul", "sum of products")

    def matrix(angle):
        c, s = 0.9 * jnp.cos(angle), 0.9 * jnp.sin(angle)
        return jnp.stack([jnp.stack([c, -s], -1), jnp.stack([s, c], -1)], -2)

    def turned(turn, s):
        if by == "einsum":
            axes = "ij" if turn.ndim == 2 else "...nij"
            return jnp.einsum(f"{axes},...nj->...ni", turn, s)
        if by == "matmul" and turn.ndim == 2:
            return s @ turn.T
        return (turn * s[..., None, :]).sum(-1)

    def step(run: Run, u):
        s = run.old("s")
        y = run.product("w", u).reshape(*draw.head, units, 2)
        if how == "constant":
            s = turned(constant, s)
        elif how == "free" and by != "sum of products":  # a product with a trained matrix is one with weights
            s = run.op(draw.name("t"), turned, s)
        elif how == "free":
            s = turned(run.number("t"), s)
        elif how in ("angle", "angles"):
            s = turned(matrix(run.number("t")), s)
        elif how == "turned by inputs":
            s = turned(matrix(run.product("t", u)), s)
        elif how == "normed":
            s = s / jnp.sqrt(1 + (s**2).sum(-1, keepdims=True))
        else:
            s = jnp.tanh(s) + run.number("t") * jnp.tanh(s)[..., ::-1]
        s = run.set("s", s + y)
        return s[..., 0] * jnp.tanh(s[..., 1])

    return step


def window(draw: Draw):
    """The last inputs beside the new one, with a weight for each; moved on by one, or written round and read a few at a time."""
    units, slots = draw.of(0, 2, 3), draw.of(1, 2, 3, 5)
    fed(draw, units)
    how, back = draw.of(2, "concatenate", "roll", "ring"), draw.of(3, 0.0, 0.3)
    taken = {"concatenate": slots + 1, "roll": slots, "ring": 2}[how]
    axis = len(draw.head)
    draw.state[draw.name("h")] = draw.normal(*draw.head, units)
    draw.state[draw.name("s")] = draw.normal(*draw.head, slots, units)
    draw.state[draw.name("i")] = jnp.asarray(draw.rng.integers(0, slots), jnp.int32)
    draw.weight("c", taken, units)

    def step(run: Run, u):
        s, i, h = run.old("s"), run.old("i"), run.old("h")
        z = jnp.tanh(run.product("w", u) - back * h)[..., None, :]
        if how == "concatenate":
            seen = jnp.concatenate([s, z], axis)
            s = lax.slice_in_dim(seen, 1, slots + 1, axis=axis)
        elif how == "roll":
            s = seen = lax.dynamic_update_slice_in_dim(jnp.roll(s, -1, axis), z, slots - 1, axis)
        else:
            s = lax.dynamic_update_slice_in_dim(s, z, i, axis)
            seen = lax.dynamic_slice_in_dim(s, (i + 1) % slots, taken, axis)  # clipped at the end
        h = run.set("h", 0.5 * h + (seen * run.number("c")).sum(-2))
        run.set("s", s)
        run.set("i", (i + 1) % slots)
        return h

    return step


def shift(draw: Draw):
    """A shift register: what was written comes out some steps later, and feeds back or not."""
    units, slots = draw.of(0, 2, 3), draw.of(1, 2, 3, 5)
    fed(draw, units)
    axis = draw.of(2, -1, 0, -2)
    shape = [*draw.head, units]
    shape.insert(axis % (len(shape) + 1), slots)
    draw.state[draw.name("h")] = draw.normal(*draw.head, units)
    draw.state[draw.name("s")] = draw.normal(*shape)
    draw.weight("k", units)
    how, back, curve = draw.of(3, "concatenate", "roll", "at"), draw.of(4, 0.0, 0.4), activation(draw, 5)

    def step(run: Run, u):
        s = run.old("s")
        ax = axis % s.ndim
        late = lax.index_in_dim(s, slots - 1, ax, keepdims=False)
        h = run.number("k") * run.old("h") + run.product("w", u) - back * late
        z = curve(h)
        at = (slice(None),) * ax
        if how == "concatenate":
            s = jnp.concatenate([jnp.expand_dims(z, ax), lax.slice_in_dim(s, 0, slots - 1, axis=ax)], ax)
        elif how == "roll":
            s = jnp.roll(s, 1, ax).at[(*at, 0)].set(z)
        else:
            s = s.at[(*at, slice(1, None))].set(s[(*at, slice(None, -1))]).at[(*at, 0)].set(z)
        h, s = run.set("h", h), run.set("s", s)
        return h + lax.index_in_dim(s, draw.of(6, 0, slots - 1, slots // 2), ax, keepdims=False)

    return step


def ring(draw: Draw):
    """A ring buffer at an index that runs: for all, for each neuron, or for each example."""
    units, slots = draw.of(0, 2, 3), draw.of(1, 2, 3, 4)
    fed(draw, units)
    shape = (slots, *draw.head, units)
    by = draw.of(2, "all", "neuron", "example")
    draw.state[draw.name("h")] = draw.normal(*draw.head, units)
    draw.state[draw.name("s")] = draw.normal(*shape)
    count = draw.head if by == "example" else ()
    draw.state[draw.name("i")] = jnp.asarray(draw.rng.integers(0, slots, size=count), jnp.int32)
    delays = draw.rng.integers(0, slots, size=units)
    draw.weight("k", units)
    how, back, curve = draw.of(3, "set", "add", "clear"), draw.of(4, 0.0, 0.4), activation(draw, 5)
    grids = np.meshgrid(*map(np.arange, (*draw.head, units)), indexing="ij")

    def step(run: Run, u):
        s, i = run.old("s"), run.old("i")

        def place(k):
            if by == "all":
                return ((i + k) % slots,)
            each = i[:, None] + k if by == "example" and draw.head else i + k - delays * (by == "neuron")
            return (jnp.broadcast_to(each, (*draw.head, units)) % slots, *grids)

        late = s[place(1)]
        h = run.number("k") * run.old("h") + run.product("w", u) - back * late
        z = curve(h)
        if how == "clear":
            s = s.at[place(1)].set(0.0)
        s = s.at[place(0)].add(z) if how == "add" else s.at[place(0)].set(z)
        h, s = run.set("h", h), run.set("s", s)
        run.set("i", i + 1)
        return h + s[place(draw.of(6, 0, 1, 2))]

    return step


def matrix(draw: Draw):
    """S = a * S + outer(k, v) for each head, with a gate of any shape, and what linear attention has beside it."""
    heads, K, V = draw.of(0, 1, 2), draw.of(1, 2, 3), draw.of(2, 2, 3)
    shapes = {"head": (heads,), "key": (heads, K), "value": (heads, 1, V), "matrix": (heads, K, V), "one": ()}
    gate = draw.of(
        3,
        "one" if draw.last else "key",
        "head" if draw.last else "key",
        "key",
        "value",
        "matrix",
        "number",
        "numbers",
    )
    draw.weight("k", draw.width, heads * K)
    draw.weight("v", draw.width, heads * V)
    draw.weight("q", draw.width, heads * K)
    if gate in shapes:
        draw.weight("a", draw.width, int(np.prod(shapes[gate])))
    else:
        draw.weight("a", *{"number": (), "numbers": (heads, K, V)}[gate])
    S, z, m = draw.name("S"), draw.of(4, True, False), draw.of(5, "", "", "old", "new") if draw.last else ""
    if (
        heads == 1 and draw.number
    ):  # a single element of y would pass what the layer below shows, joined with none
        m = ""
    draw.state[S] = draw.normal(*draw.head, heads, K, V)
    if z:
        draw.state[draw.name("z")] = draw.normal(*draw.head, heads, K)
    if m:
        draw.state[draw.name("m")] = draw.normal(*draw.head, heads)
        draw.weight("m", draw.width, heads)
    curve, by = activation(draw, 6), draw.of(7, "index", "einsum")

    def step(run: Run, u):
        k = curve(run.product("k", u)).reshape(*draw.head, heads, K)
        v, q = (run.product(n, u).reshape(*draw.head, heads, size) for n, size in (("v", V), ("q", K)))
        if gate in shapes:
            a = jax.nn.sigmoid(run.product("a", u)).reshape(*draw.head, *shapes[gate])
            a = a.reshape(*a.shape, *(1,) * (len(draw.head) + 3 - a.ndim))
        else:
            a = jax.nn.sigmoid(run.number("a"))
        if m:
            old = run.old("m")
            now = run.set("m", 0.8 * jnp.tanh(old) + run.product("m", u))
            k = k * jax.nn.sigmoid(old if m == "old" else now)[..., None]
        both = k[..., :, None] * v[..., None, :] if by == "index" else jnp.einsum("...k,...v->...kv", k, v)
        new = run.set("S", a * run.old("S") + both)
        shown = jnp.einsum("...k,...kv->...v", q, new)
        if z:
            shrink = a[..., 0] if jnp.ndim(a) and gate in ("one", "head", "key") else 0.9
            n = run.set("z", shrink * run.old("z") + k)
            shown = shown / (1.0 + (jnp.sum(n * q, -1, keepdims=True)) ** 2)
        return shown.reshape(*draw.head, -1)

    return step


def mamba(draw: Draw):
    """Step and B from the input over a state axis, the states of a channel in one row."""
    units, J = draw.of(0, 2, 3), draw.of(1, 2, 3)
    for name, n in (("d", draw.of(2, units, units, 1 if draw.last else units)), ("B", J), ("C", J)):
        draw.weight(name, draw.width, n)
    fed(draw, units)
    draw.weight("A", *draw.of(3, (units, J), (units, 1), (J,)))
    draw.weight("skip", units)
    draw.state[draw.name("h")] = draw.normal(*draw.head, units, J)

    def step(run: Run, u):
        x, B, C = (run.product(n, u) for n in ("w", "B", "C"))
        d = jax.nn.softplus(run.product("d", u))[..., None]
        new = jnp.exp(-d * jnp.exp(run.number("A")))
        h = run.set("h", new * run.old("h") + (d * x[..., None]) * B[..., None, :])
        return jnp.einsum("...nj,...j->...n", h, C) + run.number("skip") * x

    return step


def gain(draw: Draw):
    """A bias, a gain or a gate that is broadcast over units: by a number, by a head, along an axis."""
    heads, units = draw.of(0, 1, 2), draw.of(1, 2, 3)
    shape = draw.of(2, (), (heads, 1), (units,), (1, units))
    fed(draw, heads * units)
    draw.weight("g", *shape)
    draw.weight("b", *draw.of(3, (), (heads, 1), (heads, units)))
    gate = draw.of(4, 0, 1, heads) if draw.last else 0
    if gate:
        draw.weight("a", draw.width, gate)
    draw.state[draw.name("h")] = draw.normal(*draw.head, heads, units)
    curve = activation(draw, 5)

    def step(run: Run, u):
        y = run.product("w", u).reshape(*draw.head, heads, units)
        keep = jnp.tanh(run.number("g"))
        if gate:
            a = jax.nn.sigmoid(run.product("a", u))[..., None]
            keep = keep * (a if draw.of(6, True, False) else jnp.repeat(a, units, -1))
        h = run.set("h", curve(keep * run.old("h") + y + run.number("b")))
        return h.reshape(*draw.head, -1)

    return step


def mixing(draw: Draw):
    """What goes round among all units, so that a unit is the whole array: cut, and listed."""
    units, how = 9, draw.of(0, "mean", "cumsum", "roll", "norm")
    fed(draw, units)
    draw.weight("k", units)
    draw.state[draw.name("h")] = draw.normal(*draw.head, units)

    def step(run: Run, u):
        h = run.old("h")
        other = {
            "mean": lambda: h - h.mean(-1, keepdims=True),
            "cumsum": lambda: jnp.cumsum(h, -1),
            "roll": lambda: h + jnp.roll(h, 1, -1),
            "norm": lambda: h / jnp.sqrt(1 + (h**2).sum(-1, keepdims=True)),
        }[how]()
        return run.set("h", run.number("k") * jnp.tanh(other) + run.product("w", u))

    return step


def delays_of(draw: Draw, slots: int, units: int):
    """(units,) of int from 1 to below ``slots``: long ones, and short ones that come out within a few steps."""
    return np.where(
        draw.rng.integers(2, size=units),
        draw.rng.integers(1, 6, size=units),
        draw.rng.integers(1, slots, size=units),
    )


def line(draw: Draw):
    """Long shift registers, one or two, read at an end or at a tap of each neuron, which may feed back."""
    units, slots, count = draw.of(0, 2, 3), draw.of(1, *SLOTS), draw.of(7, 1, 1, 2)
    draw.slots = slots
    fed(draw, units)
    axis = draw.of(2, -1, 0, -2)
    shape = [*draw.head, units]
    shape.insert(axis % (len(shape) + 1), slots)
    draw.state[draw.name("h")] = draw.normal(*draw.head, units)
    begin(draw, [draw.normal(*shape) for _ in range(count)])
    draw.params[draw.name("k")] = jnp.tanh(draw.normal(units))  # many steps: what feeds back may not blow up
    how, back, curve = draw.of(3, "concatenate", "roll", "at"), draw.of(4, 0.0, 0.2, 0.2), activation(draw, 5)
    taps = delays_of(draw, slots, units) if draw.of(6, True, False) else np.full(units, slots - 1)
    grids = np.meshgrid(*map(np.arange, (*draw.head, units)), indexing="ij")

    def late(s):
        ax = axis % s.ndim
        if (taps == taps[0]).all():
            return lax.index_in_dim(s, int(taps[0]), ax, keepdims=False)
        places = list(grids)
        places.insert(ax, np.broadcast_to(taps, grids[0].shape))
        return s[tuple(places)]

    def moved(s, z):
        ax = axis % s.ndim
        at = (slice(None),) * ax
        if how == "concatenate":
            return jnp.concatenate([jnp.expand_dims(z, ax), lax.slice_in_dim(s, 0, slots - 1, axis=ax)], ax)
        if how == "roll":
            return jnp.roll(s, 1, ax).at[(*at, 0)].set(z)
        return s.at[(*at, slice(1, None))].set(s[(*at, slice(None, -1))]).at[(*at, 0)].set(z)

    def step(run: Run, u):
        lines = before(run, count)
        h = run.number("k") * run.old("h") + run.product("w", u) - back * sum(map(late, lines))
        z = curve(h)
        shown = [z, jnp.sin(z)][:count]
        h = run.set("h", h)
        lines = after(run, [moved(s, v) for s, v in zip(lines, shown, strict=True)])
        return h + sum(map(late, lines))

    return step


def delay(draw: Draw):
    """A long ring buffer: what a neuron shows comes back later, or what is sent arrives later; slots before or behind neurons."""
    units, slots = draw.of(0, 2, 3), draw.of(1, *SLOTS)
    draw.slots = slots
    fed(draw, units)
    by, first = draw.of(2, "all", "neuron", "neuron", "example"), draw.of(7, True, False)
    draw.state[draw.name("h")] = draw.normal(*draw.head, units)
    draw.state[draw.name("s")] = draw.normal(
        *((slots, *draw.head, units) if first else (*draw.head, units, slots))
    )
    count = draw.head if by == "example" else ()
    draw.state[draw.name("i")] = jnp.asarray(draw.rng.integers(0, slots, size=count), jnp.int32)
    delays = delays_of(draw, slots, units)
    draw.params[draw.name("k")] = jnp.tanh(draw.normal(units))  # many steps: what feeds back may not blow up
    how, back, curve = (
        draw.of(3, "set", "add", "clear", "sent"),
        draw.of(4, 0.0, 0.2, 0.2),
        activation(draw, 5),
    )
    short = draw.of(6, 0, 2)
    grids = np.meshgrid(*map(np.arange, (*draw.head, units)), indexing="ij")

    def step(run: Run, u):
        s, i = run.old("s"), run.old("i")

        def place(k, late):
            """Slots that lie k behind the index; with ``late`` at the delay of each neuron."""
            if by == "neuron" and late:
                slot = (
                    jnp.broadcast_to(i + k + (delays if how == "sent" else -delays), grids[0].shape) % slots,
                )
                return (*slot, *grids) if first else (*grids, *slot)
            if by == "example" and draw.head:
                slot = (jnp.broadcast_to(i[:, None] + k, grids[0].shape) % slots,)
                return (*slot, *grids) if first else (*grids, *slot)
            return ((i + k) % slots,) if first else (..., (i + k) % slots)

        if how == "sent":
            current = run.product("w", u)
            arrived = s[place(0, False)]
            h = run.number("k") * run.old("h") + arrived
            s = s.at[place(0, False)].set(0.0)
            s = s.at[place(short - 1, True)].add(current - back * curve(h))
            run.set("s", s)
            run.set("i", i + 1)
            return run.set("h", h)
        h = run.number("k") * run.old("h") + run.product("w", u) - back * s[place(1 + short, True)]
        if how == "clear":
            s = s.at[place(1, False)].set(0.0)
        s = s.at[place(0, False)].add(curve(h)) if how == "add" else s.at[place(0, False)].set(curve(h))
        h, s = run.set("h", h), run.set("s", s)
        run.set("i", i + 1)
        return h + s[place(1, True)]

    return step


KINDS: dict[str, Callable] = {
    f.__name__: f
    for f in (neuron, pair, rotation, shift, ring, window, matrix, mamba, gain, mixing, line, delay)
}


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    recipe: Recipe
    step: Callable
    params: dict
    state: dict
    xs: Any
    targets: Any
    slots: int


def square(out, target):
    return jnp.sum((out - target) ** 2)


def build(recipe: Recipe, length: int, *, whole: bool = False) -> Model:
    """``length`` steps of a model; if ``whole``, as many more as its longest delay has slots."""
    draws = [Draw(recipe, n) for n in range(len(recipe.layers))]
    head, steps = draws[0].head, []
    params, state, width = {}, {}, INPUTS

    def together(op, put, state, x, count):
        new, shown = {}, []
        for draw, body in zip(draws[:count], steps[:count], strict=True):
            run = Run(draw, state, op, put)
            if draw.layer.recurrent:
                x = jnp.concatenate([x, flat(draw, state)], -1)
            x = body(run, x)
            shown.append(x)
            new |= run.new
        return new, shown

    def flat(draw, state):
        """All of a layer's first state as a row of each example, real, and bounded: what feeds itself back may not blow up."""
        leaf = jax.tree.leaves(state[next(iter(draw.state))])[0]
        leaf = leaf.real if jnp.iscomplexobj(leaf) else leaf
        if head and leaf.shape[0] != head[0]:
            leaf = jnp.moveaxis(leaf, leaf.shape.index(head[0]), 0)
        return jnp.tanh(leaf.reshape(*head, -1))

    for draw in draws:
        draw.width = width
        if draw.layer.recurrent:  # its states say how wide the weights are that it is made with
            KINDS[draw.layer.kind](draw)
            draw.width += jax.eval_shape(lambda s, draw=draw: flat(draw, s), draw.state).shape[-1]
            draw.params, draw.state = {}, {}
        steps.append(KINDS[draw.layer.kind](draw))
        params |= draw.params
        state |= draw.state
        seen = jax.eval_shape(
            lambda p, s, x: together(lambda n, f, *r: f(p[n], *r), lambda n, v: v, s, x, len(steps))[1][-1],
            params,
            state,
            jnp.zeros((*head, INPUTS)),
        )
        width = seen.shape[-1]

    rng = np.random.default_rng([recipe.seed, 99])
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    params["out"] = 0.6 * normal(width, OUTPUTS)

    def step(params, state, x, *, op, put):
        new, shown = together(op, put, state, x, len(steps))
        out = op("out", lambda w, u: u @ w, jnp.sin(shown[-1]))
        if recipe.old:
            out = out + 0.2 * sum(
                jnp.sum(jnp.real(v) ** 2) for v in jax.tree.leaves(state) if v.dtype != jnp.int32
            )
        return new, out

    slots = max(draw.slots for draw in draws)
    length += slots if whole else 0
    xs, targets = normal(length, *head, INPUTS), normal(length, *head, OUTPUTS)
    return Model(recipe, step, params, state, xs, targets, slots)
