"""What a rule can say of activity, modulators, masks and losses: equations in plain numpy, masks, chunks, refusals, the report."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from language_rules import FILTERED, PRODUCTS, Filtered, Products
from numpy_models import MODELS, SQUARED
from numpy_rules import run, summed
from oracles import relative_error
from shared import shared
from test_rules import ALL, QUIET, compare, compiled, feedback, flattened, run_compiled

import etcompile

pytestmark = pytest.mark.usefixtures("by_numpy")

TOLERANCE = 1e-10


@shared
def step_of(name, algo, **options):
    """Whoever runs it resets it first."""
    return compiled(ALL[name](), algo, **options)


def sequence(name, step, **call):
    """The summed gradients of the whole sequence, from the model's first states."""
    model = ALL[name]()
    step.reset()
    chunk = call.pop("chunk", None)
    given = (jnp.asarray(model.xs), jnp.asarray(model.targets))
    return flattened(step.scan_value_and_grad(SQUARED.jax, chunk=chunk)(*given, **call)[1])


@pytest.mark.parametrize("name", MODELS)
def test_activity_and_local_errors_equal_their_equations(name):
    model, step = ALL[name](), compiled(ALL[name](), PRODUCTS)
    got = run_compiled(step, model, SQUARED, model.targets, quiet=QUIET)
    compare(got, run(Products(feedback(step, model)), model, SQUARED, model.targets, quiet=QUIET))


@pytest.mark.parametrize("name", ["spiking", "two_layer", "lstm"])
def test_filters_of_the_loss_go_on_at_steps_with_a_loss_alone(name):
    model, step = ALL[name](), step_of(name, FILTERED)
    step.reset()
    got = run_compiled(step, model, SQUARED, model.targets, quiet=QUIET)
    compare(got, run(Filtered(), model, SQUARED, model.targets, quiet=QUIET))


def test_a_masked_step_is_a_step_without_a_loss():
    model, mask = ALL["spiking"](), np.ones(6)
    mask[list(QUIET)] = 0
    _, wanted = run(Filtered(), model, SQUARED, model.targets, quiet=QUIET)
    got = sequence("spiking", step_of("spiking", FILTERED), mask=jnp.asarray(mask))
    assert relative_error(got, summed([g for g in wanted if g is not None])) < TOLERANCE


def test_what_learns_is_named_and_refused_where_it_could_not():
    step = step_of("spiking", FILTERED)
    names = step.report().to_dict()["learning"]
    assert names and f"which it is made: {names[0]} (" in str(step.report())
    assert all(f"{name}[t] = learn(" in str(step.program) for name in names)
    assert etcompile.parse_program(str(step.program)) == step.program
    with pytest.raises(etcompile.UnsupportedError, match="depends on the loss"):
        sequence("spiking", step, chunk=3)
    with pytest.raises(etcompile.AlgorithmError, match="no place in a window"):
        step_of("spiking", FILTERED, within="exact")
    model, carry = ALL["spiking"](), step.init_carry()
    with pytest.raises(etcompile.UnsupportedError, match="cannot advance"):
        jax.grad(lambda p: jnp.sum(step.apply(p, carry, jnp.asarray(model.xs[0]))[1]))(step.params)


def test_a_recurrence_that_depends_on_the_loss_says_how_it_is_meant():
    @etcompile.algorithm("means_it_otherwise")
    def unmeant(p):
        for r in p.relations:
            L = p.recur(decay=0.9, inject=p.signal(r.group))
            p.gradient(r, p.contract(L, p.outer(r)))

    with pytest.raises(etcompile.PassError, match=r"(?s)depends on the loss.*p\.learning_carry"):
        compiled(ALL["rate"](), unmeant)


@pytest.mark.parametrize("name", ["spiking", "conv"])
def test_products_with_activity_run_in_chunks(name):
    steps = [compiled(ALL[name](), PRODUCTS) for _ in range(2)]
    one_by_one, in_chunks = (sequence(name, step, chunk=c) for step, c in zip(steps, (1, 4), strict=True))
    assert relative_error(in_chunks, one_by_one) < TOLERANCE
    assert relative_error(steps[1].traces, steps[0].traces) < TOLERANCE


# --- modulators that are carried -------------------------------------------------------------------------------------------


def test_a_mean_of_modulators_advances_with_every_step_and_outlasts_a_reset():
    model, step, plain = (
        ALL["rate"](),
        step_of("rate", "three_factor", baseline=0.25),
        step_of("rate", "three_factor"),
    )
    rewards, b = np.random.default_rng(3).standard_normal(12), 0.0
    for episode in (rewards[:6], rewards[6:]):
        step.reset(), plain.reset()
        for t, reward in enumerate(episode):
            x, y = jnp.asarray(model.xs[t]), jnp.asarray(model.targets[t])
            if t in QUIET:
                step(x, modulator=reward), plain(x)
            else:
                _, got = step.value_and_grad(SQUARED.jax)(x, y, modulator=reward)
                _, wanted = plain.value_and_grad(SQUARED.jax)(x, y, modulator=reward - b)
                assert relative_error(flattened(got), flattened(wanted)) < TOLERANCE
            b += 0.25 * (reward - b)
    with pytest.raises(etcompile.InputError, match="steps without a loss take it too"):
        step(jnp.asarray(model.xs[0]))
    with pytest.raises(etcompile.UnsupportedError, match="made of earlier steps"):
        sequence("rate", step, chunk=2, modulator=jnp.asarray(rewards[:6]))


def test_a_mean_of_other_units_is_not_kept():
    step = step_of("lstm", "three_factor", baseline=0.25)
    step(jnp.ones((3, 3)), modulator=2.0)
    step.reset(batch_size=5)
    step(jnp.ones((5, 3)), modulator=1.0)
    kept = next(step.traces[e.name] for e in step.program.equations if e.op == "lasting")
    assert relative_error(kept, np.full((5, 4), 0.25)) < TOLERANCE


# --- masks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("algo", ["three_factor", "osttp"])
def test_a_signal_of_its_own_is_masked_whatever_the_target(algo, chunk):
    model, step = ALL["spiking"](), step_of("spiking", algo)
    mask = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    call = {"modulator": jnp.asarray(np.arange(6.0))} if algo == "three_factor" else {}
    step.reset()
    total, one = [], step.value_and_grad(SQUARED.jax)
    for t in range(6):
        x, y = jnp.asarray(model.xs[t]), jnp.asarray(model.targets[t])
        if mask[t]:
            total.append(flattened(one(x, y, **{k: v[t] for k, v in call.items()})[1]))
        else:
            step(x)
    step.reset()
    targets = jnp.where(mask[:, None, None] == 0, jnp.nan, jnp.asarray(model.targets))
    run_all = step.scan_value_and_grad(SQUARED.jax, chunk=chunk)
    _, got = run_all(jnp.asarray(model.xs), targets, mask=jnp.asarray(mask), **call)
    assert relative_error(flattened(got), summed(total)) < TOLERANCE


def test_a_mask_of_examples_masks_a_signal_of_its_own():
    """Only the first example counts: its gradient is that of the example alone."""
    model, step = ALL["rate"](), step_of("rate", "three_factor")
    mask = np.zeros((6, 3))
    mask[:, 0] = 1
    state = dict(h=jnp.asarray(model.states["h"][:1]))
    alone = etcompile.compile(
        etcompile.from_function(model.fn, {k: jnp.asarray(v) for k, v in model.weights.items()}, state),
        jnp.asarray(model.xs[0, :1]), algo="three_factor",
    )  # fmt: skip

    def each(out, y):
        return jnp.sum((out - y) ** 2, -1)

    step.reset()
    data = jnp.asarray(model.xs), jnp.asarray(model.targets)
    _, got = step.scan_value_and_grad(each)(*data, mask=jnp.asarray(mask), modulator=0.7)
    _, wanted = alone.scan_value_and_grad(SQUARED.jax)(*(v[:, :1] for v in data), modulator=0.7)
    assert relative_error(flattened(got), flattened(wanted)) < TOLERANCE


# --- what a group must show ------------------------------------------------------------------------------------------------


def shows(output):
    def fn(p, s, x):
        h = jnp.tanh(0.5 * s["h"] + x @ p["w"])
        return {"h": h}, output(p, s["h"], h, x)

    return etcompile.from_function(fn, {"w": jnp.ones((3, 4))}, {"h": jnp.zeros((2, 4))})


@pytest.mark.parametrize(
    ("word", "output", "message"),
    [
        ("shown", lambda p, old, h, x: x, "shows nothing"),
        ("derivative", lambda p, old, h, x: old @ jnp.ones((4, 2)), "old states alone"),
        ("shown_signal", lambda p, old, h, x: (h @ jnp.ones((4, 2)), (h**2) @ jnp.ones((4, 2))), "several values"),
    ],
)  # fmt: skip
def test_words_that_a_group_has_no_value_for_are_refused(word, output, message):
    @etcompile.algorithm(f"asks_{word}", preserves="changes", leaves_out="a rule of the tests")
    def asks(p):
        for r in p.relations:
            value = p.op(word, r.group)
            p.gradient(r, p.contract(p.spread(p.constant(r.group, 1.0)), p.scale(value, p.outer(r))))

    with pytest.raises(etcompile.UnsupportedError, match=message):
        etcompile.compile(shows(output), jnp.ones((2, 3)), algo=asks)
