"""Laws of every model, on random step functions out of operations that people bring.

Nothing is known of these models beforehand, so what is asked holds of all: a model is compiled, or refused in our own words;
it runs as it did; the gradient of the first step is autodiff's; chunks change nothing; an exact program gives the gradient of
backpropagation; and a program is exact if and only if nothing is listed that it loses.
"""

from __future__ import annotations

import dataclasses
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_evaluation import by_numpy
from numpy_gradients import vjp
from oracles import relative_error
from random_steps import Recipe, build, recipe

import etcompile
from etcompile.errors import EtcompileError, ModelError

MODELS = int(os.environ.get("ETCOMPILE_RANDOM_STEPS", "300"))
#: Models per test: enough tests to share among workers, and a failure names a few models.
BLOCK = 10
#: Rules that take turns; each runs, or says why it does not.
RULES = (
    "pp_prop", "e_prop", "rtrl", "snap", "uoro", "kf_rtrl", "rank_rtrl", "ostl", "ottt", "otpe", "rflo", "three_factor", "bptt",
)  # fmt: skip


def compiled(model, **options):
    function = etcompile.from_function(model.step, model.params, model.state)
    return function, etcompile.compile(function, model.xs[0], **options)


def loss_of(model, function):
    """The loss as a user writes it: a function of the result that reads what it likes of the model."""
    return lambda out, target: model.loss(function.params, function.state, out, target)


def reference(model, params, state, xs, targets):
    """Autodiff: losses, results, the last states, the gradient of the first loss and that of their sum."""

    def losses_of(params):
        def one(state, item):
            x, target = item
            state, out = model.step(params, state, x)
            return state, (model.loss(params, state, out, target), out)

        last, (losses, outputs) = jax.lax.scan(one, state, (xs, targets))
        return losses, (losses, outputs, last)

    losses, pull, found = vjp(losses_of, params, has_aux=True)
    return *found, *pull(np.eye(len(losses), dtype=losses.dtype)[0]), *pull(np.ones_like(losses))


def as_numbers(tree):
    """Leaves that relative errors can be taken of."""
    leaves = jax.tree.leaves(tree)
    data = [
        jax.random.key_data(v) if jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in leaves
    ]
    return [jnp.asarray(v, jnp.complex128) for v in data]


def check(made: Recipe) -> None:
    model, number = build(made), made.number
    try:
        function, step = compiled(model)
    except ModelError as error:
        if "no hidden state" not in str(error):
            raise
        return
    report = step.report()
    listed = bool(report.cuts or report.leaves_out)
    assert step.exact is not listed, f"exact={step.exact}, and {len(report.cuts)} cuts; {report.leaves_out!r}"
    loss = loss_of(model, function)

    losses, outputs, state, first, backpropagated = reference(
        model, model.params, model.state, model.xs, model.targets
    )
    run = step.value_and_grad(loss)
    found = [run(x, y) for x, y in zip(model.xs, model.targets, strict=True)]
    online = jax.tree.map(lambda *g: sum(g[1:], start=g[0]), *[g for _, g in found])
    close(jnp.stack([f for f, _ in found]), losses, model, "losses")
    close(as_numbers(function.state), as_numbers(state), model, "states")
    close(found[0][1], first, model, "the gradient of the first step")
    if step.exact:
        close(online, backpropagated, model, "the gradient of an exact program")

    step.reset()
    turn = number % 9  # six of nine end here: the others cost as much again
    if turn == 0:
        chunked, grads = step.scan_value_and_grad(loss, chunk=2)(model.xs, model.targets)
        close(chunked, losses, model, "losses in chunks")
        close(grads, online, model, "the gradient in chunks")
    elif turn == 1:
        close(step.scan(model.xs), outputs, model, "results of a scan")
    elif turn == 2:
        check_rule(model, RULES[number // 9 % len(RULES)], losses, backpropagated)


def check_rule(model, rule: str, losses, backpropagated) -> None:
    """Another rule runs, or says why it does not; if it calls itself exact, it is."""
    try:
        function, step = compiled(model, algo=rule)
        with warnings.catch_warnings():  # some rules do not hear what a loss says of states, and say so
            warnings.simplefilter("ignore", etcompile.EtcompileWarning)
            found, grads = step.scan_value_and_grad(loss_of(model, function))(model.xs, model.targets)
    except EtcompileError:
        return
    report = step.report()
    assert step.exact is not bool(report.cuts or report.leaves_out), f"{rule}: exact={step.exact}"
    close(found, losses, model, f"losses under {rule}")
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads)), rule
    if step.exact:
        close(grads, backpropagated, model, f"the gradient of {rule}, which calls itself exact")


def close(found, wanted, model, what: str) -> None:
    error = relative_error(found, wanted)
    if error >= model.tolerance and model.recipe.dtype == "bfloat16":
        # The terms of a leaf may cancel, and then 16 bits are worth little of it; they are worth as much of the largest leaf as
        # ever, and in 64 bits all of this holds to 1e-10.
        error = largest_difference(found, wanted)
        check(dataclasses.replace(model.recipe, dtype="float64"))
    assert error < model.tolerance, f"{what}: off by {error:.1e}"


def largest_difference(found, wanted) -> float:
    """The largest difference over all leaves, by the largest number that is wanted."""
    found, wanted = (
        [np.asarray(v, np.complex128) for v in jax.tree.leaves(tree)] for tree in (found, wanted)
    )
    scale = max(np.abs(w).max(initial=1e-30) for w in wanted)
    return max(np.abs(f - w).max(initial=0.0) for f, w in zip(found, wanted, strict=True)) / scale


@pytest.mark.parametrize("block", range(0, MODELS, BLOCK))
def test_laws_of_every_model(block):
    for number in range(block, min(block + BLOCK, MODELS)):
        # XLA compiles a sixth of the programs, and a third of other rules', of every turn and every rule: the numbers are the question.
        share = 3 if number % 9 == 2 else 6
        try:
            with by_numpy(on=(number + number // 9 + number // 108) % share != 0):
                check(recipe(number))
        except Exception as error:
            error.add_note(f"random step {number}: {recipe(number)}")
            raise
