"""HTML views of what the compiler makes, for notebooks and files; one file for each kind of value.

``_repr_html_`` of a value comes here by way of :mod:`etcompile.shown`.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from etcompile.cost.cost import Cost
from etcompile.errors import OptionError
from etcompile.graph import HiddenGroupGraph
from etcompile.ir.program import TraceProgram
from etcompile.markup import Markup, document, framed
from etcompile.report import Report
from etcompile.runtime.step import Step
from etcompile.views.cost import cost_view
from etcompile.views.graph import graph_svg, graph_view
from etcompile.views.program import program_view
from etcompile.views.report import report_view
from etcompile.views.step import step_page, step_view

__all__ = ["html_of", "page_of", "svg_of"]


def html_of(value: Any) -> str:
    """A compact view for a notebook."""
    return framed(_view(value))


def page_of(step: Step) -> str:
    """A page about a step, open from top to bottom, that needs no other file."""
    header = step.program.header
    return document(f"{header.model} \N{MIDDLE DOT} {step.program.name}", step_page(step))


def svg_of(graph: HiddenGroupGraph) -> str | None:
    """The picture of a graph; None where it cannot be drawn."""
    return graph_svg(graph)


@singledispatch
def _view(value: Any) -> Markup:
    raise OptionError("there is no view of this.", got=repr(value))


_view.register(Cost)(cost_view)
_view.register(HiddenGroupGraph)(graph_view)
_view.register(Report)(report_view)
_view.register(Step)(step_view)
_view.register(TraceProgram)(program_view)
