"""Losses with operations that JAX does not differentiate: the line is named, and calls to the host without derivative run in chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_reset import XS, fresh, same

from etcompile.errors import UnsupportedError


def on_the_host(v):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(v.shape, v.dtype), v)


@jax.custom_jvp
def with_derivative(v):
    return on_the_host(v)


@with_derivative.defjvp
def _with_derivative_jvp(primals, tangents):
    return with_derivative(*primals), jnp.cos(primals[0]) * tangents[0]


UNDERIVABLE = {
    "host": lambda out: jnp.sum(on_the_host(out)),
    "operand": lambda out: jnp.sum(jax.scipy.special.betainc(1.5 + jnp.tanh(out), 2.0, 0.4)),
    "while": lambda out: jax.lax.while_loop(lambda v: v < 3, lambda v: 2 * v + 1, jnp.sum(out**2)),
}


@pytest.mark.parametrize("algo", ["d_rtrl", "bptt"])
@pytest.mark.parametrize("loss", UNDERIVABLE)
def test_a_loss_that_jax_does_not_differentiate_is_named_where_it_is(loss, algo):
    step, fn = fresh(algo=algo), UNDERIVABLE[loss]
    before = step.executor.live.states()["h"]
    calls = [lambda: step.scan_value_and_grad(fn)(XS)]
    if algo != "bptt":
        calls += [lambda: step.value_and_grad(fn)(XS[0]), lambda: step.scan_value_and_grad(fn, chunk=2)(XS)]
    for call in calls:
        with pytest.raises(
            UnsupportedError, match=r"test_underivable_losses\.py:\d+: the gradient of the loss"
        ):
            call()
    assert step.executor.live.states()["h"] is before


@pytest.mark.parametrize(
    ("host", "plain"),
    [
        (lambda out: jnp.sum(with_derivative(out)), lambda out: jnp.sum(jnp.sin(out))),
        (
            lambda out: jnp.sum(out * on_the_host(jax.lax.stop_gradient(out))),
            lambda out: jnp.sum(out * jnp.sin(jax.lax.stop_gradient(out))),
        ),
    ],
)
def test_calls_to_the_host_without_a_way_to_batch_them_run_in_chunks(host, plain):
    reference = fresh().scan_value_and_grad(plain)(XS)
    for chunk in (1, 2):
        same(fresh().scan_value_and_grad(host, chunk=chunk)(XS), reference)
