"""Idioms of models that people bring: the values of the model, exact or listed, and no zero without a word.

Refractory neurons, states packed in one array, delays, ring buffers, caches written at a running index, shift registers.
"""

from __future__ import annotations

import brainpy
import brainstate
import braintools
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import saiunit as u
from brainstate import environ
from jax import lax
from oracles import dense_d_rtrl, relative_error

import etcompile

DT = 1.0 * u.ms
STEPS, BATCH, INPUTS, UNITS = 7, 2, 3, 4


@pytest.fixture(autouse=True)
def _double():
    with environ.context(precision=64, dt=DT):
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def square(out, y):
    return jnp.sum((out - y) ** 2)


# -- plain functions --------------------------------------------------------------------------------------------------


def cache(p, s, x):
    """Attention over keys and values written at a running index."""
    k, v = s["k"].at[:, s["i"]].set(x @ p["wk"]), s["v"].at[:, s["i"]].set(x @ p["wv"])
    score = jnp.einsum("bd,btd->bt", x @ p["wq"], k)
    seen = jnp.arange(k.shape[1]) <= s["i"]
    weight = jax.nn.softmax(jnp.where(seen, score, -1e9), axis=-1)
    return {"k": k, "v": v, "i": s["i"] + 1}, jnp.einsum("bt,btd->bd", weight, v)


def ring(p, s, x):
    """A ring buffer: the oldest entry is read and then overwritten."""
    at = s["i"] % 3
    old = s["b"][at]
    b = lax.dynamic_update_index_in_dim(s["b"], x @ p["w"], at, 0)
    h = jnp.tanh(0.8 * s["h"] + old)
    return {"b": b, "h": h, "i": s["i"] + 1}, h


def sorted_rows(p, s, x):
    """The least of the last three values of each unit is read and dropped."""
    h = jnp.tanh(0.8 * s["h"] + s["b"][0])
    return {"b": jnp.sort(jnp.concatenate([s["b"][1:], (x @ p["w"])[None]]), 0), "h": h}, h


def one_hot_ring(p, s, x):
    """A ring buffer written by a mask: element by element."""
    at = (jnp.arange(3) == s["i"] % 3)[:, None, None]
    b = jnp.where(at, x @ p["w"], s["b"])
    return {"b": b, "i": s["i"] + 1}, jnp.tanh(b).sum(0)


def register(p, s, x):
    """A shift register by concatenation."""
    b = jnp.concatenate([s["b"][1:], (x @ p["w"])[None]])
    return {"b": b}, jnp.tanh(b[0])


def rolled(p, s, x):
    """A shift register by roll and set, with taps that are trained."""
    b = jnp.roll(s["b"], 1, axis=0).at[0].set(x @ p["w"])
    return {"b": b}, jnp.tanh(jnp.einsum("tbu,tu->bu", b, p["taps"]))


def shifted_inputs(p, s, x):
    """A shift register of inputs alone: there is no memory of a parameter in it."""
    b = jnp.concatenate([x[None], s["b"][:-1]])
    h = 0.9 * s["h"] + jnp.einsum("tbi,tiu->bu", b, p["w3"])
    return {"b": b, "h": h}, jnp.tanh(h)


def packed(p, s, x):
    """Membrane and adaptation in one array, along its last axis."""
    v, a = s["h"][..., 0], s["h"][..., 1]
    v = 0.9 * v + x @ p["w"] - 0.2 * a
    return {"h": jnp.stack([v, 0.8 * a + 0.1 * v], -1)}, jnp.tanh(v)


def packed_alone(p, s, x):
    """Two states in one array that do not feed each other."""
    v, a = s["h"][0], s["h"][1]
    v, a = 0.9 * v + x @ p["w"], 0.5 * a + jnp.tanh(x @ p["v"])
    return {"h": jnp.stack([v, a])}, v * a


def concatenated(p, s, x):
    """Two layers in one array, side by side."""
    a, b = jnp.split(s["h"], 2, axis=-1)
    a = jnp.tanh(0.5 * a + x @ p["w"])
    b = jnp.tanh(0.5 * b + a @ p["r"])
    return {"h": jnp.concatenate([a, b], -1)}, b


def history(p, s, x):
    """A matrix memory: outer products of keys and values (linear attention)."""
    k, v, q = x @ p["wk"], x @ p["wv"], x @ p["wq"]
    m = 0.9 * s["m"] + k[:, :, None] * v[:, None, :]
    return {"m": m}, jnp.einsum("bk,bkv->bv", q, m)


def written_rows(p, s, x):
    """Rows of a table chosen by the input are moved."""
    rows = jnp.argmax(x, -1)
    table = s["t"].at[jnp.arange(BATCH), rows].add(0.5 * (x @ p["w"]))
    return {"t": table}, jnp.tanh(table[jnp.arange(BATCH), jnp.argmin(x, -1)])


def every_other(p, s, x):
    """A state that is updated at every second step."""
    h = lax.cond(s["i"] % 2 == 0, lambda h: jnp.tanh(0.9 * h + x @ p["w"]), lambda h: h, s["h"])
    return {"h": h, "i": s["i"] + 1}, h


def some_units(p, s, x):
    """Some units are lessened, scaled or bounded where they are, at indices that are known; one of them twice."""
    h = 0.9 * s["h"] + x @ p["w"]
    h = h.at[:, 1].subtract(0.3).at[:, jnp.array([0, 2, 2])].subtract(0.1 * x)
    h = h.at[:, :2].multiply(1.5).at[:, 3].min(0.1).at[:, 1:3].max(-0.4)
    return {"h": h}, jnp.tanh(h)


def inhibited(p, s, x):
    """Synapses as an index array, some of which take away."""
    h = 0.9 * s["h"] + x @ p["w"]
    h = h.at[:, jnp.array([0, 1, 1, 3, 2])].subtract(p["g"] * x[:, jnp.array([0, 1, 2, 0, 1])])
    return {"h": h}, jnp.tanh(h)


def running_mean(p, s, x):
    """A count in the divisor."""
    n = s["n"] + 1.0
    h = s["h"] + (x @ p["w"] - s["h"]) / n
    return {"h": h, "n": n}, jnp.tanh(h)


SHAPES = {
    "w": (INPUTS, UNITS), "v": (INPUTS, UNITS), "wk": (INPUTS, UNITS), "wv": (INPUTS, UNITS), "wq": (INPUTS, UNITS),
    "r": (UNITS, UNITS), "taps": (3, UNITS), "w3": (3, INPUTS, UNITS),
    "g": (5,),
}  # fmt: skip
ROWS, COUNT = jnp.zeros((3, BATCH, UNITS)), jnp.zeros((), jnp.int32)
H = jnp.zeros((BATCH, UNITS))
PLAIN = {
    cache: ("wk wv wq", {"k": jnp.zeros((BATCH, STEPS, UNITS)), "v": jnp.zeros((BATCH, STEPS, UNITS)), "i": COUNT}),
    ring: ("w", {"b": ROWS, "h": H, "i": COUNT}),
    sorted_rows: ("w", {"b": ROWS, "h": H}),
    one_hot_ring: ("w", {"b": ROWS, "i": COUNT}),
    register: ("w", {"b": ROWS}),
    rolled: ("w taps", {"b": ROWS}),
    shifted_inputs: ("w3", {"b": jnp.zeros((3, BATCH, INPUTS)), "h": H}),
    packed: ("w", {"h": jnp.zeros((BATCH, UNITS, 2))}),
    packed_alone: ("w v", {"h": jnp.zeros((2, BATCH, UNITS))}),
    concatenated: ("w r", {"h": jnp.zeros((BATCH, 2 * UNITS))}),
    history: ("wk wv wq", {"m": jnp.zeros((BATCH, UNITS, UNITS))}),
    written_rows: ("w", {"t": jnp.zeros((BATCH, INPUTS, UNITS))}),
    every_other: ("w", {"h": H, "i": COUNT}),
    running_mean: ("w", {"h": H, "n": jnp.zeros(())}),
    some_units: ("w", {"h": H}),
    inhibited: ("w g", {"h": H}),
}  # fmt: skip


def of(fn):
    names, state = PLAIN[fn]
    params = {name: normal(k, *SHAPES[name]) for k, name in enumerate(names.split())}
    return params, state


def data(seed=5):
    return normal(seed, STEPS, BATCH, INPUTS), normal(seed + 1, STEPS, BATCH, UNITS)


def through_time(fn, params, state, xs, ys):
    def total(params):
        def one(s, item):
            s, out = fn(params, s, item[0])
            return s, (out, square(out, item[1]))

        _, (outs, losses) = lax.scan(one, state, (xs, ys))
        return losses.sum(), outs

    grads, outs = jax.jit(jax.grad(total, has_aux=True))(params)
    return outs, grads


def listed(step):
    report = step.report()
    return len(report.cuts) + bool(report.leaves_out)


def gap(found, wanted):
    scale = max(float(jnp.abs(wanted).max()), 1e-6)
    return float(jnp.abs(found - wanted).max()) / scale


#: Those of which d_rtrl loses nothing; and those in which it has nothing for w.
EXACT = {
    cache, ring, shifted_inputs, packed_alone, every_other, running_mean, packed, register, rolled, one_hot_ring,
    history, written_rows, some_units, inhibited,
}  # fmt: skip
ZERO = {sorted_rows}


def said_to_be_zero(step):
    return {p.path for p in step.report().parameters if p.zero}


def assert_told(step, zero):
    """Weights with a gradient of zero have no trace, and the report says of what nothing is kept, which rules keep it, and where
    nothing can come of them in one step."""
    report = step.report()
    assert said_to_be_zero(step) <= zero
    assert not zero or (report.forgotten and "rules that keep a memory of it: rtrl" in str(report))
    for p in report.parameters:
        assert p.path not in zero or p.how == "within the step only"
        assert not p.zero or f"its gradient is zero with {step.program.name}: within a step" in str(report)


@pytest.mark.parametrize("fn", PLAIN, ids=lambda fn: fn.__name__)
def test_d_rtrl_is_exact_or_says_what_it_loses(fn):
    params, state = of(fn)
    xs, ys = data()
    outs, wanted = through_time(fn, params, state, xs, ys)
    step = etcompile.compile(etcompile.from_function(fn, params, state), xs[0])
    losses, grads = step.scan_value_and_grad(square, chunk=1)(xs, ys)
    np.testing.assert_allclose(losses, jax.vmap(square)(outs, ys), rtol=1e-12)
    worst = max(gap(grads[k], wanted[k]) for k in wanted)
    assert step.exact == (fn in EXACT) == (not listed(step)) == (worst < 1e-10), worst
    zero = {k for k, g in grads.items() if not g.any()}
    assert zero == ({"w"} if fn in ZERO else set())
    assert_told(step, zero)


@pytest.mark.parametrize("fn", [cache, ring, rolled, packed], ids=lambda fn: fn.__name__)
def test_rtrl_is_exact(fn):
    params, state = of(fn)
    xs, ys = data()
    _, wanted = through_time(fn, params, state, xs, ys)
    step = etcompile.compile(etcompile.from_function(fn, params, state), xs[0], algo="rtrl")
    _, grads = step.scan_value_and_grad(square, chunk=1)(xs, ys)
    assert step.exact and not listed(step) and not said_to_be_zero(step)
    assert max(gap(grads[k], wanted[k]) for k in wanted) < 1e-10


def concatenated_with_cuts(p, s, x, *, cut, put):
    a, b = jnp.split(s["h"], 2, axis=-1)
    a = jnp.tanh(0.5 * a + x @ p["w"])
    b = jnp.tanh(0.5 * b + cut(a) @ p["r"])
    return {"h": put("h", jnp.concatenate([a, b], -1))}, b


def test_what_is_left_is_the_gradient_with_those_uses_cut():
    params, state = of(concatenated)
    xs, ys = data()
    wanted = dense_d_rtrl(concatenated_with_cuts, params, state, xs, (ys,), square, [["h"]])
    step = etcompile.compile(etcompile.from_function(concatenated, params, state), xs[0])
    for chunk in (1, 3):
        step.reset()
        _, grads = step.scan_value_and_grad(square, chunk=chunk)(xs, ys)
        assert relative_error(grads, wanted.grads) < 1e-10


# -- modules ----------------------------------------------------------------------------------------------------------


def param(seed, *shape):
    return brainstate.ParamState(normal(seed, *shape))


class Refractory(brainstate.nn.Module):
    """Neurons that hold still for a while after a spike: they read ``t``."""

    def __init__(self, kind, drive=8.0, **options):
        super().__init__()
        self.drive = drive
        surrogate = braintools.surrogate.Sigmoid(2.0)
        self.w, self.o = param(0, INPUTS, UNITS), param(1, UNITS, UNITS)
        self.cell = kind(UNITS, tau=5.0 * u.ms, tau_ref=2.5 * u.ms, spk_fun=surrogate, **options)

    def update(self, x):
        return self.cell(self.drive * (x @ self.w.value) * u.mA) @ self.o.value


class Grouped(brainstate.nn.Module):
    """A leaky unit and its average in one array."""

    def __init__(self):
        super().__init__()
        self.w = param(0, INPUTS, UNITS)

    def init_state(self, batch_size=None):
        self.h = brainstate.HiddenGroupState(jnp.zeros((batch_size, UNITS, 2)))

    def update(self, x):
        v = 0.9 * self.h.get_value(0) + x @ self.w.value
        a = 0.8 * self.h.get_value(1) + 0.1 * jnp.tanh(v)
        self.h.set_value([v, a])
        return jnp.tanh(v - a)


class Apart(Grouped):
    """Two units in one array that do not feed each other."""

    def update(self, x):
        v = 0.9 * self.h.get_value(0) + x @ self.w.value
        a = 0.8 * self.h.get_value(1) + 0.1 * jnp.sin(x @ self.w.value[:, ::-1])
        self.h.set_value({"1": a, "0": v})
        return jnp.tanh(v - a)


class Tree(Grouped):
    """A membrane and a current, with their units, in one array."""

    def init_state(self, batch_size=None):
        zero = jnp.zeros((batch_size, UNITS))
        self.h = brainstate.HiddenTreeState({"v": zero * u.mV, "i": zero * u.mA})

    def update(self, x):
        i = 0.7 * self.h.get_value("i") + (x @ self.w.value) * u.mA
        v = 0.9 * self.h.get_value("v") + i * u.ohm
        self.h.set_value({"v": v, "i": i})
        return jnp.tanh(v / u.mV)


class Partly(Tree):
    """One of the packed states is written alone."""

    def update(self, x):
        v = 0.9 * self.h.get_value("v") + (x @ self.w.value) * u.mV
        self.h.set_value({"v": v})
        return jnp.tanh(v / u.mV)


class Delayed(brainstate.nn.Module):
    """A weight in front of a delay."""

    def __init__(self, at=True, **options):
        super().__init__()
        self.w, self.at = param(0, INPUTS, UNITS), at
        self.delay = brainstate.nn.Delay(
            jax.ShapeDtypeStruct((UNITS,), jnp.float64), time=3 * DT, entries={"late": 2 * DT}, **options
        )

    def init_state(self, batch_size=None):
        self.h = brainstate.HiddenState(jnp.zeros((batch_size, UNITS)))

    def update(self, x):
        self.delay.update(x @ self.w.value)
        late = self.delay.at("late") if self.at else self.delay.retrieve_at_step(3)
        self.h.value = 0.8 * self.h.value + late
        return jnp.tanh(self.h.value)


class Behind(Delayed):
    """A state goes through the delay, and comes back into itself."""

    def update(self, x):
        self.h.value = jnp.tanh(0.8 * self.h.value + x @ self.w.value + 0.3 * self.delay.at("late"))
        self.delay.update(self.h.value)
        return self.h.value


class InputsDelayed(Delayed):
    """Inputs go through the delay, and no weight does."""

    def __init__(self):
        super().__init__()
        self.delay = brainstate.nn.Delay(
            jax.ShapeDtypeStruct((INPUTS,), jnp.float64), time=3 * DT, entries={"late": 2 * DT}
        )

    def update(self, x):
        self.delay.update(x)
        self.h.value = 0.8 * self.h.value + self.delay.at("late") @ self.w.value
        return jnp.tanh(self.h.value)


bp = brainpy.state
MODULES = {
    "LIFRef": (lambda: Refractory(bp.LIFRef), True),
    "LIFRef with a hard reset": (lambda: Refractory(bp.LIFRef, spk_reset="hard"), True),
    "AdExIFRef": (lambda: Refractory(bp.AdExIFRef, 60.0), True),
    "HiddenGroupState": (Grouped, False),
    "HiddenGroupState, apart": (Apart, True),
    "HiddenTreeState": (Tree, False),
    "HiddenTreeState, partly": (Partly, True),
    "Delay.at": (Delayed, True),
    "Delay.retrieve_at_step": (lambda: Delayed(at=False), True),
    "Delay, feedback": (Behind, True),
    "Delay of inputs": (InputsDelayed, True),
    "Delay, every other step": (lambda: Delayed(update_every=2 * DT), False),
}


def at(k):
    return environ.context(i=k, t=k * DT)


def by_hand(model, xs, ys):
    """Outputs, losses and gradient of the module itself, every step in its own environment."""
    with at(0):
        brainstate.nn.init_all_states(model, batch_size=BATCH)

    def total():
        outs = []
        for k in range(len(xs)):
            with at(k):
                outs.append(model(xs[k]))
        losses = jnp.stack([square(o, y) for o, y in zip(outs, ys, strict=True)])
        return losses.sum(), (jnp.stack(outs), losses)

    weights = {".".join(p): s for p, s in model.states(brainstate.ParamState).items()}
    grads, (outs, losses) = brainstate.transform.grad(total, weights, has_aux=True)()
    return outs, losses, grads


def compiled(make, xs, **options):
    with at(0):
        return etcompile.compile(make(), xs[0], batch_size=BATCH, **options)


#: Modules in which a trace of a weight is kept, and its credit reaches no output but through a cut that names the weight.
CUT_TO_ZERO = {"Delay, every other step"}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_exact_or_say_what_they_lose(name):
    make, exact = MODULES[name]
    xs, ys = data()
    outs, losses, wanted = by_hand(make(), xs, ys)
    step = compiled(make, xs)
    with at(0):
        np.testing.assert_allclose(step.scan(xs), outs, rtol=1e-10, atol=1e-13)
        step.reset()
        found, grads = step.scan_value_and_grad(square, chunk=3)(xs, ys)
    np.testing.assert_allclose(found, losses, rtol=1e-10)
    assert all(jnp.abs(g).max() > 1e-3 for g in wanted.values())
    worst = max(gap(grads[k], wanted[k]) for k in wanted)
    assert step.exact == exact == (not listed(step)) == (worst < 1e-10), worst
    zero = {k for k, g in grads.items() if not g.any()}
    if name in CUT_TO_ZERO:
        assert zero and all(any(path in cut.origins for cut in step.report().cuts) for path in zero)
    else:
        assert_told(step, zero)
    assert all(cut.source.startswith("test_idioms.py:") for cut in step.report().cuts)


@pytest.mark.parametrize("name", ["Delay, feedback", "Delay, every other step"])
def test_rtrl_follows_modules_everywhere(name):
    make, _ = MODULES[name]
    xs, ys = data()
    _, _, wanted = by_hand(make(), xs, ys)
    step = compiled(make, xs, algo="rtrl")
    with at(0):
        _, grads = step.scan_value_and_grad(square, chunk=1)(xs, ys)
    assert step.exact and not listed(step)
    assert max(gap(grads[k], wanted[k]) for k in wanted) < 1e-10


def test_refractory_neurons_are_the_models_in_every_kind_of_call():
    make, _ = MODULES["LIFRef"]
    xs, ys = data()
    outs, losses, wanted = by_hand(make(), xs, ys)
    step = compiled(make, xs)
    one_by_one, total = [], 0
    for k, x in enumerate(xs):
        with at(k):
            one_by_one.append(step(x))
    np.testing.assert_allclose(jnp.stack(one_by_one), outs, rtol=1e-10, atol=1e-13)
    step.reset()
    for k, (x, y) in enumerate(zip(xs, ys, strict=True)):
        with at(k):
            total += step.value_and_grad(square)(x, y)[1]["w"]
    assert gap(total, wanted["w"]) < 1e-10
    with at(0):
        for chunk in (2, "auto"):
            step.reset()
            _, grads = step.scan_value_and_grad(square, chunk=chunk)(xs, ys)
            assert gap(grads["w"], wanted["w"]) < 1e-10
        step.reset()
        np.testing.assert_allclose(step.learn(square, optax.sgd(0.0))(xs, ys), losses, rtol=1e-10)
        step.reset()
        still = [
            step(x) for x in xs
        ]  # at a time that stands still they never come out of the refractory period
    assert float(jnp.abs(jnp.stack(still) - outs).max()) > 0.05


def test_a_weight_that_misses_the_outputs_is_told_apart_from_one_with_its_own_signal():
    params, state = of(sorted_rows)
    model = etcompile.from_function(sorted_rows, params, state)
    xs, _ = data()
    assert said_to_be_zero(etcompile.compile(model, xs[0])) == {"w"}
    for algo in ("rtrl", "snap", "bptt"):
        assert not said_to_be_zero(etcompile.compile(model, xs[0], algo=algo))
