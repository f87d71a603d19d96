"""Failed calls of what stands beside a step: synthetic gradients and checkpoints. They leave everything as it was, too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_failed_calls import (
    SGD,
    TOO_MUCH,
    XS,
    YS,
    HostError,
    Net,
    Prepared,
    divides,
    forbidden,
    optimizer,
    raises_itself,
    same,
    squared,
)

import etcompile
from etcompile import AlgorithmError, CheckpointError, EtcompileError, InputError, OptionError

# -- synthetic gradients ------------------------------------------------------------------------------------------------

ADAM = optax.adam(0.1)


class Taught:
    """A step in windows with predictors that were taught once, and what the next calls give."""

    def __init__(self, loss=squared):
        self.step = etcompile.compile(Net(), XS[0], algo="dni", window=2, batch_size=2)
        self.helper = etcompile.SyntheticGradient(self.step, loss, hidden=3)

    def begin(self):
        self.helper.update(XS, YS, optimizer=ADAM)
        return self

    def held(self):
        access = self.step.executor.live
        mine = self.helper.params, self.helper.prediction_loss
        return jax.tree.map(np.array, (access.params(), access.states(), mine))

    def goes_on(self):
        return self.helper.update(XS, YS), self.helper.fit(XS, YS), self.held()


FAILING_HELPERS = {
    "inputs": (lambda h: h.update(XS[..., :2], YS), EtcompileError, "axis . has 2 entries"),
    "inputs of fit": (lambda h: h.fit("spikes", YS), EtcompileError, "no array"),
    "lengths": (lambda h: h.update(XS, YS[:2]), InputError, "4 steps"),
    "targets": (lambda h: h.fit(XS), InputError, "0 targets"),
    "mask": (lambda h: h.update(XS, YS, mask=jnp.ones(3)), InputError, "mask"),
    "mask of examples": (lambda h: h.fit(XS, YS, mask=jnp.ones((4, 3))), InputError, "per example"),
    "epochs": (lambda h: h.fit(XS, YS, epochs=0), OptionError, "epochs"),
    "no optimiser": (lambda h: h.fit(XS, YS, optimizer="adam"), OptionError, "need an optimiser"),
    "optimiser raises": (lambda h: h.update(XS, YS, optimizer=optimizer(divides)), ZeroDivisionError, "a mistake"),
    "optimiser raises in fit": (
        lambda h: h.fit(XS, YS, optimizer=optimizer(divides)),
        ZeroDivisionError,
        "a mistake",
    ),
    "one window": (lambda h: h.update(XS[:2], YS[:2], optimizer=SGD), InputError, "one window"),
    "another loss": (lambda h: h.scan_value_and_grad(raises_itself), AlgorithmError, "another loss"),
    "environment": (lambda h: forbidden(lambda: h.update(XS, YS)), EtcompileError, "forbidden here"),
    "host": (lambda h: h.update(TOO_MUCH, YS), HostError, "host refuses"),
    "host, another optimiser": (lambda h: h.update(TOO_MUCH, YS, optimizer=SGD), HostError, "host refuses"),
    "host in fit": (lambda h: h.fit(TOO_MUCH, YS, optimizer=SGD), HostError, "host refuses"),
    "host in gradients": (lambda h: h.scan_value_and_grad(squared)(TOO_MUCH, YS), HostError, "host refuses"),
}  # fmt: skip


@pytest.fixture(scope="module")
def wanted():
    return Taught().begin().goes_on()


def test_a_failed_call_of_synthetic_gradients_changes_nothing(wanted):
    taught = Taught().begin()
    before = taught.held()
    for call, error, text in FAILING_HELPERS.values():
        with pytest.raises(error, match=text):
            call(taught.helper)
        same(taught.held(), before)
    same(taught.goes_on(), wanted)


def test_the_first_optimiser_of_a_failed_call_is_not_kept():
    taught = Taught()
    with pytest.raises(HostError, match="host refuses"):
        taught.helper.update(TOO_MUCH, YS, optimizer=ADAM)
    with pytest.raises(OptionError, match="need an optimiser"):
        taught.helper.update(XS, YS)
    with pytest.raises(AlgorithmError, match="never fitted"):
        taught.helper.scan_value_and_grad(squared)


def test_a_mask_is_a_loss_that_is_weighed():
    """Of steps and of examples."""

    def per_example(out, y):
        return jnp.mean((out - y) ** 2, -1)

    def weighed(out, y, m):
        return jnp.sum(m * per_example(out, y))

    rng = np.random.default_rng(1)
    for mask in (jnp.asarray([1.0, 0.5, 0.0, 1.0]), jnp.asarray(rng.uniform(size=(4, 2)))):
        loss = squared if mask.ndim == 1 else per_example
        as_target = (lambda out, y, m: m * squared(out, y)) if mask.ndim == 1 else weighed
        one, other = Taught(loss), Taught(as_target)
        found = one.helper.update(XS, YS, optimizer=ADAM, mask=mask), one.helper.fit(XS, YS, mask=mask)
        wanted = other.helper.update(XS, YS, mask, optimizer=ADAM), other.helper.fit(XS, YS, mask)
        same(found, wanted)
        same(
            one.helper.scan_value_and_grad(loss)(XS, YS, mask=mask),
            other.helper.scan_value_and_grad(as_target)(XS, YS, mask),
        )
        same(one.held(), other.held())


# -- checkpoints --------------------------------------------------------------------------------------------------------


class Unwritable:
    """Something that no checkpoint can hold."""


def test_a_failed_save_or_restore_changes_nothing(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    prepared, other = Prepared("module"), Prepared("module", algo="e_prop")
    saves = etcompile.Checkpoints(tmp_path / "one")
    prepared.begin()
    saves.save(prepared.step, 3)
    etcompile.Checkpoints(tmp_path / "other").save(other.step, 3)
    etcompile.Checkpoints(tmp_path / "learner").save(other.step.learn(squared, ADAM), 3)
    (damaged,) = _copy(tmp_path / "one", tmp_path / "damaged").glob("*/about/metadata")
    damaged.write_text("{")
    learner = prepared.step.learn(squared, ADAM)
    elsewhere = {name: etcompile.Checkpoints(tmp_path / name) for name in ("other", "learner", "damaged")}
    step = prepared.step
    cases = {
        "positions grow": (lambda: saves.save(step, 2), OptionError, "at=2"),
        "no position": (lambda: saves.save(step, "end"), OptionError, "at='end'"),
        "extra": (lambda: saves.save(step, 5, Unwritable()), OptionError, "Unwritable"),
        "no run": (lambda: saves.save(prepared.model, 5), OptionError, "got: Net"),
        "traced": (lambda: jax.jit(lambda v: saves.save(step, 5, v))(1.0), EtcompileError, "inside of jit"),
        "another rule": (lambda: elsewhere["other"].restore(step), CheckpointError, "e_prop in the checkpoint"),
        "a learner": (lambda: elsewhere["learner"].restore(step), CheckpointError, "a learner in the checkpoint"),
        "a step": (lambda: saves.restore(learner), CheckpointError, "a step in the checkpoint"),
        "damaged": (lambda: elsewhere["damaged"].restore(step), CheckpointError, "cannot be read"),
        "other extra": (lambda: saves.restore(step, {"key": 3}), CheckpointError, "extra.key"),
        "behind": (lambda: etcompile.Checkpoints(tmp_path / "one").save(step, 1), CheckpointError, "went further"),
        "learn behind": (
            lambda: learner(XS, YS, checkpoints=etcompile.Checkpoints(tmp_path / "one")),
            CheckpointError,
            "went further",
        ),
    }  # fmt: skip
    before, learned = prepared.held(), jax.tree.map(np.array, _values(learner))
    for name, (call, error, text) in cases.items():
        with pytest.raises(error, match=text):
            call()
        same(prepared.held(), before)
        same(_values(learner), learned)
        assert (saves.at, saves.latest) == (3, 3), name
    same(prepared.goes_on(), prepared.wanted)
    saves.restore(step)
    same(prepared.held(), before)


def test_a_restore_that_fails_half_way_changes_nothing(tmp_path, monkeypatch):
    pytest.importorskip("orbax.checkpoint")
    prepared = Prepared("module")
    saves = etcompile.Checkpoints(tmp_path)
    learner = prepared.step.learn(squared, ADAM)
    prepared.begin()
    saves.save(learner, 1)
    learner(XS, YS)
    before, learned = prepared.held(), jax.tree.map(np.array, _values(learner))

    *_, last = states = learner.saved_states()

    class Refusing:
        """The last of the learner's states, which takes no value."""

        @property
        def value(self):
            return states[last].value

        @value.setter
        def value(self, new):
            raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(learner, "saved_states", lambda: {**states, last: Refusing()})
        with pytest.raises(MemoryError, match="no room"):
            saves.restore(learner)
    same(prepared.held(), before)
    same(_values(learner), learned)
    assert saves.restore(learner).at == 1


def _values(learner):
    return {name: state.value for name, state in learner.saved_states().items()}


def _copy(source, target):
    import shutil

    shutil.copytree(source, target)
    return target
