"""Units and fan-out as the sparsity of Jacobians has them, against what the compiler found; and the gradients that follow."""

from __future__ import annotations

import os

import jax
import pytest
from numpy_gradients import grad
from oracles import relative_error
from random_units import KINDS, build, drawn, square
from units import POINTS, pattern, plain, reference

import etcompile

pytestmark = pytest.mark.usefixtures("by_numpy")
TOLERANCE = 1e-10
MODELS = int(os.environ.get("ETCOMPILE_RANDOM_UNITS", "18"))
FIRST = int(os.environ.get("ETCOMPILE_RANDOM_UNITS_FROM", "0"))
#: Models per test: a failure names one of a few.
BLOCK = 9
T = 7


def bptt(model):
    fn = plain(model.step)

    def total(params):
        def body(state, item):
            state, out = fn(params, state, item[0])
            return state, square(out, item[1])

        return jax.lax.scan(body, model.state, (model.xs, model.targets))[1].sum()

    return grad(total, model.params)


def check(number: int) -> None:
    turn = (number + number // len(KINDS)) % 4  # every kind has its turns
    model = build(drawn(number), 1 if turn == 3 else T, whole=turn == 1)
    length = len(model.xs)
    found = pattern(model.step, model.params, model.state, model.xs, points=max(POINTS, model.slots))
    function = etcompile.from_function(plain(model.step), model.params, model.state)
    step = etcompile.compile(function, model.xs[0])
    report = step.report()
    assert step.exact is not bool(report.cuts), str(report)
    assert step.exact is found.exact, f"exact={step.exact}, by the Jacobians {found.exact}\n{report}"
    wanted = None
    if found.kept:
        dense = reference(model.step, model.params, model.state, model.xs, model.targets, square, found)
        wanted = dense.grads
    if found.exact or length == 1:
        through_time = bptt(model)
        wanted = through_time if wanted is None else wanted
        assert relative_error(wanted, through_time) < TOLERANCE, "the references"
    for chunk in sorted({1, min(3, length)}):
        step.reset()
        try:
            _, grads = step.scan_value_and_grad(square, chunk=chunk)(model.xs, model.targets)
        except etcompile.UnsupportedError as error:
            # long delays beside states that others share; run step by step
            if chunk == 1 or "cannot run in chunks: units of this model have many elements" not in str(error):
                raise
            continue
        wanted = grads if wanted is None else wanted
        error = relative_error(grads, wanted)
        assert error < TOLERANCE, f"chunk {chunk}: off by {error:.1e}\n{report}"


@pytest.mark.parametrize("block", range(FIRST, FIRST + MODELS, BLOCK))
def test_units_are_those_of_the_jacobians(block):
    for number in range(block, min(block + BLOCK, FIRST + MODELS)):
        try:
            check(number)
        except Exception as error:
            error.add_note(f"model {number}: {drawn(number)}")
            raise
