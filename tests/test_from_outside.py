"""One of each from outside of the package: a learning rule, an op, a kind of value, an optimisation, an index rule.

(A schedule and a weight operation of one's own are in ``test_schedules.py`` and ``test_weight_operations.py``.)
"""

from __future__ import annotations

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.lib.mlir.dialects import hlo
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from oracles import relative_error

import etcompile
from etcompile import extend
from etcompile.analysis import index_rules

T, B, I, O = 5, 2, 3, 4
XS, YS, W = (
    jax.random.normal(jax.random.key(k), shape) for k, shape in enumerate([(T, B, I), (T, B, O), (I, O)])
)


def squared(out, y):
    return jnp.sum((out - y) ** 2)


def compiled(fn=lambda p, s, x: ({"h": 0.9 * s["h"] + x @ p["w"]},) * 2, **options):
    def step(p, s, x):
        new, out = fn(p, s, x)
        return new, jnp.tanh(out["h"])

    model = etcompile.from_function(step, {"w": W}, {"h": jnp.zeros((B, O))})
    return etcompile.compile(model, XS[0], **options)


@pytest.fixture
def mine():
    """A module of somebody else's, gone after the test."""
    tables = (extend.OPS, extend.EVALUATE, extend.KINDS, index_rules._RULES)
    before = [dict(table) for table in tables]
    try:
        yield runpy.run_path(str(Path(__file__).with_name("somebody_elses.py")))
    finally:
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)


def by_hand(weight_of_signal, decay, scale):
    """Gradients of e_t = decay e_{t-1} + scale x_t, where h' = 0.9 h + x W and out = tanh(h')."""
    h, e, total = np.zeros((B, O)), np.zeros((B, I)), np.zeros((I, O))
    for t in range(T):
        h = 0.9 * h + np.asarray(XS[t] @ W)
        e = decay * e + scale * np.asarray(XS[t])
        out = np.tanh(h)
        total += e.T @ (weight_of_signal(t) * 2 * (out - np.asarray(YS[t])) * (1 - out**2))
    return total


@pytest.mark.parametrize("optimise", [True, False])
def test_an_op_and_a_rule(mine, optimise):
    step = compiled(algo=etcompile.algorithm("halves_of_a_test")(mine["halves"])(), optimise=optimise)
    for chunk in (2, 1):
        step.reset()
        _, grads = step.scan_value_and_grad(squared, chunk=chunk)(XS, YS)
        assert relative_error(grads["w"], by_hand(lambda t: 1, 0.5, 0.25)) < 1e-10
    # What the row says is enough for the passes that ship: the trace is carried as a filter of x.
    carried = sum(leaf.size for leaf in jax.tree.leaves(step.traces))
    assert carried == (B * I if optimise else B * I * O)
    assert etcompile.parse_program(str(step.program)) == step.program


def test_an_optimisation(mine):
    halves = etcompile.algorithm("halves_of_a_test")(mine["halves"])()
    manager = etcompile.PassManager(check=True, tolerance=1e-10)
    step = compiled(algo=[halves, mine["Quarters"]()], manager=manager)
    assert {r.name: r.changed for r in step.passes}["quarters"]
    assert not any(e.op == "halve" for e in step.program.equations)
    _, grads = step.scan_value_and_grad(squared)(XS, YS)
    assert relative_error(grads["w"], by_hand(lambda t: 1, 0.5, 0.25)) < 1e-10


def test_a_kind_of_value(mine):
    step = compiled(algo=etcompile.algorithm("gated_of_a_test")(mine["gated"])())
    assert "carried" in next(line for line in str(step.program).splitlines() if line.startswith("  k0[t]"))
    _, grads = step.scan_value_and_grad(squared, chunk=1)(XS, YS)
    leak = np.cumsum(0.9 * 0.5 ** np.arange(T))
    assert relative_error(grads["w"], by_hand(lambda t: leak[t], 0.8, 1.0)) < 1e-10


mirror_p = Primitive("mirror_of_a_test")
mirror_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(
    mirror_p, lambda ctx, x: [hlo.reverse(x, mlir.dense_int_array([ctx.avals_in[0].ndim - 1]))]
)
ad.deflinear2(mirror_p, lambda cotangent, x: [mirror_p.bind(cotangent)])
batching.primitive_batchers[mirror_p] = lambda args, dims: (
    mirror_p.bind(jnp.moveaxis(args[0], dims[0], 0)),
    0,
)


def mirrored(p, s, x):
    h = jnp.tanh(mirror_p.bind(0.5 * mirror_p.bind(s["h"])) + x @ p["w"])
    return {"h": h}, {"h": h}


def test_an_index_rule(mine):
    assert not compiled(mirrored).program.exact  # where a unit goes is not known
    extend.register_index_rule("mirror_of_a_test", lambda indices: indices[..., ::-1])
    step = compiled(mirrored)
    assert step.program.exact

    def loss(w):
        def body(s, item):
            s, _ = mirrored({"w": w}, s, item[0])
            return s, squared(jnp.tanh(s["h"]), item[1])

        return jnp.sum(jax.lax.scan(body, {"h": jnp.zeros((B, O))}, (XS, YS))[1])

    _, grads = step.scan_value_and_grad(squared)(XS, YS)
    assert relative_error(grads["w"], jax.grad(loss)(W)) < 1e-10


@pytest.mark.parametrize(
    ("signature", "says"),
    [
        ("trase r -> trace r", "no kind of values 'trase'"),
        ("trace r -> gradient s", "nothing says what s is"),
        ("state r.group, state r.group -> state r.group", "nothing says what r.group is"),
        ("trace r", "no kind of values ''"),
    ],
)
def test_a_type_that_says_nothing_is_refused(mine, signature, says):
    with pytest.raises(etcompile.ProgramError, match=says):
        extend.register_op("op_of_a_test", signature, "", "", None)
    assert "op_of_a_test" not in extend.OPS


def test_names_that_are_taken_are_refused(mine):
    with pytest.raises(etcompile.ProgramError, match="'halve' is defined twice"):
        extend.register_op("halve", None, "", "", None)
    with pytest.raises(etcompile.ProgramError, match="'trace' is defined twice"):
        extend.register_kind("trace", "relation", "")
    with pytest.raises(etcompile.ProgramError, match="belong to nothing"):
        extend.register_kind("mine", "model", "")
    with pytest.raises(etcompile.ProgramError, match="'add' moves elements is defined twice"):
        extend.register_index_rule("add", lambda indices: indices)
