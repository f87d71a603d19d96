"""Sequences in pieces, with a progress bar: the numbers of one call, and a bar that tells the truth."""

from __future__ import annotations

import io
import sys

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import relative_error
from rich.console import Console
from rich.progress import Progress

import etcompile
from etcompile.runtime import progress as pieces

T = 11
RNG = np.random.default_rng(0)
XS, YS = RNG.normal(size=(T, 2, 3)), RNG.normal(size=(T, 2, 4))


def square(out, y):
    return jnp.mean((out - y) ** 2)


class Net(brainstate.nn.Module):
    """A recurrent layer with a weight that is transformed before it is used, and noise of its own."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(1)
        self.w = brainstate.ParamState(jnp.asarray(0.4 * rng.normal(size=(3, 4))))
        self.a = brainstate.ParamState(jnp.asarray(0.4 * rng.normal(size=4)))
        self.h = brainstate.HiddenState(jnp.full((2, 4), 0.1))
        self.random = brainstate.random.RandomState(5)

    def update(self, x):
        drive = x @ jnp.tanh(self.w.value) + 0.1 * self.random.normal(size=(2, 4))
        self.h.value = jnp.tanh(jax.nn.sigmoid(self.a.value) * self.h.value + drive)
        return self.h.value


def fresh(**options):
    return etcompile.compile(Net(), jnp.zeros((2, 3)), **options)


def bits(tree):
    leaves = [
        jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v
        for v in jax.tree.leaves(tree)
    ]
    return [np.asarray(v).tobytes() for v in leaves]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "_PIECES", 3)


# --- the numbers of one call -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "chunk"), [
    ({}, 1), ({}, 2), ({"algo": "uoro"}, 1), ({"algo": "bptt", "window": 2}, None), ({"algo": "bptt"}, None),
    ({"algo": "three_factor"}, 1),
])  # fmt: skip
def test_gradients_of_a_sequence_in_pieces(options, chunk):
    given = {"modulator": RNG.normal(size=T)} if options.get("algo") == "three_factor" else {}
    found = []
    for shown in (False, quiet()):
        step = fresh(**options)
        run = step.scan_value_and_grad(square, chunk=chunk)
        losses, grads = zip(*[run(XS, YS, progress=shown, **given) for _ in range(2)], strict=True)
        found.append(((losses, step.executor.carry()), grads))
    assert bits(found[0][0]) == bits(found[1][0])
    # XLA may round otherwise where the sums over steps become gradients of the parameters: that is a program of its own here.
    assert relative_error(found[0][1], found[1][1]) < 1e-14


def test_outputs_of_a_sequence_in_pieces():
    one, other = fresh(), fresh()
    assert bits(one.scan(XS)) == bits(other.scan(XS, progress=quiet()))
    assert bits(one.executor.carry()) == bits(other.executor.carry())


@pytest.mark.parametrize("update_every", [1, 3])
def test_learning_in_pieces(update_every):
    found = []
    for shown in (False, quiet()):
        learn = fresh().learn(square, optax.adam(1e-2), update_every=update_every)
        losses = learn(XS, YS, progress=shown)
        found.append((losses, learn.step.executor.live.params(), learn.step.executor.carry()))
    assert bits(found[0]) == bits(found[1])


# --- lengths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 12, 100, 101])
@pytest.mark.parametrize("chunk", [1, 2, 5, 200])
def test_pieces_are_of_whole_chunks(steps, chunk):
    lengths = pieces.piece_lengths(steps, chunk)
    assert sum(lengths) == steps
    assert all(n % chunk == 0 for n in lengths[:-1])
    assert len(lengths) == 1 or min(lengths) >= 2 * chunk, "a loop of one turn is compiled as no loop"
    assert len(lengths) <= 3


@pytest.mark.parametrize("fine", [False, True])
def test_a_run_that_goes_on_is_cut_as_the_whole_run(fine):
    whole = pieces.segment_lengths(250, at=7, every=60, fine=fine)
    ends = np.cumsum([7, *whole])
    assert ends[-1] == 257 and {60, 120, 180, 240} <= set(ends)
    for stop in (60, 120, 180, 240):
        rest = pieces.segment_lengths(257 - stop, at=stop, every=60, fine=fine)
        assert whole[-len(rest) :] == rest


# --- the bar -----------------------------------------------------------------------------------------------------------


def quiet():
    return Progress(console=Console(file=io.StringIO()), disable=True)


def test_the_bar_tells_steps_speed_and_loss(monkeypatch):
    monkeypatch.setattr(sys, "stdout", text := io.StringIO())
    learn = fresh().learn(square, optax.sgd(1e-2))
    losses = learn(XS, YS, progress=True)
    shown = text.getvalue()
    assert "learning" in shown and f"{T}/{T}" in shown and "steps/s" in shown
    assert f"loss {float(losses[-pieces.piece_lengths(T)[-1] :].mean()):.4g}" in shown


def test_a_bar_among_others():
    bars = quiet()
    step = fresh()
    step.scan(XS, progress=bars)
    step.scan_value_and_grad(square)(XS, YS, progress=bars)
    assert [(t.description, t.completed, t.total) for t in bars.tasks] == [
        ("steps", T, T),
        ("gradients", T, T),
    ]
    assert bars.tasks[0].fields["loss"] == "" and bars.tasks[1].fields["loss"].startswith("loss ")


# --- mistakes ----------------------------------------------------------------------------------------------------------


def test_mistakes_leave_states_and_traces_as_they_were(monkeypatch):
    step = fresh(algo="three_factor")
    run, learn = step.scan_value_and_grad(square), step.learn(square, optax.sgd(1e-2))
    before = bits(step.executor.carry())
    calls = [
        (lambda: run(XS, YS, progress=1), etcompile.OptionError, "progress must be"),
        (lambda: learn(XS, YS, progress="yes"), etcompile.OptionError, "progress must be"),
        (lambda: step.scan(XS[:, :1], progress=True), etcompile.InputError, "wrong shape"),
        (
            lambda: run(XS, YS, modulator=np.ones(T + 1), progress=True),
            etcompile.InputError,
            "differ in length",
        ),
        (lambda: jax.jit(lambda x: step.scan(x, progress=True))(XS), etcompile.OptionError, "inside of jit"),
        (
            lambda: brainstate.transform.jit(lambda x: learn(x, YS, progress=True))(XS),
            etcompile.OptionError,
            "inside of jit",
        ),
        (lambda: run(XS, YS[:, :, :3], progress=True), Exception, "shapes"),
    ]
    for call, kind, message in calls:
        with pytest.raises(kind, match=message):
            call()
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(etcompile.DependencyError, match=r"pip install 'etcompile\[train\]'"):
        run(XS, YS, progress=True)
    assert bits(step.executor.carry()) == before
