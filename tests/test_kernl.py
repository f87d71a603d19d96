"""KeRNL against its equations in plain numpy, what it learns, and what a reset leaves alone."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from numpy_models import MODELS, SQUARED
from numpy_rules import KeRNL, run
from oracles import relative_error
from test_rules import QUIET, autodiff_of_the_first_step, compare, compiled, run_compiled, signs_of_states

import etcompile

pytestmark = pytest.mark.usefixtures("by_numpy")


@pytest.mark.parametrize("name", MODELS)
def test_kernl_equals_its_equations(name):
    model = MODELS[name]()
    step = compiled(model, "kernl", kernel=0.6, rate=0.03, seed=4)
    got = run_compiled(step, model, SQUARED, model.targets, quiet=QUIET[1:])
    rule = KeRNL(0.6, 0.03, signs_of_states(step, model, 4))
    compare(got, run(rule, model, SQUARED, model.targets, quiet=QUIET[1:]))
    assert relative_error(got[1][0], autodiff_of_the_first_step(name)) < 1e-10


def leaky(params, state, x):
    h = jnp.asarray([0.9, 0.5]) * state["h"] + x @ params["w"]
    return {"h": h}, h


def test_the_kernel_of_leaky_units_is_found_and_outlasts_a_reset():
    """Units that do not meet: β stays the identity, k goes to their leaks, and the rule becomes D-RTRL."""
    model = etcompile.from_function(leaky, {"w": jnp.ones((3, 2))}, {"h": jnp.zeros((16, 2))})
    step = etcompile.compile(model, jnp.ones((16, 3)), algo="kernl", kernel=0.7, rate=0.003)
    for _ in range(12):
        step.reset()
        step.scan(jnp.zeros((60, 16, 3)))
    lasting = [e.name for e in step.program.equations if e.op == "lasting"]
    kinds = {
        step.program.equation(name).type.kind: np.asarray(step.traces[name][0])
        for name in lasting
        if step.program.equation(name).type.kind == "hidden"
    }
    np.testing.assert_allclose(0.7 + kinds["hidden"][0], [0.9, 0.5], atol=0.02)
    assert "goes on" not in str(step.report())


@pytest.mark.parametrize("options", [{"kernel": 1.0}, {"rate": -1.0}, {"rate": "fast"}], ids=str)
def test_bad_options(options):
    with pytest.raises(etcompile.OptionError):
        compiled(MODELS["rate"](), "kernl", **options)
