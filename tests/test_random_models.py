"""Random recurrent models: the compiler against autodiff and the dense reference, and its passes against their word."""

from __future__ import annotations

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from oracles import dense_d_rtrl, relative_error
from random_models import build, loss_fn, recipes

import etcompile
from etcompile import PassManager, parse_program

EXAMPLES = int(os.environ.get("ETCOMPILE_RANDOM_MODELS", "200"))
TOLERANCE = 1e-10


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Tiny programs that run once: compiling them well would take most of the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@dataclasses.dataclass(frozen=True)
class Checking(PassManager):
    """Checks every declaration; runs each program once though two passes meet at it."""

    def run(self, program, passes, gradients=None):
        return super().run(program, passes, functools.cache(gradients))


def compiled(model, **options):
    function = etcompile.from_function(model.plain, model.params, model.state)
    return etcompile.compile(function, model.xs[0], **options)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)
@given(recipes())
def test_random_models(recipe):
    check(recipe)


def check(recipe):
    model = build(recipe)
    step = compiled(model, manager=Checking(check=True, tolerance=1e-9))
    program = step.program
    assert parse_program(str(program)) == program
    found = {tuple(sorted(path for path, _ in g.states)) for g in program.header.groups}
    assert found == {tuple(sorted(g)) for g in model.groups}
    assert step.exact is model.exact

    losses, grads = [], []
    run = step.value_and_grad(loss_fn)
    for x, y in zip(model.xs, model.targets, strict=True):
        loss, grad = run(x, y)
        losses.append(loss)
        grads.append(grad)

    @jax.jit
    def autodiff(params):
        return loss_fn(model.plain(params, model.state, model.xs[0])[1], model.targets[0])

    assert relative_error(grads[0], jax.grad(autodiff)(model.params)) < TOLERANCE

    wanted = dense_d_rtrl(
        model.step, model.params, model.state, model.xs, (model.targets,), loss_fn, model.groups
    )
    assert relative_error(jnp.stack(losses), wanted.losses) < TOLERANCE
    for got, each in zip(grads, wanted.grads_per_step, strict=True):
        assert relative_error(got, each) < TOLERANCE
