"""What numpy makes of constants is what JAX makes of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from etcompile.frontend.folding import folded
from etcompile.frontend.jaxpr import Aval

I, F = np.arange(12, dtype=np.int32).reshape(3, 4), np.linspace(0, 1, 12).reshape(3, 4)
LARGE = np.full(3, 2**31 - 1, np.int32)

FUNCTIONS = {
    "iota": (lambda: lax.broadcasted_iota(jnp.int32, (3, 4), 1),),
    "broadcast_in_dim": (lambda x: lax.broadcast_in_dim(x, (3, 2, 4), (0, 2))[None], F),
    "moves": (lambda x: jnp.concatenate([x.T[None].squeeze(0), x.reshape(4, 3), jnp.flip(x.T, 0)], 0), F),
    "integers": (lambda x: jnp.maximum(x + 3 - 2 * x, jnp.minimum(x, 5)), I),
    "overflow": (lambda x: x + x * 2, LARGE),
    "comparisons": (lambda x: (x < 3) == (x >= 2), I),
    "select_n": (lambda x: jnp.where(x < 5, x, -x), I),
    "convert_element_type": (lambda x: (x > 3).astype(jnp.uint8).astype(jnp.float32), I),
    "select_n of floats": (lambda x: jnp.where(x < 5, x, -x), F),
    "parts": (lambda x: [*lax.split(x, (1, 3), 1), *tuple(x), x[1:3, ::2]], F),
    "padded": (lambda x: [lax.pad(x, 7.0, [(-1, 2, 0), (1, -2, 1)]), lax.pad(x, 7.0, [(1, 1, 2), (0, -3, 0)])], F),
    "padded with less than nothing": (lambda x: lax.pad(x, 7.0, [(-3, 2, 1), (-1, -3, 0)]), F),
    "padded from nothing": (lambda x: lax.pad(x[:0], 7.0, [(1, 1, 2), (0, 0, 0)]), F),
    "floats": (lambda x: x * x - x + -x, F),
    "floats of 32 bits": (lambda x: x * x - x + -x, F.astype(np.float32)),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_numbers(name):
    fn, *args = FUNCTIONS[name]
    closed = jax.make_jaxpr(fn)(*args)
    env = dict(zip(closed.jaxpr.invars, args, strict=True))
    names = set()

    def run(jaxpr, env):
        for eqn in jaxpr.eqns:
            values = [v.val if hasattr(v, "val") else env[v] for v in eqn.invars]
            if "jaxpr" in eqn.params:
                inner = eqn.params["jaxpr"].jaxpr
                wanted = run(inner, dict(zip(inner.invars, values, strict=True)))
            else:
                wanted = eqn.primitive.bind(*values, **eqn.params)
                wanted = wanted if eqn.primitive.multiple_results else [wanted]
                avals = [Aval(tuple(v.aval.shape), v.aval.dtype) for v in eqn.outvars]
                found = folded(eqn.primitive.name, eqn.params, values, avals)
                for ours, theirs in zip(found or wanted, wanted, strict=True):
                    names.add(eqn.primitive.name)
                    np.testing.assert_array_equal(ours, theirs, strict=True)
            env.update(zip(eqn.outvars, wanted, strict=True))
        return [v.val if hasattr(v, "val") else env[v] for v in jaxpr.outvars]

    run(closed.jaxpr, env)
    assert names


def folded_floats(name, *values):
    return folded(name, {}, [np.float32(v) for v in values], [Aval((), np.dtype("float32"))])


def test_what_devices_round_as_they_like_is_left_to_them():
    assert folded_floats("exp", 1) is None
    assert folded_floats("mul", 1e-20, 1e-20) is None
    assert folded_floats("mul", 1e-20, 1e-10) == [np.float32(1e-20) * np.float32(1e-10)]
