"""Random recurrent models: the compiler against autodiff and the dense reference, and its passes against their word."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from numpy_gradients import grad
from oracles import dense_d_rtrl, relative_error
from random_models import build, loss_fn, recipes
from shared import shared

import etcompile
from etcompile import PassManager, parse_program

pytestmark = pytest.mark.usefixtures("by_numpy")
EXAMPLES = int(os.environ.get("ETCOMPILE_RANDOM_MODELS", "200"))
#: Models per test: enough tests to share among workers, and a failure names a few models.
BLOCK = 10
TOLERANCE = 1e-10


def compiled(model, **options):
    function = etcompile.from_function(model.plain, model.params, model.state)
    return etcompile.compile(function, model.xs[0], **options)


def profile(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )


def cut_tree(tree):
    return jax.tree.map(jax.lax.stop_gradient, tree)


def reference(model):
    """The dense reference of `oracles` in reverse mode: losses, and the sum of the gradients.

    Per step and group the loss is taken once more with the group's old states produced by the chain of local steps
    (where everything marked is cut) and its new states by the local step: its derivative along that chain is
    (L D + bypass) J.
    """
    step = model.step
    keep = {"cut": lambda v: v, "put": lambda name, v: v}

    def pick(state, group):
        return {name: state[name] for name in group}

    def total(params):
        def one(carry, item):
            state, chains = carry
            x, target = item
            fixed = cut_tree(params)
            new, out = step(params, state, x, **keep)
            loss = loss_fn(out, target)
            past, grown = 0.0, []
            for group, chain in zip(model.groups, chains, strict=True):
                old = {**state, **chain}
                own = pick(step(fixed, old, x, cut=cut_tree, put=keep["put"])[0], group)
                _, seen = step(fixed, old, x, cut=keep["cut"], put=lambda name, v, own=own: own.get(name, v))
                past = past + loss_fn(seen, target)
                grown.append(pick(step(params, old, x, cut=cut_tree, put=keep["put"])[0], group))
            return (cut_tree(new), grown), (loss, loss + past)

        start = (model.state, [pick(model.state, g) for g in model.groups])
        _, (losses, terms) = jax.lax.scan(one, start, (model.xs, model.targets))
        return terms.sum(), losses

    grads, losses = grad(total, model.params, has_aux=True)
    return losses, grads


@profile(4)
@given(recipes())
def test_the_reverse_reference_is_the_dense_one(recipe):
    model = build(recipe)
    losses, grads = reference(model)
    wanted = dense_d_rtrl(
        model.step, model.params, model.state, model.xs, (model.targets,), loss_fn, model.groups
    )
    assert relative_error(losses, wanted.losses) < TOLERANCE
    assert relative_error(grads, wanted.grads) < TOLERANCE


def reached_by_parameters(model, group) -> bool:
    """Whether any parameter changes a state of the group within the sequence."""

    def total(params):
        state = model.state
        for x in model.xs:
            state, _ = model.plain(params, state, x)
        return sum(jnp.sum(jnp.sin(state[name])) for name in group)

    grads = grad(total, model.params)
    return any(np.any(g) for g in jax.tree.leaves(grads))


@shared
def drawn() -> list:
    """All recipes of the tests below."""
    found = []
    profile(EXAMPLES)(given(recipes())(lambda recipe: found.append(recipe)))()
    return found


def check_structure(model, program) -> None:
    """The groups are those of the recipe, but for states that no parameter reaches: these are not hidden."""
    found = [{path for path, _ in g.states} for g in program.header.groups]
    for group in map(set, model.groups):
        own = [g for g in found if g & group]
        assert len(own) <= 1 and all(g <= group for g in own)
        left = group.difference(*own)
        assert not left or not reached_by_parameters(model, left), f"{left} has no trace"
    assert set().union(*found) <= set().union(*model.groups)
    assert program.exact is model.exact


def check_gradients(model, step) -> None:
    """The first step equals autodiff, the sum over four steps the dense reference."""
    run = step.value_and_grad(loss_fn)
    found = [run(x, y) for x, y in zip(model.xs, model.targets, strict=True)]

    def first_loss(params):
        return loss_fn(model.plain(params, model.state, model.xs[0])[1], model.targets[0])

    autodiff = grad(first_loss, model.params)
    assert relative_error(found[0][1], autodiff) < TOLERANCE
    losses, wanted = reference(model)
    assert relative_error(jnp.stack([loss for loss, _ in found]), losses) < TOLERANCE
    assert relative_error(jax.tree.map(lambda *g: sum(g), *[g for _, g in found]), wanted) < TOLERANCE


def check(recipe, passes: bool) -> None:
    """All laws of one model; with ``passes``, those of each optimisation pass as well: it keeps what it declares."""
    model = build(recipe)
    step = compiled(model, **({"manager": PassManager(check=True, tolerance=1e-9)} if passes else {}))
    assert parse_program(str(step.program)) == step.program
    check_structure(model, step.program)
    check_gradients(model, step)


@pytest.mark.parametrize("block", range(0, EXAMPLES, BLOCK))
def test_laws_of_every_model(block):
    for number, recipe in enumerate(drawn()[block : block + BLOCK], block):
        try:
            check(recipe, passes=number % 2 == 0)
        except Exception as error:
            error.add_note(f"random model {number}: {recipe}")
            raise
