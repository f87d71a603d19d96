"""The small parts: against their equations in numpy, under brainstate's transformations, in every dtype."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saiunit as u
from oracles import relative_error

import etcompile
from etcompile.errors import InputError, OptionError
from etcompile.nn import FixedRandomFeedback, GradExpon, KappaFilter, LeakyRateReadout, PresynapticTrace

TOLERANCE = 1e-10
DTYPES = [jnp.float64, jnp.float32, jnp.bfloat16]


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def leaked(xs, decay, gain=1.0):
    """All values of v = decay v + gain x from zero, in plain numpy."""
    v, out = np.zeros(xs.shape[1:]), []
    for x in np.asarray(xs):
        v = decay * v + gain * x
        out.append(v)
    return np.stack(out)


XS = draw(0, 6, 2, 3)
MAKERS = {
    "grad_expon": (lambda like: GradExpon(like, 0.8), 0.8, 1.0),
    "kappa": (lambda like: KappaFilter(like, 0.8), 0.8, 0.2),
    "presynaptic": (lambda like: PresynapticTrace(like, 0.8), 0.8, 1.0),
}


@pytest.fixture(params=MAKERS)
def maker(request):
    return MAKERS[request.param]


# --- accumulators: what they have in common -----------------------------------------------------------------------------


def test_equation(maker):
    make, decay, gain = maker
    part = make(XS[0])
    got = [part.update(x) for x in XS]
    assert relative_error(jnp.stack(got), leaked(XS, decay, gain)) < TOLERANCE
    assert relative_error(part.value, got[-1]) == 0.0
    assert relative_error(part(XS[0]), decay * got[-1] + gain * XS[0]) < TOLERANCE


@pytest.mark.parametrize("how", ["jit", "for_loop", "jit of for_loop"])
def test_under_transformations(maker, how):
    make, decay, gain = maker
    part = make((2, 3))
    if how == "jit":
        update = brainstate.transform.jit(part.update)
        got = jnp.stack([update(x) for x in XS])
    elif how == "for_loop":
        got = brainstate.transform.for_loop(part.update, XS)
    else:
        got = brainstate.transform.jit(lambda xs: brainstate.transform.for_loop(part.update, xs))(XS)
    assert relative_error(got, leaked(XS, decay, gain)) < TOLERANCE
    assert relative_error(part.value, got[-1]) == 0.0
    brainstate.transform.jit(part.reset_state)()
    assert not part.value.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_dtypes_are_kept(maker, dtype):
    make, decay, gain = maker
    xs = XS.astype(dtype)
    part = make(xs[0])
    got = brainstate.transform.for_loop(part.update, xs)
    assert part.value.dtype == got.dtype == dtype
    wanted = leaked(xs.astype(jnp.float64), decay, gain)
    assert relative_error(got.astype(jnp.float64), wanted) < 16 * float(jnp.finfo(dtype).eps)
    part.reset_state(batch_size=5)
    assert part.value.dtype == dtype


def test_a_tree_of_dtypes_and_complex_numbers(maker):
    make, decay, gain = maker
    tree = {"a": [XS[:, 0].astype(jnp.bfloat16), XS], "c": XS * (1 + 2j)}
    part = make(jax.tree.map(lambda v: v[0], tree))
    got = brainstate.transform.for_loop(part.update, tree)
    assert jax.tree.map(lambda v: v.dtype, got) == jax.tree.map(lambda v: v.dtype, tree)
    assert relative_error(got["a"][1], leaked(XS, decay, gain)) < TOLERANCE
    assert relative_error(got["c"], leaked(XS, decay, gain) * (1 + 2j)) < TOLERANCE


def test_units_are_kept_and_converted(maker):
    make, decay, gain = maker
    part = make({"w": XS[0] * u.mV, "n": XS[0]})
    wanted = leaked(XS, decay, gain)
    got = brainstate.transform.for_loop(part.update, {"w": XS * u.mV, "n": XS})
    assert got["w"].unit == u.mV
    assert relative_error(got["w"].mantissa, wanted) < TOLERANCE
    part.reset_state()
    for x in XS:
        last = part.update({"w": 1e-3 * x * u.volt, "n": x})
    assert last["w"].unit == u.mV
    assert relative_error(last, {"w": wanted[-1] * u.mV, "n": wanted[-1]}) < TOLERANCE
    with pytest.raises(InputError, match=r"leaf w has another unit"):
        part.update({"w": XS[0], "n": XS[0]})
    with pytest.raises(InputError, match=r"leaf n has another unit"):
        part.update({"w": XS[0] * u.mV, "n": XS[0] * u.ms})


def test_reset_brings_zeros_back_and_changes_the_leading_axis(maker):
    make, _, _ = maker
    part = make({"x": XS[0] * u.mV, "s": jnp.zeros(())})
    one = {"x": XS[0] * u.mV, "s": jnp.ones(())}
    part.update(one)
    part.reset_state()
    assert part.value["x"].shape == (2, 3) and part.value["x"].unit == u.mV
    assert not any(v.any() for v in jax.tree.leaves(part.value))
    part.reset_state(batch_size=7)
    assert part.value["x"].shape == (7, 3) and part.value["s"].shape == (7,)
    part.update({"x": jnp.ones((7, 3)) * u.mV, "s": jnp.ones(7)})
    with pytest.raises(InputError, match="another shape"):
        part.update(one)
    part.reset_state()
    assert relative_error(part.update(one), make(one).update(one)) == 0.0
    brainstate.nn.reset_all_states(part, batch_size=4)
    assert part.value["x"].shape == (4, 3)
    for wrong in (0, -1, 2.0, True, "2"):
        with pytest.raises(InputError, match="batch_size"):
            part.reset_state(batch_size=wrong)


@pytest.mark.parametrize(
    ("like", "shape"), [(3, (3,)), ((2, 3), (2, 3)), ((), ()), (np.int64(4), (4,)), (0.0, ())]
)
def test_shapes_of_many_kinds(maker, like, shape):
    part = maker[0](like)
    assert part.value.shape == shape and part.value.dtype == jnp.float64
    with brainstate.environ.context(precision=32):
        assert maker[0](like).value.dtype == jnp.float32


def test_examples_of_many_kinds():
    tree = {"a": jax.ShapeDtypeStruct((2,), jnp.bfloat16), "b": (3, 4), "c": [jnp.ones(2, jnp.int32), 5]}
    value = GradExpon(tree, 0.5).value
    assert jax.tree.map(lambda v: (v.shape, str(v.dtype)), value) == {
        "a": ((2,), "bfloat16"),
        "b": ((3, 4), "float64"),
        "c": [((2,), "float64"), ((5,), "float64")],
    }
    assert GradExpon(tree, 0.5, dtype=jnp.float32).value["a"].dtype == jnp.float32
    unit = jax.eval_shape(lambda: jnp.ones(2) * u.mV)
    assert KappaFilter(unit, 0.5).value.unit == u.mV


def test_integers_and_booleans_are_spikes(maker):
    make, decay, gain = maker
    spikes = XS > 0
    for xs in (spikes, spikes.astype(jnp.int32), spikes.astype(jnp.bfloat16)):
        part = make((2, 3))
        got = brainstate.transform.for_loop(part.update, xs)
        assert got.dtype == jnp.float64
        assert relative_error(got, leaked(spikes, decay, gain)) < TOLERANCE


def test_inputs_that_do_not_fit(maker):
    part = maker[0]({"w": jnp.zeros((2, 3), jnp.float32)})
    good = jnp.ones((2, 3), jnp.float32)
    before = part.value
    for wrong, what in [
        (good, "another structure"),
        ({"w": good, "b": good}, "another structure"),
        ({"w": good[0]}, r"leaf w has another shape.*\n.*got: \(3,\)"),
        ({"w": good.astype(jnp.float64)}, "lose precision"),
        ({"w": good * 1j}, "lose precision"),
        ({"w": np.zeros((2, 3), jax.dtypes.float0)}, "lose precision"),
        ({"w": good * u.mV}, "another unit"),
    ]:
        with pytest.raises(InputError, match=what):
            part.update(wrong)
    assert part.value is before
    part.update({"w": good})


@pytest.mark.parametrize("like", ["text", {"w": "text"}, object(), (2, -1)])
def test_examples_that_are_none(maker, like):
    with pytest.raises(OptionError):
        maker[0](like)
    with pytest.raises(OptionError, match="dtype"):
        GradExpon((2,), 0.5, dtype=jnp.int32)


@pytest.mark.parametrize(
    "value", [1.0, 1, -0.1, 1.5, float("nan"), float("inf"), "0.5", None, True, [0.5], 0.5j, 3 * u.mV]
)
@pytest.mark.parametrize("make", [GradExpon, KappaFilter, PresynapticTrace])
def test_bad_decays(make, value):
    with pytest.raises(OptionError):
        make((3,), value)


def test_the_ends_of_the_ranges():
    for make in (GradExpon, PresynapticTrace):
        with pytest.raises(OptionError, match="out of range"):
            make((3,), 0.0)
    keep = KappaFilter((2, 3), 0)
    keep.update(XS[0])
    assert relative_error(keep.update(XS[1]), XS[1]) == 0.0
    for number in (np.float32(0.5), jnp.asarray(0.5), u.Quantity(0.5)):
        assert GradExpon((3,), number).decay == 0.5
    with pytest.raises(OptionError, match="must be a number"):
        jax.jit(lambda d: GradExpon((3,), d).value)(0.5)


def test_states_are_found_and_no_parameters(maker):
    part = maker[0]((2, 3))
    states = part.states()
    assert len(states) == 1
    assert all(type(s) is brainstate.ShortTermState for s in states.values())


# --- accumulated gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dt", [1.0 * u.ms, 1e-3 * u.second, jnp.asarray(1000.0) * u.us])
def test_grad_expon_with_a_time_constant(dt):
    g = GradExpon((2, 3), 20 * u.ms)
    with brainstate.environ.context(dt=dt):
        got = brainstate.transform.for_loop(g.update, XS)
    assert relative_error(got, leaked(XS, np.exp(-1 / 20))) < TOLERANCE


def test_grad_expon_takes_the_time_step_of_the_call():
    g = GradExpon((2, 3), 20 * u.ms)
    with brainstate.environ.context(dt=0.1 * u.ms):
        g.update(XS[0])
    with brainstate.environ.context(dt=5 * u.ms):
        second = g.update(XS[1])
    assert relative_error(second, np.exp(-0.25) * XS[0] + XS[1]) < TOLERANCE


def test_grad_expon_with_a_traced_time_step():
    g = GradExpon((2, 3), 20 * u.ms)
    update = brainstate.transform.jit(lambda dt, x: _with_dt(g, dt, x))
    for x in XS:
        last = update(jnp.asarray(5.0), x)
    assert relative_error(last, leaked(XS, np.exp(-0.25))[-1]) < TOLERANCE


def _with_dt(part, dt, x):
    with brainstate.environ.context(dt=dt * u.ms):
        return part.update(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_a_time_constant_keeps_the_dtype(dtype):
    g = GradExpon(XS[0].astype(dtype), 20 * u.ms)
    for dt in (1.0 * u.ms, jnp.asarray(1.0, jnp.float64) * u.ms):
        with brainstate.environ.context(dt=dt):
            assert g.update(XS[0].astype(dtype)).dtype == dtype


def test_time_steps_that_do_not_do():
    g = GradExpon((2, 3), 20 * u.ms)
    with pytest.raises(OptionError, match="time step is not set"):
        g.update(XS[0])
    for dt in (0.1, 0.1 * u.mV):
        with brainstate.environ.context(dt=dt), pytest.raises(OptionError, match="the time step has none"):
            g.update(XS[0])
    with brainstate.environ.context(dt=0.0 * u.ms), pytest.raises(OptionError, match="positive"):
        g.update(XS[0])
    assert not g.value.any()
    for tau in (0.0 * u.ms, -1 * u.ms, float("nan") * u.ms, jnp.ones(2) * u.ms):
        with pytest.raises(OptionError):
            GradExpon((2, 3), tau)
    with brainstate.environ.context(dt=0.1):
        GradExpon((2, 3), 0.9).update(XS[0])


def test_grad_expon_of_a_compiled_step():
    class Net(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.readout = brainstate.nn.GRUCell(3, 4), brainstate.nn.Linear(4, 2)

        def update(self, x):
            return self.readout(self.cell(x))

    model = Net()
    step = etcompile.compile(model, XS[0], batch_size=2)
    value_and_grad = step.value_and_grad(lambda out: jnp.mean(out**2))
    g, h = GradExpon(step.param_states, 0.7), GradExpon(model.states(brainstate.ParamState), 0.7)
    wanted = jax.tree.map(jnp.zeros_like, {path: s.value for path, s in step.param_states.items()})
    for x in XS:
        _, grads = value_and_grad(x)
        got = g.update(grads)
        wanted = jax.tree.map(lambda w, d: 0.7 * w + d, wanted, grads)
        h.update(
            brainstate.transform.grad(
                lambda x=x: jnp.mean(model(x) ** 2), model.states(brainstate.ParamState)
            )()
        )
    assert relative_error(got, wanted) < TOLERANCE
    assert set(h.value) == set(model.states(brainstate.ParamState))


# --- feedback ------------------------------------------------------------------------------------------------------------


def test_feedback_projects():
    feedback = FixedRandomFeedback(5, 4, seed=3)
    B = feedback.B
    assert B.shape == (5, 4)
    y = draw(1, 6, 2, 5)
    for got in (feedback.project(y), feedback(y), brainstate.transform.for_loop(feedback.project, y)):
        assert relative_error(got, np.asarray(y) @ np.asarray(B)) < TOLERANCE
    assert relative_error(feedback.project(y[0, 0]), y[0, 0] @ B) < TOLERANCE
    got = feedback.project(y * u.mV)
    assert got.unit == u.mV and relative_error(got.mantissa, y @ B) < TOLERANCE


def test_feedback_numbers():
    B = np.asarray(FixedRandomFeedback(100, 400, seed=0).B)
    assert abs(B.std() * 10 - 1) < 0.02 and abs(B.mean() * 10) < 0.02
    same = FixedRandomFeedback(5, 4, seed=3).B
    for other in (
        dict(key=jax.random.key(3)),
        dict(seed=jax.random.key(3)),
        dict(key=jax.random.PRNGKey(3)),
        dict(seed=np.int32(3)),
    ):
        assert relative_error(FixedRandomFeedback(5, 4, **other).B, same) == 0.0
    assert relative_error(FixedRandomFeedback(5, 4, 4).B, same) > 0.1


def test_feedback_is_frozen():
    feedback = FixedRandomFeedback(5, 4, 0)
    before = feedback.B
    assert isinstance(feedback.B, jax.Array)
    assert not feedback.states()
    feedback.reset_state()
    feedback.reset_state(batch_size=3)
    brainstate.nn.init_all_states(feedback, batch_size=3)
    brainstate.nn.reset_all_states(feedback, batch_size=3)
    assert feedback.B is before


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_feedback_dtypes(dtype):
    feedback = FixedRandomFeedback(5, 4, 0)
    assert feedback.project(jnp.ones((2, 5), dtype)).dtype == dtype
    assert FixedRandomFeedback(5, 4, 0, dtype=dtype).B.dtype == dtype
    labels = jax.nn.one_hot(jnp.array([1, 4]), 5, dtype=jnp.int32)
    assert relative_error(feedback.project(labels), feedback.B[jnp.array([1, 4])]) == 0.0


def test_feedback_errors():
    for args in [(0, 4, 0), (5, -1, 0), (2.0, 4, 0), (True, 4, 0), (5, 4), (5, 4, "a"), (5, 4, 0.5), (5, 4, True), (5, 4, jax.random.split(jax.random.key(0)))]:  # fmt: skip
        with pytest.raises(OptionError):
            FixedRandomFeedback(*args)
    with pytest.raises(OptionError, match="one of them only"):
        FixedRandomFeedback(5, 4, 0, key=jax.random.key(0))
    with pytest.raises(OptionError, match="dtype"):
        FixedRandomFeedback(5, 4, 0, dtype=jnp.int32)
    for y in (jnp.ones((2, 4)), jnp.ones(())):
        with pytest.raises(InputError, match=r"\(\.\.\., 5\)"):
            FixedRandomFeedback(5, 4, 0).project(y)


# --- readout -------------------------------------------------------------------------------------------------------------

DT = 1.0 * u.ms
W = 0.5 * draw(7, 3, 4)
YS = draw(8, 6, 2, 4)


def squared(out, target):
    return jnp.mean((out - target) ** 2)


def readout(batch=2, tau=5 * u.ms, **options):
    model = LeakyRateReadout(3, 4, tau=tau, w_init=W, **options)
    model.init_state(batch)
    return model


def outputs(w, decay, xs, r=0.0):
    """The readout's equation, written out."""
    out = []
    for x in xs:
        r = decay * r + x @ w
        out.append(r)
    return jnp.stack(out)


@pytest.mark.parametrize("tau", [5 * u.ms, 5e-3 * u.second, np.array([1.0, 5.0, 20.0, 100.0]) * u.ms])
@pytest.mark.parametrize("run", ["calls", "for_loop"])
def test_readout_equation(tau, run):
    model = readout(tau=tau)
    with brainstate.environ.context(dt=DT):
        got = (
            jnp.stack([model(x) for x in XS]) if run == "calls" else brainstate.transform.for_loop(model, XS)
        )
    decay = np.exp(-1.0 / np.asarray(tau.to_decimal(u.ms)))
    assert relative_error(got, outputs(W, decay, XS)) < TOLERANCE
    assert relative_error(model.r.value, got[-1]) == 0.0


def test_readout_states():
    model = LeakyRateReadout((3,), (4,))
    assert type(model.weight) is brainstate.ParamState and model.weight.value.shape == (3, 4)
    assert isinstance(model.weight.value, jax.Array)
    assert model.tau == 5 * u.ms
    for batch, shape in [(None, (4,)), (2, (2, 4))]:
        model.init_state(batch)
        assert isinstance(model.r, brainstate.HiddenState)
        assert model.r.value.shape == shape and not model.r.value.any()
        with brainstate.environ.context(dt=DT):
            model(jnp.ones((*shape[:-1], 3)))
        assert model.r.value.any()
        model.reset_state(batch)
        assert model.r.value.shape == shape and not model.r.value.any()
    model.reset_state(batch_size=6)
    assert model.r.value.shape == (6, 4)
    brainstate.nn.init_all_states(model, batch_size=3)
    assert model.r.value.shape == (3, 4)
    for start in (0.5, jnp.full(4, 0.5), brainstate.nn.init.Constant(0.5)):
        assert relative_error(readout(r_init=start).r.value, jnp.full((2, 4), 0.5)) == 0.0
    assert float(jnp.abs(model.weight.value).max()) > 0


@pytest.mark.parametrize("tau", [5 * u.ms, np.array([1.0, 5.0, 20.0, 100.0]) * u.ms])
def test_compiled_readout_is_backpropagation_through_time(tau):
    model = readout(tau=tau, r_init=0.3)
    with brainstate.environ.context(dt=DT):
        step = etcompile.compile(model, XS[0], algo="d_rtrl")
    assert step.exact
    losses, grads = step.scan_value_and_grad(squared)(XS, YS)
    decay = np.exp(-1.0 / np.asarray(tau.to_decimal(u.ms)))

    def total(w):
        each = jax.vmap(squared)(outputs(w, decay, XS, 0.3), YS)
        return each.sum(), each

    wanted, wanted_losses = jax.grad(total, has_aux=True)(W)
    assert set(grads) == {"weight"}
    assert float(jnp.abs(wanted).min()) > 1e-4
    assert relative_error(grads["weight"], wanted) < TOLERANCE
    assert relative_error(losses, wanted_losses) < TOLERANCE


def test_compiled_readout_is_jax_grad_at_one_step():
    with brainstate.environ.context(dt=DT):
        step = etcompile.compile(readout(), XS[0], batch_size=2)
    loss, grads = step.value_and_grad(squared)(XS[0], YS[0])
    wanted = jax.value_and_grad(lambda w: squared(XS[0] @ w, YS[0]))(W)
    assert relative_error((loss, grads["weight"]), wanted) < TOLERANCE


@pytest.mark.parametrize("batch", [None, 5])
def test_compiled_readout_at_another_batch_size(batch):
    model = readout(batch)
    xs, ys = (XS[:, 0], YS[:, 0]) if batch is None else (draw(3, 6, 5, 3), draw(4, 6, 5, 4))
    with brainstate.environ.context(dt=DT):
        step = etcompile.compile(model, xs[0])
        if batch:
            step.reset(batch_size=2)
            step.scan(XS)
            step.reset(batch_size=batch)
    _, grads = step.scan_value_and_grad(squared)(xs, ys)
    wanted = jax.grad(lambda w: jax.vmap(squared)(outputs(w, np.exp(-0.2), xs), ys).sum())(W)
    assert relative_error(grads["weight"], wanted) < TOLERANCE


def test_readout_as_the_last_layer():
    """Behind a leaky layer with an element-wise recurrence the whole is not local: credit of the first layer through
    the readout's memory is cut. The readout's own weight is exact all the same."""

    class Net(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = brainstate.ParamState(draw(5, 3, 3))
            self.readout = LeakyRateReadout(3, 4, w_init=W)

        def init_state(self, batch_size=None, **kwargs):
            self.h = brainstate.HiddenState(jnp.zeros((batch_size, 3)))

        def update(self, x):
            self.h.value = jnp.tanh(0.7 * self.h.value + x @ self.w.value)
            return self.readout(self.h.value)

    with brainstate.environ.context(dt=DT):
        step = etcompile.compile(Net(), XS[0], batch_size=2)
    _, grads = step.scan_value_and_grad(squared)(XS, YS)

    def total(w, weight):
        h, hs = 0.0, []
        for x in XS:
            h = jnp.tanh(0.7 * h + x @ w)
            hs.append(h)
        return jax.vmap(squared)(outputs(weight, np.exp(-0.2), hs), YS).sum()

    wanted_w, wanted = jax.grad(total, (0, 1))(draw(5, 3, 3), W)
    assert not step.exact
    assert relative_error(grads["readout.weight"], wanted) < TOLERANCE
    assert relative_error(grads["w"], wanted_w) > 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_readout_dtypes(dtype):
    model = LeakyRateReadout(3, 4, w_init=W.astype(dtype))
    model.init_state(2)
    with brainstate.environ.context(dt=jnp.asarray(1.0) * u.ms):
        out = brainstate.transform.for_loop(model, XS.astype(dtype))
        assert out.dtype == model.r.value.dtype == dtype
        assert model(XS[0] > 0).dtype == dtype
        step = etcompile.compile(model, XS[0].astype(dtype), batch_size=2)
    _, grads = step.scan_value_and_grad(squared)(XS.astype(dtype), YS.astype(dtype))
    assert grads["weight"].dtype == dtype


def test_readout_with_units():
    model = LeakyRateReadout(3, 4, w_init=W * u.mV)
    model.init_state(2)
    assert model.r.value.unit == u.mV
    with brainstate.environ.context(dt=DT):
        got = brainstate.transform.for_loop(model, XS)
    assert got.unit == u.mV
    assert relative_error(got.mantissa, outputs(W, np.exp(-0.2), XS)) < TOLERANCE


def test_readout_errors():
    for args in [(0, 4), (3, -1), (3.5, 4), ("a", 4), ((), 4), ((2, 3), (4,))]:
        with pytest.raises(OptionError):
            LeakyRateReadout(*args)
    for tau in (5.0, 5 * u.mV, 0 * u.ms, -5 * u.ms, np.ones(3) * u.ms):
        with pytest.raises(OptionError, match="tau"):
            LeakyRateReadout(3, 4, tau=tau)
    for wrong in (dict(w_init=jnp.ones((3, 5))), dict(w_init="zeros")):
        with pytest.raises(OptionError, match="w_init"):
            LeakyRateReadout(3, 4, **wrong)
    model = readout()
    with pytest.raises(OptionError, match="not set"):
        model(XS[0])
    with brainstate.environ.context(dt=0.1), pytest.raises(OptionError, match="has none"):
        model(XS[0])
    with pytest.raises(OptionError, match="not set"):
        etcompile.compile(readout(), XS[0])


# --- inside compiled models ------------------------------------------------------------------------------------------------


def test_parts_inside_a_compiled_model():
    """A kappa filter is a hidden state like any other; feedback that nothing trained reaches is left alone."""

    class Net(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = brainstate.ParamState(W)
            self.smooth = KappaFilter((2, 4), 0.6)
            self.seen = PresynapticTrace((2, 3), 0.5)
            self.feedback = FixedRandomFeedback(3, 4, 0)

        def update(self, x):
            return self.smooth(x @ self.w.value) + self.feedback(self.seen(x))

    model = Net()
    B = model.feedback.B
    step = etcompile.compile(model, XS[0], batch_size=2)
    assert step.exact
    _, grads = step.scan_value_and_grad(squared)(XS, YS)
    seen = jnp.asarray(leaked(XS, 0.5)) @ B

    def total(w):
        return jax.vmap(squared)(outputs(0.4 * w, 0.6, XS) + seen, YS).sum()

    assert relative_error(grads["w"], jax.grad(total)(W)) < TOLERANCE
    assert relative_error(model.feedback.B, B) == 0.0
    step.reset(batch_size=5)
    assert step(jnp.ones((5, 3))).shape == (5, 4)
    assert relative_error(model.feedback.B, B) == 0.0


def test_parts_survive_splitting_into_graph_and_states(maker):
    part = maker[0]({"w": XS[0]})
    part.update({"w": XS[0]})
    graph, states = brainstate.graph.treefy_split(part)
    again = brainstate.graph.treefy_merge(graph, states)
    assert relative_error(again.update({"w": XS[1]}), part.update({"w": XS[1]})) == 0.0


@pytest.mark.parametrize("how", ["state", "param"])
def test_a_time_constant_of_a_readout_can_be_trained(how):
    tau = np.array([5.0, 9.0]) * u.ms
    given = brainstate.ParamState(tau) if how == "state" else brainstate.nn.Param(tau)
    xs, ys = np.random.default_rng(0).normal(size=(2, 4, 3, 3))[..., :], np.ones((4, 3, 2))

    def square(out, y):
        return jnp.sum((out - y) ** 2)

    with brainstate.environ.context(dt=1.0 * u.ms):
        layer = LeakyRateReadout(3, 2, tau=given)
        step = etcompile.compile(layer, xs[0, 0], batch_size=3)
        _, found = step.scan_value_and_grad(square, chunk=3)(xs[0], ys)
    weight = layer.weight.value

    def whole(tau):
        r, total = jnp.zeros((3, 2)), 0.0
        for x, y in zip(xs[0], ys, strict=True):
            r = jnp.exp(-1.0 / tau) * r + x @ weight
            total += square(r, y)
        return total

    (name,) = [path for path in found if path.startswith("tau")]
    wanted = jax.grad(whole)(jnp.array([5.0, 9.0]))
    assert step.exact
    assert relative_error(u.get_mantissa(found[name]), wanted) < 1e-10
