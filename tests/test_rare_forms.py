"""Operations in a form that few models use: a move in Fortran's order, several arrays in one primitive, plain numbers of Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import relative_error

import etcompile
from etcompile.errors import UnsupportedError
from etcompile.frontend.jaxpr import flatten_jaxpr

B, I, N, T = 2, 3, 4, 4
RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(I, N)) * 0.3, "u": RNG.uniform(0.3, 0.7, N), "g": np.asarray(0.7)}
XS = RNG.normal(size=(T, B, I))


@jax.custom_vjp
def backwards_again(v):
    """Running sums, whose derivative calls the function itself, as that of an ODE solver does."""
    return jnp.cumsum(v, axis=-1)


backwards_again.defvjp(
    lambda v: (backwards_again(v), None), lambda _, g: (backwards_again(g[..., ::-1])[..., ::-1],)
)


@jax.custom_vjp
def looked_up(v, table):
    return v * table[1]


def _looked_up_reverse(saved, g):
    v, table = saved
    chosen = table[jnp.argmax(jnp.ravel(v)) * 0 + 1]  # an index that is known at run time alone
    return g * chosen, jnp.zeros_like(table)


looked_up.defvjp(lambda v, table: (looked_up(v, table), (v, table)), _looked_up_reverse)


def clipped(how):
    """A value whose credit is clipped on the way back: no linear map, so no Jacobian either."""

    @jax.custom_vjp
    def same(v):
        return v

    same.defvjp(lambda v: (v, None), lambda _, g: (how(g),))
    return same


CLIPS = {
    "clip": lambda g: jnp.clip(g, -0.3, 0.3),
    "by a condition": lambda g: jnp.where(jnp.abs(g) > 0.3, 0.3, g),
    "by the norm": lambda g: g / jnp.maximum(1.0, jnp.linalg.norm(g, axis=-1, keepdims=True)),
    "by rank": lambda g: jnp.where(g >= jnp.sort(g, axis=-1)[..., :1], g, 0.0) * jnp.abs(g),
}
NOT_A_NUMBER = {
    "without NaN": lambda g: jnp.where(jnp.isnan(g), 0.0, g),
    "scaled": lambda g: 0.5 * g,
}


@jax.custom_jvp
def looked_up_forwards(v, table):
    return v * table[1]


@looked_up_forwards.defjvp
def _(primals, tangents):
    v, table = primals
    chosen = table[jnp.argmax(jnp.ravel(v)) * 0 + 1]
    return looked_up_forwards(v, table), tangents[0] * chosen


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
    "a derivative that is the function again": (
        lambda p, h, x: 0.5 * backwards_again(h * p["u"]) + x @ p["w"],
        False,
    ),
    "a constant that a derivative of one's own indexes": (
        lambda p, h, x: looked_up(h * p["u"], jnp.arange(3.0) / 2) + x @ p["w"],
        True,
    ),
    "the same, forwards": (
        lambda p, h, x: looked_up_forwards(h * p["u"], jnp.arange(3.0) / 2) + x @ p["w"],
        True,
    ),
    **{
        f"credit clipped: {name}": (lambda p, h, x, how=how: clipped(how)(h * p["u"]) + x @ p["w"], False)
        for name, how in CLIPS.items()
    },
    **{
        f"credit {name}": (lambda p, h, x, how=how: clipped(how)(h * p["u"]) + x @ p["w"], True)
        for name, how in NOT_A_NUMBER.items()
    },
    "a table read beyond its end": (
        lambda p, h, x: p["u"] * h + jnp.take(p["w"], _numbers(x), axis=0, mode="clip"),
        True,
    ),
    "a table read beyond its end, plainly": (lambda p, h, x: p["u"] * h + p["w"].at[_numbers(x)].get(mode="clip"), True),
    "a table that is nothing beyond its end": (
        lambda p, h, x: p["u"] * h + jnp.take(p["w"], _numbers(x), axis=0, mode="fill", fill_value=0.0),
        True,
    ),
    "select_n False": (lambda p, h, x: jax.lax.select_n(False, p["u"] * h, h) + x @ p["w"], True),
}  # fmt: skip


def _numbers(x):
    """From -4 to 4, of a table with three rows."""
    return jnp.clip(x[:, 0] * 4, -4, 4).astype(int)


def loss(out):
    return jnp.sum(out**2)


#: Where a rule that follows every path is refused, and why.
NO_FORWARD_DERIVATIVE = ("credit clipped", "function again")


def compared(fn, algo):
    """The step, and how far its gradients over 1 and T steps are from backpropagation, in one chunk and step by step."""

    def total(params, xs):
        def one(h, x):
            h, out = fn(params, h, x)
            return h, loss(out)

        return jnp.sum(jax.lax.scan(one, jnp.zeros((B, N)), xs)[1])

    step = etcompile.compile(etcompile.from_function(fn, PARAMS, jnp.zeros((B, N))), XS[0], algo=algo)
    gaps = {}
    for steps in (1, T):
        wanted = jax.grad(total)(jax.tree.map(jnp.asarray, PARAMS), XS[:steps])
        found = []
        for chunk in (None, 1):
            step.reset()
            found.append(step.scan_value_and_grad(loss, chunk=chunk)(XS[:steps])[1])
        assert relative_error(found[1], found[0]) < 1e-10
        gaps[steps] = relative_error(found[0], wanted)
    return step, gaps


@pytest.mark.parametrize("name", FORMS)
def test_exact_or_listed(name):
    update, exact = FORMS[name]

    def fn(params, h, x):
        h = update(params, h, x)
        return h, jnp.tanh(h)

    step, gaps = compared(fn, "d_rtrl")
    assert gaps[1] < 1e-10
    assert (gaps[T] < 1e-10) == exact
    report = step.report()
    assert step.exact == exact == (not report.cuts and not report.leaves_out)


@pytest.mark.parametrize(
    "name", ["a constant that a derivative of one's own indexes", "a table read beyond its end"]
)
def test_rules_that_follow_every_path(name):
    update, _ = FORMS[name]
    step, gaps = compared(lambda p, h, x: (update(p, h, x), jnp.tanh(h)), "rtrl")
    assert step.exact and gaps[T] < 1e-10


@pytest.mark.parametrize(
    "name", [name for name in FORMS if any(word in name for word in NO_FORWARD_DERIVATIVE)]
)
def test_rules_that_need_a_forward_derivative_refuse_one_that_has_none(name):
    update, _ = FORMS[name]
    with pytest.raises(UnsupportedError, match="custom_vjp_call, which JAX does not differentiate here"):
        compared(lambda p, h, x: (update(p, h, x), jnp.tanh(h)), "rtrl")


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
