"""Traces are updated where they lie: what the compiled loop copies at every step."""

import re

import brainstate
import jax
import jax.numpy as jnp
import pytest
from zoo.spiking import spike

import etcompile

BATCH, INPUTS, UNITS, OUT, STEPS = 4, 24, 48, 5, 6


def leaky(p, s, x):
    h = jax.nn.sigmoid(p["d"]) * s["h"] + x @ p["w"]
    return {"h": h}, jnp.tanh(h) @ p["readout"]


def gated(p, s, x):
    z, c = jnp.split(jnp.concatenate([x, s["h"]], -1) @ p["w2"], 2, -1)
    h = s["h"] + jax.nn.sigmoid(z) * (jnp.tanh(c) - s["h"])
    return {"h": h}, h @ p["readout"]


def chain(p, s, x):
    """The trace of the first state is read by the second's, that by the third's."""
    a = jax.nn.sigmoid(p["d"]) * s["a"] + x @ p["w"]
    b = 0.8 * s["b"] * (1 - s["b"]) + jnp.tanh(s["a"])
    c = 0.7 * s["c"] * (1 - s["c"]) + s["b"]
    return {"c": c, "a": a, "b": b}, c @ p["readout"]


def adaptive(p, s, x):
    """Current, then membrane and adaptation, of which each reads the other."""
    z = spike(s["v"] - 1 - 0.1 * s["a"])
    i = 0.8 * s["i"] + x @ p["w"]
    v = 0.9 * s["v"] * (1 - z) + s["i"]
    a = 0.95 * s["a"] + z
    return {"v": v, "a": a, "i": i}, spike(v - 1 - 0.1 * a) @ p["readout"]


#: The model, and how many rows of a trace have to be copied.
MODELS = {"leaky": (leaky, "h", 0), "gated": (gated, "h", 0), "chain": (chain, "abc", 0), "adaptive": (adaptive, "via", 1)}  # fmt: skip


#: Their gradients read old traces; new ones; those of a filter behind them.
RULES = [{"algo": "d_rtrl"}, {"algo": "rflo"}, {"algo": "e_prop", "kappa": 0.7}]


def compiled(fn, states, units=UNITS, **options):
    keys = iter(jax.random.split(jax.random.key(0), 8))
    shapes = {"w": (INPUTS, units), "w2": (INPUTS + units, 2 * units), "d": (units,), "readout": (units, OUT)}
    params = {name: 0.1 * jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    used = {"leaky": "w d readout", "gated": "w2 readout", "chain": "w d readout", "adaptive": "w readout"}
    params = {name: params[name] for name in used[fn.__name__].split()}
    state = {name: jnp.zeros((BATCH, units)) for name in states}
    return etcompile.compile(
        etcompile.from_function(fn, params, state), jnp.zeros((BATCH, INPUTS)), **options
    )


def computations(text):
    """The loops and kernels of a compiled program, by name."""
    return dict(re.findall(r"^(?:ENTRY )?(%[\w.\-]+) .*?\{\n(.*?)^\}", text, re.M | re.S))


def loops(text):
    """The bodies of the loops of a compiled program."""
    return [computations(text)[name] for name in re.findall(r"\bbody=(%[\w.\-]+)", text)]


def smaller_work(kernel, dims):
    """Shapes of what a kernel computes along the last axis of its result, and not for all of it."""
    work = re.findall(r"^.*\[([\d,]*)\]\S* (?:multiply|add|subtract|divide|exponential|tanh)\(", kernel, re.M)
    return [found for found in work if found != dims and found.split(",")[-1] == dims.split(",")[-1]]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts what XLA does on a CPU")
@pytest.mark.parametrize("options", RULES, ids=lambda options: options["algo"])
@pytest.mark.parametrize("name", MODELS)
def test_no_trace_is_copied_that_need_not_be(name, options):
    fn, states, unavoidable = MODELS[name]
    step = compiled(fn, states, **options)
    run = step.scan_value_and_grad(lambda out, y: jnp.mean((out - y) ** 2), chunk=1)
    xs, ys = jnp.ones((STEPS, BATCH, INPUTS)), jnp.zeros((STEPS, BATCH, OUT))
    text = brainstate.transform.jit(run).lower(xs, ys).compile().as_text()
    large = {v.shape for v in jax.tree.leaves(step.traces) if v.ndim == 3}
    assert large
    shapes = ["f64[" + ",".join(map(str, shape)) + "]" for shape in large]
    (body,) = loops(text)
    assert any(f"= {shape}" in body for shape in shapes)
    copies = [
        line
        for line in body.splitlines()
        for s in shapes
        if re.search(re.escape(f"= {s}") + r"\S* copy\(", line)
    ]
    assert len(copies) == unavoidable, "\n".join(copies)
    traces = {shape[4:-1] for shape in shapes}
    updates = [
        (dims, kernel)
        for kernel in computations(text).values()
        for dims in re.findall(r"^  ROOT .*? = f64\[([\d,]*)\]\S* (?:add|divide)\(", kernel, re.M)
        if dims in traces
    ]
    assert updates
    for dims, kernel in updates:  # D and f, once for each unit and not for each weight
        assert not smaller_work(kernel, dims), kernel


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts what XLA does on a CPU")
@pytest.mark.parametrize("name", ["leaky", "gated"])
def test_a_trace_is_read_before_the_end_of_a_chunk_takes_its_place(name):
    fn, states, _ = MODELS[name]
    step = compiled(fn, states)
    run = step.scan_value_and_grad(lambda out, y: jnp.mean((out - y) ** 2), chunk=STEPS // 2)
    xs, ys = jnp.ones((2 * STEPS, BATCH, INPUTS)), jnp.zeros((2 * STEPS, BATCH, OUT))
    text = brainstate.transform.jit(run).lower(xs, ys).compile().as_text()
    (shape,) = {v.shape for v in jax.tree.leaves(step.traces) if v.ndim == 3}
    trace = "f64[" + ",".join(map(str, shape)) + "]"
    bodies = [body for body in loops(text) if f"= {trace}" in body]
    assert bodies and not any(re.search(re.escape(f"= {trace}") + r"\S* copy\(", body) for body in bodies)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="orders are told on a CPU")
def test_an_order_is_told_once_for_large_arrays_and_not_for_small_ones():
    def zeros(units):
        """How many zeros that XLA cannot see a chunk has."""
        step = compiled(adaptive, "via", units, algo="e_prop", kappa=0.7)
        run = step.scan_value_and_grad(lambda out, y: jnp.mean((out - y) ** 2), chunk=STEPS)
        xs, ys = jnp.ones((2 * STEPS, BATCH, INPUTS)), jnp.zeros((2 * STEPS, BATCH, OUT))
        text = brainstate.transform.jit(run).lower(xs, ys).as_text()
        return text.count("stablehlo.bitcast_convert")

    made_once = zeros(UNITS // 8)  # gradients of what was in the traces: one weight
    assert made_once <= 1
    assert made_once < zeros(UNITS) <= made_once + 2
