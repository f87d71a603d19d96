"""The hidden-group graph of compiled models, queried as a user of networkx would, and drawn from the command line."""

from __future__ import annotations

import brainstate
import jax.numpy as jnp
import networkx as nx
import pytest
from references import step_of, zoo_cases
from zoo import CASES

import etcompile
from etcompile.viz import draw
from etcompile.viz.cli import main


class Stack(brainstate.nn.Module):
    def __init__(self, cells):
        super().__init__()
        self.cells = cells
        self.readout = brainstate.nn.Linear(5, 2)

    def update(self, x):
        for cell in self.cells:
            x = cell(x)
        return self.readout(x)


def graph_of(*cells):
    return etcompile.compile(Stack(list(cells)), jnp.ones((4, 3)), batch_size=4).graph


@pytest.fixture(scope="module")
def gru():
    return graph_of(brainstate.nn.GRUCell(3, 5))


@pytest.fixture(scope="module")
def lstms():
    return graph_of(brainstate.nn.LSTMCell(3, 5), brainstate.nn.LSTMCell(5, 5))


def nodes(graph, **wanted):
    return [n for n, d in graph.nodes(data=True) if all(d.get(k) == v for k, v in wanted.items())]


def edges(graph, kind):
    return {(a, b) for a, b, k in graph.edges(data="kind") if k == kind}


def test_graph_names_model_rule_and_groups(lstms):
    about = lstms.graph
    assert (about["model"], about["algo"], about["exact"]) == ("Stack", "d_rtrl", False)
    assert list(about["groups"]) == ["g0", "g1"]
    for name, group in about["groups"].items():
        assert group["states"] == nodes(lstms, kind="state", group=name)
        assert group["shape"] == (4, 5)


def test_nodes_of_a_gru(gru):
    (h,) = nodes(gru, kind="state")
    assert gru.nodes[h]["hidden"]
    assert gru.nodes[h]["shape"] == (4, 5)
    assert len(nodes(gru, kind="parameter")) == 6
    operations = nodes(gru, kind="operation")
    assert [gru.nodes[n]["primitive"] for n in operations] == ["dot_general"] * 3
    assert all(len(gru.nodes[n]["sites"]) == 2 for n in operations), "a bias joins the product it is added to"
    assert nodes(gru, kind="input") == ["in0"]
    assert nodes(gru, kind="output") == ["out"]


def test_how_each_weight_learns(gru):
    how = {n: gru.nodes[n]["how"] for n in nodes(gru, kind="parameter")}
    for name, text in how.items():
        assert text.startswith("trace") == ("readout" not in name)
        assert ("in part" in text) == ("Wrz" in name), "the reset gate acts through another weight"


def test_the_reset_gate_feeds_the_candidate_and_is_cut_there(gru):
    (h,) = nodes(gru, kind="state")
    gates, candidate, readout = nodes(gru, kind="operation")
    assert edges(gru, "presynaptic") == {
        ("in0", gates), (h, gates), ("in0", candidate), (h, candidate), (gates, candidate), (h, readout),
    }  # fmt: skip
    assert edges(gru, "immediate") == {(gates, h), (candidate, h)}
    assert edges(gru, "transition") == {(h, h)}
    assert edges(gru, "data") == {(readout, "out")}
    assert edges(gru, "cut") == {(h, h), (gates, h)}


def test_memory_lies_in_c_and_layers_are_joined_by_weights_alone(lstms):
    states = nodes(lstms, kind="state")
    c = [s for s in states if s.endswith(".c")]
    h = [s for s in states if s.endswith(".h")]
    assert edges(lstms, "transition") == {pair for k in range(2) for pair in ((c[k], c[k]), (c[k], h[k]))}
    local = nx.MultiDiGraph((a, b) for a, b, k in lstms.edges(data="kind") if k == "transition")
    assert {frozenset(x) for x in nx.weakly_connected_components(local)} == {
        frozenset(g["states"]) for g in lstms.graph["groups"].values()
    }
    assert (h[0], c[1]) in edges(lstms, "cut")
    assert nx.has_path(lstms, "in0", "out")


def test_an_element_wise_recurrence_has_no_cut():
    def step(params, state, x):
        h = jnp.tanh(x @ params["w"] + params["decay"] * state["h"])
        return {"h": h, "count": state["count"] + 1}, h

    params = {"w": jnp.ones((3, 5)), "decay": jnp.ones(5)}
    model = etcompile.from_function(step, params, {"h": jnp.zeros((4, 5)), "count": jnp.zeros((), int)})
    graph = etcompile.compile(model, jnp.ones((4, 3))).graph
    assert graph.graph["exact"]
    assert not edges(graph, "cut")
    (decay,) = graph.successors("decay")
    assert graph.nodes[decay]["primitive"] == "mul"
    assert edges(graph, "presynaptic") >= {("h", decay)}
    assert edges(graph, "data") == {("count", "count"), ("h", "out")}
    assert not graph.nodes["count"]["hidden"]
    assert graph.nodes["count"]["group"] is None


def test_an_excluded_state_shows_as_a_cut():
    def step(params, state, x):
        a = 0.9 * state["a"] + x @ params["w"]
        b = 0.8 * state["b"] + a
        return {"a": a, "b": b}, b

    model = etcompile.from_function(
        step, {"w": jnp.ones((3, 5))}, {"a": jnp.zeros((4, 5)), "b": jnp.zeros((4, 5))}
    )
    graph = etcompile.compile(model, jnp.ones((4, 3)), exclude="a").graph
    assert edges(graph, "cut") == {("a", "a")}


def test_names_that_collide_stay_apart():
    def step(params, state, x):
        h = 0.5 * state["in0"] + x @ params["in0"]
        return {"in0": h}, h

    model = etcompile.from_function(step, {"in0": jnp.ones((3, 5))}, {"in0": jnp.zeros((4, 5))})
    graph = etcompile.compile(model, jnp.ones((4, 3))).graph
    assert [len(nodes(graph, kind=k)) for k in ("input", "state", "parameter", "operation")] == [1, 1, 1, 1]
    assert draw(graph).source


def test_the_cuts_of_the_graph_are_those_of_the_program(gru, lstms):
    step = etcompile.compile(Stack([brainstate.nn.GRUCell(3, 5)]), jnp.ones((4, 3)), batch_size=4)
    drawn = {d["cut"]: d for _, _, d in step.graph.edges(data=True) if d["kind"] == "cut"}
    assert set(drawn) == {cut.name for cut in step.program.header.cuts}
    for cut in step.program.header.cuts:
        assert drawn[cut.name]["meaning"] == cut.meaning
        assert drawn[cut.name]["origins"] == cut.origins
        assert cut.source.startswith(drawn[cut.name]["source"])


def test_command_line_draws_a_real_model(tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "import brainstate\n"
        "class Net(brainstate.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.cell, self.readout = brainstate.nn.GRUCell(3, 5), brainstate.nn.Linear(5, 2)\n"
        "    def update(self, x):\n"
        "        return self.readout(self.cell(x))\n"
        "net = Net()\n"
    )
    out = tmp_path / "net.svg"
    assert main([f"{tmp_path}/net.py:net", "--input-shape", "4,3", "--batch", "4", "-o", str(out)]) == 0
    text = out.read_text()
    for word in ("group g0", "cell.h", "dot_general + bias", "net.py:7", "exact: no, 2 cuts"):
        assert word in text


@pytest.mark.parametrize("case", zoo_cases(CASES))
def test_every_model_has_a_sound_graph(case):
    step = step_of(case)
    graph = step.graph
    assert {n for g in graph.graph["groups"].values() for n in g["states"]} == set(nodes(graph, hidden=True))
    assert {d["cut"] for *_, d in graph.edges(data=True) if d["kind"] == "cut"} == {
        c.name for c in step.program.header.cuts
    }
    for name in nodes(graph, kind="operation"):
        assert any(kind == "weight" for *_, kind in graph.in_edges(name, data="kind"))
    for name in nodes(graph, kind="parameter"):
        traced = graph.nodes[name]["how"].startswith("trace")
        reached = [k for op in graph.successors(name) for *_, k in graph.out_edges(op, data="kind")]
        assert not traced or "immediate" in reached
    draw(graph)
    draw(graph, every_layer=True)
    draw(step.program)
