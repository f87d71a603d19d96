"""The pullbacks that are written down are those of ``jax.vjp``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from etcompile.frontend.jaxpr import flatten_jaxpr
from etcompile.lowering import transposes
from etcompile.lowering.tape import Tape

rng = np.random.default_rng(0)
X, Y = jnp.asarray(rng.normal(size=(2, 3, 4))), jnp.asarray(rng.normal(size=(2, 3, 4)))
WHERE = X > 0

FUNCTIONS = {
    "add": (lambda x, y: x + y, X, Y),
    "the same twice": (lambda x: x * x + (x - x * 2.0) + (x + x), X),
    "sub": (lambda x, y: y - x, X, Y),
    "neg": (lambda x: -x, X),
    "mul": (lambda x, y: x * y, X, Y),
    "mul, constant": (lambda x: 2.5 * x * np.arange(4.0), X),
    "div": (lambda x: x / 3.0, X),
    "div, by itself": (lambda x, y: x / y, X, Y),
    "exp, tanh, logistic": (lambda x: jnp.exp(x) + jnp.tanh(x) * jax.nn.sigmoid(x), X),
    "infinite": (lambda x: jnp.where(x > 0, jnp.log(x), x), X),
    "select_n": (lambda x, y: jnp.where(WHERE, x, y), X, Y),
    "select_n of three": (lambda x, y: lax.select_n(jnp.ones(X.shape, jnp.int32), x, y, x), X, Y),
    "dtype": (lambda x: x.astype(jnp.float32) * 2, X),
    "reshape": (lambda x: x.reshape(4, 6), X),
    "squeeze": (lambda x: (x[:, None] * 2)[:, 0], X),
    "transpose": (lambda x: x.transpose(2, 0, 1), X),
    "broadcast": (lambda x: lax.broadcast_in_dim(x, (5, 2, 3, 4), (1, 2, 3)), X),
    "broadcast of ones": (lambda x: x[:, :1] + jnp.zeros((2, 3, 4)), X),
    "sum": (lambda x: x.sum((0, 2)), X),
    "concatenate": (lambda x, y: jnp.concatenate([x, y, x], 1), X, Y),
    "slice": (lambda x: x[1:, :2, 1:3], X),
    "slice, strided": (lambda x: x[:, ::2], X),
    "matrix": (lambda x, y: x[0] @ y[0].T, X, Y),
    "einsum": (lambda x, y: jnp.einsum("bik,bjk->bji", x, y), X, Y),
    "contracted in another order": (
        lambda x, y: lax.dot_general(x, y.transpose(2, 0, 1), (((2, 0), (0, 1)), ((), ()))),
        X,
        Y,
    ),
    "batched in another order": (
        lambda x, y: lax.dot_general(x, y, (((1,), (1,)), ((2, 0), (2, 0)))),
        X,
        Y,
    ),
    "outer": (lambda x, y: lax.dot_general(x[0], y[1], (((), ()), ((), ()))), X, Y),
    "mixed precision": (
        lambda x, y: jnp.matmul(x[0].astype(jnp.bfloat16), y[0].T, preferred_element_type=jnp.float64),
        X,
        Y,
    ),
    "complex": (lambda x, y: jnp.abs((x + 1j * y) * (2 - 1j)), X, Y),
    "bfloat16": (lambda x: (x.astype(jnp.bfloat16)[:, None] + jnp.zeros((2, 9, 3, 4), jnp.bfloat16)).sum(1), X),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_pullback_is_that_of_vjp(name):
    fn, *args = FUNCTIONS[name]
    out, pull = jax.vjp(fn, *args)
    cotangent = jnp.asarray(rng.normal(size=out.shape)).astype(out.dtype)
    graph = flatten_jaxpr(jax.make_jaxpr(fn)(*args))
    tape = Tape(graph, args, frozenset())
    (result,) = graph.outputs
    found = tape.pull({result: cotangent}, set(graph.inputs))
    for v, wanted in zip(graph.inputs, pull(cotangent), strict=True):
        assert found[v].shape == wanted.shape and found[v].dtype == wanted.dtype
        np.testing.assert_allclose(found[v], wanted, rtol=1e-13, atol=1e-14)


def test_each_of_them_is_used():
    used = set()
    for fn, *args in FUNCTIONS.values():
        used |= {operation.name for operation in flatten_jaxpr(jax.make_jaxpr(fn)(*args)).operations}
    assert {"add_any", "copy"} >= set(transposes._RULES) - used
