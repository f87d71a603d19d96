"""Losses: what they read of the model and outside of it, aux values, masks, units; and the drivers that take them."""

from __future__ import annotations

import warnings

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import saiunit as u
from numpy_gradients import grad
from oracles import relative_error

import etcompile
from etcompile.errors import InputError, OptionError

pytestmark = pytest.mark.usefixtures("by_numpy")

T, B = 5, 2


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


XS, YS = draw(0, T, B, 3), draw(1, T, B, 2)
PARAMS = {"w": draw(2, 3, 4), "v": 0.5 * draw(3, 4), "r": draw(4, 4, 2)}


class Net(brainstate.nn.Module):
    """An exact model: an element-wise recurrence and a readout."""

    def __init__(self):
        super().__init__()
        self.w, self.v, self.r = (brainstate.ParamState(PARAMS[k]) for k in "wvr")
        self.h = brainstate.HiddenState(jnp.zeros((B, 4)))

    def update(self, x):
        self.h.value = jnp.tanh(self.h.value * self.v.value + x @ self.w.value)
        return self.h.value @ self.r.value


def plain(params, loss, xs=XS, ys=YS, carried=0.0):
    """Sum of losses and the losses by backpropagation; ``loss(out, y, h, params, carried) -> (loss, carried)``."""

    def body(loop, item):
        h, carried = loop
        x, y = item
        h = jnp.tanh(h * params["v"] + x @ params["w"])
        value, carried = loss(h @ params["r"], y, h, params, carried)
        return (h, carried), value

    losses = jax.lax.scan(body, (jnp.zeros((B, 4)), carried), (xs, ys))[1]
    return losses.sum(), losses


def backpropagated(*arguments):
    """Gradients of :func:`plain`, and its losses."""
    return grad(plain, PARAMS, *arguments, has_aux=True)


def square(out, y):
    return jnp.mean((out - y) ** 2)


def same(found, expected):
    for key in expected:
        assert relative_error(found[key], expected[key]) < 1e-10, key


def penalised(net, count):
    def loss(out, y):
        count.value = count.value + 1
        penalty = jnp.sum(net.h.value**2) + 0.1 * jnp.sum(net.w.value**2)
        return count.value * square(out, y) + penalty

    return loss


def penalty_oracle(out, y, h, params, count):
    count = count + 1
    return count * square(out, y) + jnp.sum(h**2) + 0.1 * jnp.sum(params["w"] ** 2), count


@pytest.mark.parametrize(
    "how", [{"chunk": 1}, {"chunk": 2}, {"chunk": T}, {"chunk": 2, "progress": True}, "bptt", "steps", "jit"]
)
def test_a_loss_reads_states_weights_and_a_count(how):
    net, count = Net(), brainstate.ShortTermState(jnp.zeros(()))
    loss = penalised(net, count)
    step = etcompile.compile(net, XS[0], algo="bptt" if how == "bptt" else "d_rtrl")
    expected, oracle = backpropagated(penalty_oracle)
    if how == "steps":
        found = [step.value_and_grad(loss)(x, y) for x, y in zip(XS, YS, strict=True)]
        losses = jnp.stack([value for value, _ in found])
        grads = jax.tree.map(lambda *g: sum(g), *[g for _, g in found])
    elif how == "jit":
        losses, grads = brainstate.transform.jit(lambda x, y: step.scan_value_and_grad(loss)(x, y))(XS, YS)
    else:
        how = {} if how == "bptt" else dict(how)
        progress = how.pop("progress", False)
        losses, grads = step.scan_value_and_grad(loss, **how)(XS, YS, progress=progress)
    assert relative_error(losses, oracle) < 1e-12
    same(grads, expected)
    assert count.value == T


def test_learn_sees_states_weights_and_a_count_at_every_step():
    net, count = Net(), brainstate.ShortTermState(jnp.zeros(()))
    loss = penalised(net, count)
    learner = etcompile.compile(net, XS[0]).learn(loss, optax.sgd(0.01))
    losses = jnp.concatenate([learner(XS[:2], YS[:2]), learner(XS[2:], YS[2:])])
    other, counts = Net(), brainstate.ShortTermState(jnp.zeros(()))
    step, again = etcompile.compile(other, XS[0]), penalised(other, counts)
    for k in range(T):
        value, grads = step.value_and_grad(again)(XS[k], YS[k])
        assert relative_error(losses[k], value) < 1e-10
        for path, g in grads.items():
            step.param_states[path].value = step.param_states[path].value - 0.01 * g
    same(
        {p: s.value for p, s in net.states(brainstate.ParamState).items()},
        {p: s.value for p, s in other.states(brainstate.ParamState).items()},
    )


@pytest.mark.parametrize("algo", ["rtrl", "ostl"])
def test_rules_that_follow_all_paths_agree_at_the_first_step(algo):
    net, count = Net(), brainstate.ShortTermState(jnp.zeros(()))
    step = etcompile.compile(net, XS[0], algo=algo)
    value, grads = step.value_and_grad(penalised(net, count))(XS[0], YS[0])
    expected, oracle = backpropagated(penalty_oracle, XS[:1], YS[:1])
    assert relative_error(value, oracle[0]) < 1e-12
    same(grads, expected)


def test_a_loss_reads_the_state_of_a_plain_function():
    def fn(params, state, x):
        h = jnp.tanh(state["h"] * params["v"] + x @ params["w"])
        return {"h": h}, h @ params["r"]

    model = etcompile.from_function(fn, PARAMS, {"h": jnp.zeros((B, 4))})
    step = etcompile.compile(model, XS[0])

    def loss(out, y):
        return square(out, y) + jnp.sum(model.state["h"] ** 2) + 0.1 * jnp.sum(model.params["w"] ** 2)

    _, grads = step.scan_value_and_grad(loss, chunk=3)(XS, YS)

    def oracle(out, y, h, params, carried):
        return square(out, y) + jnp.sum(h**2) + 0.1 * jnp.sum(params["w"] ** 2), carried

    same(grads, backpropagated(oracle)[0])


@pytest.mark.parametrize("algo", ["rflo", "three_factor"])
def test_a_rule_that_does_not_hear_of_states_says_so(algo):
    net = Net()
    step = etcompile.compile(net, XS[0], algo=algo)
    given = {"modulator": 1.0} if algo == "three_factor" else {}
    with pytest.warns(etcompile.EtcompileWarning, match=f"reads h, and {algo}.*within the step only"):
        step.scan_value_and_grad(lambda out, y: square(out, y) + jnp.sum(net.h.value**2))(XS, YS, **given)


def averaging(net, keep=lambda h: h, through_another=False, read=True):
    """A penalty on a running mean of the state, which the loss keeps."""
    mean, other = (brainstate.ShortTermState(jnp.zeros((B, 4))) for _ in range(2))

    def loss(out, y):
        if through_another:
            other.value = 0.5 * other.value + mean.value
        mean.value = 0.9 * mean.value + 0.1 * keep(net.h.value)
        used = other if through_another else mean
        return square(out, y) + (jnp.sum((used.value - 0.1) ** 2) if read else 0.0)

    return loss


CREDIT_THAT_A_LOSS_KEEPS = {
    "read": ({}, True),
    "through another": ({"through_another": True}, True),
    "stopped": ({"keep": jax.lax.stop_gradient}, False),
    "not read": ({"read": False}, False),
    "a count": ({"keep": lambda h: jnp.sum(h > 0, axis=-1, keepdims=True)}, False),
}


@pytest.mark.parametrize(
    ("how", "said"), CREDIT_THAT_A_LOSS_KEEPS.values(), ids=list(CREDIT_THAT_A_LOSS_KEEPS)
)
def test_credit_through_what_a_loss_keeps_of_the_model_ends_with_a_warning(how, said):
    net, other = Net(), Net()
    step = etcompile.compile(net, XS[0])
    whole = etcompile.compile(other, XS[0], algo="bptt")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        _, grads = step.scan_value_and_grad(averaging(net, **how))(XS, YS)
    assert any("credit ends there" in str(w.message) for w in found) == said
    with warnings.catch_warnings():
        warnings.simplefilter("error", etcompile.EtcompileWarning)
        _, expected = whole.scan_value_and_grad(averaging(other, **how))(XS, YS)
    worst = max(relative_error(grads[k], expected[k]) for k in expected)
    assert (worst > 1e-4) == said
    if not said:
        same(grads, expected)


def test_a_loss_that_draws_goes_on_with_the_random_numbers():
    step = etcompile.compile(Net(), XS[0])
    noisy = lambda out, y: jnp.mean((out - y + brainstate.random.normal(size=(B, 2))) ** 2)  # noqa: E731
    found = []
    for chunk in (1, 2, T):
        brainstate.random.seed(3)
        step.reset()
        losses, _ = step.scan_value_and_grad(noisy, chunk=chunk)(XS, YS)
        found.append(losses)
    brainstate.random.seed(3)
    net = Net()
    assert (
        relative_error(found[0], jnp.stack([noisy(net(x), y) for x, y in zip(XS, YS, strict=True)])) < 1e-12
    )
    assert relative_error(found[1], found[0]) < 1e-12
    assert relative_error(found[2], found[0]) < 1e-12


class Weights:
    """Something of the user's that a loss reads."""

    scale = 1.0

    def __init__(self):
        self.table = {"a": [1.0]}
        self.array = np.ones(2)

    def total(self):
        return self.scale * self.table["a"][0]


SETTINGS = {"factor": 1.0}


def test_a_function_made_anew_in_a_loop_is_traced_once():
    step = etcompile.compile(Net(), XS[0])
    weights, scale = Weights(), 2.0

    def made(run):
        def loss(out, y):
            return square(out, y) * weights.scale * run.factor * scale

        return loss

    same_run, losses = Weights(), []
    same_run.factor = 3.0
    for run in (same_run, same_run, same_run):
        step.reset()
        losses.append(step.scan_value_and_grad(made(run))(XS, YS)[0])
    traced = step.executor.compilations.now.losses
    assert len(traced) == 1
    assert relative_error(losses[2], losses[0]) == 0
    other = Weights()  # what an object holds cannot all be compared: another one is another loss
    other.factor = 5.0
    step.reset()
    found = step.scan_value_and_grad(made(other))(XS, YS)[0]
    assert len(traced) == 2
    assert relative_error(found, losses[0] / 3 * 5) < 1e-12


def test_two_functions_of_the_same_code_are_told_apart_by_what_they_close_over():
    step = etcompile.compile(Net(), XS[0])
    halves, thirds = (lambda v, by=by: v / by for by in (2, 3))

    def made(*fns):
        first, second, third = fns
        return lambda out, y: first(square(out, y)) + 5 * second(square(out, y)) + 7 * third(square(out, y))

    def total(*fns):
        step.reset()
        return step.scan_value_and_grad(made(*fns))(XS, YS)[0]

    plain = total(lambda v: v, lambda v: v, lambda v: v) / 13
    for fns, factor in {
        (halves, thirds, halves): 1 / 2 + 5 / 3 + 7 / 2,
        (halves, halves, thirds): 3 + 7 / 3,
    }.items():
        assert relative_error(total(*fns), factor * plain) < 1e-12


def test_what_a_loss_closes_over_is_read_at_every_call():
    step, weights, beta = etcompile.compile(Net(), XS[0]), Weights(), 1.0

    def loss(out, y):
        return (
            beta
            * SETTINGS["factor"]
            * weights.total()
            * jnp.mean(jnp.asarray(weights.array))
            * square(out, y)
        )

    gradients = step.scan_value_and_grad(loss)
    learner = step.learn(loss, optax.sgd(0.0))

    def check(factor):
        for run in (lambda: gradients(XS, YS)[0], lambda: learner(XS, YS)):
            step.reset()
            assert relative_error(run(), factor * first) < 1e-12

    first = gradients(XS, YS)[0]
    beta = jnp.asarray(2.0)
    check(2)
    SETTINGS["factor"] = 3.0
    check(6)
    weights.table["a"][0] = 0.5
    check(3)
    weights.scale = 2
    check(6)
    weights.array[:] = 2
    check(12)
    SETTINGS["factor"] = 1.0


def test_a_loss_that_writes_the_model_or_reads_traces_is_refused():
    net = Net()
    step = etcompile.compile(net, XS[0])

    def writes(out, y):
        net.h.value = jnp.zeros((B, 4))
        return square(out, y)

    with pytest.raises(InputError, match="the loss writes h of Net"):
        step.value_and_grad(writes)(XS[0], YS[0])
    with pytest.raises(InputError, match="reads the traces"):
        step.value_and_grad(lambda out, y: square(out, y) + len(step.traces_state.value))(XS[0], YS[0])
    assert (net.h.value == 0).all()


def test_aux_values_come_back_step_by_step():
    net = Net()
    step = etcompile.compile(net, XS[0])
    with_aux = lambda out, y: (square(out, y), {"rate": jnp.mean(net.h.value), "out": out})  # noqa: E731
    (value, aux), _ = step.value_and_grad(with_aux, has_aux=True)(XS[0], YS[0])
    assert value.shape == () and relative_error(aux["rate"], jnp.mean(net.h.value)) < 1e-12
    for chunk in (1, 2):
        step.reset()
        (losses, aux), _ = step.scan_value_and_grad(with_aux, chunk=chunk, has_aux=True)(XS, YS)
        assert losses.shape == (T,) and aux["out"].shape == YS.shape
        step.reset()
        assert relative_error(aux["out"], step.scan(XS)) < 1e-12
    with pytest.raises(InputError, match="must return two values"):
        step.value_and_grad(square, has_aux=True)(XS[0], YS[0])


@pytest.mark.parametrize(("algo", "chunk"), [("d_rtrl", 1), ("d_rtrl", 2), ("bptt", None)])
def test_a_masked_step_has_no_loss_and_no_gradient_whatever_its_target(algo, chunk):
    mask = jnp.asarray([1.0, 0.0, 0.5, 1.0, 0.0])
    step = etcompile.compile(Net(), XS[0], algo=algo)
    padded = jnp.where(mask[:, None, None] == 0, jnp.nan, YS)
    gradients = step.scan_value_and_grad(square, chunk=chunk)
    losses, grads = gradients(XS, padded, mask=mask)
    weighed = lambda out, item, h, p, c: (item[1] * square(out, item[0]), c)  # noqa: E731
    expected, oracle = backpropagated(weighed, XS, (YS, mask))
    assert relative_error(losses, oracle) < 1e-12
    same(grads, expected)
    step.reset()
    _, mean = step.scan_value_and_grad(square, chunk=chunk, reduction="mean")(XS, padded, mask=mask)
    same(mean, {k: g / 2.5 for k, g in expected.items()})
    with pytest.raises(InputError, match="mask does not fit"):
        gradients(XS, YS, mask=mask[:-1])


def test_a_mask_of_examples_sums_what_each_gives():
    mask = jnp.asarray(np.random.default_rng(5).integers(0, 2, (T, B)), bool)
    each = lambda out, y: jnp.sum((out - y) ** 2, axis=-1)  # noqa: E731
    step = etcompile.compile(Net(), XS[0])
    summed = lambda out, item, h, p, c: (jnp.sum(each(out, item[0]) * item[1]), c)  # noqa: E731
    expected, _ = backpropagated(summed, XS, (YS, mask))
    same(step.scan_value_and_grad(each)(XS, YS, mask=mask)[1], expected)
    with pytest.raises(InputError, match="one number per example"):
        step.scan_value_and_grad(square)(XS, YS, mask=mask)
    with pytest.raises(OptionError, match="reduction must be"):
        step.scan_value_and_grad(each, reduction="none")


def test_a_loss_without_unit_is_a_number_and_another_is_refused():
    u = pytest.importorskip("saiunit")
    step = etcompile.compile(Net(), XS[0])
    volts = lambda out, y: jnp.mean((out - y) ** 2) * u.mV  # noqa: E731
    with pytest.raises(InputError, match="divide by the unit"):
        step.value_and_grad(volts)(XS[0], YS[0])
    value, _ = step.value_and_grad(lambda out, y: volts(out, y) / u.volt)(XS[0], YS[0])
    step.reset()
    assert relative_error(value, 1e-3 * step.value_and_grad(square)(XS[0], YS[0])[0]) < 1e-12


def test_targets_may_be_the_same_at_every_step_or_many():
    step = etcompile.compile(Net(), XS[0])
    every = jnp.broadcast_to(YS[0], YS.shape)
    expected = step.scan_value_and_grad(square)(XS, every)
    one, many = etcompile.SingleStepData, etcompile.MultiStepData
    for gradients, args in [
        (step.scan_value_and_grad(square), (XS, one(YS[0]))),
        (step.scan_value_and_grad(square), (many(XS), one(YS[0]))),
        (step.value_and_grad(square), (many(XS), YS[0])),
        (step.value_and_grad(square), (many(XS), one(YS[0]))),
    ]:
        step.reset()
        losses, grads = gradients(*args)
        assert relative_error(losses, expected[0]) < 1e-12
        same(grads, expected[1])
    step.reset()
    assert step.learn(square, optax.sgd(0.0))(XS, one(YS[0])).shape == (T,)
    assert step.value_and_grad(square)(one(XS[0]), one(YS[0]))[0].shape == ()


def test_learn_returns_outputs_and_aux_and_tells_a_callback():
    net, seen = Net(), []
    step = etcompile.compile(net, XS[0])
    with_aux = lambda out, y: (square(out, y), jnp.mean(net.h.value))  # noqa: E731
    learner = step.learn(with_aux, optax.sgd(0.0), has_aux=True, outputs=True)
    losses, outputs, rates = learner(XS, YS, callback=lambda steps, losses: seen.append((steps, losses)))
    step.reset()
    assert relative_error(outputs, step.scan(XS)) < 1e-12 and rates.shape == (T,)
    assert seen[-1][0] == T and relative_error(jnp.concatenate([v for _, v in seen]), losses) < 1e-12


def test_updates_every_k_steps_are_those_of_gradients_summed_by_hand():
    net, other = Net(), Net()
    learner = etcompile.compile(net, XS[0]).learn(square, optax.sgd(0.1), update_every=3)
    parts = [
        learner(XS[:1], YS[:1]),
        learner(XS[1:], YS[1:]),
        learner(XS, YS),
    ]  # 1, then 2 + 2, then 1 + 3 + 1
    step, total, losses = etcompile.compile(other, XS[0]), None, []
    for k in range(2 * T):
        value, grads = step.value_and_grad(square)(XS[k % T], YS[k % T])
        losses.append(value)
        total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        if k % 3 == 2:
            for path, g in total.items():
                step.param_states[path].value = step.param_states[path].value - 0.1 * g
            total = None
    assert relative_error(jnp.concatenate(parts), jnp.stack(losses)) < 1e-10
    for path in "wvr":
        assert relative_error(getattr(net, path).value, getattr(other, path).value) < 1e-10


def test_an_optimiser_sees_the_tree_that_the_parameters_are():
    def fn(params, h, x):
        h = jnp.tanh(h * params["cell"]["v"] + x @ params["cell"]["w"])
        return h, h @ params["r"]

    def step():
        params = {"cell": {k: PARAMS[k] for k in "wv"}, "r": PARAMS["r"]}
        return etcompile.compile(etcompile.from_function(fn, params, jnp.zeros((B, 4))), XS[0])

    labels = {"cell": {"w": "learns", "v": "stays"}, "r": "learns"}
    kinds = {"learns": optax.sgd(0.1), "stays": optax.set_to_zero()}
    one, other = step(), step()
    one.learn(square, optax.multi_transform(kinds, labels))(XS, YS)
    for x, y in zip(XS, YS, strict=True):
        _, g = other.value_and_grad(square)(x, y)
        g["cell"]["v"] = jnp.zeros(4)
        other.params = jax.tree.map(lambda p, g: p - 0.1 * g, other.params, g)
    assert relative_error(one.params, other.params) < 1e-10


def test_an_optimiser_registered_under_other_keys_learns():
    optim = pytest.importorskip("braintools.optim")
    net, other = Net(), Net()
    registered = optim.SGD(0.1)
    registered.register_trainable_weights(net.states(brainstate.ParamState))
    etcompile.compile(net, XS[0]).learn(square, registered)(XS, YS)
    etcompile.compile(other, XS[0]).learn(square, optax.sgd(0.1))(XS, YS)
    for path in "wvr":
        assert relative_error(getattr(net, path).value, getattr(other, path).value) < 1e-10
    with pytest.raises(OptionError, match="does not train"):
        etcompile.compile(Net(), XS[0]).learn(square, registered)


def test_learn_descends_by_complex_parameters():
    def fn(params, state, x):
        h = state["h"] * params["a"] + (x @ params["w"])
        return {"h": h}, h.real

    params = {"a": jnp.asarray([0.5 + 0.3j]), "w": (draw(6, 3, 1) + 1j * draw(7, 3, 1))}
    model = etcompile.from_function(fn, params, {"h": jnp.zeros((B, 1), complex)})
    step = etcompile.compile(model, XS[0])
    learner = step.learn(lambda out, y: jnp.mean((out - y[:, :1]) ** 2), optax.sgd(0.05))
    losses = []
    for _ in range(30):
        step.reset()
        losses.append(float(jnp.mean(learner(XS, YS))))
    assert losses[-1] < 0.7 * losses[0]


class Measured(Net):
    """The same model with weights and a state in millivolts."""

    def __init__(self):
        super().__init__()
        self.w, self.h = (
            brainstate.ParamState(PARAMS["w"] * u.mV),
            brainstate.HiddenState(self.h.value * u.mV),
        )

    def update(self, x):
        v = self.h.value * self.v.value + x @ self.w.value
        self.h.value = jnp.tanh(v / u.mV) * u.mV
        return self.h.value / u.mV @ self.r.value


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adam(0.1)], ids=["sgd", "adam"])
def test_weights_with_units_learn_as_their_numbers(optimizer):
    steps = [etcompile.compile(model(), XS[0]) for model in (Net, Measured)]
    assert relative_error(*(s.learn(square, optimizer)(XS, YS) for s in steps)) < 1e-10
    numbers, measured = (s.params for s in steps)
    assert relative_error(measured["w"].to_decimal(u.mV), numbers["w"]) < 1e-10


@pytest.mark.parametrize("constant", [3.0, np.float64(3.0), jnp.asarray(3.0)], ids=["python", "numpy", "jax"])
def test_a_constant_is_a_loss(constant):
    step = etcompile.compile(Net(), XS[0])
    (value, aux), gradients = step.value_and_grad(lambda out, y: (constant, 2), has_aux=True)(XS[0], YS[0])
    assert value == 3 and aux == 2 and not any(map(np.any, jax.tree.leaves(gradients)))
    losses, gradients = step.scan_value_and_grad(lambda out, y: constant, chunk=2)(XS, YS)
    assert np.all(losses == 3) and losses.shape == (T,) and not any(map(np.any, jax.tree.leaves(gradients)))
