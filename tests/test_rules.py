"""The compiled learning rules against their equations in plain numpy, step by step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_models import CROSS_ENTROPY, EXTRA, MODELS, SQUARED
from numpy_rules import (
    DRTRL,
    KFRTRL,
    OSTL,
    OSTTP,
    OTPE,
    OTTT,
    RFLO,
    RTRL,
    UORO,
    Compose,
    EProp,
    PpProp,
    Rule,
    SnAp,
    ThreeFactor,
    backpropagate,
    bptt,
    exact_within,
    run,
    summed,
)
from oracles import relative_error
from shared import shared

import etcompile
from etcompile.lowering.layers import random_signs

pytestmark = pytest.mark.usefixtures("by_numpy")

ALL = {**MODELS, **EXTRA}
TOLERANCE = 1e-10
#: Steps without a loss, in runs that have some: traces and filters must go on.
QUIET = (1, 3)


# --- The reference itself -------------------------------------------------------------------------------------------------


def difference(fn, at, epsilon=1e-5):
    """Derivative [size of fn, size of at] by central differences."""
    at = np.asarray(at, float)
    columns = []
    for k in range(at.size):
        nudge = np.zeros(at.size)
        nudge[k] = epsilon
        nudge = nudge.reshape(at.shape)
        columns.append((np.ravel(fn(at + nudge)) - np.ravel(fn(at - nudge))) / (2 * epsilon))
    return np.stack(columns, -1)


def flat(states):
    return np.concatenate([v.ravel() for v in states.values()])


def unflat(vector, like):
    ends = np.cumsum([v.size for v in like.values()])[:-1]
    return {n: p.reshape(like[n].shape) for n, p in zip(like, np.split(vector, ends), strict=True)}


def near(got, wanted):
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=1e-7, atol=2e-8)


def a_later_step(name):
    """A model, the states before its third step, and the data of that step."""
    model = ALL[name]()
    model.smooth = True
    states = model.states
    for x in model.xs[:2]:
        states, _ = model.forward(model.weights, states, x)
    return model, states, model.xs[2], model.targets[2]


def adding(which, value):
    return lambda name, v: v + value.reshape(v.shape) if name == which else v


@pytest.mark.parametrize("name", ALL)
def test_full_derivatives_equal_finite_differences(name):
    model, states, x, target = a_later_step(name)
    t = model.tables(model.weights, states, x, target, SQUARED)

    def new(w, vector, **hooks):
        return flat(model.forward(w, unflat(vector, states), x, **hooks)[0])

    def loss(w, vector, **hooks):
        return SQUARED.numpy(model.forward(w, unflat(vector, states), x, **hooks)[1], target)[0]

    h = flat(states)
    near(t.recurrence, difference(lambda v: new(model.weights, v), h))
    near(t.past[None], difference(lambda v: loss(model.weights, v), h))
    for n, site in t.sites.items():
        nothing = np.zeros(site.x.shape[0])
        by_y = difference(lambda v, n=n: new(model.weights, h, y=adding(n, v)), nothing)
        credit = difference(lambda v, n=n: loss(model.weights, h, y=adding(n, v)), nothing)
        by_w = difference(lambda v, n=n: new({**model.weights, n: v}, h), model.weights[n])
        near(site.credit[None], credit)
        near(
            (t.one_step(n) @ site.raw)[None],
            difference(lambda v, n=n: loss({**model.weights, n: v}, h), model.weights[n]),
        )
        if n in t.by_y:
            near(t.by_y[n], by_y)
            near(t.influence[n] @ site.raw, by_w)
        else:
            assert not by_w.any()


@pytest.mark.parametrize("name", ALL)
def test_local_derivatives_equal_finite_differences_with_the_mixing_cut(name):
    model, states, x, target = a_later_step(name)
    t = model.tables(model.weights, states, x, target, SQUARED)
    h = flat(states)

    def new(vector, **hooks):
        return flat(model.forward(model.weights, unflat(vector, states), x, mixed=states, **hooks)[0])

    def loss(**hooks):
        return SQUARED.numpy(model.forward(model.weights, states, x, **hooks)[1], target)[0]

    whole = difference(new, h)
    for g in t.groups.values():
        for k, row in enumerate(g.index):
            for j, column in enumerate(g.index):
                near(np.diag(g.transition[k, j]), whole[np.ix_(row, column)])
        signal = [
            difference(lambda v, s=s: loss(put=adding(s, v)), np.zeros(row.size))[0]
            for s, row in zip(g.states, g.index, strict=True)
        ]
        near(g.signal, np.stack(signal))
    for n in t.traced:
        site = t.sites[n]
        rows = t.groups[site.group].index
        by_y = difference(lambda v, n=n: new(h, y=adding(n, v)), np.zeros(site.x.shape[0]))[rows]
        wanted = np.zeros_like(by_y)
        wanted[:, site.at, np.arange(site.at.size)] = site.immediate
        near(wanted, by_y)


@pytest.mark.parametrize("name", ALL)
def test_what_a_group_shows(name):
    """The signal is what `show` makes of the loss's derivative by what the group shows."""
    model, states, x, target = a_later_step(name)
    t = model.tables(model.weights, states, x, target, SQUARED)

    def loss(**hooks):
        return SQUARED.numpy(model.forward(model.weights, states, x, **hooks)[1], target)[0]

    for n, g in t.groups.items():
        shown = difference(lambda v, n=n: loss(show=adding(n, v)), np.zeros(g.show.shape[1]))
        near(g.signal, g.show * shown)


def test_cross_entropy_of_the_reference():
    rng = np.random.default_rng(0)
    out, labels = rng.standard_normal((3, 4)), np.array([0, 3, 1])
    value, error = CROSS_ENTROPY.numpy(out, labels)
    near(error.reshape(1, -1), difference(lambda v: CROSS_ENTROPY.numpy(v, labels)[0], out))
    assert abs(value - float(CROSS_ENTROPY.jax(out, labels))) < 1e-12


@pytest.mark.parametrize("name", ALL)
def test_models_are_alive(name):
    model = ALL[name]()
    states, spikes = model.states, []
    for x in model.xs:
        t = model.tables(model.weights, states, x, model.targets[0], SQUARED)
        states = t.states
        for n in t.traced:
            assert np.any(t.one_step(n)), n
        assert all(np.all(np.abs(v) < 10) for v in states.values())
        if name == "spiking":
            spikes.append(model.spikes(states))
    if name == "spiking":
        assert 0.02 < np.mean(spikes) < 0.6, f"spikes {np.mean(spikes):.0%} of the time"


@pytest.mark.parametrize("name", ALL)
def test_numpy_backpropagation_equals_jax(name):
    model = ALL[name]()
    tables, _ = run(Rule(), model, SQUARED, model.targets)

    @jax.grad
    def through_time(params):
        def body(state, data):
            state, out = model.fn(params, state, data[0])
            return state, SQUARED.jax(out, data[1])

        return jax.lax.scan(body, jax.tree.map(jnp.asarray, model.states), (model.xs, model.targets))[1].sum()

    wanted = through_time(jax.tree.map(jnp.asarray, model.weights))
    assert relative_error(backpropagate(tables)[0], dict(wanted)) < TOLERANCE


# --- Running the compiler's side ------------------------------------------------------------------------------------------------


def compiled(model, algo, **options):
    return etcompile.compile(model.build(), jnp.asarray(model.outside(model.xs[0])), algo=algo, **options)


def flattened(tree, prefix=""):
    """Nested dicts as one, keys joined by dots."""
    found = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        found.update(flattened(value, f"{path}.") if isinstance(value, dict) else {path: np.asarray(value)})
    return found


def set_weights(step, weights):
    for path, state in step.param_states.items():
        plain = set(state.value) <= set(weights)
        state.value = {k: jnp.asarray(weights[k if plain else f"{path}.{k}"]) for k in state.value}


def feedback(step, model, seed=0):
    """The compiler's random matrices under the reference's names of groups."""
    tables = model.tables(model.weights, model.states, model.xs[0])

    def matrix(group, rows, units):
        first = tables.groups[group].states[0]
        (name,) = (
            g.name
            for g in step.program.header.groups
            if any(path.split(".")[-1].strip("[]'") == first for path, _ in g.states)
        )
        return np.asarray(etcompile.feedback_matrix(seed, name, rows, units, jnp.float64))

    return functools.cache(matrix)


def run_compiled(step, model, loss, targets, *, quiet=(), update=None, **call):
    """Losses and gradients of every step, as `numpy_rules.run` gives them; `update` as there."""
    value_and_grad = step.value_and_grad(loss.jax)
    weights, losses, grads = model.weights, [], []
    for k, (x, target) in enumerate(zip(model.xs, targets, strict=True)):
        x = jnp.asarray(model.outside(x))
        if k in quiet:
            step(x)
            losses.append(None)
            grads.append(None)
            continue
        value, found = value_and_grad(x, jnp.asarray(model.outside(target)), **call)
        losses.append(float(value))
        grads.append(flattened(found))
        if update is not None:
            weights = update(weights, grads[-1])
            set_weights(step, weights)
    return losses, grads


def compare(got, wanted):
    losses, grads = got
    tables, expected = wanted
    for k, (loss, grad, t, e) in enumerate(zip(losses, grads, tables, expected, strict=True)):
        if e is None:
            assert grad is None
            continue
        assert abs(loss - t.loss) <= TOLERANCE * abs(t.loss), f"loss of step {k}"
        assert set(grad) == set(e)
        for name in e:
            error = relative_error({name: grad[name]}, {name: e[name]})
            assert error < TOLERANCE, f"step {k}, {name}: off by {error:.1e}"


@dataclass(frozen=True)
class Case:
    """A compiled rule with options, and its reference, given the feedback matrices."""

    algo: str
    reference: Callable[[Any], Rule]
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __str__(self):
        told = ",".join(f"{k}={v}" for k, v in self.options.items()).replace(" ", "")
        return f"{self.algo}({told})"


CASES = [
    Case("d_rtrl", lambda B: DRTRL()),
    Case("pp_prop", lambda B: PpProp(0.9)),
    Case("pp_prop", lambda B: PpProp(0.6), dict(decay=0.6)),
    Case("pp_prop", lambda B: PpProp((0.7, 0.9)), dict(decay=(0.7, 0.9))),
    Case("pp_prop", lambda B: PpProp(rank=4), dict(rank=4)),
    Case("es_d_rtrl", lambda B: PpProp(rank=1), dict(rank=1)),
    Case("e_prop", lambda B: EProp()),
    Case("e_prop", lambda B: EProp(0.0), dict(kappa=0.0)),
    Case("e_prop", lambda B: EProp(0.7, normalize=True), dict(kappa=0.7, normalize=True)),
    Case("e_prop", lambda B: EProp(0.9, "random", matrix=B), dict(feedback="random")),
    Case(
        "e_prop",
        lambda B: EProp(0.8, "random", True, matrix=B),
        dict(kappa=0.8, feedback="random", normalize=True, seed=3),
        seed=3,
    ),
    Case("ottt", lambda B: OTTT()),
    Case("ottt", lambda B: OTTT(0.6), dict(leak=0.6)),
    Case("otpe", lambda B: OTPE()),
    Case("otpe", lambda B: OTPE(0.7, True), dict(leak=0.7, approximate=True)),
    Case("rflo", lambda B: RFLO(matrix=B)),
    Case("rflo", lambda B: RFLO(0.7, B), dict(leak=0.7, seed=5), seed=5),
    Case("osttp", lambda B: OSTTP(matrix=B)),
    Case("osttp", lambda B: OSTTP(True, B), dict(recurrent=True, seed=2), seed=2),
    Case("ostl", lambda B: OSTL()),
    Case("ostl", lambda B: DRTRL(), dict(recurrent=False)),
    Case("rtrl", lambda B: RTRL()),
    Case("snap", lambda B: SnAp(1), dict(n=1)),
    Case("snap", lambda B: SnAp(2), dict(n=2)),
    Case("snap", lambda B: SnAp(50), dict(n=50)),
]

#: Points of the space of rules that have no name of their own.
COMPOSED = [
    Case("compose", lambda B: Compose()),
    Case("compose", lambda B: Compose("none"), dict(trace="none")),
    Case(
        "compose",
        lambda B: Compose("none", filter=0.6, normalize=True),
        dict(trace="none", filter=0.6, normalize=True),
    ),
    Case("compose", lambda B: Compose(leak=0.6, filter=0.5), dict(transition=0.6, filter=0.5)),
    Case(
        "compose", lambda B: Compose(signal="random", filter=0.5, matrix=B), dict(signal="random", filter=0.5)
    ),
    Case("compose", lambda B: Compose("factored", decay=0.7), dict(trace="factored", decay=0.7)),
    Case("compose", lambda B: Compose("factored", 0.5), dict(trace="factored", transition=0.5)),
    Case(
        "compose",
        lambda B: Compose("presynaptic", 0.7, "target", matrix=B),
        dict(trace="presynaptic", transition=0.7, signal="target", seed=1),
        seed=1,
    ),
]

BY_NAME = {str(c): c for c in (*CASES, *COMPOSED)}


@shared
def step_of(name: str, case: str):
    """A rule compiled for a model. Whoever runs it resets it first."""
    rule = BY_NAME[case]
    return compiled(ALL[name](), rule.algo, **rule.options)


@shared
def both(name: str, case: str, quiet: tuple[int, ...] = ()):
    """Compiled and reference run of a rule on a model; many tests look at the same."""
    model, step, case = ALL[name](), step_of(name, case), BY_NAME[case]
    step.reset()
    got = run_compiled(step, model, SQUARED, model.targets, quiet=quiet)
    rule = case.reference(feedback(step, model, case.seed))
    return got, run(rule, model, SQUARED, model.targets, quiet=quiet)


def grads_of(name, case):
    """The compiled gradients of every step."""
    return both(name, case)[0][1]


# --- Every rule on every model ----------------------------------------------------------------------------------------------


#: Where the mask of a weight matters: rules that read the recurrence as a whole.
MASKED = ["d_rtrl()", "ostl()", "rtrl()", "snap(n=1)", "snap(n=2)", "snap(n=50)"]


@pytest.mark.parametrize(
    ("name", "case"),
    [*((n, str(c)) for n in MODELS for c in CASES), *(("sparse_rate", c) for c in MASKED)],
)
def test_rule_equals_its_equations(name, case):
    compare(*both(name, case))


@pytest.mark.parametrize("case", [*map(str, COMPOSED)])
@pytest.mark.parametrize("name", ["lstm", "spiking"])
def test_composed_rule_equals_its_equations(name, case):
    compare(*both(name, case))


@pytest.mark.parametrize("case", [*map(str, CASES)])
@pytest.mark.parametrize("name", ["two_layer"])
def test_traces_go_on_in_steps_without_a_loss(name, case):
    compare(*both(name, case, QUIET))


@pytest.mark.parametrize("batch", [None, 1])
@pytest.mark.parametrize("name", ["rate", "lstm"])
@pytest.mark.parametrize("case", ["pp_prop()", "e_prop(feedback=random)", "osttp()", "rtrl()", "snap(n=1)"])
def test_other_batch_sizes(name, batch, case):
    model, case = ALL[name](batch), BY_NAME[case]
    step = compiled(model, case.algo, **case.options)
    got = run_compiled(step, model, SQUARED, model.targets)
    compare(got, run(case.reference(feedback(step, model)), model, SQUARED, model.targets))


def test_final_states_are_those_of_the_model():
    for name, kind in MODELS.items():
        model = kind()
        built = model.build()
        step = etcompile.compile(built, jnp.asarray(model.xs[0]), algo="d_rtrl")
        for x in model.xs:
            step(jnp.asarray(x))
        tables, _ = run(Rule(), model, SQUARED, model.targets)
        assert relative_error(model.read_states(built), tables[-1].states) < 1e-12, name


# --- Signals given from outside -------------------------------------------------------------------------------------------------


def descending(weights, grads):
    return {n: w - 0.05 * grads[n] for n, w in weights.items()}


@pytest.mark.parametrize("name", [n for n in MODELS if n != "two_layer"])
@pytest.mark.parametrize(
    "options", [{}, dict(kappa=0.5, normalize=True, seed=4, feedback_decay=0.2)], ids=["plain", "options"]
)
def test_adaptive_feedback_follows_the_readout(name, options):
    model = MODELS[name]()
    step = compiled(model, "e_prop", feedback="adaptive", **options)
    got = run_compiled(step, model, SQUARED, model.targets, update=descending)
    own = {k: v for k, v in options.items() if k != "seed"}
    rule = EProp(feedback="adaptive", matrix=feedback(step, model, options.get("seed", 0)), **own)
    wanted = run(rule, model, SQUARED, model.targets, update=descending)
    compare(got, wanted)
    fixed = EProp(
        feedback="random", matrix=rule.matrix, **{k: v for k, v in own.items() if k != "feedback_decay"}
    )
    _, other = run(fixed, model, SQUARED, model.targets, update=descending)
    assert relative_error(wanted[1][0], other[0]) == 0.0
    assert relative_error(wanted[1][-1], other[-1]) > 1e-4


def test_adaptive_feedback_without_weight_updates_is_random_feedback():
    model = MODELS["lstm"]()
    step = compiled(model, "e_prop", feedback="adaptive")
    _, grads = run_compiled(step, model, SQUARED, model.targets)
    assert relative_error(grads, grads_of("lstm", "e_prop(feedback=random)")) < TOLERANCE


def test_adaptive_feedback_goes_on_in_steps_without_a_loss():
    """The readout is changed before steps that have no loss."""
    model = MODELS["rate"]()
    step = compiled(model, "e_prop", feedback="adaptive", feedback_decay=0.1)
    got = run_compiled(step, model, SQUARED, model.targets, quiet=QUIET, update=descending)
    rule = EProp(feedback="adaptive", feedback_decay=0.1, matrix=feedback(step, model))
    compare(got, run(rule, model, SQUARED, model.targets, quiet=QUIET, update=descending))


def test_a_layer_that_no_readout_reads_has_no_adaptive_feedback():
    model = MODELS["two_layer"]()

    def attempt():
        compiled(model, "e_prop", feedback="adaptive")(jnp.asarray(model.xs[0]))

    with pytest.raises(etcompile.AlgorithmError, match="readout"):
        attempt()


def test_random_feedback_differs_between_seeds_and_groups():
    draw = functools.partial(etcompile.feedback_matrix, rows=3, units=400, dtype=jnp.float64)
    B = np.asarray(draw(0, "g0"))
    assert B.shape == (3, 400)
    assert np.array_equal(B, draw(0, "g0"))
    assert not np.array_equal(B, draw(1, "g0")) and not np.array_equal(B, draw(0, "g1"))
    assert abs(B.mean()) < 0.1 and 0.1 < B.std() < 2.0
    # The compiled step draws it inside of jit: a fixed matrix is the same there, to the last bit.
    assert np.array_equal(B, jax.jit(lambda: draw(0, "g0"))())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["number", "per unit", "per example", "per group"])
def test_three_factor_with_modulators_of_every_kind(name, kind):
    model = MODELS[name]()
    step = three_factor_step(name)
    tables = model.tables(model.weights, model.states, model.xs[0])
    sizes = {n: g.shape for n, g in tables.groups.items()}
    if kind.startswith("per ") and kind != "per group" and len({s[1:] for s in sizes.values()}) > 1:
        return  # one array cannot fit layers of different widths
    rng = np.random.default_rng(1)
    shape = next(iter(sizes.values()))
    rule = ThreeFactor()
    if kind == "number":
        rule.modulator = given = 0.7
    elif kind == "per unit":
        rule.modulator = given = rng.standard_normal(shape[1:])
    elif kind == "per example":
        rule.modulator = given = rng.standard_normal(shape)
    else:
        rule.modulator = {n: rng.standard_normal(s[1:]) for n, s in sizes.items()}
        given = {tables.groups[n].states[0]: m for n, m in rule.modulator.items()}
        prefix = "cell." if name == "lstm" else ""
        given = {f"{prefix}{k}": v for k, v in given.items()}
    step.reset()
    got = run_compiled(step, model, SQUARED, model.targets, modulator=jax.tree.map(jnp.asarray, given))
    compare(got, run(rule, model, SQUARED, model.targets))


@shared
def three_factor_step(name):
    return compiled(MODELS[name](), "three_factor")


def test_a_modulator_of_every_step_in_a_scan():
    model = MODELS["spiking"]()
    rng = np.random.default_rng(2)
    modulators = rng.standard_normal((len(model.xs), model.units))
    step, rule, total = three_factor_step("spiking"), ThreeFactor(), []
    step.reset()
    states = model.states
    for x, target, modulator in zip(model.xs, model.targets, modulators, strict=True):
        t = model.tables(model.weights, states, x, target, SQUARED)
        if not total:
            rule.start(t)
        rule.modulator, states = modulator, t.states
        rule.advance(t)
        total.append(rule.gradient(t))
    _, grads = step.scan_value_and_grad(SQUARED.jax)(
        jnp.asarray(model.xs), jnp.asarray(model.targets), modulator=jnp.asarray(modulators)
    )
    assert relative_error(flattened(grads), summed(total)) < TOLERANCE


def test_target_projection_of_class_labels():
    """Integer targets become one-hot rows."""
    model = MODELS["lstm"]()
    step = compiled(model, "osttp")
    got = run_compiled(step, model, CROSS_ENTROPY, model.labels)
    compare(got, run(OSTTP(matrix=feedback(step, model)), model, CROSS_ENTROPY, model.labels))


def test_random_feedback_of_another_loss():
    model = MODELS["spiking"]()
    step = compiled(model, "e_prop", feedback="random")
    got = run_compiled(step, model, CROSS_ENTROPY, model.labels)
    compare(
        got, run(EProp(feedback="random", matrix=feedback(step, model)), model, CROSS_ENTROPY, model.labels)
    )


# --- Windows ----------------------------------------------------------------------------------------------------------------------


def in_windows(step, model, chunk=None, parts=1):
    """Losses and the summed gradient over the sequence, given in `parts` calls."""
    losses, total = [], []
    driver = step.scan_value_and_grad(SQUARED.jax, **({} if chunk is None else dict(chunk=chunk)))
    xs, targets = (np.array([model.outside(v) for v in values]) for values in (model.xs, model.targets))
    for k in np.split(np.arange(len(xs)), parts):
        loss, grads = driver(jnp.asarray(xs[k]), jnp.asarray(targets[k]))
        losses.append(np.asarray(loss))
        total.append(flattened(grads))
    return np.concatenate(losses), summed(total)


@shared
def plain_tables(name):
    model = ALL[name]()
    return run(Rule(), model, SQUARED, model.targets)[0]


@pytest.mark.parametrize(
    ("name", "window"), [*((name, w) for name in MODELS for w in (None, 4)), ("lstm", 1), ("lstm", 2)]
)
def test_truncated_backpropagation(name, window):
    """A window of 4 leaves a shorter one at the end."""
    model = ALL[name]()
    losses, grads = in_windows(compiled(model, "bptt", window=window), model)
    tables = plain_tables(name)
    assert relative_error(losses, np.array([t.loss for t in tables])) < TOLERANCE
    assert relative_error(grads, summed(bptt(tables, window))) < TOLERANCE


def test_truncated_backpropagation_in_two_calls():
    model = ALL["lstm"]()
    _, grads = in_windows(compiled(model, "bptt"), model, parts=2)
    assert relative_error(grads, summed(bptt(plain_tables("lstm"), 3))) < TOLERANCE


def test_truncated_backpropagation_step_by_step():
    model = ALL["spiking"]()
    _, grads = run_compiled(compiled(model, "bptt"), model, SQUARED, model.targets)
    assert relative_error(grads, bptt(plain_tables("spiking"), 1)) < TOLERANCE


WITHIN = [
    "d_rtrl()",
    "pp_prop(decay=(0.7,0.9))",
    "e_prop()",
    "ottt()",
    "otpe()",
    "otpe(leak=0.7,approximate=True)",
    "ostl()",
    "snap(n=2)",
]


@pytest.mark.parametrize(
    ("name", "case"), [*(("two_layer", c) for c in WITHIN), ("spiking", "e_prop()"), ("spiking", "snap(n=2)")]
)
def test_exact_within_windows(name, case):
    model, case = ALL[name](), BY_NAME[case]
    step = compiled(model, case.algo, within="exact", **case.options)
    losses, grads = in_windows(step, model, 4)
    tables = plain_tables(name)
    wanted = summed(exact_within(case.reference(None), tables, 4))
    assert relative_error(losses, np.array([t.loss for t in tables])) < TOLERANCE
    for n in grads:
        error = relative_error({n: grads[n]}, {n: wanted[n]})
        assert error < TOLERANCE, f"{n}: off by {error:.1e}"


def test_windows_of_another_length_and_in_two_calls():
    model = ALL["two_layer"]()
    step = compiled(model, "d_rtrl", within="exact")
    for chunk, parts in ((3, 2), (1, 1)):
        step.reset()
        _, grads = in_windows(step, model, chunk, parts)
        wanted = summed(exact_within(DRTRL(), plain_tables("two_layer"), chunk))
        assert relative_error(grads, wanted) < TOLERANCE
    # A window of one step still holds the credit that crosses from unit to unit in that step, which the rule cuts.
    assert relative_error(grads, summed(grads_of("two_layer", "d_rtrl()"))) > 1e-6


@pytest.mark.parametrize("name", ["lstm", "spiking"])
def test_one_window_is_backpropagation_through_time(name):
    model = ALL[name]()
    _, grads = in_windows(compiled(model, "d_rtrl", within="exact"), model)
    assert relative_error(grads, whole_sequence(name)) < TOLERANCE


@pytest.mark.parametrize(
    "options", [dict(feedback="random"), dict(feedback="adaptive")], ids=["random", "adaptive"]
)
def test_a_signal_of_its_own_cannot_be_exact_within(options):
    with pytest.raises(etcompile.AlgorithmError):
        compiled(ALL["rate"](), "e_prop", within="exact", **options)


# --- Unbiased estimates --------------------------------------------------------------------------------------------------------


def last_gradient(rule, tables):
    rule.start(tables[0])
    for t in tables:
        rule.advance(t)
    return rule.gradient(tables[-1])


def three_steps(kind):
    model = kind(batch=1, length=3)
    return run(Rule(), model, SQUARED, model.targets)[0]


def signs_of_states(step, model, seed):
    """What the compiled UORO draws: nu of each step under the reference's numbering of the states."""
    header = step.program.header
    (network,) = header.layers
    order = [path.split(".")[-1] for g in network.groups for path, _ in header.group(g).states]

    def draw(t):
        drawn = {
            name: random_signs(seed, jnp.uint32(t + 1), k, model.outside(model.states[name]).shape, float)
            for k, name in enumerate(order)
        }
        return np.concatenate([np.ravel(drawn[name]) for name in model.states])

    return draw


def signs_of_rows(step, seed):
    """What the compiled KF-RTRL draws: c1 and c2 of each step and weight, one per row of y."""
    header = step.program.header
    number = {header.site(e.site).params[0]: 1000 + int(e.name[1:]) for e in header.effects}

    def draw(t, name, rows):
        return tuple(
            np.ravel(random_signs(2 * seed + k, jnp.uint32(t + 1), number[name], (rows,), float))
            for k in (0, 1)
        )

    return draw


@pytest.mark.parametrize(("name", "seed"), [("rate", 0), *((n, 3) for n in MODELS)])
def test_uoro_equals_its_equations_for_the_signs_drawn(name, seed):
    model = MODELS[name]()
    step = compiled(model, "uoro", seed=seed)
    got = run_compiled(step, model, SQUARED, model.targets, quiet=QUIET[1:])
    compare(
        got, run(UORO(signs_of_states(step, model, seed)), model, SQUARED, model.targets, quiet=QUIET[1:])
    )


@pytest.mark.parametrize(("name", "seed"), [("rate", 0), *((n, 3) for n in MODELS)])
def test_kf_rtrl_equals_its_equations_for_the_signs_drawn(name, seed):
    model = MODELS[name]()
    step = compiled(model, "kf_rtrl", seed=seed)
    got = run_compiled(step, model, SQUARED, model.targets, quiet=QUIET[1:])
    compare(got, run(KFRTRL(signs_of_rows(step, seed)), model, SQUARED, model.targets, quiet=QUIET[1:]))


@pytest.mark.parametrize("algo", ["uoro", "kf_rtrl"])
def test_seeds_resets_and_steps_have_signs_of_their_own(algo):
    model = MODELS["rate"]()
    steps = [compiled(model, algo, seed=seed) for seed in (0, 1)]
    first, other = (run_compiled(step, model, SQUARED, model.targets)[1] for step in steps)
    assert relative_error(first[0], other[0]) < TOLERANCE  # nothing is estimated yet
    assert relative_error(first[-1], other[-1]) > 1e-3
    again = run_compiled(compiled(model, algo, seed=0), model, SQUARED, model.targets)[1]
    assert relative_error(again, first) == 0.0
    steps[0].reset()  # the next sequence draws signs of its own
    after = run_compiled(steps[0], model, SQUARED, model.targets)[1]
    assert relative_error(after[0], first[0]) < TOLERANCE
    assert relative_error(after[-1], first[-1]) > 1e-3


SIGNS = (-1.0, 1.0)


def test_uoro_is_rtrl_on_average():
    """The mean over all signs of the two steps that the third step's gradient depends on."""
    tables = three_steps(MODELS["rate"])
    size = len(tables[0].recurrence)
    found = [
        last_gradient(UORO([np.array(a), np.array(b), np.ones(size)].__getitem__), tables)
        for a in itertools.product(SIGNS, repeat=size)
        for b in itertools.product(SIGNS, repeat=size)
    ]
    mean = {n: np.mean([f[n] for f in found], axis=0) for n in found[0]}
    wanted = last_gradient(RTRL(), tables)
    assert relative_error(mean, wanted) < TOLERANCE
    assert relative_error(found[0], wanted) > 1e-3


@pytest.mark.parametrize("name", ["rate", "lstm", "conv"])
def test_kf_rtrl_is_rtrl_on_average(name):
    tables = three_steps(MODELS[name])

    def estimate(signs):
        def draw(step, name, rows):
            return np.full(rows, signs[2 * step]), np.full(rows, signs[2 * step + 1])

        return last_gradient(KFRTRL(draw), tables)

    found = [estimate((*signs, 1.0, 1.0)) for signs in itertools.product(SIGNS, repeat=4)]
    mean = {n: np.mean([f[n] for f in found], axis=0) for n in found[0]}
    wanted = last_gradient(RTRL(), tables)
    assert relative_error(mean, wanted) < TOLERANCE
    assert relative_error(found[0], wanted) > 1e-3


# --- Identities -----------------------------------------------------------------------------------------------------------------


@shared
def whole_sequence(name):
    model = ALL[name]()
    return backpropagate(run(Rule(), model, SQUARED, model.targets)[0])[0]


ONE_LAYER = ["rate", "lstm", "spiking", "conv", "sparse_rate"]


@pytest.mark.parametrize("case", ["rtrl()", "snap(n=50)"])
@pytest.mark.parametrize("name", [*MODELS, "sparse_rate"])
def test_full_influence_is_backpropagation_through_time(name, case):
    assert relative_error(summed(grads_of(name, case)), whole_sequence(name)) < TOLERANCE


@pytest.mark.parametrize("name", ONE_LAYER)
def test_ostl_of_one_recurrent_layer_is_backpropagation_through_time(name):
    assert relative_error(summed(grads_of(name, "ostl()")), whole_sequence(name)) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_e_prop_without_filter_is_d_rtrl(name):
    assert relative_error(grads_of(name, "e_prop(kappa=0.0)"), grads_of(name, "d_rtrl()")) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_ostl_without_recurrence_is_d_rtrl(name):
    assert relative_error(grads_of(name, "ostl(recurrent=False)"), grads_of(name, "d_rtrl()")) < TOLERANCE


@shared
def on_the_leaky_integrator(algo, **options):
    model = EXTRA["leaky"]()
    return run_compiled(compiled(model, algo, **options), model, SQUARED, model.targets)[1]


@pytest.mark.parametrize(
    ("algo", "options"),
    [
        ("ottt", dict(leak=0.8)),
        ("otpe", dict(leak=0.8)),
        ("snap", dict(n=1)),
        ("rtrl", {}),
        ("ostl", {}),
        ("e_prop", dict(kappa=0.0)),
    ],
    ids=["ottt", "otpe", "snap1", "rtrl", "ostl", "e_prop"],
)
def test_rules_that_are_d_rtrl_on_a_leaky_integrator(algo, options):
    """Constant leak, no mixing, no reset: nothing is cut, and the trace is a filter of x."""
    found = on_the_leaky_integrator(algo, **options)
    assert relative_error(found, on_the_leaky_integrator("d_rtrl")) < TOLERANCE
    assert relative_error(summed(found), whole_sequence("leaky")) < TOLERANCE


SYMMETRIC = [
    "d_rtrl()",
    "pp_prop()",
    "pp_prop(rank=4)",
    "e_prop()",
    "ottt()",
    "otpe()",
    "otpe(leak=0.7,approximate=True)",
    "ostl()",
    "rtrl()",
    "snap(n=1)",
    "snap(n=2)",
]  # uoro and kf_rtrl at the first step: test_..._for_the_signs_drawn


@shared
def autodiff_of_the_first_step(name):
    model = ALL[name]()

    def loss(params):
        return SQUARED.jax(
            model.fn(params, jax.tree.map(jnp.asarray, model.states), model.xs[0])[1], model.targets[0]
        )

    return dict(jax.grad(loss)(jax.tree.map(jnp.asarray, model.weights)))


@pytest.mark.parametrize("case", SYMMETRIC)
@pytest.mark.parametrize("name", MODELS)
def test_the_first_step_is_autodiff(name, case):
    assert relative_error(grads_of(name, case)[0], autodiff_of_the_first_step(name)) < TOLERANCE


#: Pairwise different, step by step, on models with a memory of their own and recurrent weights.
DIFFERENT = [
    "d_rtrl()",
    "pp_prop()",
    "pp_prop(decay=(0.7,0.9))",
    "e_prop()",
    "e_prop(kappa=0.7,normalize=True)",
    "e_prop(feedback=random)",
    "ottt()",
    "ottt(leak=0.6)",
    "otpe()",
    "otpe(leak=0.7,approximate=True)",
    "rflo()",
    "rflo(leak=0.7,seed=5)",
    "osttp()",
    "osttp(recurrent=True,seed=2)",
    "snap(n=1)",
    "snap(n=2)",
    "rtrl()",
]


#: Where f is constant in time, R of OTPE is f (x) a of OTTT; dense layers leave SnAp-2 nothing to drop.
ALIKE = {("spiking", "otpe()", "ottt()"), ("two_layer", "rtrl()", "snap(n=2)")}


@pytest.mark.parametrize("name", ["spiking", "conv", "two_layer"])
def test_rules_that_should_differ_do(name):
    total = {case: summed(grads_of(name, case)) for case in DIFFERENT}
    for k, first in enumerate(DIFFERENT):
        for second in DIFFERENT[:k]:
            if (name, first, second) not in ALIKE:
                assert relative_error(total[first], total[second]) > 1e-6, (first, second)
    if name == "two_layer":
        assert relative_error(summed(grads_of(name, "ostl()")), total["rtrl()"]) > 1e-6
