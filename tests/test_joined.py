"""Of what a product's operand joins, credit is pulled to the parts that are asked for, and no number changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from etcompile.frontend.jaxpr import flatten_jaxpr
from etcompile.lowering.joined import JoinedOperand
from etcompile.lowering.tape import Tape

rng = np.random.default_rng(0)
A, B, C = (jnp.asarray(rng.normal(size=(3, n))) for n in (4, 2, 5))
W, V = jnp.asarray(rng.normal(size=(11, 6))), jnp.asarray(rng.normal(size=(11, 2)))


def two_readers(a, b, c):
    both = jnp.concatenate([a, b * b, c], -1)
    return jnp.tanh(both @ W) * (both @ V).sum(-1, keepdims=True)


def behind(a, b, c):
    return jnp.tanh(W.T @ jnp.concatenate([a.T, b.T, c.T], 0))


def read_beside(a, b, c):
    both = jnp.concatenate([a, b, c], -1)
    return both @ W + both[:, :6]


def along_a_free_axis(a, b, c):
    return jnp.concatenate([a, a + b.sum(-1, keepdims=True)], 0) @ W[:4] + c.sum()


def twice(a, b, c):
    return jnp.concatenate([b, a[:, :2], b, c], -1) @ W


def one_reaches(a, b, c):
    return jnp.concatenate([a, b, c], -1) @ W * a.sum()


FUNCTIONS = [two_readers, behind, read_beside, along_a_free_axis, twice, one_reaches]


@pytest.mark.parametrize("fn", FUNCTIONS)
@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_credit_of_parts_is_that_of_jax(fn, asked):
    graph = flatten_jaxpr(jax.make_jaxpr(fn)(A, B, C))
    y = graph.outputs[0]
    cotangent = jnp.asarray(rng.normal(size=graph.avals[y].shape))
    _, pull = jax.vjp(fn, A, B, C)
    expected = pull(cotangent)
    tape = Tape(graph, [A, B, C], frozenset(), parts=True)
    found = tape.pull({y: cotangent}, {graph.inputs[k] for k in asked})
    for k in asked:
        got = found.get(graph.inputs[k], 0.0)
        np.testing.assert_allclose(got, expected[k], rtol=1e-12, atol=1e-13, err_msg=str(k))


@pytest.mark.parametrize("fn", [two_readers, behind, one_reaches])
def test_less_is_multiplied(fn):
    """Of 11 rows of each weight those of the part alone."""
    graph = flatten_jaxpr(jax.make_jaxpr(fn)(A, B, C))
    y = graph.outputs[0]

    def pulled(cotangent, parts):
        found = Tape(graph, [A, B, C], frozenset(), parts=parts).pull({y: cotangent}, {graph.inputs[1]})
        return found[graph.inputs[1]]

    def sizes(parts):
        jaxpr = jax.make_jaxpr(lambda c: pulled(c, parts))(jnp.ones(graph.avals[y].shape))
        products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
        return sorted({e.outvars[0].aval.size for e in products})

    assert 3 * 11 in sizes(parts=False) and 3 * 11 not in sizes(parts=True)


def test_what_is_cut_or_asked_for_itself_is_pulled_whole():
    graph = flatten_jaxpr(jax.make_jaxpr(lambda a, b, c: jnp.concatenate([a, b, c], -1) @ W)(A, B, C))
    (product,) = [k for k, op in enumerate(graph.operations) if op.name == "dot_general"]
    joined = JoinedOperand.of(graph, graph.operations[product], 0)
    y, part = graph.outputs[0], graph.inputs[1]
    tape = Tape(graph, [A, B, C], frozenset(), parts=True)
    ones = jnp.ones(graph.avals[y].shape)
    whole = ones @ W.T
    mask = np.zeros((3, 11), bool)
    mask[:, 4] = True
    cut = tape.pull({y: ones}, {part}, {(product, 0): mask})[part]
    np.testing.assert_allclose(cut, jnp.where(mask, 0, whole)[:, 4:6], rtol=1e-12)
    at_part = tape.pull({y: ones}, {part}, {(joined.joining, 1): mask[:, 4:6]})[part]
    np.testing.assert_allclose(at_part, cut, rtol=1e-12)
    both = tape.pull({y: ones}, {part, joined.variable})
    np.testing.assert_allclose(both[joined.variable], whole, rtol=1e-12)
    np.testing.assert_allclose(both[part], whole[:, 4:6], rtol=1e-12)


def test_what_is_no_joined_operand():
    def fn(a, b, c):
        return a @ W[:4] + jnp.concatenate([a, a], 0)[:3] @ W[:4] + b.sum() * c.sum()

    graph = flatten_jaxpr(jax.make_jaxpr(fn)(A, B, C))
    assert all(JoinedOperand.of(graph, op, 0) is None for op in graph.operations if op.inputs)
