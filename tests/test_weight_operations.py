"""A weight operation is one class: a diagonal plus a low rank, defined here, with a closed form that the package does not know."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import etcompile
from etcompile.errors import ModelError, OptionError, ProgramError

pytestmark = pytest.mark.usefixtures("by_numpy")

STEPS, BATCH, UNITS, RANK = 6, 3, 5, 2
rng = np.random.default_rng(5)
W = jnp.asarray(rng.normal(size=(UNITS, 1 + RANK)))
V = jnp.asarray(rng.normal(size=(UNITS, RANK)))
XS, YS = (jnp.asarray(rng.normal(size=(STEPS, BATCH, UNITS))) for _ in range(2))


def product(w, x, v):
    """Y = (diag(w[:, 0]) + w[:, 1:] v^T) x for every row of x."""
    return x * w[:, 0] + (x @ v) @ w[:, 1:].T


def opaque_to_tracing(name):
    """The product as one operation of the graph, called so."""

    def fn(w, x, v):
        return product(w, x, v)

    fn.__name__ = name
    made = jax.custom_jvp(fn)
    made.defjvp(lambda values, tangents: jax.jvp(product, values, tangents))
    return made


known, unknown = opaque_to_tracing("diagonal_low_rank"), opaque_to_tracing("not_known")


@etcompile.weight_operation("diagonal_low_rank")
class DiagonalLowRank(etcompile.WeightOperation):
    """Every unit has a factor of its own: its x, and all that the rank sees."""

    @classmethod
    def recognise(cls, use):
        return use.name == "diagonal_low_rank" and use.operand == 0

    @property
    def shared(self):
        return ((1, 0),)

    def factor(self, x):
        x, v = x
        seen = jnp.broadcast_to((x @ v)[:, None, :], (*x.shape, v.shape[1]))
        return jnp.concatenate([x[..., None], seen], axis=-1)


def squares(out, y):
    return jnp.sum((out - y) ** 2)


def cell(operation):
    def step(p, s, x):
        h = jnp.tanh(p["a"] * s["h"] + operation(p["w"], x, p["v"]))
        return {"h": h}, h

    return step


PARAMS = {"w": W, "v": V, "a": jnp.linspace(0.5, 0.9, UNITS)}
STATE = {"h": jnp.zeros((BATCH, UNITS))}


def compiled(operation, algo="d_rtrl"):
    return etcompile.compile(etcompile.from_function(cell(operation), PARAMS, STATE), XS[0], algo=algo)


def gradients(step, chunk):
    step.reset()
    return step.scan_value_and_grad(squares, chunk=chunk)(XS, YS)[1]


def assert_close(found, wanted):
    for name, value in wanted.items():
        assert jnp.abs(found[name] - value).max() <= 1e-10 * jnp.abs(value).max(), name


@pytest.fixture(scope="module")
def step():
    return compiled(known)


@pytest.mark.parametrize("chunk", [1, STEPS])
def test_its_gradients_equal_backpropagation_through_time(step, chunk):
    def whole(params):
        def body(s, item):
            s, out = cell(product)(params, s, item[0])
            return s, squares(out, item[1])

        return jnp.sum(jax.lax.scan(body, STATE, (XS, YS))[1])

    assert step.program.exact
    assert_close(gradients(step, chunk), jax.grad(whole)(PARAMS))


def test_its_trace_is_smaller_than_that_of_an_unknown_operation(step):
    sizes = {}
    for name, one in {"known": step, "unknown": compiled(unknown)}.items():
        (site,) = (s for s in one.program.header.sites if s.params == ("w",))
        (relation,) = one.program.header.relations_of(site.name)
        sizes[name] = sum(
            math.prod(e.type.shape)
            for e in one.program.equations
            if (e.type.kind, e.type.of) == ("trace", relation.name)
        )
        assert site.closed == (name == "known")
    assert sizes["unknown"] == UNITS * sizes["known"]


@pytest.mark.parametrize(
    ("algo", "chunk"), [("pp_prop", 1), ("pp_prop", 3), ("kf_rtrl", None), ("rtrl", None)]
)
def test_other_rules_find_what_they_find_by_automatic_differentiation(algo, chunk):
    assert_close(*(gradients(compiled(operation, algo), chunk) for operation in (known, unknown)))


def test_a_program_names_it_and_parses_back(step):
    text = str(step.program)
    assert "site s1 diagonal_low_rank w" in text and f"contracted=[{1 + RANK}]" in text
    assert etcompile.parse_program(text) == step.program
    elsewhere = etcompile.parse_program(text.replace("diagonal_low_rank", "elsewhere"))
    with pytest.raises(ProgramError, match="'elsewhere', which is not registered"):
        _ = elsewhere.header.site("s1").closed


def registered(name, shared, shape):
    """A weight operation that says something wrong of `known`'s axes."""

    class Wrong(etcompile.WeightOperation):
        @classmethod
        def recognise(cls, use):
            return use.name == name and use.operand == 0

        @property
        def shared(self):
            return shared

        def factor(self, x):
            return jnp.zeros(shape)

    etcompile.weight_operation(name)(Wrong)
    return opaque_to_tracing(name)


@pytest.mark.parametrize(
    ("shared", "shape", "message"),
    [
        (
            ((0, 0),),
            (),
            r"shared = \(0, 0\)[\s\S]*an axis of y \(3, 5\) and one of the weight \(5, 3\), as long",
        ),
        (((1, 0), (1, 0)), (), r"each axis of y \(3, 5\) and of the weight \(5, 3\) once"),
        (((1, 0),), (BATCH, UNITS), r"factor = \(3, 5\)[\s\S]*\(3, 5, 3\): the axes of y"),
    ],
)
def test_axes_that_do_not_fit_are_refused_with_the_line_of_the_model(shared, shape, message):
    with pytest.raises(ModelError, match=message) as error:
        compiled(registered("wrong", shared, shape))
    assert "test_weight_operations.py:" in str(error.value.where)


def test_names_and_classes_that_cannot_be_registered():
    with pytest.raises(OptionError, match="comes with etcompile"):
        etcompile.weight_operation("dot_general")
    with pytest.raises(OptionError, match="in parentheses"):
        etcompile.weight_operation(DiagonalLowRank)
    with pytest.raises(OptionError, match=r"subclass of etcompile\.WeightOperation"):
        etcompile.weight_operation("my_product")(product)
