"""Patches of convolutions against JAX's own convolution and its derivative, for strides, dilations, groups and odd borders."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from oracles import relative_error

from etcompile.sites.patches import kernel_gradient, patches

FORMS = {
    "plain": {},
    "valid": {"padding": "VALID"},
    "strides": {"window_strides": (2, 3)},
    "dilated_kernel": {"rhs_dilation": (2, 1)},
    "dilated_input": {"lhs_dilation": (1, 2), "padding": ((1, 2), (0, 3))},
    "cropped": {"padding": ((-1, 2), (0, -2))},
    "groups": {"feature_group_count": 2},
    "channels_first": {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
    "odd_order": {"dimension_numbers": ("HNWC", "IHOW", "CWNH")},
    "a_kernel_larger_than_its_steps": {"kernel": (1, 5), "window_strides": (1, 2)},
    "all": {
        "feature_group_count": 2, "window_strides": (2, 1), "lhs_dilation": (2, 1), "rhs_dilation": (1, 2),
        "padding": ((2, 0), (1, 1)), "dimension_numbers": ("NCHW", "HWIO", "NHWC"), "kernel": (2, 3),
    },
}  # fmt: skip


def operation(kernel=(3, 2), padding="SAME", window_strides=(1, 1), **options):
    names = options.pop("dimension_numbers", ("NHWC", "HWIO", "NHWC"))
    groups = options.get("feature_group_count", 1)
    size = {"N": 3, "C": 4, "H": 7, "W": 6}
    weight = {"I": 4 // groups, "O": 6, "H": kernel[0], "W": kernel[1]}
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (5, *(size[c] for c in names[0])))
    w = jax.random.normal(keys[1], tuple(weight[c] for c in names[1]))

    def fn(x, w):
        return lax.conv_general_dilated(x, w, window_strides, padding, dimension_numbers=names, **options)

    (equation,) = jax.make_jaxpr(fn)(x[0], w).eqns
    return types.SimpleNamespace(params=equation.params), jax.vmap(fn, (0, None)), x, w


@pytest.mark.parametrize("name", FORMS)
def test_the_gradient_of_a_kernel(name):
    of, fn, x, w = operation(**FORMS[name])
    y, pull = jax.vjp(lambda w: fn(x, w), w)
    credit = jax.random.normal(jax.random.key(1), y.shape)
    found = kernel_gradient(of, x, credit, jax.ShapeDtypeStruct(w.shape, w.dtype))
    assert relative_error(found, pull(credit)[0]) < 1e-12


@pytest.mark.parametrize("steps", [1, 7, 8, 24, 26])
def test_any_number_of_steps(steps):
    of, fn, x, w = operation()
    x = jnp.resize(x, (steps, *x.shape[1:]))
    y, pull = jax.vjp(lambda w: fn(x, w), w)
    found = kernel_gradient(of, x, y, jax.ShapeDtypeStruct(w.shape, w.dtype))
    assert relative_error(found, pull(y)[0]) < 1e-12


@pytest.mark.parametrize("name", FORMS)
def test_patches_times_the_kernel_are_the_convolution(name):
    of, fn, x, w = operation(**FORMS[name])
    numbers, groups = of.params["dimension_numbers"], of.params["feature_group_count"]
    rhs, out = numbers.rhs_spec, numbers.out_spec
    kernel = jnp.transpose(w, (*rhs[2:], rhs[1], rhs[0]))
    seen = patches(of, x[0], kernel.shape[:2])
    seen = seen.reshape(*seen.shape[:-1], groups, -1)
    kernel = kernel.reshape(*kernel.shape[:3], groups, -1)
    y = jnp.einsum("nhwklgi,kligo->ngohw", seen, kernel)
    y = y.reshape(y.shape[0], -1, *y.shape[3:])  # batch, channel, places
    assert relative_error(jnp.transpose(y, [out.index(d) for d in range(4)]), fn(x[:1], w)[0]) < 1e-12


def test_sums_of_16_bit_numbers_are_taken_in_32():
    of, fn, x, w = operation()
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    x = jnp.resize(x, (40, *x.shape[1:]))
    credit = jnp.ones(fn(x, w).shape, jnp.bfloat16)
    found = kernel_gradient(of, x, credit, jax.ShapeDtypeStruct(w.shape, w.dtype))
    wide = kernel_gradient(
        of, x.astype(jnp.float32), credit.astype(jnp.float32), jax.ShapeDtypeStruct(w.shape, jnp.float32)
    )
    assert found.dtype == jnp.bfloat16
    assert relative_error(found.astype(jnp.float32), wide) < 2**-8
