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
    "convert_element_type": (lambda x: (x > 3).astype(jnp.uint8), I),
    "floats are not computed with": (lambda x: jnp.where(x > 0.5, x * 2, x), F),
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
                wanted = [eqn.primitive.bind(*values, **eqn.params)]
                aval = Aval(tuple(eqn.outvars[0].aval.shape), eqn.outvars[0].aval.dtype)
                found = folded(eqn.primitive.name, eqn.params, values, [aval])
                if found is not None:
                    names.add(eqn.primitive.name)
                    np.testing.assert_array_equal(found, wanted[0], strict=True)
            env.update(zip(eqn.outvars, wanted, strict=True))
        return [v.val if hasattr(v, "val") else env[v] for v in jaxpr.outvars]

    run(closed.jaxpr, env)
    assert bool(names) or name == "floats are not computed with"
