"""`draw`: a compiled step, its graph or its program, as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etcompile.ir.program import TraceProgram
from etcompile.viz.dataflow import program_picture
from etcompile.viz.dot import to_dot
from etcompile.viz.errors import VizError
from etcompile.viz.graph import as_graph
from etcompile.viz.model import model_picture
from etcompile.viz.picture import Picture
from etcompile.viz.render import FORMATS, check_format, render

__all__ = ["VIEWS", "Drawing", "draw", "drawing_of", "output_format"]

VIEWS = ("model", "program")


@dataclass(frozen=True)
class Drawing:
    """A picture, shown by notebooks.

    Attributes
    ----------
    source : str
        DOT text.
    title : str
        One line about what is drawn.
    """

    source: str
    title: str

    def render(self, format: str = "svg") -> bytes:
        """The picture in one of the formats svg, png, pdf or dot."""
        return render(self.source, format)

    def save(self, path: str | Path, format: str | None = None) -> Path:
        """Write the picture; the suffix of the path names the format unless `format` does.

        Raises
        ------
        VizError
            For an unknown format, or a path that cannot be written.
        """
        path = Path(path)
        name = output_format(path, format)
        if not path.parent.is_dir():
            raise VizError(f"Cannot write {path}: there is no directory {path.parent}. Create it first.")
        picture = self.render(name)
        try:
            path.write_bytes(picture)
        except OSError as error:
            raise VizError(f"Cannot write {path}: {error.strerror or error}.") from error
        return path

    def _repr_svg_(self) -> str:
        return self.render("svg").decode()

    def __repr__(self) -> str:
        return f"Drawing({self.title!r})"


def draw(
    graph_or_step: object,
    path: str | Path | None = None,
    format: str | None = None,
    *,
    view: str | None = None,
    every_layer: bool = False,
) -> Drawing:
    """Draw a step: its model, or the dataflow of its program.

    Parameters
    ----------
    graph_or_step : Step, networkx.MultiDiGraph or TraceProgram
        What `etcompile.compile` returns, or its `graph` or `program`.
    path : str or Path, optional
        Where to write the picture.
    format : {"svg", "png", "pdf", "dot"}, optional
        Taken from the suffix of `path` by default. Everything but "dot" needs Graphviz, which the extra
        ``etcompile[viz]`` brings.
    view : {"model", "program"}, optional
        ``"model"``: hidden groups, states, weights with their traces, operations, spikes and cuts. ``"program"``: what a step
        reads (x, f, D, L), carries (e) and makes of it (G). By default that of what is given, and of a step the model.
    every_layer : bool
        Draw layers that repeat one by one, and not once with a count.

    Returns
    -------
    Drawing
        Shows itself in notebooks; has `source` (DOT text), `render` and `save`.

    Raises
    ------
    VizError
        If there is nothing to draw, the view or the format is unknown, the path cannot be written, or there
        is no Graphviz.

    Examples
    --------
    >>> etcompile.viz.draw(step, "model.svg")  # doctest: +SKIP
    >>> etcompile.viz.draw(step, "program.svg", view="program")  # doctest: +SKIP
    """
    drawing = drawing_of(_picture(graph_or_step, view, every_layer))
    if path is not None:
        drawing.save(path, format)
    elif format is not None:
        raise VizError(
            "The 'format' parameter of draw needs a 'path'; use `draw(...).render(format)` for bytes."
        )
    return drawing


def drawing_of(picture: Picture, table: bool = True) -> Drawing:
    """A picture as a drawing, with a table of its cuts unless told otherwise."""
    return Drawing(to_dot(picture, table), picture.title)


def _picture(what: Any, view: str | None, every_layer: bool) -> Picture:
    if view not in (None, *VIEWS):
        raise VizError(f"The view must be one of {', '.join(VIEWS)}. Got {view!r} instead.")
    given = isinstance(what, TraceProgram)
    if view == "model" or (view is None and not given):
        return model_picture(as_graph(what), every_layer)
    program = what if given else getattr(what, "program", None)
    if not isinstance(program, TraceProgram):
        raise VizError(
            "The view 'program' is of a compiled step or of its program. "
            f"Got {type(what).__name__} instead; draw the step itself."
        )
    return program_picture(program, {} if given else what.report().traces)


def output_format(path: Path, format: str | None) -> str:
    """The format asked for, else the one that the suffix of the path names."""
    if format is not None:
        return check_format(format)
    if not path.suffix:
        raise VizError(
            f"The path {path} has no suffix to take a format from; add one, or name a format: "
            f"{', '.join(FORMATS)}."
        )
    return check_format(path.suffix[1:])
