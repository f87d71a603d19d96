"""The report's text is short and in the model's order; its record is complete."""

from __future__ import annotations

import re

import brainstate
import jax.numpy as jnp
import pytest

import etcompile
from etcompile.amounts import bytes_text
from etcompile.paths import natural_key, short_list, short_text

DEPTH = 11


class Deep(brainstate.nn.Module):
    def __init__(self, depth=DEPTH):
        super().__init__()
        self.cells = [brainstate.nn.GRUCell(2, 2) for _ in range(depth)]

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


def hints(step):
    return [line for line in str(step.report()).splitlines() if line.startswith("  hint ")]


def test_one_line_names_windows_where_credit_between_layers_is_cut(step):
    report = step.report()
    assert report.between_layers and not report.windows and report.bytes_of_a_step > 0
    (line,) = hints(step)
    assert 'within="exact"' in line and bytes_text(report.bytes_of_a_step) in line and len(line) < 130


def small(**options):
    return etcompile.compile(Deep(2), jnp.ones((1, 2)), batch_size=1, **options)


def test_no_hint_where_windows_are_there_already_or_would_keep_nothing_more():
    windows = small(within="exact")
    assert windows.report().windows and "each step of one holds about" in str(windows.report())
    for there in (
        windows,
        small(algo="bptt"),
        small(algo="rtrl"),
        small(algo="rflo"),  # a signal of its own, for which there are no exact windows
        etcompile.compile(Deep(1), jnp.ones((1, 2)), batch_size=1),  # cuts within a layer alone
    ):
        assert not there.report().between_layers and not hints(there)


@pytest.mark.parametrize("algo", ["otpe", "pp_prop", "e_prop"])
def test_a_rule_with_the_hint_can_be_compiled_as_it_says(algo):
    assert hints(small(algo=algo))
    assert not hints(small(algo=algo, within="exact"))


def test_each_trace_line_says_whose_it_is(step):
    report = step.report()
    lines = str(report).split("  traces\n")[1].split("  cuts")[0].splitlines()
    for line, name in zip(lines, report.traces, strict=True):
        assert re.fullmatch(rf"    {name}  \d+ B  cells\.\d+\.\S+ in g\d+", line)
        assert line.endswith(report.to_dict()["trace_owners"][name])


@pytest.mark.parametrize("algo", ["rtrl", "pp_prop", "uoro", "kf_rtrl", "rank_rtrl"])
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
