"""Drawings of a compiled step: its hidden groups, states, weights, operations and cuts, and the dataflow of its program.

Examples
--------
>>> drawing = etcompile.viz.draw(step, "graph.svg")  # doctest: +SKIP
>>> drawing  # doctest: +SKIP

In a notebook the last line shows the picture.

A picture is made in three stages: a view makes a `Picture` of plain records (`model.py` of a graph, `dataflow.py` of a program),
`dot.py` writes it down for Graphviz with its key (`legend.py`), and `render.py` has it laid out.
"""

from __future__ import annotations

from etcompile.viz.drawing import Drawing, draw
from etcompile.viz.errors import VizError

__all__ = ["Drawing", "VizError", "draw"]
