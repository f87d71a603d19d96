"""The small parts under the names that other libraries use."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import etcompile
from etcompile.errors import InputError, OptionError
from etcompile.nn import FixedRandomFeedback, KappaFilter, PresynapticTrace

XS = np.random.default_rng(0).normal(size=(4, 3))


@pytest.mark.parametrize(
    "make",
    [lambda: PresynapticTrace(jnp.zeros(3), leak=0.5), lambda: PresynapticTrace(init_value=jnp.zeros(3), leak=0.5),
     lambda: PresynapticTrace(jnp.zeros(3), 0.5), lambda: PresynapticTrace((3,), decay=0.5)],
)  # fmt: skip
def test_presynaptic_traces_leak_or_decay(make):
    trace, wanted = make(), np.zeros(3)
    for x in XS:
        wanted = 0.5 * wanted + x
        np.testing.assert_allclose(trace.update(x), wanted, rtol=1e-12)
    assert trace.leak == trace.decay == 0.5


@pytest.mark.parametrize("by_name", [True, False])
def test_kappa_filters_have_the_numbers_of_braintrace(by_name):
    braintrace = pytest.importorskip("braintrace")
    theirs = braintrace.KappaFilter(jnp.zeros(3), 0.5)
    mine = KappaFilter(init_value=jnp.zeros(3), kappa=0.5) if by_name else KappaFilter(jnp.zeros(3), 0.5)
    for x in XS:
        np.testing.assert_allclose(mine.update(x), theirs.update(x), rtol=1e-12)


def test_a_filter_starts_from_a_value_that_is_named_so():
    start = jnp.asarray([1.0, 2.0, 3.0])
    mine = KappaFilter(init_value=start, kappa=0.5)
    np.testing.assert_allclose(mine.value, start)
    np.testing.assert_allclose(mine.update(XS[0]), 0.5 * XS[0] + 0.5 * start, rtol=1e-12)
    mine.reset_state()
    assert not mine.value.any()


def test_feedback_from_a_key_is_scaled_normal_numbers():
    key = jax.random.key(7)
    for made in (
        FixedRandomFeedback(4, 3, key),
        FixedRandomFeedback(n_target=4, n_layer=3, key=key),
        FixedRandomFeedback(4, 3, key, 0.1),
    ):
        assert isinstance(made.B, jax.Array) and made.B.shape == (4, 3)
        np.testing.assert_allclose(made.B, 0.1 * jax.random.normal(key, (4, 3)), rtol=1e-12)
    np.testing.assert_allclose(
        FixedRandomFeedback(4, 3, key, init_scale=2.0).B, 2.0 * jax.random.normal(key, (4, 3)), rtol=1e-12
    )


def test_feedback_is_frozen_under_grad_and_compiles():
    made = FixedRandomFeedback(4, 3, jax.random.key(7))

    def through(B):
        made.B = B
        return jnp.sum(made.project(jnp.ones(4)) ** 2)

    B = made.B
    assert not jax.grad(through)(B).any()
    made.B = B
    y = jnp.arange(4.0)
    np.testing.assert_allclose(jax.grad(lambda y: made.project(y).sum())(y), B.sum(1), rtol=1e-12)
    np.testing.assert_allclose(brainstate.transform.jit(made.project)(y), y @ B, rtol=1e-12)


def test_the_target_among_arguments():
    assert etcompile.extract_y_target((1, 2, 3)) == 3
    assert etcompile.extract_y_target((1, 2, 3), index=0) == 1
    assert etcompile.extract_y_target(()) is None
    with pytest.raises(InputError, match="index=5 of 2"):
        etcompile.extract_y_target((1, 2), 5)


def test_two_names_for_one_thing_are_refused():
    for wrong in (
        lambda: PresynapticTrace((3,), 0.5, leak=0.5),
        lambda: PresynapticTrace((3,)),
        lambda: PresynapticTrace((3,), leak=1.5),
        lambda: KappaFilter((3,), 0.5, init_value=jnp.zeros(3)),
        lambda: KappaFilter(kappa=0.5),
        lambda: FixedRandomFeedback(4, 3, 0, init_scale="a"),
    ):
        with pytest.raises(OptionError):
            wrong()
