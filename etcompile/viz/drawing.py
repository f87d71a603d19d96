"""`draw`: a compiled step, or its graph, as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from etcompile.viz.dot import to_dot
from etcompile.viz.errors import VizError
from etcompile.viz.graph import as_graph, title
from etcompile.viz.render import FORMATS, check_format, render

__all__ = ["Drawing", "draw", "output_format"]


@dataclass(frozen=True)
class Drawing:
    """A picture of a hidden-group graph, shown by notebooks.

    Attributes
    ----------
    source : str
        DOT text.
    title : str
        One line about the graph.
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


def draw(graph_or_step: object, path: str | Path | None = None, format: str | None = None) -> Drawing:
    """Draw hidden groups, states, weights, operations and cuts.

    Parameters
    ----------
    graph_or_step : Step or networkx.MultiDiGraph
        What `etcompile.compile` returns, or its `graph`.
    path : str or Path, optional
        Where to write the picture.
    format : {"svg", "png", "pdf", "dot"}, optional
        Taken from the suffix of `path` by default. Everything but "dot" needs Graphviz, which the extra
        ``etcompile[viz]`` brings.

    Returns
    -------
    Drawing
        Shows itself in notebooks; has `source` (DOT text), `render` and `save`.

    Raises
    ------
    VizError
        If there is nothing to draw, the format is unknown, the path cannot be written, or there
        is no Graphviz.
    """
    graph = as_graph(graph_or_step)
    drawing = Drawing(to_dot(graph), title(graph))
    if path is not None:
        drawing.save(path, format)
    elif format is not None:
        raise VizError(
            "The 'format' parameter of draw needs a 'path'; use `draw(...).render(format)` for bytes."
        )
    return drawing


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
