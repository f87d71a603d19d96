"""The drawing of hidden-group graphs, on graphs made by hand in the form that `step.graph` has."""

from __future__ import annotations

import re
import shutil
import sys
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import jax.numpy as jnp
import networkx as nx
import pytest

import etcompile
from etcompile.errors import EtcompileError
from etcompile.viz import Drawing, VizError, draw, render
from etcompile.viz.graph import collect_cuts, direction, title
from etcompile.viz.labels import array_type, wrap
from etcompile.viz.style import EDGES, NODES, node_style

CREDIT = "recurrent weights: credit through them ends after one step"
SVG = "{http://www.w3.org/2000/svg}"


# Graphs ---------------------------------------------------------------------------------------------------


def start(model, exact, features=64):
    graph = nx.MultiDiGraph(groups={}, model=model, algo="d_rtrl", exact=exact)
    graph.add_node("in0", kind="input", label="x", shape=(16, features), dtype="float32")
    return graph


def add_state(graph, name, shape, group=None, reason="a trained parameter reaches it", dtype="float32"):
    about = dict(hidden=group is not None, group=group, reason=reason)
    graph.add_node(name, kind="state", label=name, shape=shape, dtype=dtype, **about)
    if group is not None:
        entry = graph.graph["groups"].setdefault(group, {"states": [], "shape": shape})
        entry["states"].append(name)


def add_use(graph, weight, shape, how, operation, line, inputs, targets, kind="immediate"):
    """A weight, the operation that uses it with the inputs, and what the operation leads to."""
    node = f"{weight}.{operation}"
    graph.add_node(weight, kind="parameter", label=weight, shape=shape, dtype="float32", how=how)
    graph.add_node(
        node,
        kind="operation",
        label=operation,
        source=f"model.py:{line}",
        shape=(16, shape[-1]),
        relation=None if kind == "data" else f"r{line}",
        site="s0",
    )
    graph.add_edge(weight, node, kind="weight")
    for tail in inputs:
        graph.add_edge(tail, node, kind="presynaptic")
    for target in targets:
        graph.add_edge(node, target, kind=kind)


def add_cut(graph, name, tail, head, line=31, meaning=CREDIT):
    about = dict(primitive="dot_general", source=f"model.py:{line}", meaning=meaning)
    graph.add_edge(tail, head, kind="cut", cut=name, **about)


def add_readout(graph, hidden, size=256):
    graph.add_node("out", kind="output", label="out", shape=(16, 10), dtype="float32")
    how = "within the step only"
    add_use(graph, "readout.weight", (size, 10), how, "dot_general", 60, [hidden], ["out"], kind="data")


def indrnn():
    """One group, nothing cut."""
    graph = start("IndRNN", exact=True)
    add_state(graph, "cell.h", (16, 256), "g0")
    add_use(graph, "cell.weight", (64, 256), "trace g0", "dot_general", 14, ["in0"], ["cell.h"])
    add_use(graph, "cell.decay", (256,), "trace g0", "mul", 15, ["cell.h"], ["cell.h"])
    graph.add_edge("cell.h", "cell.h", kind="transition")
    add_readout(graph, "cell.h")
    return graph


def gru():
    """One group; some columns of each weight act within the step only."""
    graph = start("GRUNet", exact=False)
    h, part = "cell.h", "trace g0, in part"
    add_state(graph, h, (16, 256), "g0")
    for name, width, line in (("cell.Wrz", 512, 31), ("cell.Wh", 256, 34)):
        add_use(graph, f"{name}.weight", (320, width), part, "dot_general", line, ["in0", h], [h])
        add_use(graph, f"{name}.bias", (width,), "trace g0", "add", line, [], [h])
    graph.add_edge(h, h, kind="transition")
    add_cut(graph, "c0", h, h)
    reset = "reset gate: its weights reach the state through another weight"
    add_cut(graph, "c1", "cell.Wrz.weight.dot_general", h, 34, reset)
    add_readout(graph, h)
    return graph


def lstm_two_layers():
    """Two groups of two states each, the second fed by the first, and states that are not hidden."""
    graph = start("StackedLSTM", exact=False)
    below = "in0"
    for layer in range(2):
        group, prefix, line = f"g{layer}", f"layers.{layer}.cell", 40 + layer
        c, h = f"{prefix}.c", f"{prefix}.h"
        add_state(graph, c, (16, 128), group)
        add_state(graph, h, (16, 128), group)
        part = f"trace {group}, in part"
        add_use(graph, f"{prefix}.weight", (256, 512), part, "dot_general", line, [below, h], [c, h])
        add_use(graph, f"{prefix}.bias", (512,), f"trace {group}", "add", line, [], [c, h])
        graph.add_edge(c, c, kind="transition")
        graph.add_edge(c, h, kind="transition")
        for state in (c, h):
            add_cut(graph, f"c{2 * layer}", h, state, line)
            if layer:
                add_cut(graph, "c1", below, state, line, "memory of layer 1 ends after this step")
        below = h
    add_state(graph, "dropout.key", (2,), None, "not floating-point: a random key", "uint32")
    add_state(graph, "steps", (), None, "no trained parameter reaches it", "int32")
    graph.add_edge("dropout.key", "layers.1.cell.weight.dot_general", kind="data")
    add_readout(graph, below, 128)
    return graph


def spiking_stack(layers, size=100):
    """As many groups as layers, each of a synapse and a membrane."""
    graph = start(f"SpikingStack{layers}", exact=False, features=size)
    below = "in0"
    for layer in range(layers):
        group, prefix = f"g{layer}", f"layers.{layer}"
        g, v = f"{prefix}.synapse.g", f"{prefix}.neuron.V"
        add_state(graph, g, (16, size), group)
        add_state(graph, v, (16, size), group)
        weight = f"{prefix}.synapse.weight"
        add_use(graph, weight, (size, size), f"trace {group}", "dot_general", 20, [below], [g, v])
        for tail, head in ((g, g), (g, v), (v, v)):
            graph.add_edge(tail, head, kind="transition")
        if layer:
            add_cut(graph, f"c{layer - 1}", below, g, 20, "memory of the layer below ends after this step")
        below = v
    add_readout(graph, below, size)
    return graph


def columns(count):
    """Groups side by side, all fed by the input and read by the output."""
    graph = start(f"Columns{count}", exact=False)
    graph.add_node("out", kind="output", label="out", shape=(16, 10), dtype="float32")
    for column in range(count):
        group, h = f"g{column}", f"columns.{column}.h"
        add_state(graph, h, (16, 32), group)
        weight = f"columns.{column}.weight"
        add_use(graph, weight, (64, 32), f"trace {group}", "dot_general", 12, ["in0"], [h])
        graph.add_edge(h, h, kind="transition")
        add_cut(graph, f"c{column}", h, h, 12)
        graph.add_edge(h, "out", kind="data")
    return graph


GRAPHS = {
    "indrnn": indrnn,
    "gru": gru,
    "lstm_two_layers": lstm_two_layers,
    "spiking_5": lambda: spiking_stack(5),
    "spiking_30": lambda: spiking_stack(30),
    "columns_30": lambda: columns(30),
}


@pytest.fixture(params=GRAPHS)
def graph(request):
    return GRAPHS[request.param]()


def svg_of(graph, **options):
    return ET.fromstring(draw(graph, **options).render("svg"))


def boxes(svg):
    """Bounding boxes of the nodes of an SVG, by title, from their outlines."""
    found = {}
    for group in svg.iter(f"{SVG}g"):
        if group.get("class") != "node":
            continue
        numbers = []
        for shape in group.iter():
            points = shape.get("points") or shape.get("d")
            if points:
                pairs = re.findall(r"(-?[\d.]+),(-?[\d.]+)", points)
                numbers += [(float(x), float(y)) for x, y in pairs]
        if numbers:
            xs, ys = zip(*numbers, strict=True)
            found[group.findtext(f"{SVG}title")] = (min(xs), min(ys), max(xs), max(ys))
    return found


# What is drawn --------------------------------------------------------------------------------------------


def test_every_node_and_edge_is_drawn(graph):
    svg = svg_of(graph, every_layer=True)
    titles = [group.findtext(f"{SVG}title") for group in svg.iter(f"{SVG}g")]
    first = {s: g["states"][0] for g in graph.graph["groups"].values() for s in g["states"]}

    def drawn(tail, head):
        """To itself, or with others of its group to their frame."""
        return f"{tail}->{head}" in titles or f"{tail}->{first.get(head)}" in titles

    for node in graph:
        assert node in titles
    for tail, head, kind in graph.edges(data="kind"):
        assert kind == "cut" or drawn(tail, head)
    for cut in collect_cuts(graph):
        assert f"cut {cut.name}" in titles
        for tail, head in cut.paths:
            assert f"{tail}->cut {cut.name}" in titles
            assert drawn(f"cut {cut.name}", head)


def test_svg_has_a_title_and_real_text(graph):
    svg = svg_of(graph, every_layer=True)
    assert svg.find(f"{SVG}g/{SVG}title").text == title(graph)
    words = {"".join(text.itertext()).strip() for text in svg.iter(f"{SVG}text")}
    assert title(graph) in words
    assert {f"group {group}" for group in graph.graph["groups"]} <= words
    assert {data["label"] for _, data in graph.nodes(data=True) if len(data["label"]) < 26} <= words
    assert not list(svg.iter(f"{SVG}image"))


def test_nodes_do_not_overlap(graph):
    placed = [box for name, box in boxes(svg_of(graph)).items() if name]
    for i, (left, top, right, bottom) in enumerate(placed):
        for left2, top2, right2, bottom2 in placed[i + 1 :]:
            apart = right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
            assert apart


def test_states_lie_inside_the_box_of_their_group():
    svg = svg_of(lstm_two_layers())
    node = boxes(svg)
    for group in ("g0", "g1"):
        cluster = next(
            item
            for item in svg.iter(f"{SVG}g")
            if item.get("class") == "cluster" and item.findtext(f"{SVG}title") == f"cluster group {group}"
        )
        pairs = re.findall(
            r"(-?[\d.]+),(-?[\d.]+)", " ".join(path.get("d", "") for path in cluster.iter(f"{SVG}path"))
        )
        xs, ys = [float(x) for x, _ in pairs], [float(y) for _, y in pairs]
        for state in lstm_two_layers().graph["groups"][group]["states"]:
            left, top, right, bottom = node[state]
            assert min(xs) <= left < right <= max(xs)
            assert min(ys) <= top < bottom <= max(ys)


def test_weights_show_how_they_learn():
    source = draw(gru()).source
    for name, style in (
        ("cell.Wrz.weight", "part"),
        ("cell.Wh.bias", "trace"),
        ("readout.weight", "one step"),
    ):
        line = next(line for line in source.splitlines() if line.strip().startswith(f'"{name}" ['))
        assert (
            f'style="{NODES[style].attributes["style"]}"' in line
            or f"style={NODES[style].attributes['style']}" in line
        )


@pytest.mark.parametrize(
    ("algo", "style"), [("rtrl", "influence"), ("snap", "influence"), ("bptt", "window")]
)
def test_weights_of_rules_without_traces_are_not_drawn_as_within_the_step(algo, style):
    model = etcompile.from_function(
        lambda p, h, x: ((h := jnp.tanh(x @ p["w"] + h @ p["r"])), h @ p["readout"]),
        {"w": jnp.ones((3, 4)), "r": jnp.ones((4, 4)), "readout": jnp.ones((4, 2))},
        jnp.zeros((2, 4)),
    )
    graph = etcompile.compile(model, jnp.ones((2, 3)), algo=algo).graph
    found = {path: node_style(path, graph.nodes[path]) for path in ("w", "r", "readout")}
    assert found == {"w": style, "r": style, "readout": "window" if algo == "bptt" else "one step"}
    assert NODES[style].name.split("\n")[0] in draw(graph).source


def test_legend_shows_what_occurs_and_nothing_else():
    exact, cut = draw(indrnn()).source, draw(gru()).source
    assert NODES["cut"].name not in exact
    assert NODES["part"].name not in exact
    assert NODES["other state"].name not in exact
    for name in (NODES["cut"].name, NODES["part"].name, EDGES["cut"].name):
        assert name in cut


def test_cut_names_its_line_and_what_is_lost():
    svg = svg_of(gru())
    words = " ".join(" ".join(text.itertext()) for text in svg.iter(f"{SVG}text"))
    assert " c0 " in words and "model.py:34" in words
    assert "recurrent weights: credit through them ends" in words


def test_cut_over_several_paths_is_one_cut():
    cuts = collect_cuts(lstm_two_layers())
    assert [cut.name for cut in cuts] == ["c0", "c1", "c2"] or {cut.name for cut in cuts} == {
        "c0",
        "c1",
        "c2",
    }
    assert all(len(cut.paths) == 2 for cut in cuts)
    assert title(lstm_two_layers()).endswith("exact: no, 3 cuts")


def test_kinds_differ_without_colour():
    """Shape and line tell the kinds apart in black and white, too."""

    def look(style, names):
        return tuple(style.attributes.get(name) for name in names)

    nodes = [look(style, ("shape", "style")) for style in NODES.values()]
    edges = [look(style, ("style", "arrowhead", "penwidth")) for style in EDGES.values()]
    assert len(set(nodes)) == len(nodes)
    assert len(set(edges)) == len(edges)


def test_deep_graphs_run_down_and_wide_ones_to_the_right():
    assert direction(spiking_stack(30)) == direction(gru()) == "TB"
    assert direction(columns(30)) == "LR"


def test_same_graph_gives_the_same_text(graph):
    assert draw(graph).source == draw(graph.copy()).source


# Text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "text"),
    [
        ((16, 256), "float32", "f32[16,256]"),
        ((), "int32", "i32[]"),
        ((2,), "bfloat16", "bf16[2]"),
        ((3,), "complex64", "c64[3]"),
        ((3,), "bool", "bool[3]"),
        ((3,), None, "[3]"),
        (None, None, ""),
    ],
)
def test_array_type(shape, dtype, text):
    assert array_type(shape, dtype) == text


@pytest.mark.parametrize(
    "text", ["encoder.layers.12.recurrent_weight_matrix", "a" * 70, "one two", "", "a.b_" * 20]
)
def test_wrap_keeps_the_text_and_the_width(text):
    lines = wrap(text, 20)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(len(line) <= 20 for line in lines)


@pytest.mark.parametrize(
    "name",
    [
        "<lambda>",
        'quo"ted',
        "back\\slash\\N",
        "a:b:c",
        "<b>&amp;",
        "\x00bell\x07",
        "ünï✂",
        "cut c0",
        "legend node cut",
        "x" * 300,
    ],
)
def test_any_name_can_be_drawn(name):
    graph = gru()
    graph = nx.relabel_nodes(graph, {"cell.h": name})
    graph.nodes[name]["label"] = name
    graph.graph["model"] = name
    graph.graph["algo"] = graph.graph["exact"] = None
    graph.nodes["in0"]["label"] = name
    svg = svg_of(graph)
    # Graphviz shows a backslash in the name of a graph as two.
    assert svg.find(f"{SVG}g/{SVG}title").text.replace("\\\\", "\\") == title(graph)
    assert len([group for group in svg.iter(f"{SVG}g") if group.get("class") == "node"]) > len(graph)


# Files and formats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "magic"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF"), ("dot", b"digraph")]
)
def test_formats(tmp_path, format, magic):
    draw(gru(), tmp_path / f"graph.{format}")
    assert (tmp_path / f"graph.{format}").read_bytes().startswith(magic)
    draw(gru(), str(tmp_path / "other"), format=format.upper())
    assert (tmp_path / "other").read_bytes().startswith(magic)


def test_step_is_drawn_by_its_graph_and_shown_in_notebooks():
    drawing = draw(SimpleNamespace(graph=gru()))
    assert isinstance(drawing, Drawing)
    assert drawing.source == draw(gru()).source
    assert "<svg" in drawing._repr_svg_()
    assert repr(drawing) == "Drawing('GRUNet \N{MIDDLE DOT} d_rtrl \N{MIDDLE DOT} exact: no, 2 cuts')"


def test_graph_is_left_as_it_was(graph):
    before = graph.copy()
    draw(graph)
    assert nx.utils.graphs_equal(before, graph)
    assert before.graph == graph.graph


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: draw(42), "Got int instead"),
        (lambda path: draw(nx.Graph([(1, 2)])), "undirected Graph"),
        (lambda path: draw(nx.MultiDiGraph()), "no nodes"),
        (lambda path: draw(nx.MultiDiGraph([("a", "b")])), "Node 'a' of the graph has kind None"),
        (lambda path: draw(gru(), path / "graph.gif"), "one of svg, png, pdf, dot. Got 'gif'"),
        (lambda path: draw(gru(), path / "graph"), "no suffix"),
        (lambda path: draw(gru(), format="svg"), "needs a 'path'"),
        (lambda path: draw(gru(), path / "missing" / "graph.svg"), "there is no directory"),
        (lambda path: draw(gru(), path, format="svg"), "Cannot write"),
        (lambda path: draw(gru()).render("jpg"), "Got 'jpg'"),
    ],
)
def test_mistakes_are_named(tmp_path, make, message):
    with pytest.raises(VizError, match=re.escape(message)) as caught:
        make(tmp_path)
    assert isinstance(caught.value, EtcompileError)


def test_unknown_kind_of_edge_is_named():
    graph = indrnn()
    graph.add_edge("in0", "cell.h", kind="wormhole")
    with pytest.raises(VizError, match=r"Edge 'in0' -> 'cell.h' of the graph has kind 'wormhole'"):
        draw(graph)


# Finding Graphviz -----------------------------------------------------------------------------------------


def test_bundled_graphviz_is_preferred(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/dot")
    first, second = render.dot_commands()
    assert first[0] == sys.executable
    assert second == ["/usr/bin/dot"]


def test_system_dot_is_used_without_the_extra(monkeypatch):
    monkeypatch.setattr(render.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/dot")
    assert render.dot_commands() == [["/usr/bin/dot"]]


def test_without_any_graphviz_the_message_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(render.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(VizError, match=re.escape("pip install 'etcompile[viz]'")):
        draw(gru(), tmp_path / "graph.svg")
    assert not list(tmp_path.iterdir())
    draw(gru(), tmp_path / "graph.dot")


def test_failure_of_graphviz_is_passed_on(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(VizError, match=r"could not draw the graph: [\s\S]*syntax error"):
        render.render("digraph {", "svg")
