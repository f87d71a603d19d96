"""Networks in the exchange format NIR: what they compute, what they are refused for, and weights that go back.

That their gradients are right ``test_flax_equinox.py`` shows, as of all models of other frameworks.
"""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saiunit as u
from nir_models import CASES, DT, simulated
from numpy_evaluation import by_numpy, op_by_op
from oracles import relative_error

import etcompile
from etcompile.errors import EtcompileError, InputError, ModelError, OptionError

nir = pytest.importorskip("nir")

TOLERANCE = 1e-12
EXACTLY = {"method": "exponential_euler", "reset": "subtract", "current": "new"}


def outputs(model, xs):
    def run(xs):
        state, outs = model.state, []
        for x in xs:
            state, out = model.fn(model.params, state, x)
            outs.append(out)
        return jnp.stack(outs)

    return op_by_op(run, xs)


@pytest.mark.parametrize("how", [{}, EXACTLY], ids=["forward-euler", "exponential-euler"])
@pytest.mark.parametrize("name", CASES)
def test_a_network_computes_the_equations_of_its_nodes(name, how):
    case = CASES[name](nir)
    xs = 2.0 * np.random.default_rng(1).normal(size=(12, *case.shape))
    wanted = simulated(case, xs, **how)
    assert np.std(wanted) > 0.05
    model = etcompile.from_nir(case.graph, DT, **case.options, **how)
    assert relative_error(outputs(model, jnp.asarray(xs)), wanted) < TOLERANCE
    batched = etcompile.from_nir(case.graph, DT, batch_size=1, **case.options, **how)
    assert relative_error(outputs(batched, jnp.asarray(xs[:, None]))[:, 0], wanted) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_the_rule_is_exact_where_it_should_be(name):
    case = CASES[name](nir)
    model = etcompile.from_nir(case.graph, DT, batch_size=2, **case.options)
    step = etcompile.compile(model, jnp.ones((2, *case.shape)))
    assert step.exact is case.exact
    paths = {*case.nodes(), *(f"cell.{name}" for name in case.nodes())}
    assert {cut.source for cut in step.program.header.cuts} <= paths  # where a line of a model would stand


# -- weights go back ----------------------------------------------------------------------------------------------------


def fields(graph):
    """Everything in a graph, flat."""
    found = {}
    for path, value in jax.tree_util.tree_leaves_with_path(graph.to_dict()):
        found[jax.tree_util.keystr(path)] = value
    return found


def same(one, two):
    one, two = fields(one), fields(two)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert np.asarray(value).dtype == np.asarray(two[key]).dtype, key
        np.testing.assert_array_equal(value, two[key], key)


@pytest.mark.parametrize("name", CASES)
def test_a_graph_comes_back_as_it_was(name, tmp_path):
    case = CASES[name](nir)
    before = copy.deepcopy(case.graph)
    step = etcompile.compile(etcompile.from_nir(case.graph, DT, **case.options), jnp.ones(case.shape))
    back = step.to_nir()
    same(back, before)
    same(case.graph, before)
    if name != "nir-averages":  # HDF5 has no None, which stands there for a bias
        nir.write(tmp_path / "before.nir", before)
        nir.write(tmp_path / "after.nir", back)
        read = [nir.read(tmp_path / f"{when}.nir", type_check=False) for when in ("before", "after")]
        same(*read)
        again = etcompile.from_nir(read[1], DT, **case.options)
        assert relative_error(again.params, step.params) == 0.0


def test_trained_weights_go_into_the_file_and_come_back(tmp_path):
    case = CASES["nir-recurrent"](nir)
    xs = jnp.asarray(np.random.default_rng(2).normal(size=(4, 2, *case.shape)))
    with by_numpy():
        step = etcompile.compile(etcompile.from_nir(case.graph, DT, batch_size=2), xs[0])
        _, grads = step.scan_value_and_grad(lambda out: jnp.sum(out**2))(xs)
        step.params = jax.tree.map(lambda p, g: p - 0.1 * g, step.params, grads)
        step.reset()
        wanted = step.scan(xs)
        nir.write(tmp_path / "trained.nir", copy.deepcopy(step).to_nir())
        again = etcompile.compile(
            etcompile.from_nir(nir.read(tmp_path / "trained.nir"), DT, batch_size=2), xs[0]
        )
        assert relative_error(again.scan(xs), wanted) < TOLERANCE
    trained = step.to_nir()
    assert trained.nodes["0"].weight.dtype == np.float64
    assert not np.array_equal(trained.nodes["0"].weight, case.graph.nodes["0"].weight)
    rest = trained.nodes["cell"].nodes["cell.lif"]
    np.testing.assert_array_equal(rest.tau, case.graph.nodes["cell"].nodes["cell.lif"].tau)


def test_weights_keep_the_dtype_of_the_graph():
    graph = nir.NIRGraph.from_list(
        nir.Affine(np.ones((2, 3), np.float32), np.zeros(2, np.float32)),
        nir.Scale(np.array([1, 2])),
        nir.I(np.ones(2, np.float32)),
    )
    model = etcompile.from_nir(graph, DT, trained=("weight", "scale"))
    assert {v.dtype for v in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
    back = etcompile.compile(model, jnp.ones(3)).to_nir()
    assert back.nodes["affine"].weight.dtype == np.float32
    assert back.nodes["scale"].scale.dtype == np.float32  # an integer that is trained becomes a real number


# -- inputs, outputs, options -------------------------------------------------------------------------------------------


def neurons(n=2, kind="LIF", **fields):
    ones = np.ones(n)
    usual = {"tau": 0.02 * ones, "r": ones, "v_leak": 0 * ones, "v_threshold": ones}
    return getattr(nir, kind)(**{**usual, **fields})


def branched():
    nodes = {
        "left": nir.Input(np.array([3])),
        "right": nir.Input(np.array([2])),
        "w": nir.Linear(np.ones((2, 3))),
        "cell": neurons(),
        "spikes": nir.Output(np.array([2])),
        "drive": nir.Output(np.array([2])),
    }
    edges = [("left", "w"), ("w", "cell"), ("right", "cell"), ("w", "drive"), ("cell", "spikes")]
    return nir.NIRGraph(nodes, edges)


def test_several_inputs_and_outputs_go_by_name():
    x = {"left": jnp.ones((4, 3)), "right": 90.0 * jnp.ones((4, 2))}
    with by_numpy():
        step = etcompile.compile(etcompile.from_nir(branched(), DT, batch_size=4), x)
        out = step(x)
    assert (out["drive"] == 3.0).all() and (out["spikes"] == 1.0).all()
    for wrong in (x["left"], {"left": x["left"]}, None):
        with pytest.raises(EtcompileError, match="dict by name"):
            etcompile.compile(etcompile.from_nir(branched(), DT, batch_size=4), wrong)


def test_a_time_step_may_have_a_unit_and_inputs_any_dtype():
    graph = nir.NIRGraph.from_list(nir.Linear(np.ones((2, 3), np.float32)), neurons(r=np.full(2, 5.0)))
    one = etcompile.from_nir(graph, 2.0 * u.ms, dtype=jnp.float32)
    two = etcompile.from_nir(graph, 2e-3, dtype=jnp.float32)
    x = np.array([1, 0, 1])
    (a, b) = (model.fn(model.params, model.state, x) for model in (one, two))
    assert relative_error(a, b) == 0.0 and a[1].dtype == jnp.float32
    half = etcompile.from_nir(graph, 2e-3, batch_size=1, dtype=jnp.bfloat16)
    step = etcompile.compile(half, jnp.ones((1, 3), bool))
    _, grads = step.scan_value_and_grad(lambda out: jnp.sum(out))(jnp.ones((3, 1, 3), bool))
    assert grads["linear"]["weight"].dtype == jnp.bfloat16 and grads["linear"]["weight"].all()
    step.reset(batch_size=5)
    assert step(jnp.ones((5, 3), bool)).shape == (5, 2)


def test_a_surrogate_of_ones_own_is_used():
    braintools = pytest.importorskip("braintools")
    graph = nir.NIRGraph.from_list(nir.Linear(np.ones((2, 3))), neurons())
    surrogate = braintools.surrogate.Sigmoid(2.0)
    model = etcompile.from_nir(graph, DT, surrogate=surrogate)

    def spikes(w):
        return jnp.sum(surrogate(0.1 * (w @ jnp.ones(3)) - 1.0))

    with by_numpy():
        step = etcompile.compile(model, jnp.ones(3))
        _, grads = step.value_and_grad(jnp.sum)(jnp.ones(3))
        wanted = jax.grad(spikes)(jnp.ones((2, 3)))
    assert relative_error(grads["linear"]["weight"], wanted) < TOLERANCE


# -- mistakes -----------------------------------------------------------------------------------------------------------


def refused(says, graph, dt=DT, error=ModelError, **options):
    before = None if not isinstance(graph, nir.NIRGraph) else copy.deepcopy(graph)
    with pytest.raises(error) as caught:
        etcompile.from_nir(graph, dt, **options)
    for text in (says,) if isinstance(says, str) else says:
        assert text in str(caught.value)
    if before is not None:
        same(graph, before)


def graph_of(nodes, edges):
    return nir.NIRGraph(nodes, edges, type_check=False)


def between(edges, **nodes):
    ends = {"input": nir.Input(np.array([2])), "output": nir.Output(np.array([2]))}
    return graph_of({**ends, **nodes}, edges)


def test_graphs_that_mean_nothing_are_refused():
    line = [("input", "a"), ("a", "output")]
    square = nir.Linear(np.ones((2, 2)))

    class Strange(nir.Threshold):
        pass

    refused(("a is of a type", "got: Strange", "CubaLIF"), between(line, a=Strange(np.ones(2))))
    refused(
        "has no shape", graph_of({"input": nir.Input(None), "a": square, "output": nir.Output(None)}, line)
    )
    refused("no Output", graph_of({"input": nir.Input(np.array([2])), "a": square}, line[:1]))
    refused("no Input", graph_of({"a": square, "output": nir.Output(None)}, line[1:]))
    refused("something leads to the NIR node input", between([*line, ("a", "input")], a=square))
    refused("nothing leads to the NIR node b", between([*line, ("b", "output")], a=square, b=neurons()))
    refused("leads to a node that it has not", between([*line, ("a", "c")], a=square))
    refused("an edge twice", between([*line, line[0]], a=square))
    wide = nir.Linear(np.ones((3, 2)))
    refused(
        ("different shapes", "(2,) from a", "(3,) from b"),
        between([*line, ("input", "b"), ("b", "output")], a=square, b=wide),
    )
    refused("a cannot take what leads to it", between(line, a=nir.Linear(np.ones((2, 3)))))
    refused(("a.tau does not fit", "(3,) for (2,)"), between(line, a=neurons(3)))
    inner = nir.NIRGraph(
        {"i": nir.Input(np.array([2])), "j": nir.Input(np.array([2])), "o": nir.Output(np.array([2]))},
        [("i", "o"), ("j", "o")],
    )
    refused("which Input of the NIR subgraph a", between(line, a=inner))


def test_loops_without_a_state_are_refused():
    line = [("input", "a"), ("a", "b"), ("b", "a"), ("b", "output")]
    square = nir.Linear(np.ones((2, 2)))
    refused(("no state", "a -> b -> a"), between(line, a=square, b=nir.Threshold(np.ones(2))))
    refused("a -> a", between([("input", "a"), ("a", "a"), ("a", "output")], a=square))
    mixed = nir.Delay(np.array([0.0, 1.0]))
    refused("below half a time step", between(line, a=square, b=mixed))
    etcompile.from_nir(between(line, a=square, b=nir.Delay(np.full(2, 1.0))), dt=0.5)
    refused(
        "different shapes",
        between(line, a=square, b=nir.LIF(**{f: np.ones(1) for f in ("tau", "r", "v_leak", "v_threshold")})),
    )


def test_options_that_cannot_be_taken_are_refused():
    graph = nir.NIRGraph.from_list(nir.Linear(np.ones((2, 2))), neurons())
    refused(("first", "got: a str"), "network.nir")
    refused(("needs the time step", "dt=1e-3"), graph, None, OptionError)
    for dt in (0.0, -1.0, np.inf, "ms", 3 * u.mV):
        refused("dt", graph, dt, OptionError)
    refused(("grows without bound at lif.tau", "exponential_euler"), graph, 0.05)
    etcompile.from_nir(graph, 0.05, method="exponential_euler")
    refused("no time constant", nir.NIRGraph.from_list(neurons(tau=np.zeros(2))))
    refused("no delay", nir.NIRGraph.from_list(nir.Delay(np.array([-1.0]))))
    refused(
        ("names what no node has", "'lif.tauu'"), graph, error=OptionError, trained=("weight", "lif.tauu")
    )
    refused("whole number of steps", graph, error=OptionError, trained="delay")
    for name, value in {"method": "rk4", "reset": "zero", "current": 1, "surrogate": 3, "dtype": int}.items():
        refused(name, graph, error=OptionError, **{name: value})
    refused("batch_size", graph, error=OptionError, batch_size=0)
    with pytest.raises(ModelError, match="time step of the NIR graph"):
        etcompile.compile(graph, jnp.ones(2))
    with pytest.raises(InputError, match="behind the batch axis"):
        etcompile.compile(etcompile.from_nir(graph, DT, batch_size=3), jnp.ones(2))
    with pytest.raises(InputError, match="mV in an array"):
        etcompile.compile(etcompile.from_nir(graph, DT), jnp.ones(2) * u.mV)
    step = etcompile.compile(etcompile.from_function(lambda p, s, x: (p * x + s, x), 1.0, 0.0), 1.0)
    with pytest.raises(ModelError, match="made of none"):
        step.to_nir()
