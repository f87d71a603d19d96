"""How values show themselves in notebooks: each asks here, and the views of :mod:`etcompile.views` are found by name.

So a program, a report or a cost knows nothing of HTML or of drawings, as it should.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["html_of", "page_of", "svg_of"]


def html_of(value: Any) -> str:
    """A compact view for a notebook."""
    return import_module("etcompile.views").html_of(value)


def svg_of(value: Any) -> str | None:
    """The picture of a graph; None where it cannot be drawn."""
    return import_module("etcompile.views").svg_of(value)


def page_of(value: Any) -> str:
    """A page that needs no other file."""
    return import_module("etcompile.views").page_of(value)
