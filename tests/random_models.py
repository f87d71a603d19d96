"""Random recurrent models as instrumented steps, with their groups and exactness known from their own graph.

A model is drawn as a list of nodes. Every node of a layer has the layer's shape (batch, units), and element (b, i)
of it can influence position (b, i) only, unless it goes through a mixing operation; there the use is cut. So where
credit stops is a matter of construction, and groups and exactness follow from paths in the graph alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
from hypothesis import strategies as st
from zoo.base import Function

LENGTH = 5
BATCH = 2
N_IN = 2
N_OUT = 2


@dataclass(frozen=True)
class RandomModel:
    """`step` is instrumented; `model` is the same step without marks, for `etcompile.from_function`."""

    seed: int
    step: Callable
    params: dict
    state: dict
    xs: jax.Array
    targets: tuple
    loss_fn: Callable
    groups: tuple[tuple[str, ...], ...]
    exact: bool
    listing: str

    @property
    def model(self) -> Function:
        def fn(params, state, x):
            return self.step(params, state, x, cut=lambda v: v, put=lambda name, v: v)

        return Function(fn, self.params, self.state)

    def __repr__(self):
        return f"random_models.make({self.seed})  groups={self.groups} exact={self.exact}\n{self.listing}"


@dataclass(frozen=True)
class Node:
    """One value: ``value = evaluate(params, argument values, cut)``.

    `arguments` that the operation spreads are listed in `spread`; `parameters` are the trained ones it reads. With
    `slope` False no derivative passes (comparisons, say).
    """

    name: str
    arguments: tuple[str, ...]
    spread: tuple[str, ...]
    parameters: tuple[str, ...]
    evaluate: Callable
    width: int
    text: str


class Draft:
    """The model while it is being drawn."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.nodes: list[Node] = [Node("x", (), (), (), None, N_IN, "input")]
        self.params: dict = {}
        self.old: dict[str, int] = {}
        self.new: dict[str, str] = {}
        self.counter = 0

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def pick(self, options):
        return options[int(self.rng.integers(len(options)))]

    def width(self, name: str) -> int:
        return next(n.width for n in self.nodes if n.name == name)

    def parameter(self, *shape: int, scale: float | None = None) -> str:
        name = f"p{len(self.params)}"
        scale = scale or (1.0 / np.sqrt(shape[0]) if len(shape) > 1 else 0.7)
        self.params[name] = jnp.asarray(self.rng.normal(size=shape) * scale)
        return name

    def add(self, text, evaluate, width, arguments=(), spread=(), parameters=()) -> str:
        name = f"v{self.counter}"
        self.counter += 1
        self.nodes.append(Node(name, tuple(arguments), tuple(spread), tuple(parameters), evaluate, width, text))
        return name

    def state(self, width: int) -> str:
        name = f"h{len(self.old)}"
        self.old[name] = width
        self.nodes.append(Node(f"{name}.old", (), (), (), None, width, "old state"))
        return name

    def write(self, state: str, value: str):
        node = Node(state, (value,), (), (), lambda p, v, cut: v, self.old[state], "new state")
        self.nodes.append(node)
        self.new[state] = value

    # --- Weights -----------------------------------------------------------------------------------------------------

    def weight(self, rows: int, columns: int) -> tuple[tuple[str, ...], Callable, str]:
        """Names of parameters, and the effective matrix that they make."""
        kind = self.pick(["plain", "plain", "plain", "tied", "abs", "mask", "sum", "tanh", "gain", "lora"])
        matching = [n for n, v in self.params.items() if v.shape == (rows, columns)]
        if kind == "tied" and matching:
            w = self.pick(matching)
            return (w,), lambda p: p[w], f"{w} tied"
        w = self.parameter(rows, columns)
        if kind == "abs":
            return (w,), lambda p: jnp.abs(p[w]), f"|{w}|"
        if kind == "tanh":
            return (w,), lambda p: jnp.tanh(p[w]), f"tanh {w}"
        if kind == "mask":
            mask = (self.rng.random((rows, columns)) < 0.7).astype(float)
            return (w,), lambda p: p[w] * mask, f"{w}*mask"
        if kind == "sum":
            other = self.parameter(rows, columns)
            return (w, other), lambda p: p[w] + p[other], f"({w}+{other})"
        if kind == "gain":
            gain = self.parameter(columns)
            return (w, gain), lambda p: p[w] * p[gain], f"{w}*{gain}"
        if kind == "lora":
            a, b = self.parameter(rows, 1), self.parameter(1, columns)
            return (w, a, b), lambda p: p[w] + p[a] @ p[b], f"({w}+{a}@{b})"
        return (w,), lambda p: p[w], w

    # --- Operations --------------------------------------------------------------------------------------------------

    def dense(self, sources: list[str], width: int) -> str:
        """A trained matrix over the concatenation of any values; all their uses are spread."""
        rows = sum(self.width(s) for s in sources)
        names, matrix, text = self.weight(rows, width)
        bias = self.parameter(width, scale=0.3) if self.chance(0.6) else None

        def evaluate(p, *values_and_cut):
            *values, cut = values_and_cut
            y = jnp.concatenate([cut(v) for v in values], axis=-1) @ matrix(p)
            return y if bias is None else y + p[bias]

        parameters = names if bias is None else (*names, bias)
        return self.add(f"[{', '.join(sources)}] @ {text}", evaluate, width, sources, sources, parameters)

    def constant_mix(self, source: str, width: int) -> str:
        kind = self.pick(["matrix", "mean", "sum"]) if self.width(source) == width else "matrix"
        if kind == "matrix":
            matrix = self.rng.normal(size=(self.width(source), width)) / np.sqrt(width)
            return self.add(
                f"{source} @ constant", lambda p, v, cut: cut(v) @ matrix, width, [source], [source]
            )
        if kind == "mean":

            def mean(p, v, cut):
                return jnp.broadcast_to(jnp.mean(cut(v), -1, keepdims=True), v.shape)

            return self.add(f"mean {source}", mean, width, [source], [source])
        return self.add(
            f"cumsum {source}", lambda p, v, cut: 0.5 * jnp.cumsum(cut(v), -1), width, [source], [source]
        )

    def normalise(self, source: str) -> str:
        """Layer-norm-like, off centre so that no derivative vanishes by symmetry: the direct path stays."""

        def evaluate(p, v, cut):
            centre = 0.8 * jnp.mean(v, -1, keepdims=True)
            scale = jnp.mean((v - centre) ** 2, -1, keepdims=True)
            return (v - cut(centre)) / jnp.sqrt(cut(scale) + 0.2)

        # The direct path is an edge of its own; `spread` marks the other one.
        return self.add(f"norm {source}", evaluate, self.width(source), [source], [f"~{source}"])

    def elementwise(self, sources: list[str]) -> str:
        """One to three values of a layer, joined position by position."""
        a = self.pick(sources)
        b = self.pick(sources)
        width = self.width(a)
        kind = self.pick(
            ["tanh", "sigmoid", "mul", "add", "leak", "where", "gain", "bias", "learned", "sin", "gate", "const"]
        )
        one = {
            "tanh": jnp.tanh,
            "sigmoid": jax.nn.sigmoid,
            "sin": jnp.sin,
            "const": lambda v: 0.3 - 0.8 * v,
        }
        if kind in one:
            f = one[kind]
            return self.add(f"{kind} {a}", lambda p, v, cut: f(v), width, [a])
        if kind == "gain":
            g = self.parameter(*([width] if self.chance(0.7) else []))
            return self.add(f"{a} * {g}", lambda p, v, cut: v * p[g], width, [a], (), [g])
        if kind == "bias":
            g = self.parameter(width)
            return self.add(f"{a} + {g}", lambda p, v, cut: v + p[g], width, [a], (), [g])
        if kind == "learned":
            g = self.parameter(width)

            def decay(p, v, w, cut):
                d = jax.nn.sigmoid(p[g])
                return d * v + (1 - d) * w

            return self.add(f"decay {g} {a} {b}", decay, width, [a, b], (), [g])
        two = {
            "mul": lambda v, w: v * w,
            "add": lambda v, w: v + w,
            "leak": lambda v, w: 0.7 * v + 0.4 * w,
            "where": lambda v, w: jnp.where(mask, v, 0.5 * w),
            "gate": lambda v, w: jax.nn.sigmoid(v) * jnp.tanh(w),
        }
        mask = np.arange(width) % 2 == 0
        f = two[kind]
        return self.add(f"{kind} {a} {b}", lambda p, v, w, cut: f(v, w), width, [a, b])

    def gates(self, sources: list[str], width: int, count: int) -> list[str]:
        """A fused dense operation, taken apart by split or slices."""
        fused = self.dense(sources, count * width)
        how = self.pick(["split", "slice", "stride", "reshape"])

        def take(i):
            if how == "split":
                return lambda p, v, cut: jnp.split(v, count, axis=-1)[i]
            if how == "slice":
                return lambda p, v, cut: v[..., i * width : (i + 1) * width]
            if how == "stride":
                return lambda p, v, cut: v[..., i::count]
            return lambda p, v, cut: v.reshape(*v.shape[:-1], count, width)[..., i, :]

        return [self.add(f"{how} {i} of {fused}", take(i), width, [fused]) for i in range(count)]


def draw_layer(d: Draft, inputs: list[str]) -> list[str]:
    """One layer of one to three states of the same width; returns what later layers may read."""
    width = int(d.rng.integers(2, 5))
    states = [d.state(width) for _ in range(int(d.rng.choice([1, 1, 2, 2, 3])))]
    old = [f"{s}.old" for s in states]
    recurrent = d.chance(0.55)

    sources = [d.pick(inputs)] + ([d.pick(old)] if recurrent else [])
    if d.chance(0.5):
        pool = d.gates(sources, width, int(d.rng.integers(2, 4)))
    else:
        pool = [d.dense(sources, width)]
    if d.chance(0.4):
        pool = [d.add(f"tanh {v}", lambda p, v, cut: jnp.tanh(v), width, [v]) for v in pool]
    if d.chance(0.2):
        shift = int(d.rng.integers(1, width))
        # Rolled before anything of the state's own positions joins it.
        pool[0] = d.add(
            f"roll {pool[0]}", lambda p, v, cut, k=shift: jnp.roll(v, k, -1), width, [pool[0]]
        )
    if d.chance(0.25):
        pool.append(d.normalise(d.pick(pool)))
    if d.chance(0.2):
        pool.append(d.constant_mix(d.pick(pool + old), width))
    if d.chance(0.15):
        pool.append(d.dense([d.pick(pool)], width))
    values = pool + old
    for _ in range(int(d.rng.integers(0, 5))):
        values.append(d.elementwise(values[-3:] + old + pool[:1]))

    written = []
    for s in states:
        drive = d.pick(pool + values[len(pool) + len(old) :] + written)
        rest = d.pick(values + written)
        kind = d.pick(["tanh", "leak", "gate", "learned"])
        own = f"{s}.old"
        if kind == "tanh":
            new = d.add(
                f"tanh(.6 {own} + {drive} + .3 {rest})",
                lambda p, v, w, r, cut: jnp.tanh(0.6 * v + w + 0.3 * r),
                width,
                [own, drive, rest],
            )
        elif kind == "leak":
            new = d.add(
                f".8 {own} + tanh({drive}) * cos({rest})",
                lambda p, v, w, r, cut: 0.8 * v + jnp.tanh(w) * jnp.cos(r),
                width,
                [own, drive, rest],
            )
        elif kind == "gate":
            new = d.add(
                f"gate {rest} between {own} and {drive}",
                lambda p, v, w, r, cut: jax.nn.sigmoid(r) * v + (1 - jax.nn.sigmoid(r)) * jnp.tanh(w),
                width,
                [own, drive, rest],
            )
        else:
            g = d.parameter(width)
            new = d.add(
                f"tanh({g} {own} + {drive})",
                lambda p, v, w, cut, g=g: jnp.tanh(p[g] * v + w),
                width,
                [own, drive],
                (),
                [g],
            )
        d.write(s, new)
        written.append(s)
    return written + (old[:1] if d.chance(0.3) else [])


def structure(d: Draft):
    """Hidden states, groups and exactness from the graph of nodes alone."""
    full, local = nx.DiGraph(), nx.DiGraph()
    for node in d.nodes:
        full.add_node(node.name)
        local.add_node(node.name)
        for a in node.arguments:
            full.add_edge(a, node.name)
            if a not in node.spread:
                local.add_edge(a, node.name)
        for p in node.parameters:
            full.add_edge(p, node.name)
            local.add_edge(p, node.name)
    over_time = full.copy()
    over_time.add_edges_from((s, f"{s}.old") for s in d.old)
    reached = {n for p in d.params for n in nx.descendants(over_time, p)}
    hidden = [s for s in d.old if s in reached]

    components = nx.Graph()
    components.add_nodes_from(hidden)
    for s in hidden:
        for source in (s, f"{s}.old"):
            components.add_edges_from((s, r) for r in hidden if r in nx.descendants(local, source))
    order = {s: i for i, s in enumerate(hidden)}
    groups = sorted(tuple(sorted(c, key=order.get)) for c in nx.connected_components(components))

    origins = set(d.params) | {f"{s}.old" for s in hidden} | set(hidden)
    exact = True
    for node in d.nodes:
        for a in node.spread:
            a = a.removeprefix("~")
            depends = a in origins or bool(nx.ancestors(full, a) & origins)
            reaches = node.name in hidden or bool(nx.descendants(full, node.name) & set(hidden))
            exact = exact and not (depends and reaches)
    return groups, exact


def make(seed: int) -> RandomModel:
    """The random model of that seed."""
    rng = np.random.default_rng(seed)
    d = Draft(rng)
    available = ["x"]
    if d.chance(0.2):
        y = d.dense(["x"], 3)
        available = [d.add(f"tanh {y}", lambda p, v, cut: jnp.tanh(v), 3, [y])]
    readable: list[str] = []
    for _ in range(int(rng.choice([1, 1, 1, 2, 2, 3]))):
        outputs = draw_layer(d, available)
        readable += outputs
        # Mostly deeper, sometimes beside the layer before.
        available = outputs if d.chance(0.7) else [*available, *outputs]
    count = min(len(readable), int(rng.integers(1, 4)))
    read = [readable[i] for i in sorted(rng.choice(len(readable), count, replace=False))]
    if not any(r in d.new for r in read):
        read.append(next(iter(d.new)))
    out = d.dense(read, N_OUT)

    groups, exact = structure(d)
    nodes = tuple(d.nodes)

    def step(params, state, x, *, cut, put):
        values = {"x": x, **{f"{s}.old": state[s] for s in state}}
        new = {}
        for node in nodes:
            if node.evaluate is None:
                continue
            value = node.evaluate(params, *(values[a] for a in node.arguments), cut)
            if node.name in state:
                value = new[node.name] = put(node.name, value)
            values[node.name] = value
        return new, values[out]

    state = {s: jnp.asarray(rng.normal(size=(BATCH, w)) * 0.5) for s, w in d.old.items()}
    xs = jnp.asarray(rng.normal(size=(LENGTH, BATCH, N_IN)))
    targets = (jnp.asarray(rng.normal(size=(LENGTH, BATCH, N_OUT))),)
    return RandomModel(
        seed,
        step,
        d.params,
        state,
        xs,
        targets,
        lambda o, target: 0.5 * jnp.sum((o - target) ** 2),
        tuple(groups),
        exact,
        "\n".join(f"  {n.name} = {n.text}" for n in nodes),
    )


def random_models() -> st.SearchStrategy[RandomModel]:
    """Random models, by seed: a failing one is named by a number that makes it again."""
    return st.integers(0, 2**31 - 1).map(make)
