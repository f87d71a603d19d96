"""What tests run by numpy is what XLA computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy_evaluation import op_by_op
from numpy_gradients import grad, vjp
from oracles import relative_error

A = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
WHOLE = jnp.asarray([[7, -3, 5, 2], [0, 9, -8, 1], [4, 4, -1, 6]])


def numbers(a, whole):
    """Operations on numbers of 64 and of 16 bits, one after another."""
    half = a.astype(jnp.bfloat16)
    return {
        "sorted": (jnp.sort(a, 1), jnp.argsort(a, 0), jnp.argmax(a, 1), jnp.argmin(a, 0)),
        "placed": (a[jnp.asarray([2, 0, 2])], a[:, jnp.asarray([1, 3])], a[jnp.asarray([0, 1]), jnp.asarray([3, 2])]),
        "put": (a.at[jnp.asarray([2, 0])].set(whole[:2] * 0.1), a.at[:, jnp.asarray([1, 3, 1])].add(a[:, :3]), a.at[1, 2].set(3.0),
                a.at[jnp.asarray([0, 1]), jnp.asarray([3, 2])].add(0.5), a.at[jnp.asarray([1, 7])].add(1.0), a.at[0].apply(jnp.sin)),
        "padded": (lax.pad(a, 7.0, [(-1, 2, 0), (1, -2, 1)]), lax.pad(a, 7.0, [(1, 1, 2), (0, -3, 0)])),
        "rounded": (jnp.round(3 * a), (5 * a).astype(jnp.int32), jnp.trunc(a), a % 0.7, lax.rem(whole, whole**2 + 3)),
        "bits": (whole << 3, lax.shift_right_logical(whole, jnp.full_like(whole, 60)), whole >> 1),
        "viewed": lax.bitcast_convert_type(a.astype(jnp.float32), jnp.int32),
        "errors": (lax.erf(a), lax.erfc(a), lax.erf_inv(jnp.tanh(a))),
        "apart": (jnp.stack([a, -a], 1), *jnp.unstack(a), *jnp.split(a, 2, 1)),
        "half": (half * half, half @ half.T, jnp.sum(half, 1), jnp.tanh(half), half.astype(jnp.float64)),
    }  # fmt: skip


def halved(a):
    """Each until it is small: of a batch, some go on longer."""
    return jax.vmap(lambda v: lax.while_loop(lambda w: abs(w).sum() > 1, lambda w: w / 2, v))(a)


def draws(key):
    first, second = jax.random.split(key)
    return (
        jax.random.normal(first, (3, 5)),
        jax.random.uniform(second, (4,), jnp.float32),
        jax.random.bernoulli(first, 0.3, (2, 3)),
        jax.random.bits(second, (5,)),
        jax.random.key_data(second) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else second,
    )


def agree(found, wanted):
    for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (f.shape, f.dtype, f.weak_type) == (w.shape, w.dtype, w.weak_type)
        tolerance = {8: 1e-14, 4: 1e-6, 2: 1e-2}[f.dtype.itemsize] if f.dtype.kind not in "iub" else 0
        f, w = np.asarray(f, float), np.asarray(w, float)
        np.testing.assert_allclose(f, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("fn", "arguments"),
    [
        (numbers, (A, WHOLE)),
        (halved, (jnp.cumsum(A**2, 0),)),
        (draws, (jax.random.PRNGKey(3),)),
        (draws, (jax.random.key(4),)),
    ],
    ids=["numbers", "loops of a batch", "raw key", "typed key"],
)
def test_numpy_gives_what_xla_gives(fn, arguments):
    wanted = jax.jit(fn)(*arguments)
    agree(fn(*arguments), wanted)  # operation by operation, as tests draw and compare
    agree(op_by_op(fn, *arguments), wanted)


def moved(a, b):
    """What outside of a jit is done without a program."""
    where = jnp.asarray([2, 0, 2])
    return [
        *(a + b, a - b, a * b, -a, abs(a), jnp.maximum(a, b), jnp.minimum(a, b), a[1], a[1:, ::2], a[where], a.T[::-1]),
        *(a < b, a == a.T[0, 0], jnp.where(a > b, a, 0), jnp.full((2, 3), a[0, 0]), jnp.arange(5) + a[0, 0], jnp.pad(a, 1)),
        *(a.at[1].set(b[0]), jnp.concatenate([a, b]), jnp.stack([a, b], 1), jnp.ones((2, 1)) * a[0], a.reshape(-1), a[..., None]),
        *(a.astype(jnp.float32), a.max(1), a.min(), (a > b).any(0), jnp.zeros_like(a), a.astype(bool), jnp.squeeze(a[:1]), 2 * a),
        *((a / b, jnp.sqrt(abs(a)), jnp.floor(a)) if jnp.issubdtype(a.dtype, jnp.floating) else ()),
        *((a / np.asarray(3**0.5, a.dtype), a / a[0, 0], a / b[:1]) if jnp.issubdtype(a.dtype, jnp.floating) else ()),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float64", "float32", "int32", "bfloat16"])
def test_numbers_that_are_moved_without_a_program_are_those_of_xla_to_the_last_bit(dtype):
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(5 * rng.normal(size=(3, 4))).astype(dtype) for _ in range(2))
    for found, wanted in zip(moved(a, b), jax.jit(moved)(a, b), strict=True):
        assert (found.shape, found.dtype, found.weak_type) == (wanted.shape, wanted.dtype, wanted.weak_type)
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()


def test_what_is_moved_without_a_program_shares_no_memory_and_stays_on_its_device():
    a = jnp.arange(6.0).reshape(2, 3) + 0
    row, device = a[1], jax.devices()[0]
    jax.jit(lambda v: v * 2, donate_argnums=0)(a).block_until_ready()
    assert np.array_equal(row, [3, 4, 5]) and not row.committed
    assert (jax.device_put(row, device) + 1).committed


def branching(p):
    """Loops that weights reach or not, conditions, declared derivatives, complex numbers and results that are no numbers, in a row."""

    def body(carry, x):
        new = jnp.tanh(carry @ p["w"] + x)
        new = new + lax.cond(x.sum() > 0, lambda v: v * jnp.sin(p["b"]), lambda v: v, carry)
        return new, ((jax.nn.softmax(new) * carry).sum() + new.max(), jnp.sort(new), jnp.argmax(new))

    last, (losses, rows, _) = lax.scan(body, jnp.ones(4), p["x"], reverse=True)
    spectrum = jnp.abs(jnp.fft.fft(last + 1j * p["b"]))
    halvings = lax.while_loop(lambda v: v > 1, lambda v: v / 2, lax.stop_gradient(last).max() + 5)
    still = lax.stop_gradient(last) * p["b"] * halvings + p["unused"] * 0
    return losses.sum() + (rows**2).sum() + jax.nn.relu(last).sum() + spectrum.sum() + still.sum(), losses


def test_gradients_by_numpy_are_those_of_jax():
    at = {"w": A.T @ A, "b": A[0], "x": A, "unused": A[1]}
    wanted, losses = jax.grad(branching, has_aux=True)(at)
    found, mine = grad(branching, at, has_aux=True)
    assert relative_error(found, wanted) < 1e-13 and relative_error(mine, losses) < 1e-13
    weights = jnp.arange(3.0)
    (wanted,) = jax.vjp(lambda p: branching(p)[1], at)[1](weights)
    (found,) = vjp(lambda p: branching(p)[1], at)[1](weights)
    assert relative_error(found, wanted) < 1e-13
