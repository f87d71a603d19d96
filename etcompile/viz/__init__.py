"""Drawings of a compiled step: hidden groups, states, weights, operations and cuts.

Examples
--------
>>> drawing = etcompile.viz.draw(step, "graph.svg")  # doctest: +SKIP
>>> drawing  # doctest: +SKIP

In a notebook the last line shows the picture.
"""

from __future__ import annotations

from etcompile.viz.drawing import Drawing, draw
from etcompile.viz.errors import VizError

__all__ = ["Drawing", "VizError", "draw"]
