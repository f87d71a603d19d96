"""Checkpoints: a run goes on from the last one bit for bit, and none is taken that does not fit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import brainstate
import braintools
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from long_run import EVERY, STEPS, Noisy, data, everything, learner

import etcompile

CHILD = Path(__file__).with_name("long_run.py")


def same(mine, theirs):
    """Bit for bit, and of one dtype."""
    pairs = zip(mine, theirs, strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


def square(out, y):
    return jnp.mean((out - y) ** 2)


def leaky(params, state, x):
    h = params["decay"] * state["h"] + x @ params["w"]
    return {"h": h}, h


def leaky_step(batch=2, units=4, fn=leaky, **options):
    params = {"w": jnp.ones((3, units)), "decay": jnp.full(units, 0.5)}
    model = etcompile.from_function(fn, params, {"h": jnp.zeros((batch, units))})
    return etcompile.compile(model, jnp.ones((batch, 3)), **options)


def numbers(step):
    kept = (step.executor.live.params(), step.executor.carry(), step.executor.live.initial)
    return [np.array(v) for v in jax.tree.leaves(kept)]


# --- killed ---------------------------------------------------------------------------------------------------------


def child(*args):
    path = os.pathsep.join([str(CHILD.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(CHILD), *map(str, args)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE)


def finished(process):
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors.decode()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path):
    rng = np.random.default_rng()  # another moment in every run of the tests: none may matter
    delay, wait = rng.uniform(0, 0.08), rng.uniform(0, 0.5)
    told = f"killed {delay:.4f} s into a save, then {wait:.4f} s after another"
    killed, whole = tmp_path / "killed", tmp_path / "whole"

    code, errors = finished(child(killed, tmp_path / "killed.npz", 3, delay))
    assert code == -signal.SIGKILL, (told, errors)
    first = etcompile.Checkpoints(killed).latest
    assert first >= 2 * EVERY, told

    process = child(killed, tmp_path / "killed.npz")
    deadline = time.monotonic() + 300
    while (
        not (killed / str(first + EVERY)).exists() and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    time.sleep(wait)
    process.kill()
    finished(process)
    assert first < etcompile.Checkpoints(killed).latest, told

    for directory in (killed, whole):
        code, errors = finished(child(directory, directory.with_suffix(".npz")))
        assert code == 0, (told, errors)
        assert etcompile.Checkpoints(directory).latest == STEPS
        assert len([d for d in directory.iterdir() if d.is_dir()]) == 2, (
            "keep=2, and nothing left of what was killed"
        )
    mine, theirs = (np.load(directory.with_suffix(".npz")) for directory in (killed, whole))
    assert same(list(mine.values()), list(theirs.values())), told


# --- goes on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [
    lambda: optax.inject_hyperparams(optax.adamw)(1e-2),
    lambda: braintools.optim.Adam(braintools.optim.StepLR(1e-2, step_size=2)),
], ids=["optax", "braintools"])  # fmt: skip
def test_a_learner_goes_on_bit_for_bit(tmp_path, optimizer):
    xs, ys = data(12)
    made = [optimizer() for _ in range(2)]
    whole, other = (learner(o, "d_rtrl") for o in made)
    saves = etcompile.Checkpoints(tmp_path, every=4)

    def run(learn, schedule, a, b):
        losses = learn(xs[a:b], ys[a:b], checkpoints=saves if learn is whole else None)
        if hasattr(schedule, "lr_scheduler"):
            schedule.lr_scheduler.step()
        return np.asarray(losses)

    run(whole, made[0], 0, 6)
    wanted = run(whole, made[0], 6, 10)  # the checkpoint at 8 is made inside of this call
    assert saves.latest == 8 and saves.at == 10
    found = etcompile.Checkpoints(tmp_path)
    assert found.restore(other) == (8, None)
    assert found.at == 8
    if hasattr(made[1], "lr_scheduler"):
        assert made[1].lr_scheduler.last_epoch.value == 1
    assert run(other, made[1], 8, 10).tobytes() == wanted[2:].tobytes()
    assert same(everything(other), everything(whole))
    assert run(other, made[1], 10, 12).tobytes() == run(whole, made[0], 10, 12).tobytes()
    assert same(everything(other), everything(whole))
    types = [jax.tree.map(jax.typeof, [s.value for s in x.saved_states().values()]) for x in (other, whole)]
    assert types[0] == types[1], "weak dtypes too"


def test_a_step_with_an_optimiser_of_ones_own(tmp_path):
    xs, ys = (v[:, :, :3] for v in data(3))
    optimizer = optax.adam(1e-2)
    key = jax.random.key(3)

    def train(step, saves, first, last, extra):
        for k in range(first, last):
            losses, grads = step.scan_value_and_grad(square, chunk=1)(xs, jnp.sin(k + ys))
            params = step.executor.live.params()
            changes, opt = optimizer.update(grads, extra["opt"], params)
            step.executor.live.set_params(optax.apply_updates(params, changes))
            rows = jax.random.normal(extra["key"], (2,))
            extra = {
                "opt": opt,
                "key": jax.random.split(extra["key"])[0],
                "best": float(losses.min()),
                "rows": rows,
            }
            saves.save(step, k + 1, extra)
            if k % 2:
                step.reset()
        return extra

    def start(step):
        return {
            "opt": optimizer.init(step.executor.live.params()),
            "key": key,
            "best": 0,
            "rows": jnp.zeros(2),
        }

    whole, other = (leaky_step(units=3) for _ in range(2))
    saves = etcompile.Checkpoints(tmp_path, every=2, keep=1)
    extra = train(whole, saves, 0, 5, start(whole))
    assert saves.latest == 4 and [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["4"]
    wanted = train(whole, etcompile.Checkpoints(tmp_path / "whole", every=99), 5, 7, extra)
    at, extra = saves.restore(other, start(other))
    other.reset()  # the checkpoint at 4 was made before the reset of its sequence
    assert at == 4 and isinstance(extra["best"], float)
    found = train(other, saves, at, 7, extra)
    assert found["best"] == wanted["best"] and (found["key"] == wanted["key"]).all()
    assert same(numbers(other), numbers(whole))


def test_initial_states_and_arrays_of_no_size_are_kept(tmp_path):
    def model(first):
        def fn(params, state, x):
            h = jnp.tanh(state["h"] + x * params["w"])
            return {"h": h, "none": state["none"]}, h

        model = etcompile.from_function(fn, {"w": jnp.ones(3)}, {"h": first, "none": jnp.zeros((0, 2))})
        return etcompile.compile(model, jnp.ones(3))

    saved, other = model(jnp.full(3, 0.5)), model(jnp.zeros(3))
    saved.scan(jnp.ones((4, 3)))
    saves = etcompile.Checkpoints(tmp_path)
    saves.save(saved, 1)
    saves.restore(other)
    assert same(numbers(other), numbers(saved))
    other.reset()
    np.testing.assert_array_equal(other.init_carry().states["h"], 0.5)
    np.testing.assert_array_equal(other.executor.carry().states["h"], 0.5)


def test_restored_traces_are_the_step_s_own(tmp_path):
    """Traces are donated to the next call: what is restored must be the step's own."""
    step = leaky_step()
    run = step.scan_value_and_grad(square, chunk=1)
    run(jnp.ones((4, 2, 3)), jnp.zeros((4, 2, 4)))
    saves = etcompile.Checkpoints(tmp_path)
    saves.save(step, 1)
    before = numbers(step)
    after = []
    for _ in range(2):
        run(jnp.ones((4, 2, 3)), jnp.zeros((4, 2, 4)))
        after.append(numbers(step))
        saves.restore(step)
        assert same(numbers(step), before)
    assert same(*after)


def test_nothing_to_restore_yet(tmp_path):
    step = leaky_step()
    saves = etcompile.Checkpoints(tmp_path / "new", every=10)
    assert saves.restore(step, {"k": 3}) == (0, {"k": 3})
    assert saves.latest is None and not (tmp_path / "new").exists()
    assert not saves.save(step, 9) and saves.latest is None
    assert saves.save(step, 12) and not saves.save(step, 19) and saves.save(step, 20)
    assert saves.save(step, 21, force=True) and not saves.save(step, 21, force=True)
    assert saves.latest == 21


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path):
    step = leaky_step()
    saves = etcompile.Checkpoints(tmp_path)
    saves.save(step, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    assert etcompile.Checkpoints(tmp_path).restore(step).at == 1
    assert (tmp_path / "2.orbax-checkpoint-tmp").exists(), "a reader clears nothing away"
    saves.save(step, 2)
    assert not (tmp_path / "2.orbax-checkpoint-tmp").exists()


# --- does not fit ---------------------------------------------------------------------------------------------------


def other_leaky(params, state, x):
    h = params["decay"] * state["h"] + x @ params["w"] - jnp.mean(state["h"])
    return {"h": h}, h


MASKED = np.ones((3, 4))


def masked(params, state, x):
    h = params["decay"] * state["h"] + x @ (params["w"] * MASKED)
    return {"h": h}, h


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of the leaky step, and one of its learner."""
    step = leaky_step()
    learn = step.learn(square, optax.adam(1e-2), update_every=2)
    learn(jnp.ones((3, 2, 3)), jnp.zeros((3, 2, 4)))
    places = {}
    for name, run in [("step", step), ("learner", learn)]:
        places[name] = tmp_path_factory.mktemp(name)
        etcompile.Checkpoints(places[name]).save(run, 3, {"k": jnp.zeros(2)})
    return places


K = {"k": jnp.zeros(2)}


@pytest.mark.parametrize(("make", "extra", "message"), [
    (lambda: leaky_step(batch=5), K, r"states.h.*float64\[2, 4\].*float64\[5, 4\].*batch_size"),
    (lambda: leaky_step(units=6), K, r"params.decay, params.w"),
    (lambda: leaky_step(algo="e_prop"), K, r"another learning rule.*d_rtrl in the checkpoint.*e_prop here"),
    (lambda: leaky_step(fn=other_leaky), K, r"another trace program.*exact=yes.*exact=no"),
    (lambda: leaky_step().learn(square, optax.adam(1e-2), 2), K, r"something else.*a step.*a learner"),
    (leaky_step, None, r"extra.k.*nothing here"),
    (leaky_step, {"k": jnp.zeros(2, jnp.float32)}, r"extra.k.*float64\[2\].*float32\[2\]"),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_a_step(saved, make, extra, message):
    run = make()
    step = getattr(run, "step", run)
    step.scan(jnp.ones((1, *jax.tree.leaves(step.executor.inputs)[0].shape)))
    before = numbers(step)
    with pytest.raises(etcompile.CheckpointError, match=f"(?s){message}"):
        etcompile.Checkpoints(saved["step"]).restore(run, extra)
    assert same(numbers(step), before)


@pytest.mark.parametrize(("optimizer", "every", "message"), [
    (optax.adam(1e-2), 4, r"another number of steps between updates.*2 in the checkpoint.*4 here"),
    (optax.sgd(1e-2, momentum=0.9), 2, r"learner.optimizer.*nothing"),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_a_learner(saved, optimizer, every, message):
    learn = leaky_step().learn(square, optimizer, every)
    with pytest.raises(etcompile.CheckpointError, match=f"(?s){message}"):
        etcompile.Checkpoints(saved["learner"]).restore(learn, K)


def test_masks_that_were_drawn_anew_are_noticed(tmp_path, monkeypatch):
    saves = etcompile.Checkpoints(tmp_path)
    saves.save(leaky_step(fn=masked), 1)
    assert saves.restore(leaky_step(fn=masked)).at == 1
    monkeypatch.setitem(globals(), "MASKED", np.eye(3, 4))
    with pytest.raises(etcompile.CheckpointError, match="closes over"):
        saves.restore(leaky_step(fn=masked))


def test_another_run_in_the_same_directory(saved):
    step = leaky_step()
    with pytest.raises(etcompile.CheckpointError, match="went further"):
        etcompile.Checkpoints(saved["step"]).save(step, 3)
    learn = step.learn(square, optax.adam(1e-2), 2)
    before = numbers(step)
    with pytest.raises(etcompile.CheckpointError, match="went further"):
        learn(jnp.ones((3, 2, 3)), jnp.zeros((3, 2, 4)), checkpoints=etcompile.Checkpoints(saved["learner"]))
    assert same(numbers(step), before)


def test_a_directory_of_something_else(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(7, args=ocp.args.Composite(tree=ocp.args.StandardSave({"a": np.ones(2)})))
        manager.wait_until_finished()
    with pytest.raises(etcompile.CheckpointError, match=r"checkpoint 7 in .*cannot be read"):
        etcompile.Checkpoints(tmp_path).restore(leaky_step())


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes(tmp_path, monkeypatch):
    step = leaky_step()
    saves = etcompile.Checkpoints(tmp_path)
    saves.save(step, 5)
    for call, message in [
        (lambda: etcompile.Checkpoints(tmp_path, every=0), "every must be"),
        (lambda: etcompile.Checkpoints(tmp_path, keep=1.5), "keep must be"),
        (lambda: saves.save(step, 4), "integers that grow"),
        (lambda: saves.save(step, 6, {"name": "run"}), "extra.name cannot be saved"),
        (lambda: saves.save(Noisy(), 6), "only a step or a learner"),
        (lambda: jax.jit(lambda v: saves.save(step, 6, v))(1.0), "inside of jit"),
    ]:
        with pytest.raises(etcompile.OptionError, match=message):
            call()
    assert saves.latest == saves.at == 5
    monkeypatch.setitem(sys.modules, "orbax", None)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(etcompile.DependencyError, match=r"pip install 'etcompile\[checkpoint\]'"):
        etcompile.Checkpoints(tmp_path)


def test_a_learner_inside_of_jit_saves_nothing(tmp_path):
    learn = leaky_step().learn(square, optax.sgd(1e-2))
    saves = etcompile.Checkpoints(tmp_path)
    xs, ys = jnp.ones((3, 2, 3)), jnp.zeros((3, 2, 4))
    with pytest.raises(etcompile.OptionError, match="inside of jit"):
        brainstate.transform.jit(lambda x, y: learn(x, y, checkpoints=saves))(xs, ys)
    assert saves.latest is None
