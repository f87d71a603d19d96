"""The report's text is short and in the model's order; its record is complete."""

from __future__ import annotations

import re

import brainstate
import jax.numpy as jnp
import pytest

import etcompile
from etcompile.paths import natural_key, short_list, short_text

DEPTH = 11


class Deep(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = [brainstate.nn.GRUCell(2, 2) for _ in range(DEPTH)]

    def update(self, x):
        for cell in self.cells:
            x = cell(x)
        return x


@pytest.fixture(scope="module")
def step():
    return etcompile.compile(Deep(), jnp.ones((1, 2)), batch_size=1)


def test_groups_states_parameters_and_traces_come_in_the_models_order(step):
    report = step.report()
    expected = [f"cells.{k}.h" for k in range(DEPTH)]
    assert [g.states[0] for g in report.groups] == [s.path for s in report.states] == expected
    assert [g.name for g in report.groups] == [f"g{k}" for k in range(DEPTH)]
    cells = [int(p.path.split(".")[1]) for p in report.parameters]
    assert cells == sorted(cells)
    assert list(report.traces) == [f"e{k}" for k in range(len(report.traces))]


def test_the_text_of_a_deep_model_is_short_and_the_record_complete(step):
    report = step.report()
    text = str(report)
    assert len(text) < 16_000
    assert max(map(len, text.splitlines())) < 400
    last = report.cuts[-1]
    assert len(last.origins) > 2 * DEPTH and all(
        path in last.meaning for path in last.origins if "weight" in path
    )
    assert f"({len(last.origins)} in all)" in text and "cells.0.* to cells.10.*" in text


def test_each_trace_line_says_whose_it_is(step):
    report = step.report()
    lines = str(report).split("  traces\n")[1].split("  cuts")[0].splitlines()
    for line, name in zip(lines, report.traces, strict=True):
        assert re.fullmatch(rf"    {name}  \d+ B  cells\.\d+\.\S+ in g\d+", line)
        assert line.endswith(report.to_dict()["trace_owners"][name])


@pytest.mark.parametrize("algo", ["rtrl", "pp_prop", "uoro", "kf_rtrl"])
def test_each_trace_of_every_kind_of_rule_has_an_owner(algo):
    cell = etcompile.compile(brainstate.nn.ValinaRNNCell(2, 2), jnp.ones((1, 2)), batch_size=1, algo=algo)
    assert all(cell.report().trace_owners[name] for name in cell.report().traces)


def test_no_file_of_a_library_in_the_text(step):
    assert ".py" in str(step.report())
    assert not re.search(r"\(\w+\.py:\d+\)", str(step.report()))


def test_repr_of_report_and_program_is_their_text(step):
    assert repr(step.report()) == str(step.report())
    assert repr(step.program) == str(step.program)


def test_names_in_short():
    assert sorted(["c.10", "c.2", "c", "b.3"], key=natural_key) == ["b.3", "c", "c.2", "c.10"]
    assert short_list(["a.w", "b.w", "c.w"]) == "a.w, b.w, c.w"
    assert short_list(["a.w", "a.v", "a.u", "b"]) == "a.*, b (4 in all)"
    assert short_text("x: g0, g1, g2, g10 reaches g3") == "x: g0 to g10 (4 in all) reaches g3"
    assert short_text("memory, attention, x") == "memory, attention, x"
