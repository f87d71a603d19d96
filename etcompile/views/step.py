"""A compiled step: its report with the picture, and its program; as a page also what a step takes."""

from __future__ import annotations

from etcompile.errors import EtcompileError
from etcompile.markup import Markup, joined, tag
from etcompile.runtime.step import Step
from etcompile.views.cost import cost_view
from etcompile.views.graph import graph_view
from etcompile.views.program import program_view
from etcompile.views.report import report_view

__all__ = ["step_page", "step_view"]


def step_view(step: Step) -> Markup:
    """For a notebook: a screen of it is open."""
    report = step.report()
    program = tag("details", tag("summary", "Program"), program_view(step.program, sizes=report.traces))
    return joined(report_view(report, graph_view(step.graph, table=False)), program)


def step_page(step: Step) -> Markup:
    """For a file: everything is open."""
    report = step.report()
    return joined(
        report_view(report, graph_view(step.graph, table=False), shut=False),
        _cost(step),
        program_view(step.program, shut=False, sizes=report.traces),
    )


def _cost(step: Step) -> Markup:
    try:
        return cost_view(step.cost())
    except EtcompileError as error:
        return tag("p", str(error), class_="quiet")
