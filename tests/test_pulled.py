"""States larger than what weights make: one loop for all credits of a chunk, which writes no array of the states' size but these."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error

import etcompile
from etcompile.lowering.schedules import first_pass

TOLERANCE = 1e-10
ALONE = etcompile.Schedule(keep_traces=False)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def square(out, target):
    return jnp.sum((out - target) ** 2)


def attention(batch, inputs, keys):
    params = {name: 0.3 * draw(k, inputs, keys) for k, name in enumerate("qkva")}

    def step(params, state, x):
        q, k, v, a = (x @ params[name] for name in "qkva")
        S = jax.nn.sigmoid(a)[..., None] * state["S"] + k[..., None] * v[..., None, :]
        return {"S": S}, jnp.einsum("bk,bkv->bv", q, S)

    return step, params, {"S": jnp.zeros((batch, keys, keys))}


def test_a_sequence_alone_keeps_its_states_and_nothing_else_of_their_size():
    batch, steps, keys = 2, 40, 32
    model = etcompile.from_function(*attention(batch, 3, keys))
    xs, targets = draw(10, steps, batch, 3), draw(11, steps, batch, keys)
    step = etcompile.compile(model, xs[0], schedule=ALONE)
    lowered = brainstate.transform.jit(step.scan_value_and_grad(square)).lower(xs, targets)
    states = steps * batch * keys * keys * xs.dtype.itemsize
    assert states <= lowered.compile().memory_analysis().temp_size_in_bytes < 1.5 * states


def selective(batch, inputs, channels):
    """The recurrence of Mamba, whose decays are as large as its states, behind a second state that many positions read."""
    names = {"d": channels, "u": channels, "b": 3, "c": 3, "m": 1}
    params = {name: 0.5 * draw(k, inputs, size) for k, (name, size) in enumerate(names.items())}
    params["a"] = draw(9, channels, 3)

    def step(params, state, x):
        d, u, b, c, m = (x @ params[name] for name in names)
        m = jnp.tanh(0.5 * state["m"] + m)
        kept = jnp.exp(-jax.nn.softplus(d)[..., None] * jnp.exp(params["a"]))
        h = kept * state["h"] * (1 + 0.1 * m[..., None]) + u[..., None] * b[..., None, :]
        return {"h": h, "m": m}, jnp.einsum("bdn,bn->bd", jnp.tanh(h), c)

    return step, params, {"h": draw(7, batch, channels, 3), "m": draw(8, batch, 1)}


@pytest.mark.usefixtures("by_numpy")
@pytest.mark.parametrize("made", [attention, selective])
def test_states_made_again_block_by_block_are_the_same(made, monkeypatch):
    model = lambda: etcompile.from_function(*made(2, 3, 4))  # noqa: E731
    xs, targets = draw(10, 16, 2, 3), draw(11, 16, 2, 4)
    expected = etcompile.compile(model(), xs[0]).scan_value_and_grad(square, chunk=1)(xs, targets)
    monkeypatch.setattr(first_pass, "_CACHED", 0)
    for schedule, chunk in ((None, 8), (ALONE, 16), (ALONE, 12)):
        step = etcompile.compile(model(), xs[0], schedule=schedule)
        (chunked,) = [s for s in step.executor.compiled.functions.schedules if s.name == "chunks"]
        assert chunked.program.first_pass.block(chunk) == {8: 4, 16: 8, 12: 6}[chunk] and step.exact
        losses, grads = step.scan_value_and_grad(square, chunk=chunk)(xs, targets)
        assert relative_error((losses, grads), expected) < TOLERANCE


def spike(v):
    return v + jax.lax.stop_gradient((v > 0).astype(v.dtype) - v)


class Delayed(brainstate.nn.Module):
    """Recurrent neurons, cut at their weights, with spikes in a ring buffer that the output reads."""

    def __init__(self, units, slots):
        super().__init__()
        self.units, self.slots = units, slots
        self.delays = jnp.asarray(np.random.default_rng(0).integers(1, slots + 1, units))
        self.weights = brainstate.ParamState(
            {"w": draw(1, 3 + units, units), "b": draw(2, units), "o": draw(3, units, 2)}
        )
        self.v = brainstate.HiddenState(draw(4, 2, units))
        self.sent = brainstate.HiddenState(draw(5, 2, slots, units))
        self.now = brainstate.ShortTermState(jnp.zeros((), jnp.int32))

    def update(self, x):
        now, sent, v, p = self.now.value, self.sent.value, self.v.value, self.weights.value
        arriving = sent[:, (now - self.delays) % self.slots, jnp.arange(self.units)]
        v = 0.9 * v + jnp.concatenate([x, arriving], -1) @ p["w"] + p["b"] - spike(v - 1)
        self.v.value = v
        self.sent.value = sent.at[:, now % self.slots].set(spike(v - 1))
        self.now.value = now + 1
        return arriving @ p["o"] + v[:, :2]


@pytest.mark.usefixtures("by_numpy")
@pytest.mark.parametrize("read_by_loss", [False, True])
def test_what_is_cut_is_left_out_as_step_by_step(read_by_loss):
    xs, targets = draw(6, 7, 2, 3), draw(7, 7, 2, 2)
    ways = {
        "step by step": (None, 1),
        "in chunks": (None, 3),
        "alone": (ALONE, 7),
        "alone in chunks": (ALONE, 3),
    }
    found = {}
    for name, (schedule, chunk) in ways.items():
        model = Delayed(5, 3)

        def loss(out, target, model=model):
            return square(out, target) + (jnp.sum(model.sent.value**2) if read_by_loss else 0.0)

        step = etcompile.compile(model, xs[0], schedule=schedule)
        assert not step.exact
        found[name] = step.scan_value_and_grad(loss, chunk=chunk)(xs, targets)[1]
    for grads in found.values():
        assert relative_error(grads, found["step by step"]) < TOLERANCE


@pytest.mark.usefixtures("by_numpy")
def test_a_loss_of_nothing_has_no_gradient():
    model = etcompile.from_function(*attention(2, 3, 4))
    xs, targets = draw(10, 5, 2, 3), draw(11, 5, 2, 4)
    step = etcompile.compile(model, xs[0])
    losses, grads = step.scan_value_and_grad(lambda out, target: jnp.sum(target), chunk=5)(xs, targets)
    assert losses.shape == (5,) and not any(g.any() for g in grads.values())
