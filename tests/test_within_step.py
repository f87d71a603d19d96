"""Which way credit goes within a step: relations that carry all of it, and those that do not."""

from __future__ import annotations

import pytest
from hypothesis import given
from numpy_gradients import grad
from oracles import relative_error, time_slice
from random_models import build, loss_fn, recipes
from references import autodiff, fresh, zoo_cases
from references import compiled as compiled_case
from test_random_models import TOLERANCE, compiled, profile
from zoo import CASES, by_name

pytestmark = pytest.mark.usefixtures("by_numpy")

# At its first step pp_prop's gradient is that of autodiff. It is made of L f; what of q is not in that is added,
# unless the relation is whole.


@pytest.mark.parametrize("case", zoo_cases(CASES))
def test_the_first_step_of_pp_prop_equals_autodiff(case):
    built = fresh(case)
    step = compiled_case(built, algo="pp_prop")
    x, target = time_slice(built.xs, 0), time_slice(built.targets, 0)
    _, found = step.value_and_grad(built.loss_fn)(x, *target)
    assert relative_error(found, autodiff(case).first) < built.tolerance


@pytest.mark.slow
@profile(40)
@given(recipes())
def test_the_first_step_of_pp_prop_in_random_models(recipe):
    model = build(recipe)
    x, target = model.xs[0], model.targets[0]
    _, found = compiled(model, algo="pp_prop").value_and_grad(loss_fn)(x, target)

    def loss(params):
        return loss_fn(model.plain(params, model.state, x)[1], target)

    assert relative_error(found, grad(loss, model.params)) < TOLERANCE


def test_which_relations_are_whole():
    def whole(name):
        header = compiled_case(by_name(name)()).program.header
        return {p for r in header.relations if r.whole for p in header.site(r.site).params}

    found = whole("gru_no_batch")
    assert any("Wh" in path for path in found)
    assert not any("Wrz" in path for path in found)  # the reset gate reaches the state through weights
    assert " whole" in str(compiled_case(by_name("gru_no_batch")()).program)
