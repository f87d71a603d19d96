"""Traces of sequences that nobody reads are not made; whoever asks after all finds those of the steps."""

from __future__ import annotations

import copy

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import relative_error
from references import compiled, fresh
from small_models import draw
from zoo import by_name

import etcompile
from etcompile.runtime.later_traces import alone

T, B = 6, 4
XS, YS = draw(0, T, B, 3), draw(1, T, B, 2)


class Net(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.readout = brainstate.nn.GRUCell(3, 5), brainstate.nn.Linear(5, 2)

    def update(self, x):
        return self.readout(self.cell(x))


def loss(out, target):
    return jnp.mean((out - target) ** 2)


def net(model=Net, **options):
    brainstate.random.seed(0)
    return etcompile.compile(model(), XS[0], batch_size=B, **options)


def waits(step):
    """Whether there are traces that have not been made."""
    return not step.traces_state.empty and not step.traces_state.allocated


def two():
    """A step whose sequence leaves its traces for later, and one that makes them; and their functions."""
    steps = net(), net()
    at_once(steps[1])
    return [(step, step.scan_value_and_grad(loss)) for step in steps]


def at_once(step):
    """Let a step make all traces in sequences."""
    vars(step.executor.compilation)["alone"] = None
    return step


def states(step):
    return jax.tree.map(jnp.asarray, step.executor.live.states())


ZOO = {
    "d_rtrl": [
        "gru_no_batch",
        "lstm",
        "lif_exponential",
        "embedding",
        "lru",
        "quantities",
    ],
    "e_prop": ["lif_exponential", "gru_no_batch", "conv1d_grouped"],
    "pp_prop": ["gif", "lstm"],
}


@pytest.mark.parametrize(("algo", "name"), [(a, n) for a, names in ZOO.items() for n in names])
def test_a_sequence_that_leaves_its_traces_for_later_is_the_same(algo, name):
    """Losses, gradients, and those of the next sequence, which goes on; and the traces at its end."""
    found = []
    for later in (False, True):
        brainstate.random.seed(0)
        built = fresh(by_name(name))
        step = compiled(built, algo)
        if not later:
            at_once(step)
        run = step.scan_value_and_grad(built.loss_fn)
        first = run(built.xs, *built.targets)
        assert waits(step) is later
        found.append((first, run(built.xs, *built.targets), jax.tree.leaves(step.traces)))
    for mine, theirs in zip(*found, strict=True):
        assert relative_error(mine, theirs) < built.tolerance


def test_the_same_call_gives_the_same_bits_whatever_was_before():
    step = net()
    run = step.scan_value_and_grad(loss)
    first, goes_on, traces = run(XS, YS), run(XS, YS), step.traces
    for _ in range(2):
        step.reset()
        again = run(XS, YS)
        assert waits(step)
        assert relative_error(again, first) == 0
    assert relative_error(run(XS, YS), goes_on) == 0
    assert not waits(step)
    assert relative_error(step.traces, traces) == 0


USES = {
    "traces": lambda step, run: step.traces,
    "value": lambda step, run: step.traces_state.value,
    "step": lambda step, run: step(XS[0]),
    "gradient": lambda step, run: step.value_and_grad(loss)(XS[0], YS[0]),
    "sequence": lambda step, run: run(XS[:3], YS[:3]),
    "scan": lambda step, run: step.scan(XS[:2]),
    "learn": lambda step, run: step.learn(loss, optax.sgd(0.1))(XS[:2], YS[:2]),
    "copy": lambda step, run: copy.deepcopy(step).value_and_grad(loss)(XS[0], YS[0]),
    "own jit": lambda step, run: brainstate.transform.jit(lambda x, y: step.value_and_grad(loss)(x, y))(XS[0], YS[0]),
    "own loop": lambda step, run: brainstate.transform.for_loop(step.value_and_grad(loss), XS[:3], YS[:3]),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_whoever_uses_the_traces_finds_them(use):
    found = []
    for step, run in two():
        run(XS, YS)
        waited = waits(step)
        used = USES[use](step, run)
        assert not waits(step)
        found.append((waited, (used, step.traces, states(step))))
    (later, mine), (made, theirs) = found
    assert later and not made
    assert relative_error(mine, theirs) < 1e-10


def test_a_jit_and_a_loop_of_the_users_that_were_compiled_before_find_them():
    for kind in (brainstate.transform.jit, lambda f: lambda *a: brainstate.transform.for_loop(f, *a)):
        found = []
        for later in (True, False):
            step = net() if later else at_once(net())
            run = step.scan_value_and_grad(loss)
            one = kind(step.value_and_grad(loss))
            xs, ys = (XS[:3], YS[:3]) if kind is not brainstate.transform.jit else (XS[0], YS[0])
            one(xs, ys)
            step.reset()
            run(XS, YS)
            assert waits(step) is later
            found.append((one(xs, ys), step.traces, states(step)))
        assert relative_error(*found) < 1e-10


def test_they_are_those_of_the_arrays_that_the_sequence_had():
    """Parameters that are given away or written, inputs that are overwritten or deleted."""
    found = []
    for step, run in two():
        given = np.array(XS)
        jax.block_until_ready(run(given, YS))  # JAX reads numpy's arrays while it runs
        given[:] = np.nan
        step.params = jax.tree.map(lambda v: v * 2, step.params)
        found.append(step.traces)
        step.reset()
    assert relative_error(*found) < 1e-10
    (step, run), (other, made) = two()
    xs = jnp.array(XS)
    run(xs, YS), made(XS, YS)
    old = jax.tree.leaves(step.executor.live.params())
    step.params = jax.tree.map(lambda v: v + 0, step.params)
    for array in (xs, *old):
        array.delete()
    assert relative_error(step.traces, other.traces) < 1e-10


def test_a_failure_while_they_are_made_loses_nothing(monkeypatch):
    (step, run), (other, made) = two()
    run(XS, YS), made(XS, YS)
    make = step.traces_state._make

    def fail():
        raise MemoryError

    vars(step.traces_state)["_make"] = fail
    with pytest.raises(MemoryError):
        _ = step.traces
    assert waits(step)
    vars(step.traces_state)["_make"] = make
    assert relative_error(step.traces, other.traces) < 1e-10


class Printing(Net):
    def update(self, x):
        jax.debug.print("step")
        return super().update(x)


@pytest.mark.parametrize(
    "options",
    [
        {"model": Printing},
        {"algo": "rtrl"},
        {"schedule": etcompile.Schedule(chunk=3)},
        {"schedule": etcompile.Schedule(how="steps")},
        {"schedule": etcompile.Schedule(keep_traces=False)},
        {"schedule": etcompile.Schedule(memory=1)},
    ],
    ids=str,
)
def test_who_has_said_how_sequences_run_or_whose_steps_run_once_gets_it_as_ever(options, capfd):
    step = net(**options)
    run = step.scan_value_and_grad(loss)
    for _ in range(3):
        run(XS, YS)
        assert not waits(step)
        step.reset()
    jax.effects_barrier()
    printed = capfd.readouterr().out.count("step\n")
    assert printed == (3 * T if "model" in options else 0)


def test_inside_of_a_transformation_they_are_made():
    step = net()
    run = step.scan_value_and_grad(loss)

    @brainstate.transform.jit
    def train(xs, ys):
        step.reset()
        return run(xs, ys)

    found = [train(XS, YS) for _ in range(3)]
    assert not waits(step)
    assert relative_error(found[0], found[2]) < 1e-10


def test_a_modulator_a_progress_bar_and_a_chunk_that_is_asked_for():
    step = net()
    step.scan_value_and_grad(loss, chunk=2)(XS, YS)
    assert not waits(step)
    step.reset()
    step.scan_value_and_grad(loss)(XS, YS, progress=True)
    assert not waits(step)


def test_long_sequences_make_them_as_they_go_since_memory_must_not_grow():
    step = net()
    assert alone(step.executor, (XS,), T, None) is not None
    assert alone(step.executor, (XS,), 10**6, None) is None
    many = jax.ShapeDtypeStruct((T, 10**9), jnp.float64)  # inputs, of which there would be two
    assert alone(step.executor, (many,), T, None) is None


class Noisy(Net):
    def update(self, x):
        return super().update(x + 0.1 * brainstate.random.normal(size=x.shape))


def test_random_numbers_are_drawn_once_more_as_they_were():
    found = []
    for later in (False, True):
        step = net(Noisy) if later else at_once(net(Noisy))
        brainstate.random.seed(1)
        run = step.scan_value_and_grad(loss)
        result = run(XS, YS)
        assert waits(step) is later
        key = jax.random.key_data(brainstate.random.DEFAULT.value)
        traces = step.traces
        assert (key == jax.random.key_data(brainstate.random.DEFAULT.value)).all()
        found.append((result, traces, run(XS, YS)))
    assert relative_error(*found) < 1e-10


def test_other_batch_sizes_and_states_of_the_users_own():
    found = []
    for later in (True, False):
        step = net()
        run = step.scan_value_and_grad(loss)
        for size in (B, 2, B):
            step.reset(batch_size=size)
            if not later:
                at_once(step)
            step.executor.live.state_objects["cell.h"].value = draw(5, size, 5)
            result = run(XS[:, :size], YS[:, :size])
        assert waits(step) is later
        found.append((result, step.traces))
    assert relative_error(*found) < 1e-10


def test_numbers_of_64_bits_are_what_they_were_whoever_asks():
    (step, run), (other, other_run) = two()
    for one in (run, other_run):
        one(XS, YS)
    assert waits(step)
    with jax.enable_x64(False):
        found = step.traces_state.value
    assert all(v.dtype == jnp.float64 for v in jax.tree.leaves(found))
    assert relative_error(jax.tree.leaves(found), jax.tree.leaves(other.traces)) < 1e-12


@pytest.mark.parametrize("before", ["nothing", "later", "steps"])
def test_restored_traces_are_those_that_were_put_in(before):
    step = net()
    gradient = step.value_and_grad(loss)
    for x, y in zip(XS, YS, strict=True):
        gradient(x, y)
    saved = step.traces
    if before != "steps":
        step.reset()
    if before == "later":
        step.scan_value_and_grad(loss)(XS, YS)
        assert waits(step)
    step.traces_state.restore_value(saved)
    assert relative_error(jax.tree.leaves(step.traces), jax.tree.leaves(saved)) == 0
    gradient(XS[0], YS[0])
    assert not any(v.is_deleted() for v in jax.tree.leaves(saved))
