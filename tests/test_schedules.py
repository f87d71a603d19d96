"""Schedules are values: how a sequence is run is chosen in one place, and a new one is a class and a row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error
from references import compiled, fresh
from zoo import by_name

import etcompile
from etcompile.lowering.schedules.choose import SCHEDULES


@etcompile.register_schedule
class TwoSteps(etcompile.SequenceSchedule):
    """Two steps at a time, step by step inside."""

    name = "two_steps"

    def size(self, schedule, steps, wanted):
        return min(2, steps)

    def part(self, run, loop, steps):
        found = []
        for k in range(steps.count):
            loop, of_step = run.step(loop, steps.at(k))
            found.append(of_step)
        return loop, jax.tree.map(lambda *v: jnp.stack(v), *found)


def results(name, algo="d_rtrl", progress=False, **schedule):
    """Losses and gradients of seven steps, and the traces left."""
    built = fresh(by_name(name))
    step = compiled(built, algo, schedule=etcompile.Schedule(**schedule))
    found = step.scan_value_and_grad(built.loss_fn)(built.xs, *built.targets, progress=progress)
    return found, jax.tree.leaves(step.traces)


@pytest.mark.parametrize("name", ["gru_no_batch", "lru"])
def test_a_schedule_of_ones_own_is_a_class(name):
    assert relative_error(results(name, how="two_steps"), results(name, chunk=1)) < 1e-10


def test_it_is_what_runs_and_what_a_cost_is_of():
    built = fresh(by_name("gru_no_batch"))
    step = compiled(built, schedule=etcompile.Schedule(how="two_steps"))
    assert step.cost(steps=6).chunk == 2
    plan = step.executor.functions.plan(etcompile.Schedule(), 7)
    assert isinstance(plan.how, TwoSteps) and plan.size == 2


def test_it_goes_on_from_piece_to_piece():
    found, wanted = (results("gru_no_batch", progress=p, how="two_steps") for p in (True, False))
    assert relative_error(found, wanted) < 1e-12


@pytest.mark.parametrize(
    ("algo", "options", "how", "size"),
    [
        ("d_rtrl", {}, "chunks", 0), ("d_rtrl", {"chunk": 1}, "steps", 1), ("d_rtrl", {"chunk": 3}, "chunks", 3),
        ("d_rtrl", {"memory": 1}, "steps", 1), ("rtrl", {}, "steps", 1), ("bptt", {}, "windows", 0),
        ("d_rtrl", {"how": "steps", "chunk": 3}, "steps", 1), ("d_rtrl", {"how": "chunks", "chunk": 1}, "chunks", 1),
    ],
)  # fmt: skip
def test_one_place_chooses(algo, options, how, size):
    schedule = etcompile.Schedule(**options)
    step = compiled(fresh(by_name("indrnn")), algo, schedule=schedule)
    plan = step.executor.functions.plan(schedule, 7)
    assert (plan.how.name, plan.size) == (how, size)


def test_what_a_program_cannot_run_by_is_said():
    refused = [
        ("bptt", "steps", "bptt runs in windows"), ("bptt", "two_steps", "bptt runs in windows"),
        ("rtrl", "chunks", "follows every path"), ("d_rtrl", "windows", "the credit of single steps"),
    ]  # fmt: skip
    for algo, how, message in refused:
        with pytest.raises(etcompile.UnsupportedError, match=message):
            results("indrnn", algo, how=how)


def test_names_of_schedules():
    with pytest.raises(etcompile.OptionError, match="there is no schedule 'three_steps'"):
        results("indrnn", how="three_steps")
    with pytest.raises(etcompile.OptionError, match="how must be the name of a schedule"):
        etcompile.Schedule(how=2)
    with pytest.raises(
        etcompile.OptionError, match="'chunks' is the name of a schedule that comes with etcompile"
    ):
        etcompile.register_schedule(type("Mine", (etcompile.SequenceSchedule,), {"name": "chunks"}))
    with pytest.raises(etcompile.OptionError, match="a subclass of etcompile"):
        etcompile.register_schedule(int)
    assert list(SCHEDULES)[:5] == ["windows", "events", "replay", "chunks", "steps"]


@pytest.mark.parametrize(("synapses", "how"), [(60_000, "steps"), (200, "chunks")])
def test_steps_of_a_sparse_weight_run_one_by_one_where_dense_weights_gain_less(synapses, how):
    """Nothing of a sparse weight becomes a matrix product in a chunk: its share of f_t is as large as the trace."""
    senders, receivers = np.random.default_rng(0).integers(0, 100, (2, synapses))

    def leaky(params, state, x):
        arrived = jax.ops.segment_sum(params["w"] * x[senders], receivers, 100)
        h = jnp.tanh(0.9 * state["h"] + arrived + x @ params["dense"] + params["bias"])
        return {"h": h}, h

    shapes = {"w": (synapses,), "dense": (100, 100), "bias": (100,)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    units = jax.ShapeDtypeStruct((100,), jnp.float32)
    step = etcompile.compile(etcompile.from_function(leaky, params, {"h": units}), units)
    plan = step.executor.functions.plan
    assert plan(etcompile.Schedule(), 50).how.name == how
    assert plan(etcompile.Schedule(), 50, 10).how.name == "chunks"  # as asked
