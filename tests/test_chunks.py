"""Chunked schedules give the numbers of the step-by-step program: gradients, losses, traces and states."""

from __future__ import annotations

import os

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error
from references import autodiff, compiled, fresh
from zoo import CASES, by_name

import etcompile


def built_and_step(name, algo, **options):
    built = fresh(by_name(name))
    return built, compiled(built, algo, **options)


#: Two calls, of 5 steps and the other 2; and one, of two chunks.
TWO_CALLS, ONE_CALL = (slice(0, 5), slice(5, 7)), (slice(0, 4),)


def results(name, algo, chunk, calls=TWO_CALLS, **options):
    """Losses and gradients of each call, and the traces left."""
    built, step = built_and_step(name, algo, **options)
    run = step.scan_value_and_grad(built.loss_fn, chunk=chunk)
    found = []
    for part in calls:
        xs, targets = jax.tree.map(lambda v, p=part: np.asarray(v)[p], (built.xs, built.targets))
        found.append(run(xs, *targets))
    return found, jax.tree.leaves(step.traces), built.tolerance


#: tests/test_zoo.py runs every model in chunks; here traces and states go on from call to call.
MODELS = [
    "gru_no_batch", "lstm", "gif", "brainevent_csr_recurrent", "noise_and_dropout", "quantities", "embedding",
    "conv1d_grouped", "sparse_segment_sum_recurrent", "one_weight_of_two_results", "lru", "states_of_two_precisions",
]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_d_rtrl_in_chunks(name):
    wanted, found = results(name, "d_rtrl", 1), results(name, "d_rtrl", 2)  # 2 does not divide 5
    for mine, theirs in zip(found[:2], wanted[:2], strict=True):
        assert relative_error(mine, theirs) < wanted[2]


class Net(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.readout = brainstate.nn.GRUCell(5, 16), brainstate.nn.Linear(16, 2)

    def update(self, x):
        return self.readout(self.cell(x))


def test_chunks_in_float32():
    xs = jax.random.normal(jax.random.key(0), (60, 4, 5), jnp.float32)
    ys = jax.random.normal(jax.random.key(1), (60, 4, 2), jnp.float32)

    def grads(chunk):
        brainstate.random.seed(0)
        with brainstate.environ.context(precision=32):
            step = etcompile.compile(Net(), xs[0], batch_size=4)
        return step.scan_value_and_grad(lambda out, y: jnp.mean((out - y) ** 2), chunk=chunk)(xs, ys)[1]

    found, wanted = grads("auto"), grads(1)
    assert {v.dtype for v in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    assert relative_error(found, wanted) < 1e-5


def test_the_size_of_a_chunk_leaves_no_rest_where_it_can():
    _, step = built_and_step("gru_no_batch", "d_rtrl")

    def size(steps, memory=1 << 28):
        plan = step.executor.functions.plan(etcompile.Schedule(memory=memory), steps)
        return plan.together(steps)

    assert size(5000) == size(500) == 125
    assert size(7) == 7
    assert size(500, memory=1) == 1


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the C library")
@pytest.mark.parametrize(("units", "expected"), [(64, 128), (320, 64), (512, 128)])
def test_a_chunk_takes_no_new_memory_at_each_run_where_that_leaves_enough_steps(units, expected):
    """Traces of 1, 26 and 68 MB; with the last no chunk is short enough."""
    params = {k: jax.ShapeDtypeStruct((units, units), jnp.float32) for k in ("w", "u")}

    def unit(params, state, x):
        h = 0.5 * state["h"] + jnp.tanh(state["h"] @ params["w"] + x @ params["u"])
        return {"h": h}, h

    like = jax.ShapeDtypeStruct((32, units), jnp.float32)
    step = etcompile.compile(etcompile.from_function(unit, params, {"h": like}), like)
    assert step.executor.functions.plan(etcompile.Schedule(), 6400).together(6400) == expected


def test_a_sequence_is_one_chunk_where_traces_are_given_up_and_memory_allows():
    _, step = built_and_step("gru_no_batch", "d_rtrl", schedule=etcompile.Schedule(keep_traces=False))

    def size(steps, memory):
        return step.executor.functions.plan(etcompile.Schedule(memory=memory), steps).together(steps)

    assert size(500, memory=1 << 28) == 500
    assert size(500, memory=1 << 18) < 500


RULES = [
    ("e_prop", {"kappa": 0.7, "normalize": True}), ("e_prop", {"feedback": "random"}), ("pp_prop", {"decay": (0.8, 0.6)}),
    ("ottt", {}), ("otpe", {}), ("otpe", {"approximate": True}), ("rflo", {"leak": 0.8}), ("osttp", {}),
    ("compose", {"trace": "factored", "signal": "random"}), ("compose", {"trace": "none"}),
]  # fmt: skip


#: These run with every rule; the other models take turns with the rules.
FULLY = [
    "lstm",
    "two_spiking_layers_and_a_leaky_readout",
    "embedding",
    "conv2d_recurrent",
    "sparse_segment_sum",
]


def models_and_rules():
    for k, case in enumerate(CASES):
        whole = case.name in FULLY or "ETCOMPILE_EVERY_RULE" in os.environ
        for j, rule in enumerate(RULES):
            if whole or j == k % len(RULES):
                yield (case.name, *rule)


def step_by_step(name, algo, calls, **options):
    """What chunks are held against; a rule may refuse a model, in chunks or not."""
    try:
        return results(name, algo, 1, calls, **options)
    except etcompile.EtcompileError as error:
        if "shows nothing to the outputs" not in str(error):
            raise
        return pytest.skip(f"refused step by step as well: {error}")


@pytest.mark.usefixtures("by_numpy")
@pytest.mark.parametrize(("name", "algo", "options"), list(models_and_rules()))
def test_other_rules_in_chunks(name, algo, options):
    calls = TWO_CALLS if name in FULLY else ONE_CALL
    wanted = step_by_step(name, algo, calls, **options)
    found = results(name, algo, 3 if name in FULLY else 2, calls, **options)
    for mine, theirs in zip(found[:2], wanted[:2], strict=True):
        assert relative_error(mine, theirs) < wanted[2]


def in_turns():
    """Every third model, and all of them with `--every-rule`: what differs from float64 is the rounding alone."""
    for k, case in enumerate(CASES):
        asked = k % 3 == 0 or "ETCOMPILE_EVERY_RULE" in os.environ
        if asked and not case.name.startswith(
            "brainevent"
        ):  # their matrices are float64 from when they are loaded
            # numpy rounds as XLA does, and XLA compiles every third of these
            marks = [pytest.mark.by_xla] if k % 9 == 0 else []
            yield pytest.param(case.name, *RULES[k % len(RULES)], marks=marks)


@pytest.fixture
def single_precision():
    """Everything in float32, whatever a model asks for."""
    jax.config.update("jax_enable_x64", False)
    with brainstate.environ.context(precision=32):
        yield
    jax.config.update("jax_enable_x64", True)


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype:UserWarning")
@pytest.mark.usefixtures("single_precision", "by_numpy")
@pytest.mark.parametrize(("name", "algo", "options"), list(in_turns()))
def test_models_in_chunks_in_float32(name, algo, options):
    wanted = step_by_step(name, algo, ONE_CALL, **options)
    found = results(name, algo, 2, ONE_CALL, **options)
    assert not {v.dtype for v in jax.tree.leaves(found[0])} & {jnp.dtype("float64"), jnp.dtype("complex128")}
    for mine, theirs in zip(found[:2], wanted[:2], strict=True):
        assert relative_error(mine, theirs) < 1e-5


def test_chunks_of_an_uncut_model_are_backpropagation():
    built, step = built_and_step("indrnn", "d_rtrl")
    losses, grads = step.scan_value_and_grad(built.loss_fn, chunk=3)(built.xs, *built.targets)
    wanted = autodiff(by_name("indrnn"))
    assert relative_error(losses, wanted.losses) < 1e-12
    assert relative_error(grads, wanted.total) < 1e-10


def test_a_rule_of_ones_own_runs_in_chunks():
    @etcompile.algorithm("two_filters")
    def two_filters(p, slow=0.9, fast=0.5):
        for r in p.relations:
            e = p.recur(decay=p.transition(r.group), inject=p.outer(r))
            both = p.recur(decay=slow, inject=e) - 0.5 * p.recur(decay=fast, inject=e)
            p.gradient(r, p.contract(p.signal(r.group), both))

    wanted = results("gru_no_batch", two_filters(), 1)
    found = results("gru_no_batch", two_filters(), 4)
    for mine, theirs in zip(found[:2], wanted[:2], strict=True):
        assert relative_error(mine, theirs) < 1e-10


@pytest.mark.parametrize("algo", ["rtrl", "snap", "uoro", "kf_rtrl"])
def test_rules_that_follow_every_path_say_why_they_cannot(algo):
    built, step = built_and_step("indrnn", algo)
    before = step.traces
    with pytest.raises(etcompile.UnsupportedError, match="follows every path"):
        step.scan_value_and_grad(built.loss_fn, chunk=3)(built.xs, *built.targets)
    assert relative_error(jax.tree.leaves(step.traces), jax.tree.leaves(before)) == 0


def test_a_modulator_in_chunks():
    def run(chunk):
        built, step = built_and_step("indrnn", "three_factor")
        return step.scan_value_and_grad(built.loss_fn, chunk=chunk)(
            built.xs, *built.targets, modulator=jnp.linspace(-1, 1, 7)
        )

    assert relative_error(run(3), run(1)) < 1e-10
