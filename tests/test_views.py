"""What notebooks and saved pages show: valid, escaped, complete, and looked at in a browser where there is one."""

from __future__ import annotations

import linecache
import re

import html_pages
import jax
import jax.numpy as jnp
import pytest
from browsers import looked_at

import etcompile
from etcompile.errors import OptionError
from etcompile.markup import document, table, tag
from etcompile.views.source import source_view

NASTY = '<script>alert("&amp;")</script>'


def gru(params, state, x):
    z, r = jnp.split(jax.nn.sigmoid(jnp.concatenate([x, state["h"]], -1) @ params["gates"]), 2, axis=-1)
    c = jnp.tanh(jnp.concatenate([x, r * state["h"]], -1) @ params[NASTY])
    h = (1 - z) * state["h"] + z * c
    return {"h": h}, h @ params["readout"]


@pytest.fixture(scope="module")
def step():
    params = {"gates": jnp.ones((7, 8)), NASTY: jnp.ones((7, 4)), "readout": jnp.ones((4, 2))}
    model = etcompile.from_function(gru, params, {"h": jnp.zeros((2, 4))})
    return etcompile.compile(model, jnp.ones((2, 3)))


@pytest.fixture(scope="module")
def page(step, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert step.save_html(str(path)) == path
    return path


@pytest.mark.parametrize("what", ["step", "report", "program", "cost", "graph"])
def test_every_view_is_valid_html_and_fetches_nothing(step, what):
    values = {
        "step": step,
        "report": step.report(),
        "program": step.program,
        "cost": step.cost(),
        "graph": step.graph,
    }
    found = html_pages.read(values[what]._repr_html_())
    assert found.count("style") == 1
    assert found.count("svg") == {"step": 2, "graph": 1, "program": 1}.get(what, 0)
    if what != "cost":
        assert "alert" in found.text(), "the name is shown as text"


def test_a_saved_page_holds_report_picture_cost_and_program(step, page):
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    found = html_pages.read(text)
    assert found.count("svg") == 2, "the model and the program"
    assert found.count("title") - text.count("<title>", text.index("<svg")) == 1
    assert text.count("<title>table of cuts</title>") == 0, "the page has a table of its own"
    assert step.graph._repr_html_().count("<title>table of cuts</title>") == 1
    report, said = step.report(), found.text()
    for name in (
        "gates",
        "readout",
        NASTY,
        report.verdict,
        "trace of g0, and one step",
        "within the step only",
    ):
        assert name in said
    assert [a.get("open") for t, a in found.elements if t == "details" and "class" not in a].count(None) == 0
    shown = "".join(data for _, data in found.texts)
    assert str(step.program) in shown.replace("\n", "\n"), "the whole program, letter by letter"
    for cut in report.cuts:
        assert cut.name in said and cut.meaning in said


def test_bars_are_as_long_as_traces_are_large(step):
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", step.report()._repr_html_())]
    sizes = [p.trace_bytes for p in step.report().parameters if p.trace_bytes] + list(
        step.report().traces.values()
    )
    assert widths == [pytest.approx(100 * size / max(sizes), abs=0.06) for size in sizes]


def test_a_cut_opens_to_show_its_line(step):
    found = html_pages.read(step.report()._repr_html_())
    marked = [data for at, data in found.texts if at == "mark"]
    assert len(marked) == len(step.report().cuts) == 2
    for cut, line in zip(step.report().cuts, marked, strict=True):
        number = int(cut.source.split(":")[1])
        assert line.split()[0] == str(number) and "@ params" in line
    links = [a["href"] for t, a in found.elements if t == "a"]
    assert links and all(link.startswith("file:///") and link.endswith("test_views.py") for link in links)


def test_lines_of_notebooks_are_found_and_lines_of_nowhere_are_text(monkeypatch):
    monkeypatch.setitem(
        linecache.cache, "/tmp/ipykernel_1/77.py", (0, None, ["a = 1\n", "b < a\n"], "/tmp/ipykernel_1/77.py")
    )
    cell = source_view("77.py:2 (_linear.py:131)")
    assert "b &lt; a" in cell and "<a " not in cell and "77.py:2" in html_pages.read(cell).text()
    for nowhere in ("nowhere.py:3", "<stdin>:8", "?", "", "77.py:99"):
        assert "<details" not in source_view(nowhere)
        html_pages.read(source_view(nowhere))


def test_names_in_a_program_are_explained_and_letters_are_in_the_glossary(step):
    found = html_pages.read(step.program._repr_html_())
    told = {a["title"] for t, a in found.elements if t == "abbr"}
    assert any(about.startswith("D_t = dh_t/dh_{t-1}") for about in told)
    assert any("carried from step to step" in about and "gates in g0" in about for about in told)
    letters = [data for at, data in found.texts if at == "code"]
    assert {"g", "s", "r", "c", "D", "f", "x", "e", "L", "G"} <= set(letters)
    assert len(letters) == len(set(letters))


@pytest.mark.parametrize("rule", ["rtrl", "bptt", "snap"])
def test_programs_of_other_kinds_have_views(step, rule):
    other = etcompile.compile(
        etcompile.from_function(
            lambda p, s, x: ({"h": jnp.tanh(p["a"] * s["h"] + x)},) * 2,
            {"a": jnp.ones(())},
            {"h": jnp.ones(())},
        ),
        jnp.ones(()),
        algo=rule,
    )
    html_pages.read(other._repr_html_())


def test_shapes_alone_are_shown_too(tmp_path):
    shape = jax.ShapeDtypeStruct((2, 4), jnp.bfloat16)
    model = etcompile.from_function(
        lambda p, s, x: ({"h": jnp.tanh(s["h"] * p["a"] + x)},) * 2, {"a": jax.ShapeDtypeStruct((4,), jnp.bfloat16)}, {"h": shape}
    )  # fmt: skip
    html_pages.read(
        etcompile.compile(model, shape).save_html(tmp_path / "page.html").read_text(encoding="utf-8")
    )


def test_without_graphviz_the_view_says_so(step, monkeypatch):
    monkeypatch.setattr(etcompile.viz.render, "dot_commands", list)
    assert step.graph._repr_svg_() is None
    assert "No picture" in html_pages.read(step._repr_html_()).text()


def test_a_graph_shows_its_picture_and_is_a_networkx_graph(step):
    graph = step.graph
    assert "<svg" in graph._repr_svg_()
    assert "<svg" in graph.copy()._repr_svg_()
    graph.add_node("of mine")
    assert graph._repr_svg_() is None


def test_pages_that_cannot_be_written(step, tmp_path):
    for path in (tmp_path / "missing" / "report.html", tmp_path):
        with pytest.raises(OptionError, match="cannot be written"):
            step.save_html(path)


def test_markup_escapes_and_joins():
    assert tag("p", NASTY, title='"&') == (
        '<p title="&quot;&amp;">&lt;script&gt;alert(&quot;&amp;amp;&quot;)&lt;/script&gt;</p>'
    )
    assert "\x00" not in tag("p", "\x00") and tag("br") == "<br>"
    assert html_pages.read(document(NASTY, table(("a", "b"), [("1", "2"), ("across",)]))).count("td") == 3


# A browser ------------------------------------------------------------------------------------------------------------

#: Asks the page where things are, once it is laid out.
_LOOK = """(() => {
const box = e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
const all = name => [...document.querySelectorAll(name)];
return {
  wide: document.documentElement.scrollWidth, window: innerWidth, svg: all("svg").map(box),
  bars: all(".bar span").map(e => [box(e), getComputedStyle(e).backgroundColor]), texts: all("svg text").map(box),
  cells: all("td").filter(e => e.innerText.trim() && !e.closest("details:not([open])")).map(box), scripts: document.scripts.length,
};
})()"""


def test_a_browser_shows_the_page(page, tmp_path):
    found = looked_at(page, _LOOK, tmp_path / "profile")
    assert found["scripts"] == 1, "a name of the model did not become a script"
    assert found["wide"] <= found["window"], "the page is no wider than the window"
    assert len(found["svg"]) == 2
    for left, top, right, bottom in found["svg"]:
        assert right - left > 300 and bottom - top > 100
    assert all(
        any(
            left <= x1 and x2 <= right and top <= y1 and y2 <= bottom
            for left, top, right, bottom in found["svg"]
        )
        for x1, y1, x2, y2 in found["texts"]
    )
    assert all(x2 > x1 and y2 > y1 for x1, y1, x2, y2 in found["cells"])
    assert {color for _, color in found["bars"]} == {"rgb(230, 159, 0)"}
    assert max(x2 - x1 for (x1, _, x2, _), _ in found["bars"]) == pytest.approx(90, abs=1)
