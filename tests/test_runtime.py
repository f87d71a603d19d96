"""The compiled step under every transformation and driver: always the same numbers."""

from __future__ import annotations

import brainstate
import braintools
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import saiunit as u
from oracles import bptt, dense_d_rtrl, one_step_grad, relative_error, time_slice
from shared import shared
from zoo import Function, by_name

import etcompile

T, B = 5, 2
TOLERANCE = 1e-10


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


XS, YS = draw(0, T, B, 3), draw(1, T, B, 2)


def squared(out, target):
    return jnp.mean((out - target) ** 2)


class Net(brainstate.nn.Module):
    """A recurrent layer with one cut, one elementwise recurrence and a readout."""

    def __init__(self):
        super().__init__()
        self.w = brainstate.ParamState({"u": 0.4 * draw(2, 3, 4), "w": 0.4 * draw(3, 4, 4)})
        self.a = brainstate.ParamState(0.5 * draw(4, 4))
        self.v = brainstate.ParamState(0.5 * draw(5, 4, 2))

    def init_state(self, batch_size=None, **kwargs):
        shape = (4,) if batch_size is None else (batch_size, 4)
        self.h = brainstate.HiddenState(jnp.full(shape, 0.3))

    def update(self, x):
        h, p = self.h.value, self.w.value
        self.h.value = jnp.tanh(self.a.value * h + x @ p["u"] + h @ p["w"])
        return self.h.value @ self.v.value


def fresh(batch=B, model=Net):
    """A compiled step and its model, the same at every call."""
    model = model()
    brainstate.nn.init_all_states(model, batch_size=batch)
    return etcompile.compile(model, XS[0, :batch] if batch else XS[0, 0]), model


def values(step):
    return {path: state.value for path, state in step.param_states.items()}


@shared
def reference():
    """Losses and gradients of every step, one call of value_and_grad after the other."""
    step, model = fresh()
    found = [step.value_and_grad(squared)(x, y) for x, y in zip(XS, YS, strict=True)]
    losses, grads = zip(*found, strict=True)
    return jnp.stack(losses), list(grads), model.h.value, step.traces


def total(grads):
    return jax.tree.map(lambda *g: sum(g[1:], start=g[0]), *grads)


# --- the same step, driven in different ways ----------------------------------------------------------------------------


def test_value_and_grad_equals_brainstate_grad_around_the_call():
    losses, grads, h, traces = reference()
    step, model = fresh()
    for x, y, loss, wanted in zip(XS, YS, losses, grads, strict=True):
        fn = brainstate.transform.grad(
            lambda x=x, y=y: squared(step(x), y), step.param_states, return_value=True
        )
        got, value = fn()
        assert relative_error(value, loss) < TOLERANCE
        assert relative_error(got, wanted) < TOLERANCE
    assert relative_error(model.h.value, h) < TOLERANCE
    assert relative_error(step.traces, traces) < TOLERANCE


def test_scan_value_and_grad_equals_the_loop():
    losses, grads, h, traces = reference()
    step, model = fresh()
    got_losses, got = step.scan_value_and_grad(squared)(XS, YS)
    assert got_losses.shape == (T,)
    assert relative_error(got_losses, losses) < TOLERANCE
    assert relative_error(got, total(grads)) < TOLERANCE
    assert relative_error(model.h.value, h) < TOLERANCE
    assert relative_error(step.traces, traces) < TOLERANCE


def test_a_sequence_may_be_cut_anywhere():
    losses, grads, _, traces = reference()
    step, _ = fresh()
    run = step.scan_value_and_grad(squared)
    parts = [run(XS[:2], YS[:2]), run(XS[2:], YS[2:])]
    assert relative_error(jnp.concatenate([p[0] for p in parts]), losses) < TOLERANCE
    assert relative_error(total([p[1] for p in parts]), total(grads)) < TOLERANCE
    assert relative_error(step.traces, traces) < TOLERANCE


def test_the_traces_advance_without_a_gradient():
    """Steps without a loss give the same memory: only the last gradient is asked for."""
    _, grads, _, traces = reference()
    step, _ = fresh()
    step.scan(XS[:2])
    step(XS[2])
    step.value_and_grad(lambda out, y: 0.0 * squared(out, y))(XS[3], YS[3])
    assert relative_error(step.value_and_grad(squared)(XS[4], YS[4])[1], grads[4]) < TOLERANCE
    assert relative_error(step.traces, traces) < TOLERANCE


def test_calls_and_scan_give_what_the_plain_model_gives():
    plain = Net()
    brainstate.nn.init_all_states(plain, batch_size=B)
    wanted = jnp.stack([plain(x) for x in XS])
    step, _ = fresh()
    assert relative_error(jnp.stack([step(x) for x in XS]), wanted) < TOLERANCE
    step, _ = fresh()
    assert relative_error(step.scan(XS), wanted) < TOLERANCE


def test_under_brainstate_jit_and_for_loop():
    losses, grads, h, traces = reference()
    step, model = fresh()

    def one(x, y):
        return brainstate.transform.grad(lambda: squared(step(x), y), step.param_states, return_value=True)()

    jitted = brainstate.transform.jit(one)
    got, value = jitted(XS[0], YS[0])
    assert relative_error(got, grads[0]) < TOLERANCE
    assert relative_error(value, losses[0]) < TOLERANCE
    rest, rest_losses = brainstate.transform.for_loop(one, XS[1:], YS[1:])
    assert relative_error(rest_losses, losses[1:]) < TOLERANCE
    for k in range(T - 1):
        assert relative_error(time_slice(rest, k), grads[k + 1]) < TOLERANCE
    assert relative_error(model.h.value, h) < TOLERANCE
    assert relative_error(step.traces, traces) < TOLERANCE


def test_value_and_grad_inside_brainstate_for_loop():
    losses, grads, _, traces = reference()
    step, _ = fresh()
    got_losses, got = brainstate.transform.for_loop(lambda x, y: step.value_and_grad(squared)(x, y), XS, YS)
    assert relative_error(got_losses, losses) < TOLERANCE
    assert relative_error(jax.tree.map(lambda g: g.sum(0), got), total(grads)) < TOLERANCE
    assert relative_error(step.traces, traces) < TOLERANCE


def test_grad_around_a_whole_loop_is_the_sum_of_the_online_gradients():
    _, grads, *_ = reference()
    step, _ = fresh()

    def loss():
        return brainstate.transform.for_loop(lambda x, y: squared(step(x), y), XS, YS).sum()

    got = brainstate.transform.grad(loss, step.param_states)()
    assert relative_error(got, total(grads)) < TOLERANCE


def test_jax_grad_of_apply_under_jit_and_scan():
    losses, grads, h, traces = reference()
    step, model = fresh()
    params, start = values(step), step.init_carry()

    def loss(params, carry, x, y):
        carry, out = step.apply(params, carry, x)
        return squared(out, y), carry

    @jax.jit
    def body(carry, item):
        (value, carry), grads = jax.value_and_grad(loss, has_aux=True)(params, carry, *item)
        return carry, (value, grads)

    carry, (got_losses, per_step) = jax.lax.scan(body, start, (XS, YS))
    assert relative_error(got_losses, losses) < TOLERANCE
    for k in range(T):
        assert relative_error(time_slice(per_step, k), grads[k]) < TOLERANCE
    assert relative_error(carry.states["h"], h) < TOLERANCE
    assert relative_error(carry.traces, traces) < TOLERANCE

    def whole(params):
        _, found = jax.lax.scan(lambda c, i: loss(params, c, *i)[::-1], start, (XS, YS))
        return found.sum()

    assert relative_error(jax.grad(whole)(params), total(grads)) < TOLERANCE
    # the pure function left the model alone
    assert bool((model.h.value == 0.3).all())
    assert all(bool((v == 0).all()) for v in jax.tree.leaves(step.traces))


def test_gradient_of_the_inputs_is_that_of_one_step():
    step, _ = fresh()
    params = values(step)

    def one(x):
        h = jnp.full((B, 4), 0.3)
        h = jnp.tanh(params["a"] * h + x @ params["w"]["u"] + h @ params["w"]["w"])
        return squared(h @ params["v"], YS[0])

    got = jax.grad(lambda x: squared(step.apply(params, step.init_carry(), x)[1], YS[0]))(XS[0])
    assert relative_error(got, jax.grad(one)(XS[0])) < TOLERANCE


def test_vmap_over_the_functional_step_equals_the_batch():
    step, _ = fresh(batch=None)
    params = values(step)
    carry = jax.tree.map(lambda v: jnp.broadcast_to(v, (B, *v.shape)), step.init_carry())

    def loss(params, carry, x, y):
        carry, out = step.apply(params, carry, x)
        return squared(out, y), carry

    losses, grads = [], []
    for x, y in zip(XS, YS, strict=True):
        (found, carry), g = jax.vmap(jax.value_and_grad(loss, has_aux=True), (None, 0, 0, 0))(
            params, carry, x, y
        )
        losses.append(found.mean())
        grads.append(jax.tree.map(lambda v: v.mean(0), g))
    wanted_losses, wanted, h, _ = reference()
    assert relative_error(jnp.stack(losses), wanted_losses) < TOLERANCE
    for got, each in zip(grads, wanted, strict=True):
        assert relative_error(got, each) < TOLERANCE
    assert relative_error(carry.states["h"], h) < TOLERANCE


@pytest.mark.parametrize("batch", [1, 16, None])
@pytest.mark.parametrize("name", ["gru", "lstm", "conv2d", "lif_exponential", "states_in_a_dict"])
def test_batch_sizes(name, batch):
    built = by_name(name).build(batch, jnp.float64)
    if name == "conv2d" and batch is None:
        pytest.skip("the layer wants a batch axis")
    step = compiled(built)
    wanted = dense_of(built, 3)
    losses, grads = step.scan_value_and_grad(built.loss_fn)(built.xs[:3], *(t[:3] for t in built.targets))
    assert relative_error(losses, wanted.losses) < TOLERANCE
    assert relative_error(grads, wanted.grads) < TOLERANCE


def compiled(built, **options):
    model = built.model
    if isinstance(model, Function):
        model = etcompile.from_function(model.fn, model.params, model.state)
    return etcompile.compile(model, time_slice(built.xs, 0), **options)


def dense_of(built, n, **options):
    xs, targets = jax.tree.map(lambda a: a[:n], (built.xs, built.targets))
    return dense_d_rtrl(
        built.step, built.params, built.state, xs, targets, built.loss_fn, built.groups, **options
    )


# --- reset --------------------------------------------------------------------------------------------------------------


def test_reset_starts_the_same_sequence_again():
    step, model = fresh()
    first = step.scan_value_and_grad(squared)(XS, YS)
    step.reset()
    assert bool((model.h.value == 0.3).all())
    assert all(bool((v == 0).all()) for v in jax.tree.leaves(step.traces))
    again = step.scan_value_and_grad(squared)(XS, YS)
    assert relative_error(again, first) == 0.0


def test_reset_to_another_batch_size_and_back():
    step, model = fresh()
    first = step.scan_value_and_grad(squared)(XS, YS)
    step.reset(batch_size=6)
    wide_x, wide_y = jnp.concatenate([XS] * 3, 1), jnp.concatenate([YS] * 3, 1)
    losses, grads = step.scan_value_and_grad(squared)(wide_x, wide_y)
    assert model.h.value.shape == (6, 4)
    assert relative_error((losses, grads), first) < TOLERANCE
    step.reset()
    assert model.h.value.shape == (6, 4)
    assert relative_error(step.scan_value_and_grad(squared)(wide_x, wide_y), first) < TOLERANCE
    step.reset(batch_size=B)
    assert relative_error(step.scan_value_and_grad(squared)(XS, YS), first) < TOLERANCE
    assert step.init_carry(B).states["h"].shape == (B, 4)


def test_reset_keeps_weights_and_long_term_states():
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.count = brainstate.LongTermState(jnp.zeros((), jnp.int32))

        def update(self, x):
            self.count.value = self.count.value + 1
            return super().update(x)

    step, model = fresh(model=Counting)
    step.learn(squared, optax.sgd(0.1))(XS, YS)
    before = values(step)
    step.reset()
    assert int(model.count.value) == T
    assert relative_error(values(step), before) == 0.0


def test_states_initialised_again_by_the_user_are_the_ones_that_run():
    """`brainstate.nn.init_all_states` makes new State objects; the step must not go on with the old ones."""
    step, model = fresh()
    step.scan(XS)
    brainstate.nn.init_all_states(model, batch_size=B)
    out = step(XS[0])
    other, _ = fresh()
    assert relative_error(out, other(XS[0])) < TOLERANCE
    assert not bool((model.h.value == 0.3).any())


# --- losses, outputs, states ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["outputs_in_a_tree", "loss_on_some_steps", "cross_entropy_of_labels"])
def test_losses_of_every_kind_step_by_step(name):
    """Hidden states in the loss, several outputs, several targets, steps without a loss."""
    built = by_name(name)()
    step = compiled(built)
    wanted = dense_of(built, 5)
    for t in range(5):
        loss, grads = step.value_and_grad(built.loss_fn)(built.xs[t], *time_slice(built.targets, t))
        assert relative_error(loss, wanted.losses[t]) < TOLERANCE
        assert relative_error(grads, wanted.grads_per_step[t]) < TOLERANCE


def test_a_step_without_loss_has_no_gradient():
    step, _ = fresh()
    _, grads = step.value_and_grad(lambda out, on: on * jnp.sum(out**2))(XS[0], jnp.zeros(()))
    assert all(bool((g == 0).all()) for g in jax.tree.leaves(grads))


def test_loss_that_reads_the_state_of_the_model_itself():
    """The loss takes model.h.value after the call, inside brainstate's grad."""
    step, model = fresh()
    other, _ = fresh(model=ReturnsState)
    for x in XS:
        got = brainstate.transform.grad(
            lambda x=x: jnp.sum(step(x)) + jnp.sum(model.h.value**3), step.param_states
        )()
        _, wanted = other.value_and_grad(lambda out: jnp.sum(out[0]) + jnp.sum(out[1] ** 3))(x)
        assert relative_error(got, wanted) < TOLERANCE


class ReturnsState(Net):
    def update(self, x):
        return super().update(x), self.h.value


def test_integer_and_boolean_outputs():
    class Labels(Net):
        def update(self, x):
            y = super().update(x)
            return {"y": y, "label": jnp.argmax(y, -1), "above": y > 0}

    step, _ = fresh(model=Labels)
    plain, _ = fresh()
    got = step.scan_value_and_grad(lambda out, y: squared(out["y"], y) + 0.0 * jnp.sum(out["label"]))(XS, YS)
    assert relative_error(got, plain.scan_value_and_grad(squared)(XS, YS)) < TOLERANCE
    assert step(XS[0])["label"].dtype == jnp.argmax(XS).dtype


def test_several_inputs():
    class Gated(Net):
        def update(self, x, gate):
            return super().update(x * gate)

    model = Gated()
    brainstate.nn.init_all_states(model, batch_size=B)
    step = etcompile.compile(model, XS[0], jnp.ones(()))
    gates = jnp.asarray([1.0, 0.5, 0.0, 2.0, 1.0])
    plain, _ = fresh()
    scaled = XS * gates[:, None, None]
    wanted = plain.scan_value_and_grad(squared)(scaled, YS)
    assert relative_error(step.scan_value_and_grad(squared)((XS, gates), YS), wanted) < TOLERANCE
    step.reset()
    plain.reset()
    assert relative_error(step(XS[0], gates[0]), plain(scaled[0])) < TOLERANCE


def test_units_come_back():
    built = by_name("quantities")()
    step = compiled(built)
    loss, grads = step.value_and_grad(built.loss_fn)(built.xs[0], *time_slice(built.targets, 0))
    _, wanted = one_step_grad(
        built.plain_step, built.params, built.state, built.xs[0], time_slice(built.targets, 0), built.loss_fn
    )
    assert jax.tree.structure(grads["g"]) == jax.tree.structure(step.param_states["g"].value)
    assert relative_error(grads, wanted) < TOLERANCE
    assert isinstance(built.model.v.value, u.Quantity)


def test_from_function():
    built = by_name("function_lstm")()
    model = etcompile.from_function(built.model.fn, built.params, built.state)
    step = etcompile.compile(model, built.xs[0])
    wanted = dense_of(built, 4)
    losses, grads = step.scan_value_and_grad(built.loss_fn)(built.xs[:4], built.targets[0][:4])
    assert jax.tree.structure(grads) == jax.tree.structure(model.params)
    assert relative_error(grads, wanted.grads) < TOLERANCE
    assert relative_error(losses, wanted.losses) < TOLERANCE
    assert relative_error(model.state, wanted.state) < TOLERANCE
    step.reset()
    assert relative_error(model.state, built.state) == 0.0
    got = brainstate.transform.grad(
        lambda: built.loss_fn(step(built.xs[0]), built.targets[0][0]), step.param_states
    )()
    wanted = one_step_grad(
        built.plain_step, built.params, built.state, built.xs[0], time_slice(built.targets, 0), built.loss_fn
    )[1]
    assert relative_error(jax.tree.leaves(got), jax.tree.leaves(wanted)) < TOLERANCE


# --- random numbers -------------------------------------------------------------------------------------------------------


class Dropping(Net):
    def update(self, x):
        noise = brainstate.random.normal(0.0, 0.1, size=(B, 3))
        kept = brainstate.random.bernoulli(0.6, size=(B, 2))
        return jnp.where(kept, super().update(x + noise), 0.0)


def test_random_numbers_are_those_of_the_plain_model():
    plain = Dropping()
    brainstate.nn.init_all_states(plain, batch_size=B)
    brainstate.random.seed(3)
    wanted = jnp.stack([plain(x) for x in XS])
    key = brainstate.random.DEFAULT.value
    for run in ("calls", "scan", "value_and_grad", "scan_value_and_grad"):
        step, _ = fresh(model=Dropping)
        brainstate.random.seed(3)
        if run == "calls":
            got = jnp.stack([step(x) for x in XS])
        elif run == "scan":
            got = step.scan(XS)
        elif run == "value_and_grad":
            got = jnp.stack([step.value_and_grad(squared)(x, y)[0] for x, y in zip(XS, YS, strict=True)])
        else:
            got = step.scan_value_and_grad(squared)(XS, YS)[0]
        if "grad" in run:
            assert relative_error(got, jnp.mean((wanted - YS) ** 2, (1, 2))) < TOLERANCE
        else:
            assert relative_error(got, wanted) < TOLERANCE
        assert bool(
            (jax.random.key_data(brainstate.random.DEFAULT.value) == jax.random.key_data(key)).all()
        ), run


def test_the_gradient_uses_the_numbers_of_its_own_step():
    built = by_name("noise_and_dropout")()
    step = compiled(built)
    brainstate.random.DEFAULT.value = built.state["rng"]
    wanted = dense_of(built, 5)
    losses, grads = step.scan_value_and_grad(built.loss_fn)(built.xs[:5], built.targets[0][:5])
    assert relative_error(losses, wanted.losses) < TOLERANCE
    assert relative_error(grads, wanted.grads) < TOLERANCE


# --- learning -------------------------------------------------------------------------------------------------------------


def by_hand(optimizer, every, xs, ys):
    step, _ = fresh()
    carried = optimizer.init(values(step))
    losses, pending = [], []
    for x, y in zip(xs, ys, strict=True):
        loss, grads = step.value_and_grad(squared)(x, y)
        losses.append(loss)
        pending.append(grads)
        if len(pending) == every:
            updates, carried = optimizer.update(total(pending), carried, values(step))
            new = optax.apply_updates(values(step), updates)
            for path, state in step.param_states.items():
                state.value = new[path]
            pending = []
    return jnp.stack(losses), values(step)


@pytest.mark.parametrize("every", [1, 3])
def test_learn_equals_the_loop_written_by_hand(every):
    xs, ys = jnp.concatenate([XS, -XS]), jnp.concatenate([YS, YS])
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    losses, params = by_hand(optimizer, every, xs, ys)
    step, _ = fresh()
    learn = step.learn(squared, optimizer, update_every=every)
    got = jnp.concatenate([learn(xs[:4], ys[:4]), learn(xs[4:], ys[4:])])
    assert relative_error(got, losses) < TOLERANCE
    assert relative_error(values(step), params) < TOLERANCE


def test_learn_goes_on_after_a_reset_to_another_batch_size():
    step, _ = fresh()
    learn = step.learn(squared, optax.sgd(0.1))
    learn(XS, YS)
    step.reset(batch_size=1)
    before = values(step)
    assert learn(XS[:, :1], YS[:, :1]).shape == (T,)
    assert relative_error(values(step), before) > 1e-4


def test_learn_with_braintools():
    xs, ys = XS, YS
    losses, params = by_hand(optax.sgd(0.1), 1, xs, ys)
    step, _ = fresh()
    got = step.learn(squared, braintools.optim.SGD(0.1))(xs, ys)
    assert relative_error(got, losses) < TOLERANCE
    assert relative_error(values(step), params) < TOLERANCE


def test_learn_lowers_the_loss_of_a_function_model():
    built = by_name("function_indrnn")()
    model = etcompile.from_function(built.model.fn, built.params, built.state)
    step = etcompile.compile(model, built.xs[0])
    learn = step.learn(built.loss_fn, optax.adam(3e-2))
    losses = []
    for _ in range(10):
        step.reset()
        losses.append(float(learn(built.xs, *built.targets).sum()))
    assert losses[-1] < 0.7 * losses[0]


# --- number formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gru", "lstm", "lif_exponential", "layer_norm_recurrent"])
def test_dtypes(name, dtype):
    built = by_name(name).build(2, jnp.dtype(dtype))
    step = compiled(built)
    x, target = time_slice(built.xs, 0), time_slice(built.targets, 0)
    _, wanted = one_step_grad(built.plain_step, built.params, built.state, x, target, built.loss_fn)
    loss, grads = step.value_and_grad(built.loss_fn)(x, *target)
    assert loss.dtype == jnp.dtype(dtype)
    tolerance = 1e-10 if dtype == "float64" else 32 * float(jnp.finfo(dtype).eps)
    assert relative_error(grads, wanted) < tolerance
    for path, state in step.param_states.items():
        for g, p in zip(jax.tree.leaves(grads[path]), jax.tree.leaves(state.value), strict=True):
            assert (g.dtype, g.shape) == (p.dtype, p.shape)
    step.scan_value_and_grad(built.loss_fn)(built.xs, *built.targets)
    for leaf in jax.tree.leaves(step.traces):
        assert leaf.dtype == jnp.dtype(dtype)
        assert bool(jnp.isfinite(leaf).all())
    for path, state in built.model.states().items():
        assert all(v.dtype == jnp.dtype(dtype) for v in jax.tree.leaves(state.value) if jnp.issubdtype(v.dtype, jnp.inexact)), path  # fmt: skip


def test_bptt_reference_is_the_models_own():
    """The helpers of this file against full autodiff, where nothing is cut."""
    built = by_name("function_indrnn")()
    step = compiled(built)
    _, wanted = bptt(built.plain_step, built.params, built.state, built.xs, built.targets, built.loss_fn)
    _, grads = step.scan_value_and_grad(built.loss_fn)(built.xs, *built.targets)
    assert relative_error(grads, wanted) < TOLERANCE
