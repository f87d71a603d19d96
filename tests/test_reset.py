"""Resets: the same inside of transformations as outside, at every call; what was compiled is kept by shape."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import relative_error
from shared import shared

import etcompile
from etcompile.errors import EtcompileError, OptionError

T, B = 3, 2


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


XS, YS = draw(0, T, B, 3), draw(1, T, B, 4)


def squared(out, target):
    return jnp.mean((out - target) ** 2)


class Net(brainstate.nn.Module):
    """One recurrent layer."""

    def __init__(self):
        super().__init__()
        self.w, self.u = (
            brainstate.ParamState(0.5 * draw(2, 3, 4)),
            brainstate.ParamState(0.5 * draw(3, 4, 4)),
        )

    def init_state(self, batch_size=None, **kwargs):
        self.h = brainstate.HiddenState(jnp.full((batch_size or 1, 4), 0.3))

    def update(self, x):
        self.h.value = jnp.tanh(0.7 * self.h.value + x @ self.w.value + self.h.value @ self.u.value)
        return self.h.value


def fresh(model=Net, batch=B, **options):
    return etcompile.compile(model(), XS[0, :batch], batch_size=batch, **options)


@shared
def wanted():
    return fresh().scan_value_and_grad(squared)(XS, YS)


def same(got, reference):
    assert relative_error(got, reference) < 1e-10


# --- inside of transformations ------------------------------------------------------------------------------------------


def test_a_reset_inside_jit_is_one_at_every_call_though_no_trace_was_ever_made():
    step, reference = fresh(), wanted()

    @brainstate.transform.jit
    def train(xs, ys):
        step.reset()
        return step.scan_value_and_grad(squared)(xs, ys)

    for _ in range(3):
        same(train(XS, YS), reference)


def test_a_reset_inside_a_loop_starts_every_sequence_anew():
    step, reference = fresh(), wanted()

    def one(xs, ys):
        step.reset()
        return step.scan_value_and_grad(squared)(xs, ys)

    for _ in range(2):
        found = brainstate.transform.for_loop(one, jnp.stack([XS] * 3), jnp.stack([YS] * 3))
        for k in range(3):
            same(jax.tree.map(lambda v, k=k: v[k], found), reference)


def test_a_reset_inside_cond_happens_where_the_branch_is_taken():
    step, plain = fresh(), fresh()
    both = [plain.scan_value_and_grad(squared)(XS, YS) for _ in range(2)]

    @brainstate.transform.jit
    def train(again, xs, ys):
        brainstate.transform.cond(again, step.reset, lambda: None)
        return step.scan_value_and_grad(squared)(xs, ys)

    for again, reference in [(True, both[0]), (False, both[1]), (True, both[0])]:
        same(train(again, XS, YS), reference)


def test_a_compiled_reset_goes_back_to_what_is_initial_now():
    """Not to what was initial when the function was compiled."""

    class Random(Net):
        def init_state(self, batch_size=None, **kwargs):
            self.h = brainstate.HiddenState(brainstate.random.normal(size=(batch_size, 4)))

    step = fresh(Random)
    jitted = brainstate.transform.jit(step.reset)
    for _ in range(2):
        jitted()
        same(step.init_carry().states["h"], step.executor.live.states()["h"])
        step.reset(batch_size=B)


def test_another_batch_size_inside_jit_is_refused_and_nothing_changes():
    step, reference = fresh(), wanted()
    with pytest.raises(OptionError, match="inside of jit"):
        brainstate.transform.jit(lambda: step.reset(batch_size=B))()
    same(step.scan_value_and_grad(squared)(XS, YS), reference)


def test_functions_compiled_around_the_step_go_on_after_changes_of_the_batch_size():
    """They hold the model's states and the traces: these are the same ones when a size comes back."""
    step, reference = fresh(), wanted()
    train = brainstate.transform.jit(lambda xs, ys: step.scan_value_and_grad(squared)(xs, ys))
    same(train(XS, YS), reference)
    step.reset(batch_size=4)
    step.scan(jnp.concatenate([XS, XS], 1))
    step.reset(batch_size=B)
    same(train(XS, YS), reference)
    step.reset()
    same(train(XS, YS), reference)


# --- compilations are kept ------------------------------------------------------------------------------------------------


def test_a_batch_size_that_was_seen_compiles_nothing():
    step = fresh()
    learn = step.learn(squared, optax.sgd(0.0))
    wide = jnp.concatenate([XS, XS], 1), jnp.concatenate([YS, YS], 1)
    run = step.scan_value_and_grad(squared)

    def both():
        step.reset(batch_size=2 * B)
        step.scan(wide[0])
        step.reset(batch_size=B)
        return run(XS, YS), learn(XS, YS)

    first = both()
    step.reset(batch_size=1)  # a last batch that is smaller
    run(XS[:, :1], YS[:, :1])
    traced = []

    def counted(self, *args, **kwargs):
        traced.append(args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("etcompile.compiler.step_model", counted)
        patch.setattr("etcompile.lowering.functions.StepFunctions.sequence", counted)
        patch.setattr("etcompile.lowering.functions.StepFunctions.scan", counted)
        same(both(), first)
    assert not traced


def test_the_count_of_random_draws_goes_on_through_resets():
    step = fresh(algo="uoro")
    counts = []
    for reset in (
        lambda: None,
        step.reset,
        lambda: step.reset(batch_size=4),
        lambda: step.reset(batch_size=B),
    ):
        reset()
        step(XS[0] if step.executor.inputs[0].shape[0] == B else jnp.concatenate([XS[0]] * 2))
        counts.append([int(v) for k, v in step.executor.counts().items()])
    assert counts[0] != [] and [c[0] - counts[0][0] for c in counts] == [0, 1, 2, 3]


def test_memory_of_another_batch_size_is_given_back():
    step = fresh()
    step.scan(XS)
    held = step.traces_state
    step.reset(batch_size=4)
    assert all(isinstance(v, jax.ShapeDtypeStruct) for v in jax.tree.leaves(held._value))


# --- refused resets -------------------------------------------------------------------------------------------------------


class Picky(Net):
    """Cannot run for five examples; its init_state draws random numbers first."""

    def init_state(self, batch_size=None, **kwargs):
        self.h = brainstate.HiddenState(0.3 + 0.0 * brainstate.random.normal(size=(batch_size, 4)))
        if batch_size == 7:
            raise RuntimeError("seven")

    def update(self, x):
        if x.shape[0] == 5:
            raise ValueError("five examples")
        return super().update(x)


@pytest.mark.parametrize("batch_size", [0, -1, True, "4", 2.0, 5, 7])
def test_a_refused_reset_leaves_everything_as_it_was(batch_size):
    step = fresh(Picky)
    step.scan(XS)
    held, objects = (step.executor.carry(), step.executor.live.initial), step.executor.live.state_objects["h"]
    with pytest.raises(EtcompileError):
        step.reset(batch_size=batch_size)
    same((step.executor.carry(), step.executor.live.initial), held)
    assert step.executor.live.state_objects["h"] is objects
    other = fresh(Picky)
    other.scan(XS)
    same(step.scan_value_and_grad(squared)(XS, YS), other.scan_value_and_grad(squared)(XS, YS))


# --- what is a batch axis -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 4])
def test_constants_of_units_keys_and_delay_lines_of_a_function_are_no_batch(batch):
    """Whatever their leading axis is: 4 units and a key of 2 numbers, at a batch size of 4 and of 2."""

    def fn(params, state, x, gain):
        h = jnp.tanh(0.9 * state["h"] + gain * (x @ params["w"]) + state["line"][0])
        line = jnp.concatenate([state["line"][1:], jnp.zeros((1, 4))])
        return {"h": h, "unit": state["unit"], "key": state["key"], "line": line}, h * state["unit"]

    def build(size):
        state = {"h": jnp.zeros((size, 4)), "unit": jnp.arange(1.0, 5.0), "line": jnp.zeros((batch, 4))}
        state["key"] = jnp.zeros(2, jnp.uint32)
        model = etcompile.from_function(fn, {"w": 0.3 * draw(5, 3, 4)}, state)
        return etcompile.compile(model, jnp.ones((size, 3)), jnp.ones(4))

    step = build(batch)
    step.reset(batch_size=3)
    other = build(3)
    found, right = step.executor.live.states(), other.executor.live.states()
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, right)
    x, gain, y = draw(6, 3, 3), draw(7, 4), draw(8, 3, 4)
    same(step.value_and_grad(squared)((x, gain), y), other.value_and_grad(squared)((x, gain), y))


class Normed(Net):
    """Its examples meet: the mean over the batch is taken off, and kept in a state."""

    def __init__(self):
        super().__init__()
        self.mean = brainstate.LongTermState(jnp.zeros(4))

    def update(self, x):
        u = x @ self.w.value
        self.mean.value = 0.9 * self.mean.value + 0.1 * u.mean(0)
        self.h.value = jnp.tanh(0.9 * self.h.value + u - u.mean(0))
        return self.h.value - self.mean.value


def normed(params, state, x):
    u = x @ params["w"]
    h = 0.9 * state["h"] + u - u.mean(0)
    line = jnp.concatenate([state["line"][1:], h[None]])
    counts = {"mean": 0.9 * state["mean"] + 0.1 * u.mean(0), "seen": state["seen"] + 1}
    return {"h": h, "line": line, **counts}, jnp.tanh(line[0] - state["mean"])


def normed_at(size, units=4):
    state = {"h": jnp.zeros((size, units)), "line": jnp.zeros((3, size, units)), "mean": jnp.zeros(units)}
    model = etcompile.from_function(
        normed, {"w": 0.3 * draw(5, 3, units)}, state | {"seen": jnp.zeros((), int)}
    )
    return etcompile.compile(model, jnp.ones((size, 3)))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("module", (4, 3)),
        ("module", (1, 3)),
        ("function", (2, 5)),
        ("function", (1, 3)),
        ("as many units", (4, 3)),
    ],
)
def test_examples_that_meet_may_be_others_in_number(kind, sizes):
    """As behind batch norm: nothing but the model itself tells that the axis is one of examples, also in the middle of a state."""
    before, after = sizes

    def build(size):
        if kind == "module":
            return etcompile.compile(Normed(), jnp.ones((size, 3)), batch_size=size)
        return normed_at(size, before if kind == "as many units" else 4)

    step, other = build(before), build(after)
    step.reset(batch_size=after)
    shapes = [jax.tree.map(jnp.shape, s.executor.live.states()) for s in (step, other)]
    assert shapes[0] == shapes[1]
    xs = draw(6, 4, after, 3)
    losses = [s.scan_value_and_grad(lambda out: jnp.mean(out**2))(xs) for s in (step, other)]
    same(*losses)


def test_a_model_without_a_batch_axis_says_so():
    def alone(params, state, x):
        h = 0.9 * state["h"] + x @ params["w"]
        return {"h": h}, h

    model = etcompile.from_function(alone, {"w": draw(5, 3, 4)}, {"h": jnp.zeros(4)})
    step = etcompile.compile(model, jnp.ones(3))
    with pytest.raises(EtcompileError, match="alone"):
        step.reset(batch_size=5)
    assert step(jnp.ones(3)).shape == (4,)


def test_names_of_parts_may_have_dots_in_them():
    """As those of brainpy's projections: the same objects are found at every call, and after a change of the batch size."""

    class Parts(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = {"tau=4.0": Net()}

        def update(self, x):
            return self.parts["tau=4.0"](x)

    reference, step = wanted(), fresh(Parts)
    holders = step.executor.live.holders
    for _ in range(2):
        step(XS[0])
    assert step.executor.live.holders is holders
    step.reset(batch_size=2 * B)
    step.reset(batch_size=B)
    losses, grads = step.scan_value_and_grad(squared)(XS, YS)
    same((losses, list(grads.values())), (reference[0], list(reference[1].values())))
