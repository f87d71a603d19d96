"""From DOT text to pictures, with the Graphviz library of the `viz` extra or a system `dot`.

The wheel of pygraphviz (2.0 and newer) contains the Graphviz library but no `dot` program, so a short Python
program stands in for it (`bundled_dot.py`). It runs in a process of its own: a layout can then be
interrupted, cannot take the caller down, and prints its warnings where we can read them.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from etcompile.viz.errors import VizError

__all__ = ["FORMATS", "check_format", "dot_commands", "render"]

FORMATS = ("svg", "png", "pdf", "dot")

_PNG_DPI = 110
_TIMEOUT_SECONDS = 300
_MISSING = (
    "Drawing svg, png or pdf needs Graphviz, which was not found. Install the extra that brings it, "
    "`pip install 'etcompile[viz]'`, or put a `dot` program on the PATH. The format 'dot' needs neither."
)


def check_format(name: str) -> str:
    """Return the format in lower case.

    Raises
    ------
    VizError
        If it is not one of `FORMATS`.
    """
    if name.lower() not in FORMATS:
        raise VizError(f"The format must be one of {', '.join(FORMATS)}. Got {name!r} instead.")
    return name.lower()


def dot_commands() -> list[list[str]]:
    """Programs that behave like `dot`, as argument lists, best first.

    Raises
    ------
    VizError
        If there is none.
    """
    commands = []
    if sys.executable and importlib.util.find_spec("pygraphviz") is not None:
        # -P: the names of our files must not shadow modules that pygraphviz imports.
        commands.append([sys.executable, "-P", str(Path(__file__).with_name("bundled_dot.py"))])
    if system := shutil.which("dot"):
        commands.append([system])
    if not commands:
        raise VizError(_MISSING)
    return commands


def render(source: str, format: str) -> bytes:
    """Lay out DOT text and return the picture.

    Parameters
    ----------
    source : str
        DOT text.
    format : {"svg", "png", "pdf", "dot"}
        ``"dot"`` returns the source itself, not laid out, and needs no Graphviz.

    Raises
    ------
    VizError
        For an unknown format, when no Graphviz is found, or when it fails.
    """
    format = check_format(format)
    if format == "dot":
        return source.encode()
    options = [f"-T{format}"] + ([f"-Gdpi={_PNG_DPI}"] if format == "png" else [])
    failures = []
    for command in dot_commands():
        try:
            return _run([*command, *options], source)
        except VizError as failure:
            failures.append(str(failure))
    raise VizError("\n".join(failures))


def _run(command: list[str], source: str) -> bytes:
    try:
        done = subprocess.run(
            command, input=source.encode(), capture_output=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise VizError(
            f"Graphviz did not finish within {_TIMEOUT_SECONDS} s. Write the graph with the format 'dot' and "
            "lay it out with another engine, for example `sfdp`."
        ) from None
    except OSError as error:
        raise VizError(f"Graphviz could not be started as {command[0]!r}: {error}") from error
    if done.returncode or not done.stdout:
        said = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
        raise VizError(f"Graphviz could not draw the graph: {said}")
    return done.stdout
