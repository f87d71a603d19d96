"""Rules side by side: the numbers of each are those of a step compiled with it, and nothing is run or changed."""

from __future__ import annotations

import io
import sys

import brainstate
import html_pages
import jax
import jax.numpy as jnp
import pytest
import rich.console

import etcompile
from etcompile.errors import AlgorithmError, DependencyError, InputError, OptionError
from etcompile.passes.rules.e_prop import e_prop

X = jnp.ones((2, 3))


def gru(params, state, x):
    z, r = jnp.split(jax.nn.sigmoid(jnp.concatenate([x, state["h"]], -1) @ params["gates"]), 2, axis=-1)
    c = jnp.tanh(jnp.concatenate([x, r * state["h"]], -1) @ params["w <b>"])
    h = (1 - z) * state["h"] + z * c
    return {"h": h}, h


def model(n=4, batch=2):
    params = {"gates": jnp.ones((3 + n, 2 * n)), "w <b>": jnp.ones((3 + n, n))}
    return etcompile.from_function(gru, params, {"h": jnp.zeros((batch, n))})


def unit(p, s, x):
    h = jnp.tanh(p["a"] * s["h"] + x)
    return {"h": h}, h


@pytest.fixture(scope="module")
def found():
    return etcompile.compare(model(), X, rules=["d_rtrl", "rtrl", "e_prop", "ottt", "three_factor"])


def test_every_rule_that_ships_has_a_row_by_its_traces():
    one = jnp.ones(())
    found = etcompile.compare(etcompile.from_function(unit, {"a": one}, {"h": one}), one)
    assert [row.rule for row in found] != sorted(row.rule for row in found)
    assert sorted(row.rule for row in found) == etcompile.registry.shipped_names()
    assert {"bptt", "d_rtrl", "e_prop", "pp_prop", "snap", "dni"} <= {row.rule for row in found}
    assert all(row.report is not None and row.cost is not None for row in found)
    assert [row.trace_bytes for row in found] == sorted(row.trace_bytes for row in found)
    assert found.batch is None and "batch" not in str(found)


@pytest.mark.parametrize("rule", ["d_rtrl", "ottt"])
def test_numbers_are_those_of_the_step(found, rule):
    step = etcompile.compile(model(), X, algo=rule)
    row, report = found[rule], step.report()
    assert row.cost == step.cost()
    assert (row.exact, row.trace_bytes, row.gradient) == (step.exact, report.trace_bytes, report.verdict)
    assert row.report.to_dict() == report.to_dict()


def test_a_rule_says_what_it_leaves_out(found):
    assert found["d_rtrl"].leaves_out == "credit through 2 cuts"
    assert found["rtrl"].exact and not found["rtrl"].leaves_out
    assert found["e_prop"].leaves_out == "the trace is low-pass filtered; credit through 2 cuts"
    assert found["three_factor"].another and not found["e_prop"].another


def test_rules_with_options_mixtures_and_labels_have_rows_in_their_order():
    rules = ["e_prop", e_prop(feedback="random"), {"*": "d_rtrl", "gates": "ottt"}, "e_prop"]
    rows = etcompile.compare(model(), X, rules=rules)
    assert [row.rule for row in rows] == [
        "e_prop", "e_prop(feedback='random')", "*: d_rtrl, gates: ottt", "e_prop (2)",
    ]  # fmt: skip
    assert rows[0].cost == rows[3].cost != rows[1].cost
    assert [row.rule for row in etcompile.compare(model(), X, rules={"mine": "ottt"})] == ["mine"]


def test_a_rule_that_refuses_the_run_is_a_row_with_its_reason():
    rows = etcompile.compare(model(), X, rules=["d_rtrl", "rtrl"], steps=7, chunk=3)
    assert rows["d_rtrl"].cost == etcompile.compile(model(), X).cost(steps=7, chunk=3)
    assert rows["rtrl"].cost is None and "cannot run in chunks" in rows["rtrl"].refused
    assert rows["rtrl"].exact and "refused: rtrl cannot run in" in " ".join(str(rows).split())


def test_a_rule_that_refuses_the_model_is_a_row_with_its_reason(monkeypatch):
    monkeypatch.setattr(etcompile.registry, "_RULES", dict(etcompile.registry._RULES))

    @etcompile.algorithm("picky")
    def picky(p):
        raise AlgorithmError("picky needs two groups.", expected="<two> groups")

    rows = etcompile.compare(model(), X, rules=["picky", "ottt"])
    row = rows["picky"]
    assert row.report is row.cost is row.exact is row.trace_bytes is None
    assert row.refused == "picky needs two groups (expected <two> groups)"
    assert row.to_dict()["flops"] is None and not row.leaves_out and row.gradient == ""
    assert rows["ottt"].cost is not None
    assert row.refused in html_pages.read(rows._repr_html_()).text()


def test_nothing_is_allocated_and_a_module_stays_as_it_is():
    n = 65_536
    shapes = jax.eval_shape(lambda: {"gates": jnp.ones((3 + n, 2 * n)), "w <b>": jnp.ones((3 + n, n))})
    huge = etcompile.from_function(gru, shapes, {"h": jax.ShapeDtypeStruct((2, n), jnp.float64)})
    assert etcompile.compare(huge, X, rules=["d_rtrl"])[0].trace_bytes > 1e11
    net = brainstate.nn.GRUCell(3, 4)
    before = {path: id(state.value) for path, state in net.states().items()}
    first = etcompile.compare(net, X, rules=["sltt"], batch_size=2)
    assert {path: id(state.value) for path, state in net.states().items()} == before
    assert first.batch == 2


def test_a_step_without_axes_in_bfloat16():
    half = jnp.ones((), jnp.bfloat16)
    rows = etcompile.compare(etcompile.from_function(unit, {"a": half}, {"h": half}), half, rules=["d_rtrl"])
    assert rows["d_rtrl"].trace_bytes == 2


def test_text_fits_and_html_and_rich_say_the_same(found):
    lines = str(found).splitlines()
    assert lines[0] == "learning rules for gru: one online step, batch 2"
    assert max(map(len, lines)) < 150
    page = html_pages.read(found._repr_html_())
    assert page.count("tr") == len(found) + 1
    out = io.StringIO()
    rich.console.Console(file=out, width=80).print(found)
    for row in found:
        assert row.rule in page.text() and row.rule in out.getvalue()
    assert all(len(line) <= 80 for line in out.getvalue().splitlines())


def test_a_dataframe_has_numbers(found, monkeypatch):
    frame = found.to_dataframe()
    assert list(frame.index) == [row.rule for row in found]
    assert frame.loc["d_rtrl", "trace_bytes"] == found["d_rtrl"].trace_bytes
    assert frame["flops"].dtype.kind == "f"
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(DependencyError, match=r"etcompile\[table\]"):
        found.to_dataframe()


@pytest.mark.parametrize(
    ("error", "given", "said"),
    [
        (OptionError, {"rules": "d_rtrl"}, "several rules"),
        (AlgorithmError, {"rules": ["d_rtl"]}, "d_rtrl"),
        (OptionError, {"rule": ["d_rtrl"]}, "rules"),
        (OptionError, {"chunk": "auto"}, "number of steps"),
        (OptionError, {"within": "none"}, "within"),
        (InputError, {"batch_size": 0}, "batch_size"),
        (InputError, {"loss_fn": 3}, "loss"),
    ],
)
def test_mistakes_are_the_callers_to_see(error, given, said):
    with pytest.raises(error, match=said):
        etcompile.compare(model(), X, **given)


def test_a_loss_that_fails_is_the_callers_to_see_and_so_is_a_row_that_is_not_there(found):
    with pytest.raises(InputError, match="one number per step"):
        etcompile.compare(model(), X, rules=["sltt"], loss_fn=lambda out: out)
    with pytest.raises(KeyError, match="ottt"):
        found["d_rtl"]
