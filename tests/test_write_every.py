"""Traces that are written once in some steps: the numbers of traces written at every step, to rounding."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import relative_error
from random_models import build
from references import compiled, fresh
from test_random_models import check_gradients, drawn
from test_random_models import compiled as compiled_random
from zoo import CASES, by_name

import etcompile
from etcompile import OptionError, Schedule

#: Models of the zoo and random ones, one in so many; 1: all of them.
ONE_IN = int(os.environ.get("ETCOMPILE_WRITE_EVERY", "8"))
MODELS = [
    "gru_no_batch", "lstm_gru", "brainpy_alif_exponential", "gif", "brainevent_csr_recurrent", "retnet", "mamba",
    "conv1d_grouped", "states_of_two_precisions", "complex_and_real_state", "gru_of_one_unit", "lru",
]  # fmt: skip


def mixed(case, every):
    """What calls of every kind give one after the other, and the traces that they leave."""
    built = fresh(case)
    step = compiled(built, schedule=Schedule(write_every=every))

    def data(part):
        return jax.tree.map(lambda v: np.asarray(v)[part], (built.xs, built.targets))

    found = []
    for part, call in [
        (slice(0, 5), step.scan_value_and_grad(built.loss_fn, chunk=1)),
        (1, step.value_and_grad(built.loss_fn)),
        (slice(2, 7), step.scan_value_and_grad(built.loss_fn, chunk=2)),
        (3, step.value_and_grad(built.loss_fn)),
    ]:
        x, targets = data(part)
        found.append(call(x, *targets))
        found.append(step(data(2)[0]))
    return found, step.traces, built.tolerance, step.report().written_every


@pytest.mark.parametrize("name", MODELS if ONE_IN > 1 else [case.name for case in CASES])
def test_calls_of_every_kind(name):
    try:
        *found, _, written = mixed(by_name(name), 3)
    except OptionError:
        if name in MODELS:
            raise
        pytest.skip("no trace that can be written later")
    *wanted, tolerance, at_every_step = mixed(by_name(name), 1)
    assert set(written.values()) == {3} and not at_every_step
    assert jax.tree.structure(found[1]) == jax.tree.structure(wanted[1])
    assert relative_error(found, wanted) < tolerance


def test_random_models():
    """Their first gradient is that of autodiff, the sum over four steps that of the dense reference."""
    count = 0
    for number, recipe in enumerate(drawn()[::ONE_IN]):
        model = build(recipe)
        try:
            step = compiled_random(model, schedule=Schedule(write_every=2))
        except OptionError:  # weights that act element by element alone
            continue
        try:
            check_gradients(model, step)
        except Exception as error:
            error.add_note(f"random model {number * ONE_IN}: {recipe}")
            raise
        count += 1
    assert count > len(drawn()[::ONE_IN]) / 3


# -- how it is used ---------------------------------------------------------------------------------------------------

B, I, O = 3, 6, 5


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def unit(params, state, x):
    h = jnp.tanh(params["a"] * state["h"] + x @ params["w"] + state["h"] @ params["u"])
    return {"h": h}, h


def squared(out, target):
    return jnp.mean((out - target) ** 2)


def of_unit(every, units=O, batch=B, **options):
    params = {"w": draw(2, I, units), "u": 0.3 * draw(3, units, units), "a": jnp.full(units, 0.8)}
    model = etcompile.from_function(unit, params, {"h": jnp.zeros((batch, units))})
    schedule = Schedule(write_every=every, **options.pop("schedule", {}))
    return etcompile.compile(model, jnp.zeros((batch, I)), schedule=schedule, **options)


XS, YS = draw(0, 11, B, I), draw(1, 11, B, O)


@pytest.mark.parametrize("every", [2, 4, 20])
@pytest.mark.parametrize("update_every", [1, 3])
def test_weights_that_change_at_every_step(every, update_every):
    found = {}
    for k in (1, every):
        step = of_unit(k)
        learn = step.learn(squared, optax.adam(1e-2), update_every=update_every)
        found[k] = learn(XS, YS), learn(XS[:1], YS[:1]), learn(XS, YS), step.params, step.traces
    assert relative_error(found[every], found[1]) < 1e-10


def test_a_reset_and_another_batch_size():
    def run(every):
        step = of_unit(every)
        gradient = step.value_and_grad(squared)
        found = [gradient(x, y) for x, y in zip(XS[:5], YS[:5], strict=True)]
        step.reset()
        assert not any(np.any(v) for v in jax.tree.leaves(step.traces))
        found += [gradient(x, y) for x, y in zip(XS[:4], YS[:4], strict=True)]
        step.reset(batch_size=2)
        return found + [gradient(x[:2], y[:2]) for x, y in zip(XS[:5], YS[:5], strict=True)]

    assert relative_error(run(3), run(1)) < 1e-10


def test_a_checkpoint_between_two_writes_goes_on_bit_for_bit(tmp_path):
    one, other = (of_unit(4).learn(squared, optax.sgd(0.1)) for _ in range(2))
    one(XS[:6], YS[:6])
    etcompile.Checkpoints(tmp_path).save(one, 6)
    etcompile.Checkpoints(tmp_path).restore(other)
    assert np.array_equal(one(XS, YS), other(XS, YS))
    with pytest.raises(etcompile.EtcompileError, match="trace"):
        etcompile.Checkpoints(tmp_path).restore(of_unit(1).learn(squared, optax.sgd(0.1)))


def test_a_trace_of_fewer_bits_is_rounded_where_it_is_written():
    narrow, wide = of_unit(4, schedule={"trace_dtype": "float32"}), of_unit(1)
    for _ in range(3):
        found, wanted = (step.scan_value_and_grad(squared, chunk=1)(XS, YS) for step in (narrow, wide))
    assert 1e-10 < relative_error(found[1], wanted[1]) < 1e-6
    assert {str(v.dtype) for v in jax.tree.leaves(narrow.traces["e0"])} == {"float32"}


def test_a_failed_call_leaves_what_is_not_written_yet():
    step = of_unit(4)
    gradient = step.value_and_grad(squared)
    for x, y in zip(XS[:3], YS[:3], strict=True):
        gradient(x, y)
    before = step.traces
    with pytest.raises(etcompile.EtcompileError):
        gradient(XS[0, :, :-1], YS[0])
    assert jax.tree.all(jax.tree.map(np.array_equal, before, step.traces))


# -- when ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="measured on processors")
def test_large_traces_of_matrices_are_written_every_four_steps():
    large = of_unit("auto", units=1024, batch=16)
    assert large.report().written_every == {
        "e1": 4,
        "e2": 4,
    }  # of w and u; that of a has an entry for each unit
    assert "u in g0, written every 4 steps" in str(large.report())
    assert not of_unit("auto").report().written_every  # a cache holds them
    assert not of_unit(1, units=1024, batch=16).report().written_every


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"algo": "pp_prop", "decay": 0.9}, "e = D e"),
        ({"algo": "bptt"}, "windows"),
        ({"schedule": {"events": 0.1}}, "events"),
        ({"schedule": {"keep_traces": False}}, "write_every=1, or 'auto'"),
    ],
)
def test_what_cannot_be_written_later_is_refused(options, expected):
    with pytest.raises(etcompile.EtcompileError) as refused:
        of_unit(3, **options)
    assert expected in str(refused.value)


@pytest.mark.parametrize("every", [0, -1, 2.5, "often", None])
def test_a_wrong_number_of_steps(every):
    with pytest.raises(OptionError, match="write_every"):
        Schedule(write_every=every)
