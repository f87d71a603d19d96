"""Operations in a form that few models use: a move in Fortran's order, several arrays in one primitive, plain numbers of Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error

import etcompile
from etcompile.frontend.jaxpr import flatten_jaxpr

B, I, N, T = 2, 3, 4, 4
RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(I, N)) * 0.3, "u": RNG.uniform(0.3, 0.7, N), "g": np.asarray(0.7)}
XS = RNG.normal(size=(T, B, I))

#: ``(params, h, x) -> h``, and whether the result is exact under d_rtrl.
FORMS = {
    "ravel in Fortran's order": (lambda p, h, x: jnp.ravel(h * p["u"], order="F").reshape(B, N) + x @ p["w"], False),
    "reshape in Fortran's order": (
        lambda p, h, x: p["u"] * h + jnp.tanh(jnp.reshape(x @ p["w"], (B, 2, 2), order="F").reshape(B, N, order="F")),
        True,
    ),
    "column_stack": (lambda p, h, x: jnp.column_stack(h * p["u"]).reshape(B, N) + x @ p["w"], False),
    "device_put of several": (
        lambda p, h, x: jax.device_put((p["u"] * h, jnp.stack([h, h]), 2.0 * h))[0] + x @ p["w"],
        True,
    ),
    "dot with a number": (lambda p, h, x: jnp.dot(h * p["u"], 0.5) + jnp.dot(0.5, x @ p["w"]), True),
    "dot with a trained number": (lambda p, h, x: jnp.dot(h, p["g"]) + jnp.dot(p["g"], x @ p["w"]), True),
    "where True": (lambda p, h, x: jnp.where(True, p["u"] * h, 2.0) + x @ p["w"], True),
    "select_n False": (lambda p, h, x: jax.lax.select_n(False, p["u"] * h, h) + x @ p["w"], True),
}  # fmt: skip


def loss(out):
    return jnp.sum(out**2)


@pytest.mark.parametrize("name", FORMS)
def test_exact_or_listed(name):
    update, exact = FORMS[name]

    def fn(params, h, x):
        h = update(params, h, x)
        return h, jnp.tanh(h)

    def total(params, xs):
        def one(h, x):
            h, out = fn(params, h, x)
            return h, loss(out)

        return jnp.sum(jax.lax.scan(one, jnp.zeros((B, N)), xs)[1])

    step = etcompile.compile(etcompile.from_function(fn, PARAMS, jnp.zeros((B, N))), XS[0])
    for steps in (1, T):
        step.reset()
        _, found = step.scan_value_and_grad(loss)(XS[:steps])
        wanted = jax.grad(total)(jax.tree.map(jnp.asarray, PARAMS), XS[:steps])
        gap = relative_error(found, wanted)
        assert (gap < 1e-10) == (exact or steps == 1), gap
    report = step.report()
    assert step.exact == exact == (not report.cuts and not report.leaves_out)


def test_a_graph_says_one_thing_by_one_operation():
    """What comes after the tracing need not know of a reshape's order, of several puts in one, of numbers without a shape."""

    def fn(v):
        return jax.device_put((jnp.ravel(v, order="F"), v)), jnp.where(True, jnp.dot(v, 1.5), 0.0)

    graph = flatten_jaxpr(jax.make_jaxpr(fn)(jnp.ones((3, 2))))
    names = [o.name for o in graph.operations]
    assert names.count("device_put") == 2 and "transpose" in names
    for operation in graph.operations:
        assert operation.params.get("dimensions") is None or operation.name != "reshape"
        for v in operation.inputs:
            assert isinstance(v, int) or (v.value.dtype is not None and v.value.shape == v.aval.shape)
