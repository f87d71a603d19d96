"""Rules other than D-RTRL on models with a rare thing each: shapes without axes, many units, primitives that jax cannot batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from oracles import relative_error
from small_models import SMALL, cell, draw
from test_small_models import loss

import etcompile
from etcompile.errors import EtcompileError
from etcompile.lowering import layers

pytestmark = pytest.mark.usefixtures("by_numpy")


def compiled(parts, algo, **options):
    fn, params, state, xs = parts
    return etcompile.compile(etcompile.from_function(fn, params, state), xs[0], algo=algo, **options)


def backpropagated(parts):
    fn, params, state, xs = parts

    def total(params):
        def one(state, x):
            state, out = fn(params, state, x)
            return state, loss(out)

        return jax.lax.scan(one, state, xs)[1].sum()

    return jax.jit(jax.grad(total))(params)


@pytest.mark.parametrize(
    "name", ["state_without_axes", "two_states_without_axes", "scalar_beside_units", "size_zero_axis"]
)
def test_a_full_pattern_of_snap_is_backpropagation_whatever_the_shapes(name):
    parts = SMALL[name]()
    _, grads = compiled(parts, "snap", n=9).scan_value_and_grad(loss)(parts[3])
    assert relative_error(grads, backpropagated(parts)) < 1e-10
    _, narrow = compiled(parts, "snap", n=1).scan_value_and_grad(loss)(parts[3])
    assert jax.tree.map(jnp.shape, narrow) == jax.tree.map(jnp.shape, grads)


@pytest.mark.parametrize("rule", ["rtrl", "snap"])
def test_more_columns_than_are_taken_at_once_leave_a_rest(rule, monkeypatch):
    monkeypatch.setattr(layers, "_AT_ONCE", 3)  # so that eight states are two parts and a rest, as 1100 are
    parts = cell(
        lambda p, h, d: jax.vmap(lambda h, d: jnp.tanh(jax.nn.relu(h) @ jnp.outer(p["b"], p["b"]) + d))(h, d)
    )
    _, grads = compiled(parts, rule, **({"n": 9} if rule == "snap" else {})).scan_value_and_grad(loss)(
        parts[3]
    )
    assert relative_error(grads, backpropagated(parts)) < 1e-10


# --- primitives without a batching rule ------------------------------------------------------------------------------------

twice_p = Primitive("twice_by_hand")
twice_p.def_impl(lambda x: 2 * np.asarray(x))  # nothing that jax could look into
twice_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(twice_p, mlir.lower_fun(lambda x: 2 * x, multiple_results=False))
ad.deflinear2(twice_p, lambda cotangent, x: [twice_p.bind(cotangent)])


def ragged():
    """A product whose batching rule takes some operands only, and a primitive that has none."""

    def fn(p, s, x):
        h = jnp.tanh(twice_p.bind(0.3 * s["h"]) + lax.ragged_dot(x, p["w"], jnp.array([1, 1], jnp.int32)))
        return {"h": h}, h

    return fn, {"w": draw(1, 2, 3, 4)}, {"h": draw(2, 2, 4)}, draw(3, 5, 2, 3)


def test_the_hand_written_primitive_has_no_batching_rule():
    with pytest.raises(NotImplementedError):
        jax.vmap(twice_p.bind)(jnp.ones(3))


@pytest.mark.parametrize(("rule", "chunks"), [("d_rtrl", (None, 2, 1)), ("rtrl", (None,)), ("e_prop", (2,))])
def test_what_jax_cannot_batch_runs_in_turn(rule, chunks):
    fn, params, state, xs = ragged()

    def with_factor(p, s, x):
        s, out = fn(p, s, x)
        return s, 2 * out

    def of_result(out):
        return loss(twice_p.bind(out))

    if rule == "e_prop":  # an approximation: its own steps are the reference
        _, wanted = compiled(ragged(), rule).scan_value_and_grad(of_result, chunk=1)(xs)
    else:
        wanted = backpropagated((with_factor, params, state, xs))
    for chunk in chunks:
        _, grads = compiled(ragged(), rule).scan_value_and_grad(of_result, chunk=chunk)(xs)
        assert relative_error(grads, wanted) < 1e-10


# --- factors that are zero exactly -----------------------------------------------------------------------------------------


def zeros_in(what, dtype):
    """A recurrent cell with something that is zero at every step; and the parameters whose influence then is no estimate."""
    p = {"w": draw(1, 3, 4, dtype=dtype), "u": draw(2, 4, 4, dtype=dtype), "b": draw(3, 4, dtype=dtype)}
    h, xs = draw(4, 2, 4, dtype=dtype), draw(5, 4, 2, 3, dtype=dtype)
    gain = jnp.asarray(0 if what == "the response" else 1, dtype)
    if what in ("the weights", "all"):
        p = {k: 0 * v for k, v in p.items()}
    if what in ("the state", "all"):
        h = 0 * h
    if what in ("the input", "all"):
        xs = 0 * xs

    def fn(p, s, x):
        h = jnp.tanh(gain * (x @ p["w"]) + s["h"] @ p["u"])
        return {"h": h}, h + p["b"]

    right = {"the input": "wb", "the response": "wb", "the state": "b", "the weights": "wub", "all": "wub"}
    return (fn, p, {"h": h}, xs), right[what]


@pytest.mark.parametrize("what", ["the input", "the response", "the state", "the weights", "all"])
def test_random_estimates_stay_finite_beside_exact_zeros(what):
    for dtype, tolerance in ((jnp.float64, 1e-10), (jnp.float16, 1e-2)):
        parts, right = zeros_in(what, dtype)
        wanted = backpropagated(parts)
        for rule in ("kf_rtrl", "uoro"):
            _, grads = compiled(parts, rule).scan_value_and_grad(loss)(parts[3])
            assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads)), (rule, dtype)
            for name in right:
                assert relative_error(grads[name], wanted[name]) < tolerance, (rule, name, dtype)


# --- strict promotion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["d_rtrl", "snap", "kf_rtrl", "rank_rtrl", "otpe", "three_factor"])
def test_ranks_need_not_be_promoted(rule):
    def fn(p, s, x):
        spread = lambda v: jnp.broadcast_to(v, s["v"].shape)  # noqa: E731
        v = spread(jax.nn.sigmoid(p["tau"])) * s["v"] + x @ p["w"] + s["v"] @ p["u"] + spread(p["b"])
        a = 0.8 * s["a"] + 0.2 * jnp.tanh(v)
        return {"v": v, "a": a}, (v - a) @ p["o"]

    shapes = {"w": (3, 4), "u": (4, 4), "tau": (4,), "b": (4,), "o": (4, 2)}
    params = {name: draw(k, *shape) for k, (name, shape) in enumerate(shapes.items())}
    parts = (fn, params, {"v": draw(7, 2, 4), "a": draw(8, 2, 4)}, draw(9, 5, 2, 3))
    call = {"modulator": 0.7} if rule == "three_factor" else {}
    with jax.numpy_rank_promotion("raise"):
        compiled(parts, rule).scan_value_and_grad(loss, chunk=1)(parts[3], **call)
        if rule in ("d_rtrl", "three_factor"):
            compiled(parts, rule).scan_value_and_grad(loss, chunk=2)(parts[3], **call)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("rule", ["d_rtrl", "rtrl", "e_prop", "uoro"])
def test_types_need_not_be_promoted(rule, dtype):
    """A model of one type under the setting that forbids two to meet: sums of ours are wider, the model's are its own."""
    draw = np.random.default_rng(0)
    params = {k: jnp.asarray(draw.normal(size=s), dtype) for k, s in {"w": (3, 4), "u": (4,)}.items()}
    xs, start = jnp.asarray(draw.normal(size=(5, 2, 3)), dtype), jnp.zeros((2, 4), dtype)

    def fn(p, h, x):
        h = jnp.tanh(h * p["u"] + x @ p["w"])
        return h, h

    def gradients():
        step = etcompile.compile(etcompile.from_function(fn, params, start), xs[0], algo=rule)
        loss = lambda out: jnp.mean(out**2)  # noqa: E731
        found = step.scan_value_and_grad(loss)(xs)
        step.learn(loss, optax.sgd(0.1))(xs)
        return found

    with jax.numpy_dtype_promotion("strict"):
        found = gradients()
    jax.tree.map(np.testing.assert_array_equal, found, gradients())


def test_synthetic_gradients_say_nothing_of_states_without_elements():
    parts = SMALL["size_zero_axis"]()
    step = compiled(parts, "dni", window=3)
    helper = etcompile.SyntheticGradient(step, loss)
    found = helper.fit(parts[3], optimizer=optax.sgd(0.1), epochs=2)
    assert bool(jnp.isfinite(found).all()) and float(found[0]) > 0
    _, grads = helper.scan_value_and_grad(loss)(parts[3])
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def polygamma(order, x):
    return jax.lax.polygamma(jnp.broadcast_to(jnp.asarray(order, x.dtype), x.shape), x)


@pytest.mark.parametrize("rule", ["d_rtrl", "rtrl", "ostl", "snap", "bptt"])
@pytest.mark.parametrize(
    ("name", "fn"),
    {
        "regularized_incomplete_beta": lambda h: jax.scipy.special.betainc(1.5 + jnp.tanh(h), 2.0, 0.4),
        "polygamma": lambda h: polygamma(1.5 + jnp.tanh(h), h + 3.0),
        "regularized_incomplete_beta in rounds": lambda h: lax.fori_loop(
            0, 200, lambda _, v: jax.scipy.special.betainc(1.5 + jnp.tanh(v), 2.0, 0.4), h
        ),
        "scatter-mul": lambda h: h.at[jnp.zeros(h.shape[0], int)].multiply(1.0 + h),
    }.items(),
)
def test_compile_names_an_operand_that_jax_does_not_differentiate_by(rule, name, fn):
    parts = cell(lambda p, h, d: fn(h) + d + p["b"])
    with pytest.raises(
        EtcompileError, match=rf"test_rules_on_rare_models.py:\d+: .* {name.split()[0]}, which JAX does not"
    ):
        compiled(parts, rule)


def test_an_operand_whose_credit_is_not_asked_for_needs_no_derivative():
    parts = cell(lambda p, h, d: polygamma(jax.lax.stop_gradient(h) * 0 + 1.0, h + 3.0) + d + p["b"])
    compiled(parts, "d_rtrl").scan_value_and_grad(loss)(parts[3])


def test_the_error_of_a_complex_output_is_that_of_its_real_and_imaginary_parts():
    params = {"w": draw(0, 3, 4), "a": draw(1, 4, 2), "b": draw(2, 4, 2)}
    xs = draw(3, 4, 2, 3)

    def model(join):
        def fn(p, s, x):
            h = jnp.tanh(0.5 * s["h"] + x @ p["w"])
            return {"h": h}, join(h @ p["a"], h @ p["b"])

        return fn, params, {"h": jnp.zeros((2, 4))}, xs

    apart, joined = (
        compiled(model(join), "rflo").scan_value_and_grad(of)(xs)[1]
        for join, of in (
            (lambda a, b: (a, b), lambda o: jnp.sum(o[0] ** 2 + o[0] * o[1])),
            (lax.complex, lambda o: jnp.sum(o.real**2 + o.real * o.imag)),
        )
    )
    assert relative_error(joined, apart) < 1e-10
    with pytest.raises(EtcompileError, match="projects the error of the outputs"):
        compiled(model(lambda a, b: a > b), "rflo")
