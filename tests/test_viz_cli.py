"""The command line of the drawing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import networkx as nx
import pytest

import etcompile
from etcompile.errors import ModelError
from etcompile.viz import cli
from etcompile.viz.errors import VizError
from etcompile.viz.load import parse_shape

ROOT = Path(__file__).resolve().parents[1]

SOURCE = """
    import networkx as nx
    from types import SimpleNamespace
    import beside

    graph = nx.MultiDiGraph(groups={"g0": {"states": ["h"], "shape": (4,)}}, model="Tiny", exact=True)
    graph.add_node("h", kind="state", label="h", shape=(4,), dtype="float32", hidden=True, group="g0")
    graph.add_edge("h", "h", kind="transition")
    step = SimpleNamespace(graph=graph)

    class Model:
        def __call__(self, x):
            return x

    model = Model()
    holder = SimpleNamespace(inner=model)
    pair = (model, "an input")
    number = 3

    def make_step():
        return step

    def needs(x):
        return step

    def breaks():
        raise RuntimeError("out of luck")
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "tiny.py").write_text(dedent(SOURCE))
    return "tiny.py"


@pytest.fixture
def compiled(monkeypatch):
    """Stands in for `etcompile.compile`, and records how it was called."""
    calls = []

    def compile(model, *inputs, algo, batch_size):
        calls.append((type(model).__name__, inputs, algo, batch_size))
        graph = nx.MultiDiGraph(model="Tiny")
        graph.add_node("h", kind="state", label="h", shape=(4,), dtype="float32", hidden=True, group="g0")
        return SimpleNamespace(graph=graph)

    monkeypatch.setattr(etcompile, "compile", compile, raising=False)
    return calls


def run(capsys, *arguments):
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("name", ["graph", "step", "make_step"])
def test_draws_steps_graphs_and_what_functions_return(file, capsys, name):
    status, out, err = run(capsys, f"{file}:{name}", "-o", "picture.svg")
    assert (status, err) == (0, "")
    assert "picture.svg" in out
    assert "Tiny" in Path("picture.svg").read_text()


def test_output_is_named_after_the_object_by_default(file, capsys):
    assert run(capsys, f"{file}:step")[0] == 0
    assert run(capsys, f"{file}:step", "--format", "png")[0] == 0
    assert Path("step.svg").is_file()
    assert Path("step.png").is_file()


def test_dash_writes_to_standard_output(file, capfdbinary):
    assert cli.main([f"{file}:step", "-o", "-", "--format", "dot"]) == 0
    assert capfdbinary.readouterr().out.startswith(b"digraph")


def test_model_is_compiled_with_the_options(file, capsys, compiled):
    arguments = "--input-shape", "16,64", "--input-shape", "16:int32", "--batch", "16", "--algo", "e_prop"
    status, _, err = run(capsys, f"{file}:holder.inner", *arguments)
    assert (status, err) == (0, "")
    ((model, inputs, algo, batch),) = compiled
    assert (model, algo, batch) == ("Model", "e_prop", 16)
    assert [(x.shape, x.dtype.name) for x in inputs] == [((16, 64), "float32"), ((16,), "int32")]


def test_tuple_brings_its_inputs(file, capsys, compiled):
    assert run(capsys, f"{file}:pair")[0] == 0
    assert compiled == [("Model", ("an input",), "d_rtrl", None)]


def test_mistake_in_the_model_is_reported_without_a_traceback(file, capsys, monkeypatch):
    def compile(*_, **__):
        raise ModelError("no trainable parameter", where="tiny.py:3")

    monkeypatch.setattr(etcompile, "compile", compile, raising=False)
    status, _, err = run(capsys, f"{file}:pair")
    assert status == 2
    assert err == "etcompile-viz: error: tiny.py:3: no trainable parameter\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny.py"], "Expected FILE.py:NAME"),
        (["nowhere.py:step"], "There is no file nowhere.py"),
        (["tiny.py:stepp"], "tiny.py has no 'stepp'. Did you mean step"),
        (["tiny.py:qqq"], "It has: graph, step"),
        (["tiny.py:holder.outer"], "tiny.py has no 'holder.outer'"),
        (["tiny.py:number"], "Got int instead"),
        (["tiny.py:number", "--input-shape", "4"], "Got int instead"),
        (["tiny.py:beside", "--input-shape", "4"], "Got module instead"),
        (["tiny.py:Model", "--input-shape", "4"], "make an instance of it, Model(...)"),
        (["tiny.py:model"], "--input-shape 16,64"),
        (["tiny.py:model", "--input-shape", "4;4"], "must look like 16,64"),
        (["tiny.py:model", "--input-shape", "4:float31"], "'float31' that JAX does not have"),
        (["tiny.py:model", "--input-shape", "4", "--batch", "0"], "--batch must be at least 1"),
        (["tiny.py:pair", "--input-shape", "4"], "brings its own example inputs"),
        (["tiny.py:needs"], "The function needs needs arguments"),
        (["tiny.py:breaks"], "Calling breaks() failed at tiny.py:27: RuntimeError: out of luck"),
        (["tiny.py:step", "--algo", "e_prop"], "compiled already, so --algo cannot apply"),
        (["tiny.py:step", "--format", "gif"], "one of svg, png, pdf, dot. Got 'gif'"),
        (["tiny.py:step", "-o", "graph.jpg"], "one of svg, png, pdf, dot. Got 'jpg'"),
        (["tiny.py:step", "-o", "graph"], "no suffix"),
        (["tiny.py:step", "-o", "no/graph.svg"], "there is no directory no"),
        (["broken.py:step"], "Running broken.py failed at broken.py:2: ZeroDivisionError"),
        (["syntax.py:step"], "Running syntax.py failed at syntax.py:1: SyntaxError"),
        (["notes.txt:step"], "not a Python file"),
    ],
)
def test_mistakes_are_named(file, capsys, arguments, message):
    Path("broken.py").write_text("x = 1\nx / 0\n")
    Path("syntax.py").write_text("def\n")
    Path("notes.txt").write_text("")
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("etcompile-viz: error: ")
    assert message in err
    assert not list(Path().glob("*.svg"))


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("16,64", ((16, 64), "float32")),
        ("(16, 64)", ((16, 64), "float32")),
        ("8:int32", ((8,), "int32")),
        ("8x3", ((8, 3), "float32")),
        ("()", ((), "float32")),
    ],
)
def test_shapes(text, shape):
    assert parse_shape(text) == shape


@pytest.mark.parametrize("text", ["", "a", "3,-1", "1.5", "3:"])
def test_bad_shapes(text):
    with pytest.raises(VizError, match="must look like 16,64"):
        parse_shape(text)


def test_runs_as_a_folder(file):
    command = [sys.executable, str(ROOT / "tools" / "viz"), f"{file}:step", "-o", "graph.pdf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path("graph.pdf").read_bytes().startswith(b"%PDF")
