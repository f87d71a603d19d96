"""Observers of a run: measures against ones made by hand, what the dashboard shows, and what TensorBoard reads."""

from __future__ import annotations

import io
import struct

import brainpy
import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import saiunit as u
from oracles import relative_error
from rich.console import Console

import etcompile
from etcompile import OptionError

T = 13
RNG = np.random.default_rng(0)
XS, YS = RNG.normal(size=(T, 2, 3)), RNG.normal(size=(T, 2, 2))


class Keeps(etcompile.Observer):
    """Keeps what it is told."""

    wants_activity = wants_gradient_norms = True

    def __init__(self):
        self.seen, self.calls = [], []

    def begin(self, at, total):
        self.calls.append((at, total))

    def observe(self, seen):
        self.seen.append(seen)

    def end(self):
        self.calls.append("end")


def square(out, y):
    return jnp.mean((out - y) ** 2)


def _spike(v):
    @jax.custom_jvp
    def heaviside(v):
        return (v > 0).astype(v.dtype)

    heaviside.defjvp(lambda p, t: (heaviside(*p), t[0] / (1 + jnp.abs(p[0])) ** 2))
    return heaviside(v)


def spiking(params, state, x):
    """Spikes of the membrane before it is reset, fed back at the next step: no function of the new states."""
    v = 0.8 * state["v"] + x @ params["w"] + state["s"] @ params["r"]
    s = _spike(v - 0.5)
    return {"v": v - s, "s": s}, s @ params["o"]


def from_the_old(params, state, x):
    """Spikes of the membrane as it came in."""
    s = _spike(state["v"] - 0.5)
    return {"v": 0.8 * state["v"] + x @ params["w"] - s}, s @ params["o"]


def rate(params, state, x):
    h = jnp.tanh(0.5 * state["h"] + x @ params["w"])
    return {"h": h}, h @ params["o"]


def _params(*names):
    shapes = {"w": (3, 5), "r": (5, 5), "o": (5, 2)}
    rng = np.random.default_rng(1)
    return {k: jnp.asarray(0.6 * rng.normal(size=shapes[k])) for k in names}


def _by_hand(fn, params, states, xs):
    """Means of what is shown: the membrane's spikes, or the activity."""
    found = []
    for x in xs:
        before = states
        states, _ = fn(params, states, x)
        shown = states.get("s", states.get("h"))
        if shown is None:
            shown = _spike(before["v"] - 0.5)
        found.append(float(jnp.mean(jnp.abs(shown))))
    return found


CASES = {
    "spikes before the reset": (spiking, _params("w", "r", "o"), ("v", "s")),
    "spikes of old states": (from_the_old, _params("w", "o"), ("v",)),
    "rates": (rate, _params("w", "o"), ("h",)),
}


def _learner(name, optimizer, **options):
    fn, params, states = CASES[name]
    zeros = {k: jnp.zeros((2, 5)) for k in states}
    step = etcompile.compile(etcompile.from_function(fn, params, zeros), XS[0])
    return step.learn(square, optimizer, **options), fn, params, zeros


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_activity_is_what_the_units_show(name, every):
    learner, fn, params, zeros = _learner(name, optax.sgd(0.0), update_every=every)
    keeps = Keeps()
    learner(XS, YS, callback=keeps)
    wanted = _by_hand(fn, params, zeros, XS)
    assert keeps.calls == [(0, T), "end"] and keeps.seen[-1].steps == T
    assert len(keeps.seen) > 1 or every > 1
    done = 0
    for seen in keeps.seen:
        (group,) = seen.activity
        assert relative_error(seen.activity[group], np.mean(wanted[done : seen.steps])) < 1e-6
        assert (group in seen.spiking) == ("spikes" in name)
        done = seen.steps


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_norms_are_of_the_gradients_that_the_optimiser_gets(name, every):
    got = []

    def note(grads, state, params=None):
        jax.debug.callback(
            lambda g: got.append({k: np.linalg.norm(np.asarray(v)) for k, v in g.items()}),
            grads,
            ordered=True,
        )
        return jax.tree.map(lambda g: -0.01 * g, grads), state

    learner, *_ = _learner(
        name, optax.GradientTransformation(lambda params: optax.EmptyState(), note), update_every=every
    )
    keeps = Keeps()
    learner(XS[:6], YS[:6], callback=keeps)  # an update is left waiting
    learner(XS[6:], YS[6:], callback=keeps)
    jax.effects_barrier()
    assert len(got) == T // every
    for path in got[0]:
        norms = np.concatenate([seen.gradient_norms[path] for seen in keeps.seen])
        assert relative_error(norms, np.array([g[path] for g in got])) < 1e-6


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_watching_changes_no_number(name, every):
    quiet, *_ = _learner(name, optax.adam(0.01), update_every=every)
    watched, *_ = _learner(name, optax.adam(0.01), update_every=every)
    told = []
    callbacks = [Keeps(), lambda steps, losses: told.append((steps, len(losses)))]
    assert relative_error(watched(XS, YS, callback=callbacks), quiet(XS, YS)) < 1e-12
    for one, other in zip(
        jax.tree.leaves(watched.step.params), jax.tree.leaves(quiet.step.params), strict=True
    ):
        assert relative_error(one, other) < 1e-12
    assert told[-1][0] == T and sum(n for _, n in told) == T


class Layers(brainstate.nn.Module):
    """Two layers of spiking units with units of measurement, and a readout that leaks."""

    def __init__(self):
        super().__init__()
        self.first = brainstate.nn.Linear(3, 6)
        self.a = brainpy.state.LIF(6)
        self.second = brainstate.nn.Linear(6, 4)
        self.b = brainpy.state.LIF(4)
        self.out = brainstate.nn.Linear(4, 2)

    def update(self, x):
        return self.out(self.b(self.second(self.a(40 * self.first(x) * u.mA)) * u.mA))


@pytest.fixture
def layers():
    brainstate.random.seed(0)
    with brainstate.environ.context(dt=1.0 * u.ms):
        yield etcompile.compile(Layers(), jnp.zeros((2, 3)), batch_size=2)


def test_firing_rates_of_a_stock_model_and_the_time_of_a_step(layers):
    keeps = Keeps()
    layers.learn(square, optax.sgd(1e-3))(XS, YS, callback=keeps)
    last = keeps.seen[-1]
    assert set(last.activity) == {"a.V", "b.V"} == last.spiking and last.dt == 1e-3
    assert 0 < last.activity["a.V"] < 1


def test_the_dashboard_shows_it_all(layers):
    shown = io.StringIO()
    learner = layers.learn(square, optax.sgd(1e-3))
    with etcompile.Dashboard("spikes", console=Console(file=shown, width=100)) as board:
        for _ in range(2):
            layers.reset()
            learner(XS, YS, callback=board)
    text = shown.getvalue()
    for wanted in (
        "spikes",
        "13/13 steps",
        "call 2",
        "loss",
        "over 26 steps",
        "steps/s",
        "a.V",
        "Hz",
        "gradient norm",
    ):
        assert wanted in text, text
    assert "silent" in text and "out.weight" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_dashboard_says_where_the_loss_went_wrong():
    learner, *_ = _learner("rates", optax.sgd(1e-3))
    shown = io.StringIO()
    ys = YS.copy()
    ys[6:] = np.nan
    learner(XS, ys, callback=etcompile.Dashboard(rows=1, console=Console(file=shown, width=100)))
    assert "not a finite number since step 7" in shown.getvalue()
    assert "and 1 more" in shown.getvalue()


def test_a_long_run_keeps_its_whole_curve():
    from etcompile.runtime.observing.dashboard import _Curve

    curve = _Curve()
    for k in range(5000):
        curve.add(float(5000 - k), 1 + k % 3)
    drawn = curve.drawn()
    assert len(drawn) == 36 and drawn[0] == "█" and drawn[-1] == "▁" and curve.lowest == 1
    assert sorted(drawn, reverse=True) == list(drawn)


def _scalars(directory):
    """``{tag: [(step, value)]}`` of TensorBoard's files: length, its checksum, an event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in sorted(directory.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        at = 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard_counts_steps_over_calls(tmp_path):
    learner, *_ = _learner("rates", optax.sgd(1e-3))
    with etcompile.TensorBoard(tmp_path, first_step=100) as board:
        losses = [learner(XS, YS, callback=board) for _ in range(2)]
    found = _scalars(tmp_path)
    assert set(found) == {"loss", "steps_per_second", "activity/h", "gradient_norm/w", "gradient_norm/o"}
    steps = [step for step, _ in found["loss"]]
    assert steps == sorted(set(steps)) and steps[-1] == 100 + 2 * T and 100 + T in steps
    lengths = np.diff([100, *steps])
    mean = np.sum(lengths * [value for _, value in found["loss"]]) / (2 * T)
    assert relative_error(mean, np.mean(losses)) < 1e-6
    assert all(value > 0 for _, value in found["steps_per_second"])


def test_tensorboard_goes_on_where_checkpoints_do(tmp_path):
    for end in (6, T):
        learner, *_ = _learner("rates", optax.sgd(1e-3))
        saves = etcompile.Checkpoints(tmp_path / "saves", every=3)
        done = saves.restore(learner).at
        with etcompile.TensorBoard(tmp_path / "log") as board:
            learner(XS[done:end], YS[done:end], checkpoints=saves, callback=board)
    steps = [step for step, _ in _scalars(tmp_path / "log")["loss"]]
    assert steps == sorted(set(steps)) and steps[-1] == T and 6 in steps


def test_a_writer_of_ones_own_stays_open():
    class Writer:
        def __init__(self):
            self.tags = set()

        def add_scalar(self, tag, value, step):
            self.tags.add(tag)

    writer = Writer()
    learner, *_ = _learner("rates", optax.sgd(1e-3))
    with etcompile.TensorBoard(writer=writer) as board:
        learner(XS, YS, callback=board)
    assert "loss" in writer.tags


def test_an_observer_that_raises_is_told_of_the_end_and_the_run_stands_after_its_last_piece():
    class Stops(Keeps):
        def observe(self, seen):
            super().observe(seen)
            if seen.steps >= 4:
                raise KeyboardInterrupt

    stops = Stops()
    learner, *_ = _learner("rates", optax.sgd(1e-3))
    whole, *_ = _learner("rates", optax.sgd(1e-3))
    with pytest.raises(KeyboardInterrupt):
        learner(XS, YS, callback=stops)
    assert stops.calls[-1] == "end"
    done = stops.seen[-1].steps
    assert (
        relative_error(
            np.concatenate([whole(XS[:done], YS[:done]), whole(XS[done:], YS[done:])])[done:],
            learner(XS[done:], YS[done:]),
        )
        < 1e-12
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"callback": 3}, "a function"),
        ({"callback": [print, "x"]}, "a function"),
        ({"callback": etcompile.Dashboard}, "one that is made"),
        ({"callback": etcompile.Dashboard(), "progress": True}, "room for one"),
        ({"callback": [etcompile.Dashboard(), etcompile.Dashboard()]}, "room for one"),
    ],
    ids=["number", "string", "class", "bar", "two"],
)
def test_what_is_no_callback_is_said_before_anything_runs(options, said):
    learner, *_ = _learner("rates", optax.sgd(1e-3))
    before = jax.tree.leaves(learner.step.params)
    with pytest.raises(OptionError, match=said):
        learner(XS, YS, **options)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(learner.step.params), before, strict=True))


def test_tensorboard_takes_a_directory_or_a_writer():
    with pytest.raises(OptionError, match="neither"):
        etcompile.TensorBoard()
    with pytest.raises(OptionError, match="both"):
        etcompile.TensorBoard("somewhere", writer=object())
    with pytest.raises(OptionError, match="rows"):
        etcompile.Dashboard(rows=0)


def test_what_a_model_prints_is_printed_once():
    said = []

    def noisy(params, state, x):
        jax.debug.callback(lambda v: said.append(float(v)), x.sum())
        h = jnp.tanh(state["h"] + x @ params["w"])
        return {"h": h}, h

    model = etcompile.from_function(noisy, _params("w"), {"h": jnp.zeros((2, 5))})
    step = etcompile.compile(model, XS[0])
    step.learn(lambda o: jnp.sum(o), optax.sgd(0.0))(XS, callback=Keeps())
    jax.effects_barrier()
    assert len(said) == T


class Noisy(brainstate.nn.Module):
    """Draws from a key of its own, which is a state of the model."""

    def __init__(self):
        super().__init__()
        self.w = brainstate.ParamState(jnp.ones((3, 5)))
        self.h = brainstate.HiddenState(jnp.zeros((2, 5)))
        self.random = brainstate.random.RandomState(3)

    def update(self, x):
        self.h.value = jnp.tanh(0.5 * self.h.value + x @ self.w.value + self.random.normal(size=(2, 5)))
        return self.h.value


@pytest.mark.parametrize("every", [1, 4])
def test_a_model_that_draws_is_watched_with_the_numbers_that_it_draws(every):
    def run(callback):
        step = etcompile.compile(Noisy(), XS[0])
        learner = step.learn(lambda o: jnp.mean(jnp.abs(o)), optax.sgd(0.0), update_every=every)
        return learner(XS, callback=callback)

    keeps = Keeps()
    losses = run(keeps)
    assert relative_error(losses, run(None)) < 1e-12
    lengths = np.diff([0, *(seen.steps for seen in keeps.seen)])
    activity = np.sum(lengths * [seen.activity["h"] for seen in keeps.seen]) / T
    assert relative_error(activity, np.mean(losses)) < 1e-6
