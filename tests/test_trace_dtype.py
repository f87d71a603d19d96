"""Traces stored in fewer bits: half the memory, computed as before and rounded when they are stored."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error

import etcompile

T, B, I, O = 8, 2, 5, 4
#: Half the distance of neighbouring bfloat16 numbers, relative.
ROUNDING = 2.0**-8


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


XS, YS = draw(0, T, B, I), draw(1, T, B, O)
PARAMS = {"w": draw(2, I, O), "u": 0.3 * draw(3, O, O), "a": jnp.full(O, 0.8, jnp.float32)}


def unit(params, state, x):
    h = jnp.tanh(params["a"] * state["h"] + x @ params["w"] + state["h"] @ params["u"])
    return {"h": h}, h


def squared(out, target):
    return jnp.mean((out - target) ** 2)


def compiled(trace_dtype=None, dtype=jnp.float32, **options):
    params, state = jax.tree.map(lambda v: v.astype(dtype), (PARAMS, {"h": jnp.zeros((B, O))}))
    schedule = etcompile.Schedule(trace_dtype=trace_dtype)
    model = etcompile.from_function(unit, params, state)
    return etcompile.compile(model, XS[0].astype(dtype), schedule=schedule, **options)


def gradients(step, chunk):
    return step.scan_value_and_grad(squared, chunk=chunk)(XS, YS)[1]


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, "float16"])
def test_traces_take_half_the_memory(dtype):
    half, full = compiled(dtype), compiled()
    assert all(v.dtype == jnp.dtype(dtype) for v in jax.tree.leaves(half.traces))
    assert 2 * half.report().trace_bytes == full.report().trace_bytes == 4 * B * O * (I + O + 1)
    half.value_and_grad(squared)(XS[0], YS[0])
    assert all(v.dtype == jnp.dtype(dtype) for v in jax.tree.leaves(half.traces))


@pytest.mark.parametrize(
    ("algo", "options", "chunk"),
    [
        ("d_rtrl", {}, 1),
        ("d_rtrl", {}, 3),
        ("e_prop", {"kappa": 0.5}, 1),
        ("e_prop", {"kappa": 0.5}, 3),
        ("rtrl", {}, 1),
        ("snap", {}, 1),
    ],
)
def test_gradients_differ_by_the_rounding(algo, options, chunk):
    found, wanted = (gradients(compiled(d, algo=algo, **options), chunk) for d in ("bfloat16", None))
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(found))
    assert 0 < relative_error(found, wanted) < 2 * ROUNDING


def test_within_windows():
    found, wanted = (gradients(compiled(d, within="exact"), 3) for d in ("bfloat16", None))
    assert 0 < relative_error(found, wanted) < 2 * ROUNDING


def test_a_step_computes_in_float32_and_rounds_once():
    half, full = compiled("bfloat16"), compiled()
    run = half.value_and_grad(squared), full.value_and_grad(squared)
    for x, y in zip(XS[:3], YS[:3], strict=True):
        before = half.traces
        full.traces_state.value = jax.tree.map(lambda v: v.astype(jnp.float32), before)
        found, wanted = (one(x, y) for one in run)
        assert relative_error(found, wanted) < 1e-6
        rounded = jax.tree.map(lambda v: v.astype(jnp.bfloat16), full.traces)
        for mine, theirs in zip(jax.tree.leaves(half.traces), jax.tree.leaves(rounded), strict=True):
            np.testing.assert_array_equal(mine.astype(jnp.float32), theirs.astype(jnp.float32))


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_traces_own_dtype_changes_no_bit(chunk):
    found, wanted = gradients(compiled("float32"), chunk), gradients(compiled(), chunk)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_traces_that_are_no_wider_keep_their_dtype():
    step = compiled("float16", dtype=jnp.bfloat16)
    assert {v.dtype for v in jax.tree.leaves(step.traces)} == {jnp.dtype(jnp.bfloat16)}


def test_a_dtype_that_makes_no_sense():
    for wrong in ("int8", "complex64", "half a byte", 3):
        with pytest.raises(etcompile.OptionError, match="floating-point dtype"):
            etcompile.Schedule(trace_dtype=wrong)
    with pytest.raises(etcompile.OptionError, match="wider than the traces"):
        compiled("float64")
