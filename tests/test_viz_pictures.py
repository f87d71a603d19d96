"""What pictures of compiled models hold, read from their DOT text and their layout."""

from __future__ import annotations

import colorsys
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from math import sqrt

import brainstate
import jax
import jax.numpy as jnp
import pytest
from references import step_of
from zoo import by_name

import etcompile
from etcompile.amounts import bytes_text
from etcompile.viz import VizError, cli, draw
from etcompile.viz.dataflow import program_picture
from etcompile.viz.layers import layer_of
from etcompile.viz.model import model_picture
from etcompile.viz.style import BOXES, EDGES, FONT, NODES, QUIET

SVG = "{http://www.w3.org/2000/svg}"
#: A screen of 1920 by 1080 pixels, in points.
SCREEN = (1440, 810)


class Stack(brainstate.nn.Module):
    def __init__(self, cell, layers, units=32, between=None):
        super().__init__()
        self.layers = []
        for k in range(layers):
            self.layers.append(cell(16 if k == 0 else units, units))
            if between is not None:
                self.layers.append(between(units, units))
        self.readout = brainstate.nn.Linear(units, 10)

    def update(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.readout(x)


@jax.custom_jvp
def heaviside(v):
    return (v > 0).astype(v.dtype)


heaviside.defjvp(
    lambda primals, tangents: (heaviside(*primals), tangents[0] / (1 + jnp.abs(primals[0])) ** 2)
)


def spiking(layers, sizes=None):
    """A stack of leaky integrators that spike, as a function; names hold the number of the layer."""
    sizes = sizes or [32] * (layers + 1)

    def step(params, state, x):
        new = {}
        for k in range(layers):
            v = 0.9 * state[f"v{k}"] + x @ params[f"W{k}"] + params[f"b{k}"]
            new[f"v{k}"], x = v, heaviside(v - 1.0)
        return new, x @ params["readout"]

    pairs = list(pairwise(sizes))
    params = {f"W{k}": jnp.ones(pair) for k, pair in enumerate(pairs)}
    params |= {f"b{k}": jnp.ones(pair[1]) for k, pair in enumerate(pairs)}
    params["readout"] = jnp.ones((sizes[-1], 2))
    state = {f"v{k}": jnp.zeros((4, pair[1])) for k, pair in enumerate(pairs)}
    return etcompile.compile(etcompile.from_function(step, params, state), jnp.ones((4, sizes[0])))


def residual(layers):
    """Every layer reads the sum of all layers before it."""

    def step(params, state, x):
        new = {}
        for k, p in enumerate(params["blocks"]):
            h = jnp.tanh(x @ p["in"] + p["decay"] * state[k])
            new[k], x = h, x + h @ p["out"]
        return [new[k] for k in range(layers)], x @ params["readout"]

    blocks = [{"in": jnp.ones((8, 8)), "decay": jnp.ones(8), "out": jnp.ones((8, 8))} for _ in range(layers)]
    model = etcompile.from_function(
        step, {"blocks": blocks, "readout": jnp.ones((8, 2))}, [jnp.zeros((4, 8))] * layers
    )
    return etcompile.compile(model, jnp.ones((4, 8)))


def tied(layers):
    """One weight in all layers."""

    def step(params, state, x):
        new = []
        for h in state:
            x = jnp.tanh(0.9 * h + x @ params["W"])
            new.append(x)
        return new, x @ params["readout"]

    params = {"W": jnp.ones((8, 8)), "readout": jnp.ones((8, 2))}
    return etcompile.compile(
        etcompile.from_function(step, params, [jnp.zeros((4, 8))] * layers), jnp.ones((4, 8))
    )


_MADE: dict[tuple, etcompile.Step] = {}


def stack(cell, layers, **options):
    """Compiled once for all tests."""
    key = (cell, layers, *options.items())
    if key not in _MADE:
        model = Stack(getattr(brainstate.nn, cell), layers)
        _MADE[key] = etcompile.compile(model, jnp.ones((4, 16)), batch_size=4, **options)
    return _MADE[key]


def size_of(drawing):
    root = ET.fromstring(drawing.render("svg"))
    return tuple(float(root.get(side).removesuffix("pt")) for side in ("width", "height"))


def by_name_of(picture):
    return {node.name: node for node in picture.nodes}


# A second view ----------------------------------------------------------------------------------------------------------


def test_the_dataflow_of_a_program_is_a_second_view():
    step = stack("GRUCell", 1)
    picture = program_picture(step.program, step.report().traces)
    nodes = by_name_of(picture)
    head = {node.head[0].split(" ")[0]: name for name, node in nodes.items()}
    assert {"x", "f", "D", "e", "L", "G"} <= head.keys()
    edges = {(edge.tail, edge.head, edge.style) for edge in picture.edges}
    for tail, end, style in [("f", "o", "now"), ("x", "o", "now"), ("o", "e", "now"), ("D", "v0", "now"),
                             ("e", "v0", "before"), ("v0", "e", "now"), ("e", "G", "before"), ("L", "v1", "now")]:  # fmt: skip
        assert (head[tail], head[end], style) in edges
    assert nodes[head["e"]].style == "carried"
    assert nodes[head["e"]].amount == step.report().trace_bytes
    assert nodes[head["L"]].style == "of the loss" and nodes[head["x"]].style == "read"
    result = [node for node in nodes.values() if node.style == "gradient"]
    assert len(result) == 1 and (head["G"], result[0].name, "now") in edges


def test_the_views_are_drawn_by_name_and_shown_in_notebooks(tmp_path):
    step = stack("GRUCell", 1)
    program = draw(step, tmp_path / "program.svg", view="program")
    assert program.source != draw(step).source == draw(step, view="model").source
    assert "program d_rtrl" in program.title and bytes_text(step.report().trace_bytes) in program.source
    assert draw(step.program).title == program.title
    assert "<svg" in step.program._repr_html_()
    for what, view in ((step, "wires"), (step.graph, "program"), (step.program, "model")):
        with pytest.raises(VizError):
            draw(what, view=view)


def test_the_command_line_draws_both_views(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(
        "import etcompile, jax.numpy as jnp\n"
        "model = etcompile.from_function(lambda p, h, x: (jnp.tanh(p['a'] * h + x),) * 2, {'a': jnp.ones(3)}, jnp.ones(3))\n"
        "step = etcompile.compile(model, jnp.ones(3))\n"
    )
    for options in ([], ["--every-layer"], ["--view", "program"]):
        assert cli.main(["tiny.py:step", "-o", "graph.svg", *options]) == 0
        assert ("program" in capsys.readouterr().out) == ("program" in options)


@pytest.mark.parametrize(
    "algo", ["d_rtrl", "rtrl", "e_prop", "pp_prop", "snap", "kf_rtrl", "uoro", "bptt", "superspike"]
)
def test_a_program_is_drawn_whatever_the_rule(algo):
    try:
        step = etcompile.compile(Stack(brainstate.nn.GRUCell, 1), jnp.ones((4, 16)), batch_size=4, algo=algo)
    except etcompile.errors.EtcompileError as error:
        pytest.skip(f"{algo} refuses the model: {error}")
    drawing = draw(step, view="program")
    names = [equation.name for equation in step.program.equations]
    tips = " ".join(node.tip for node in program_picture(step.program).nodes)
    assert all(f"{name} = " in tips for name in names), "each equation stands behind some node"
    width, height = size_of(drawing)
    assert width <= SCREEN[0] and height <= 2 * SCREEN[1]


# Repeated layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "layers"), [("GRUCell", 12), ("LSTMCell", 12), ("GRUCell", 30)])
def test_repeated_layers_are_drawn_once_with_a_count(cell, layers):
    step = stack(cell, layers)
    picture = model_picture(step.graph)
    (box,) = [box for box in picture.boxes if box.style == "layers"]
    assert box.head == f"\N{MULTIPLICATION SIGN} {layers - 1}"
    assert " ".join(box.details) == f"layers.1 \N{HORIZONTAL ELLIPSIS} layers.{layers - 1}"
    states = [node.name for node in picture.nodes if node.style == "hidden"]
    assert {layer_of(name)[1] for name in states} == {0, 1}, "the first has another size and stands alone"
    drawn = sum(node.amount for node in picture.nodes)
    assert drawn == step.report().trace_bytes, "areas stand for all layers"
    assert {name for cut in picture.cuts for name in cut.names} == {cut.name for cut in step.report().cuts}
    assert sum(len(cut.names) for cut in picture.cuts) == len(step.report().cuts)
    assert any(edge.style == "next" for edge in picture.edges)
    assert ("readout.weight", 0) not in {(node.name, node.amount) for node in picture.nodes if node.box}


def test_the_dataflow_of_a_deep_network_is_as_small_as_that_of_one_layer():
    one, many = (program_picture(stack("GRUCell", layers).program) for layers in (1, 30))
    assert len(one.nodes) == len(many.nodes)
    assert any("\N{MULTIPLICATION SIGN} 120" in node.head[0] for node in many.nodes), "traces of 30 layers"


def test_every_layer_can_be_drawn():
    step = stack("GRUCell", 12)
    picture = model_picture(step.graph, every_layer=True)
    assert len([node for node in picture.nodes if node.style == "hidden"]) == 12
    assert not [box for box in picture.boxes if box.style == "layers"]
    assert "layers.7.h" in draw(step, every_layer=True).source
    assert "layers.7.h" not in draw(step).source.replace("tooltip", "\ntooltip").split("\n", 1)[0]


def test_two_layers_are_drawn_in_full():
    picture = model_picture(stack("GRUCell", 2).graph)
    assert not [box for box in picture.boxes if box.style == "layers"]


def test_layers_that_alternate_repeat_together():
    model = Stack(brainstate.nn.GRUCell, 8, units=16, between=brainstate.nn.ValinaRNNCell)
    picture = model_picture(etcompile.compile(model, jnp.ones((4, 16)), batch_size=4).graph)
    (box,) = [box for box in picture.boxes if box.style == "layers"]
    assert int(box.head.split()[1]) in (7, 8)
    assert len([node for node in picture.nodes if node.style == "hidden" and node.box]) <= 4


@pytest.mark.parametrize("make", [spiking, residual, tied])
def test_layers_named_by_numbers_alone_residual_and_tied_ones_repeat(make):
    step = make(12)
    picture = model_picture(step.graph)
    (box,) = [box for box in picture.boxes if box.style == "layers"]
    assert int(box.head.split()[1]) >= 10
    assert sum(node.amount for node in picture.nodes) == step.report().trace_bytes


def test_layers_that_differ_are_not_drawn_as_one_where_there_is_space():
    picture = model_picture(spiking(4, sizes=[8, 16, 32, 16, 8]).graph)
    assert not [box for box in picture.boxes if box.style == "layers"]


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("layers.3.weight", ("layers.", 3)),
        ("cells[3].w", ("cells[", 3)),
        ("h3", ("", 3)),
        ("W12", ("", 12)),
        ("encoder3.h", ("encoder", 3)),
        ("net.blocks.3.heads.0.w", ("net.blocks.", 3)),
        ("net.h3", ("net.", 3)),
        ("readout.weight", None),
    ],
)
def test_which_layer_a_path_names(path, layer):
    assert layer_of(path) == layer


# Nodes ------------------------------------------------------------------------------------------------------------------


def test_a_bias_of_a_sum_is_drawn_with_the_last_weight_of_it():
    def step(params, h, x):
        h = jnp.tanh(0.9 * h + x @ params["W"] + h @ params["R"] + params["b"])
        return h, h @ params["readout"] + params["c"]

    shapes = {"W": (3, 4), "R": (4, 4), "b": (4,), "readout": (4, 2), "c": (2,)}
    model = etcompile.from_function(step, {k: jnp.ones(s) for k, s in shapes.items()}, jnp.zeros((2, 4)))
    graph = etcompile.compile(model, jnp.ones((2, 3))).graph
    heads = [node.head for node in model_picture(graph).nodes if node.style in ("trace", "one step")]
    assert sorted(heads) == [("R, b",), ("W",), ("readout, c",)]
    assert set(graph.successors("b")) == set(graph.successors("R"))


@pytest.mark.parametrize("name", ["gru", "lstm", "gated_linear_attention"])
def test_a_bias_is_drawn_with_its_weight(name):
    step = step_of(by_name(name))
    picture = model_picture(step.graph)
    weights = [node for node in picture.nodes if NODES[node.style].attributes["shape"] == "cylinder"]
    sites = {
        site
        for _, data in step.graph.nodes(data=True)
        for site in data.get("sites", ())
        if data["kind"] == "operation"
    }
    operations = [node for node in picture.nodes if node.style == "operation"]
    assert len(weights) == len(operations) < len(sites)
    text = " ".join(" ".join((*node.head, *node.details)) for node in weights)
    for path, data in step.graph.nodes(data=True):
        if data["kind"] == "parameter":
            assert path.rpartition(".")[2] in text, "each is named"
    assert sum(node.amount for node in weights) == step.report().trace_bytes


def test_the_bytes_of_traces_are_areas():
    step = stack("GRUCell", 12)
    nodes = model_picture(step.graph).nodes
    most = max(node.amount for node in nodes)
    found = re.findall(r'fixedsize="true" width="(\d+)" height="(\d+)"', draw(step).source)
    areas = sorted(int(width) * int(height) for width, height in found)
    wanted = sorted(56 * 14 * node.amount / most for node in nodes if node.amount)
    assert len(areas) == len(wanted) == 4
    assert all(
        sqrt(area) == pytest.approx(sqrt(want), abs=2) for area, want in zip(areas, wanted, strict=True)
    )
    assert "area: bytes carried" in draw(step).source
    assert "area" not in draw(stack("GRUCell", 1, algo="bptt")).source


@pytest.mark.parametrize(
    "name", ["lif_delta", "lif_spike_not_kept", "brainpy_lif_delta", "spiking_net_of_modules"]
)
def test_a_spike_with_its_surrogate_is_a_node(name):
    graph = step_of(by_name(name)).graph
    spikes = [node for node, data in graph.nodes(data=True) if data["kind"] == "surrogate"]
    assert spikes
    for node in spikes:
        assert any(graph.nodes[tail].get("hidden") for tail in graph.predecessors(node)), "from the membrane"
        assert list(graph.successors(node)), "to what reads it"
    drawn = [node for node in model_picture(graph).nodes if node.style == "surrogate"]
    assert [node.name for node in drawn] == spikes
    assert NODES["surrogate"].name in draw(graph).source


@pytest.mark.parametrize("name", ["relu_and_clip", "gelu_and_softplus", "gru"])
def test_functions_with_a_derivative_of_their_own_are_no_spikes(name):
    graph = step_of(by_name(name)).graph
    assert "surrogate" not in {data["kind"] for _, data in graph.nodes(data=True)}
    assert NODES["surrogate"].name not in draw(graph).source


@pytest.mark.parametrize("algo", ["rtrl", "snap"])
def test_a_weight_with_an_influence_is_drawn_as_such(algo):
    step = stack("GRUCell", 1, algo=algo)
    nodes = by_name_of(model_picture(step.graph))
    for name in ("layers.0.Wrz.weight.weight", "layers.0.Wh.weight.weight"):
        assert nodes[name].style == "influence"
        assert nodes[name].said.startswith("influence on network: ")
    assert nodes["readout.weight.weight"].style == "one step"
    assert sum(node.amount for node in nodes.values()) == step.report().trace_bytes


# The key ----------------------------------------------------------------------------------------------------------------


def areas(drawing):
    """Area of the whole canvas, of the legend and of the table of cuts, in square points."""
    root = ET.fromstring(drawing.render("svg"))
    found = {"canvas": float(root.get("width")[:-2]) * float(root.get("height")[:-2])}
    for group in root.iter(f"{SVG}g"):
        title = group.findtext(f"{SVG}title")
        if title in ("cluster legend", "table of cuts"):
            outlines = [shape.get("points") for shape in group.iter(f"{SVG}polygon")]
            boxes = [
                list(zip(*[tuple(map(float, pair.split(","))) for pair in points.split()], strict=True))
                for points in outlines
            ]
            found[title] = max((max(x) - min(x)) * (max(y) - min(y)) for x, y in boxes)
    return found


@pytest.mark.parametrize("layers", [1, 2, 12, 30])
def test_legend_and_table_are_small_beside_the_picture(layers):
    drawing = draw(stack("GRUCell", layers), every_layer=layers == 12)
    found = areas(drawing)
    assert found["cluster legend"] < 0.35 * found["canvas"]
    assert found["table of cuts"] < 0.25 * found["canvas"]


def test_cuts_are_numbers_in_the_drawing_and_text_in_the_table():
    step = stack("GRUCell", 12)
    lines = draw(step).source.splitlines()
    marks = [line for line in lines if line.strip().startswith('"cut c') and "->" not in line]
    assert len(marks) == 4
    for mark in marks:
        label = mark.split("label=<", 1)[1].split("> color", 1)[0].split("> tooltip", 1)[0]
        shown = re.sub(r"<[^>]*>", " ", label.split("</table>")[0]).split()
        assert shown[0] in {cut.name for cut in step.report().cuts} and len(shown) <= 3
    (table,) = [line for line in lines if line.strip().startswith('"table of cuts" [')]
    assert "recurrent weights: credit through them ends after one step" in table
    assert table.count("<tr>") <= 8 and "11 in all" in table


def test_a_table_of_many_different_cuts_is_short_and_says_how_many_are_left():
    source = draw(stack("GRUCell", 12), every_layer=True).source
    (table,) = [line for line in source.splitlines() if line.strip().startswith('"table of cuts" [')]
    assert table.count("<tr>") == 8
    assert "and 17 more: the report has all of them" in table


# Size and colour --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: stack("GRUCell", 12),
        lambda: stack("GRUCell", 30),
        lambda: stack("LSTMCell", 12),
        lambda: spiking(12),
        lambda: spiking(30),
        lambda: residual(12),
        lambda: tied(30),
        lambda: spiking(30, sizes=[8 + k * k % 17 for k in range(31)]),
    ],
)
def test_deep_networks_fit_a_screen_and_are_legible(make):
    step = make()
    for view in ("model", "program"):
        drawing = draw(step, view=view)
        width, height = size_of(drawing)
        assert width <= SCREEN[0] and height <= SCREEN[1]
        sizes = [float(size) for size in re.findall(r'font-size="([\d.]+)"', drawing.render("svg").decode())]
        assert min(sizes) >= 9


def light(color):
    """Relative luminance, as the guidelines for accessible web pages (WCAG 2) define it."""
    parts = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(first, second):
    low, high = sorted((light(first), light(second)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_stand_out_from_what_is_behind_them():
    for style in NODES.values():
        assert contrast(QUIET, style.attributes.get("fillcolor", "#FFFFFF")) > 4.5
    for style in (*EDGES.values(), *(style for style in NODES.values() if "color" in style.attributes)):
        assert contrast(style.attributes["color"], "#FFFFFF") > 3


#: Of Okabe and Ito, which readers with the common colour-vision deficiencies can tell apart.
HUES = {"#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}


def test_colours_are_shades_of_a_palette_that_is_safe_for_the_colour_blind():
    def hue(color):
        h, s, _ = colorsys.rgb_to_hsv(*(int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)))
        return h if s > 0.02 else None

    safe = [hue(color) for color in HUES]
    styles = (*NODES.values(), *EDGES.values(), *BOXES.values())
    used = {value for style in styles for value in style.attributes.values() if value.startswith("#")}
    for color in used:
        found = hue(color)
        assert found is None or min(abs(found - h) for h in safe) < 0.035, color


def test_all_text_has_the_fonts_of_the_drawing():
    for view in ("model", "program"):
        svg = draw(stack("GRUCell", 2), view=view).render("svg").decode()
        assert set(re.findall(r'font-family="([^"]*)"', svg)) == {FONT}
