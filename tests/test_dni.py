"""Synthetic gradients: windows that end in a prediction, and what teaches it, against plain autodiff."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import relative_error

import etcompile

pytestmark = pytest.mark.usefixtures("by_numpy")

TOLERANCE = 1e-10
T, B, C = 8, 2, 3  # windows of 3, 3 and 2 steps
STARTS = (0, 3, 6)
NOTHING = optax.sgd(0.0)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


XS, YS = draw(0, T, B, 3), draw(1, T, B, 2)


def squared(out, target):
    return jnp.mean((out - target) ** 2)


# --- Models, each also as a plain function --------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """A model for the compiler, and the same as ``fn(params, state, x) -> (state, out)`` with its values."""

    model: Any
    fn: Callable
    params: Any
    state: dict[str, Any]
    groups: tuple[tuple[str, ...], ...]

    def run(self, params, state, xs, ys):
        """Summed loss and last state."""

        def body(state, item):
            state, out = self.fn(params, state, item[0])
            return state, squared(out, item[1])

        state, losses = jax.lax.scan(body, state, (xs, ys))
        return losses.sum(), state


def function(fn, params, state, groups):
    return Case(etcompile.from_function(fn, params, state), fn, params, state, groups)


def rate(batch=B):
    """One layer of leaky units with recurrent weights."""

    def fn(p, s, x):
        h = 0.8 * s["h"] + jnp.tanh(x @ p["u"] + s["h"] @ p["w"])
        return {"h": h}, h @ p["v"]

    params = {"u": 0.5 * draw(2, 3, 4), "w": 0.5 * draw(3, 4, 4), "v": draw(4, 4, 2)}
    return function(fn, params, {"h": 0.3 * draw(5, *(() if batch is None else (batch,)), 4)}, (("h",),))


def two_layers():
    """Two groups; the second has two states per unit."""

    def fn(p, s, x):
        h = 0.8 * s["h"] + jnp.tanh(x @ p["u"] + s["h"] @ p["w"])
        a = 0.9 * s["a"] + 0.3 * s["v"]
        v = 0.7 * s["v"] + jnp.tanh(h @ p["z"]) - 0.2 * s["a"]
        return {"a": a, "h": h, "v": v}, v @ p["o"]

    params = {
        "u": 0.5 * draw(2, 3, 4),
        "w": 0.5 * draw(3, 4, 4),
        "z": draw(4, 4, 5),
        "o": draw(6, 5, 2),
    }
    state = {"a": 0.2 * draw(7, B, 5), "h": 0.3 * draw(5, B, 4), "v": 0.4 * draw(8, B, 5)}
    return function(fn, params, state, (("a", "v"), ("h",)))


def lstm():
    """Layers of brainstate as they are."""

    class Net(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.readout = brainstate.nn.LSTMCell(3, 4), brainstate.nn.Linear(4, 2)

        def update(self, x):
            return self.readout(self.cell(x))

    def fn(p, s, x):
        inner, out = p["cell.W.weight"], p["readout.weight"]
        u = jnp.concatenate([x, s["cell.h"]], 1) @ inner["weight"] + inner["bias"]
        i, g, f, o = jnp.split(u, 4, 1)
        c = jax.nn.sigmoid(f + 1) * s["cell.c"] + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return {"cell.c": c, "cell.h": h}, h @ out["weight"] + out["bias"]

    net = Net()
    brainstate.nn.init_all_states(net, batch_size=B)
    state = {"cell.c": 0.3 * draw(5, B, 4), "cell.h": 0.2 * draw(6, B, 4)}
    net.cell.c.value, net.cell.h.value = state["cell.c"], state["cell.h"]
    params = {"cell.W.weight": net.cell.W.weight.value, "readout.weight": net.readout.weight.value}
    return Case(net, fn, params, state, (("cell.c", "cell.h"),))


MODELS = {"rate": rate, "two_layers": two_layers, "lstm": lstm}


@pytest.fixture(params=MODELS)
def case(request):
    return MODELS[request.param]()


def compiled(case, algo="dni", **options):
    options = options or {"window": C}
    return etcompile.compile(case.model, XS[0], algo=algo, **options)


def states_at(case, times):
    """The states before some steps."""
    return jax.jit(lambda: [case.run(case.params, case.state, XS[:t], YS[:t])[1] for t in times])()


def zero_helper(step, **options):
    """Predictors that were taught, and still say zero."""
    helper = etcompile.SyntheticGradient(step, squared, **options)
    helper.fit(XS, YS, optimizer=NOTHING)
    return helper


# --- The gradient -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "stream"), [(None, False), (6, True)])
def test_predictors_of_zero_give_truncated_backpropagation(case, hidden, stream):
    plain = compiled(case, "bptt", window=C)
    wanted = plain.scan_value_and_grad(squared)(XS, YS)
    ended = plain.executor.live.states()
    plain.reset()
    step = compiled(case)
    got = zero_helper(step, hidden=hidden, stream=stream).scan_value_and_grad(squared)(XS, YS)
    assert relative_error(got, wanted) < TOLERANCE
    assert relative_error(step.executor.live.states(), ended) < TOLERANCE


@dataclasses.dataclass
class Oracle:
    """In the place of the predictors: looks up the states at hand among those of all windows' ends."""

    states: tuple[int, ...]
    ends: list[Any]
    credit: list[Any]

    def __call__(self, params, states):
        flat = jnp.stack([jnp.concatenate([v.ravel() for v in jax.tree.leaves(s)]) for s in self.ends])
        here = jnp.concatenate([v.ravel() for v in states])
        k = jnp.argmin(jnp.sum((flat - here) ** 2, 1))
        return [jnp.stack(v)[k] for v in zip(*map(jax.tree.leaves, self.credit), strict=True)]


def true_credit(case, times):
    """Derivatives of all later losses by the states before some steps."""

    @jax.jit
    def credit():
        return [
            jax.grad(lambda s, t=t: case.run(case.params, s, XS[t:], YS[t:])[0])(state)
            for t, state in zip(times, states_at(case, times), strict=True)
        ]

    return credit()


def test_the_true_credit_gives_backpropagation_through_the_whole_sequence(case):
    wanted = jax.jit(jax.grad(lambda p: case.run(p, case.state, XS, YS)[0]))(case.params)
    truncated = compiled(case, "bptt", window=C)
    _, short = truncated.scan_value_and_grad(squared)(XS, YS)
    truncated.reset()
    helper = zero_helper(compiled(case))
    ends = STARTS[1:]
    helper._predictors = Oracle(helper._predictors.states, states_at(case, ends), true_credit(case, ends))
    _, grads = helper.scan_value_and_grad(squared)(XS, YS)
    assert relative_error(grads, wanted) < TOLERANCE
    assert relative_error(short, wanted) > 0.01


def test_a_stream_in_two_calls_is_the_stream_in_one():
    case = rate()
    helpers = [etcompile.SyntheticGradient(compiled(case), squared, hidden=5, stream=True) for _ in range(2)]
    for helper in helpers:
        helper.fit(XS, YS, optimizer=optax.sgd(0.1), epochs=3)
    once = helpers[0].scan_value_and_grad(squared)(XS, YS)
    helpers[0].step.reset()
    one, two = (helpers[1].scan_value_and_grad(squared)(XS[k], YS[k]) for k in (slice(0, 6), slice(6, 8)))
    assert relative_error(jnp.concatenate([one[0], two[0]]), once[0]) < TOLERANCE
    assert relative_error(jax.tree.map(jnp.add, one[1], two[1]), once[1]) < TOLERANCE


def test_one_window_given_whole_is_backpropagation():
    case = rate()
    helper = zero_helper(compiled(case))
    _, grads = helper.scan_value_and_grad(squared)(XS[:C], YS[:C])
    wanted = jax.grad(lambda p: case.run(p, case.state, XS[:C], YS[:C])[0])(case.params)
    assert relative_error(grads, wanted) < TOLERANCE


# --- What teaches the predictors ----------------------------------------------------------------------------------------------


def rows(case, state, names):
    return jnp.concatenate([state[n].reshape(B, -1) for n in names], 1)


def inner(a, b):
    return sum(jnp.sum(u * v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def network(layers, x):
    for layer in layers[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def predicted(case, layers, scale, state):
    """Cotangents of a state by the predictors' equations."""
    found = {}
    for names, own, size in zip(case.groups, layers, scale, strict=True):
        said, start = size * network(own, rows(case, state, names)), 0
        for n in names:
            width = said.shape[1] * state[n].size // sum(state[m].size for m in names)
            found[n] = said[:, start : start + width].reshape(state[n].shape)
            start += width
    return found


def targets(case, layers, scale, stream):
    """What each window finds at its start, by autodiff of its losses and of the prediction at its end."""
    found = []
    for start, state in zip(STARTS, states_at(case, STARTS), strict=True):
        stop = min(start + C, T)
        (_, end) = case.run(case.params, state, XS[start:stop], YS[start:stop])
        credit = predicted(case, layers, scale, end)
        if stop == T and not stream:
            credit = jax.tree.map(jnp.zeros_like, credit)

        def total(s, start=start, stop=stop, credit=credit):
            loss, end = case.run(case.params, s, XS[start:stop], YS[start:stop])
            return loss + inner(credit, end)

        found.append((state, jax.grad(total)(state)))
    return found if stream else found[1:]


def taught(case, layers, epochs, stream, rate):
    """Layers, scales and losses after gradient descent, in the equations of the documentation."""

    @jax.jit
    def epoch(layers, scale):
        pairs = targets(case, layers, scale, stream)
        wanted = [jnp.stack([rows(case, w, names) for _, w in pairs]) for names in case.groups]
        read = [jnp.stack([rows(case, s, names) for s, _ in pairs]) for names in case.groups]
        first = [jnp.sqrt(jnp.mean(w**2)) for w in wanted]
        scale = [jnp.where(s == 0, new, s) for s, new in zip(scale, first, strict=True)]

        def error(layers):
            return sum(
                jnp.mean((network(own, x) - w / s) ** 2)
                for own, x, w, s in zip(layers, read, wanted, scale, strict=True)
            )

        loss, slope = jax.value_and_grad(error)(layers)
        return jax.tree.map(lambda p, g: p - rate * g, layers, slope), scale, loss

    scale, losses = [0.0] * len(layers), []
    for _ in range(epochs):
        layers, scale, loss = epoch(layers, scale)
        losses.append(loss)
    return layers, scale, jnp.stack(losses)


def in_order(case, helper, by_group):
    """Values by the compiler's group as a list in the order of the case's groups."""
    header = helper.step.program.header.groups
    first = {path.replace("state.", ""): g.name for g in header for path, _ in g.states}
    return [by_group[first[names[0]]] for names in case.groups]


@pytest.mark.parametrize(("hidden", "stream"), [(None, False), (6, True)])
def test_fit_is_descent_on_what_the_next_window_finds(case, hidden, stream):
    helper = etcompile.SyntheticGradient(compiled(case), squared, hidden=hidden, stream=stream)
    layers = in_order(case, helper, helper.params["layers"])
    losses = helper.fit(XS, YS, optimizer=optax.sgd(0.2), epochs=3)
    wanted, scale, expected = taught(case, layers, 3, stream, 0.2)
    assert relative_error(losses, expected) < TOLERANCE
    assert relative_error(in_order(case, helper, helper.params["layers"]), wanted) < TOLERANCE
    assert relative_error(in_order(case, helper, helper.params["scale"]), scale) < TOLERANCE
    assert helper.prediction_loss == losses[-1]
    assert float(losses[-1]) != float(losses[0])


@pytest.mark.parametrize("batch", [None, 1])
def test_models_without_a_batch(batch):
    """No example axis: the whole step is one example."""
    case = rate(batch)
    xs, ys = (v[:, 0] if batch is None else v[:, :1] for v in (XS, YS))
    step = etcompile.compile(case.model, xs[0], algo="dni", window=C)
    helper = etcompile.SyntheticGradient(step, squared, hidden=3)
    assert helper.params["layers"]["g0"][0]["w"].shape == (4, 3)
    losses = helper.fit(xs, ys, optimizer=optax.adam(0.05), epochs=100)
    assert losses[-1] < 0.2 * losses[0]


def test_fit_leaves_model_and_carry_as_they_were(case):
    step = compiled(case)
    helper = etcompile.SyntheticGradient(step, squared)
    before = jax.tree.map(np.array, (step.executor.live.params(), step.executor.live.states(), step.traces))
    helper.fit(XS, YS, optimizer=optax.adam(0.1), epochs=2)
    after = (step.executor.live.params(), step.executor.live.states(), step.traces)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, after))


def test_the_optimiser_goes_on_from_call_to_call():
    helpers = [etcompile.SyntheticGradient(compiled(rate()), squared) for _ in range(2)]
    optimizer = optax.adam(0.1)
    once = helpers[0].fit(XS, YS, optimizer=optimizer, epochs=4)
    helpers[1].fit(XS, YS, optimizer=optimizer, epochs=2)
    twice = helpers[1].fit(XS, YS, epochs=2)
    assert relative_error(twice, once[2:]) < TOLERANCE
    assert relative_error(helpers[1].params, helpers[0].params) < TOLERANCE


def test_update_is_a_gradient_and_a_step_of_the_predictors():
    case = two_layers()
    first, second = (etcompile.SyntheticGradient(compiled(case), squared, hidden=4) for _ in range(2))
    for helper in (first, second):
        helper.fit(XS, YS, optimizer=optax.adam(0.05), epochs=3)
    wanted = first.scan_value_and_grad(squared)(XS, YS)
    ended = jax.tree.map(np.array, first.step.executor.live.states())
    first.step.reset()
    first.fit(XS, YS)
    assert relative_error(second.update(XS, YS), wanted) < TOLERANCE
    assert relative_error(second.step.executor.live.states(), ended) < TOLERANCE
    assert relative_error(second.params, first.params) < TOLERANCE
    assert relative_error(second.prediction_loss, first.prediction_loss) < TOLERANCE


def test_update_inside_of_a_brainstate_transformation():
    plain, jitted = (etcompile.SyntheticGradient(compiled(rate()), squared) for _ in range(2))
    for helper in (plain, jitted):
        helper.fit(XS, YS, optimizer=optax.adam(0.05))
    call = brainstate.transform.jit(lambda xs, ys: jitted.update(xs, ys))
    for _ in range(2):
        assert relative_error(call(XS, YS), plain.update(XS, YS)) < TOLERANCE
    assert relative_error(jitted.params, plain.params) < TOLERANCE


# --- Does it help -------------------------------------------------------------------------------------------------------------


def departure(got, wanted):
    """Size of the difference, relative to what is wanted."""
    return float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted))


def cosine(a, b):
    return float(inner(a, b) / jnp.sqrt(inner(a, a) * inner(b, b)))


@pytest.mark.by_xla
@pytest.mark.parametrize("hidden", [None, 16])
def test_credit_from_beyond_the_window_is_found(hidden):
    """Leaky units hear a cue in the first of four windows, and have a loss in the last; a constant input tells the time."""
    steps, batch, window = 20, 16, 5

    def leaky(p, s, x):
        h = 0.9 * s["h"] + 0.1 * jnp.tanh(x @ p["u"] + s["h"] @ p["w"])
        return {"h": h}, h @ p["v"]

    params = {"u": draw(2, 3, 6), "w": 0.5 * draw(3, 6, 6), "v": draw(4, 6, 2)}
    state = {"h": jnp.zeros((batch, 6))}
    time = jnp.arange(steps)

    def masked(out, y, on):
        return on * jnp.mean((out - y) ** 2)

    def data(seed):
        xs = draw(seed, 1, batch, 3) * (time < window)[:, None, None]
        return xs.at[:, :, 2].set(1.0), jnp.ones((steps, batch, 2)), jnp.where(time < 15, 0.0, 1.0)

    def compiled(algo, window):
        model = etcompile.from_function(leaky, params, state)
        return etcompile.compile(model, jnp.ones((batch, 3)), algo=algo, window=window)

    def gradient(step):
        return step.scan_value_and_grad(masked)(*data(20))[1]

    true, truncated = (gradient(compiled("bptt", w)) for w in (None, window))
    helper = etcompile.SyntheticGradient(compiled("dni", window), masked, hidden=hidden)
    losses = helper.fit(*data(10), optimizer=optax.adam(0.02), epochs=400)
    assert losses[-1] < 0.1 * losses[0]
    synthetic = gradient(helper)  # on another sequence than it was fitted on
    for name in ("u", "w"):
        assert cosine(truncated[name], true[name]) < 0.95 and cosine(synthetic[name], true[name]) > 0.98
        assert departure(truncated[name], true[name]) > 0.6 and departure(synthetic[name], true[name]) < 0.2
    assert not truncated["u"][:2].any()  # the cue lies in a window without a loss
    assert cosine(synthetic["u"][:2], true["u"][:2]) > 0.9


# --- Text and refusals ----------------------------------------------------------------------------------------------------------


def test_the_program_says_how_its_windows_end():
    program = compiled(rate()).program
    assert (program.window, program.end, program.exact) == (C, "synthetic", False)
    assert "window=3  end=synthetic\n" in str(program)
    assert etcompile.parse_program(str(program)) == program
    plain = compiled(rate(), "bptt", window=C).program
    assert plain.end is None and "end=" not in str(plain).splitlines()[0]


def test_a_step_alone_has_no_synthetic_gradients():
    step = compiled(rate())
    for ask in (step.scan_value_and_grad, step.value_and_grad, lambda loss: step.learn(loss, optax.sgd(0.1))):
        with pytest.raises(etcompile.AlgorithmError, match="SyntheticGradient"):
            ask(squared)
    with pytest.raises(etcompile.AlgorithmError, match="SyntheticGradient"):
        brainstate.transform.grad(lambda: squared(step(XS[0]), YS[0]), step.param_states)()
    assert step.scan(XS).shape == YS.shape  # without a gradient it runs as any other


def test_another_loss():
    helper = zero_helper(compiled(rate()))
    with pytest.raises(etcompile.AlgorithmError, match="another loss function"):
        helper.scan_value_and_grad(lambda out, y: squared(out, y))


def test_a_bound_method_is_the_same_loss():
    class Losses:
        def squared(self, out, y):
            return squared(out, y)

    losses = Losses()
    helper = etcompile.SyntheticGradient(compiled(rate()), losses.squared)
    helper.fit(XS, YS, optimizer=NOTHING)
    assert helper.scan_value_and_grad(losses.squared)(XS, YS)[0].shape == (T,)


def test_never_fitted():
    helper = etcompile.SyntheticGradient(compiled(rate()), squared)
    with pytest.raises(etcompile.AlgorithmError, match="never fitted"):
        helper.scan_value_and_grad(squared)


def test_another_rule():
    with pytest.raises(etcompile.AlgorithmError, match="algo='dni'"):
        etcompile.SyntheticGradient(compiled(rate(), "bptt", window=C), squared)


def test_another_batch_size():
    step = compiled(lstm())
    helper = zero_helper(step)
    gradient = helper.scan_value_and_grad(squared)
    step.reset(batch_size=B)  # compiled anew, and the same as before
    assert gradient(XS, YS)[0].shape == (T,)
    step.reset(batch_size=5)
    for ask in (
        lambda: gradient(XS, YS),
        lambda: helper.scan_value_and_grad(squared),
        lambda: helper.fit(XS, YS),
        lambda: helper.update(XS, YS),
    ):
        with pytest.raises(etcompile.AlgorithmError, match="compiled anew"):
            ask()


def test_another_window():
    step = compiled(rate())
    helper = zero_helper(step)
    step.executor.install(compiled(rate(), window=C + 1).executor.compiled, (XS[0],))
    with pytest.raises(etcompile.AlgorithmError, match="windows of 4"):
        helper.scan_value_and_grad(squared)


def test_nothing_to_predict():
    helper = etcompile.SyntheticGradient(compiled(rate()), squared)
    for ask in (helper.fit, helper.update):
        with pytest.raises(etcompile.InputError, match="one window"):
            ask(XS[:C], YS[:C], optimizer=NOTHING)
    with pytest.raises(etcompile.AlgorithmError, match="never fitted"):
        helper.scan_value_and_grad(squared)
    stream = etcompile.SyntheticGradient(compiled(rate()), squared, stream=True)
    stream.update(XS[:C], YS[:C], optimizer=NOTHING)


def test_whole_calls_as_windows_of_a_stream():
    step = compiled(rate(), window=None)
    helper = etcompile.SyntheticGradient(step, squared, stream=True)
    helper.update(XS, YS, optimizer=optax.sgd(0.1))
    assert float(jnp.abs(helper.params["layers"]["g0"][0]["w"]).max()) > 0


@pytest.mark.parametrize("hidden", [0, True, 2.5])
def test_hidden_units_that_cannot_be(hidden):
    with pytest.raises(etcompile.OptionError, match="hidden"):
        etcompile.SyntheticGradient(compiled(rate()), squared, hidden=hidden)


def test_fit_checks_what_it_is_given():
    helper = etcompile.SyntheticGradient(compiled(rate()), squared)
    with pytest.raises(etcompile.OptionError, match="optimiser"):
        helper.fit(XS, YS)
    with pytest.raises(etcompile.OptionError, match="epochs"):
        helper.fit(XS, YS, optimizer=NOTHING, epochs=0)
    with pytest.raises(etcompile.InputError, match="differ in length"):
        helper.fit(XS, YS[1:], optimizer=NOTHING)
    with pytest.raises(etcompile.InputError, match="function"):
        etcompile.SyntheticGradient(compiled(rate()), "squared")


def test_progress_is_printed(capsys):
    etcompile.SyntheticGradient(compiled(rate()), squared).fit(
        XS, YS, optimizer=NOTHING, epochs=20, progress=True
    )
    assert len(capsys.readouterr().out.splitlines()) == 10


@pytest.mark.parametrize("window", [0, -1, 2.5])
def test_windows_that_cannot_be(window):
    with pytest.raises((etcompile.OptionError, etcompile.PassError), match="window must be"):
        compiled(rate(), window=window)


def test_windows_end_in_nothing_or_in_a_synthetic_gradient():
    @etcompile.algorithm("test_dni_other_end")
    def other(p):
        p.window(3, end="zero")

    with pytest.raises((etcompile.OptionError, etcompile.PassError), match="end='zero'"):
        etcompile.compile(rate().model, XS[0], algo="test_dni_other_end")


def test_seeds_differ_in_the_hidden_layer_alone():
    helpers = [
        etcompile.SyntheticGradient(compiled(two_layers()), squared, hidden=4, seed=seed)
        for seed in (0, 0, 1)
    ]
    same, again, other = (helper.params["layers"] for helper in helpers)
    for group in same:
        (first, last), (first_again, _), (first_other, _) = same[group], again[group], other[group]
        assert (first["w"] == first_again["w"]).all() and not (first["w"] == first_other["w"]).any()
        assert not any(np.any(v) for v in (first["b"], last["w"], last["b"]))
    for a, b in itertools.combinations(same, 2):
        assert (
            same[a][0]["w"].shape[0] != same[b][0]["w"].shape[0] or (same[a][0]["w"] != same[b][0]["w"]).any()
        )
