"""``docs/rules_reference.rst``: every learning rule with its equations, options and sources, from the code."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from etcompile.registry import Rule, find_rule, shipped_names

HEAD = """
Rules and their options
=======================

Made of the rules themselves. The options are keyword arguments of ``etcompile.compile(model, x, algo="name", ...)``. :doc:`rules`
compares what they cost and what they learn.

"""


def page() -> str:
    """All rules that ship, in alphabetical order."""
    return HEAD + "\n".join(section(find_rule(name)) for name in shipped_names())


def section(rule: Rule) -> str:
    """One rule: how it is asked for, and what its file says."""
    said = inspect.getdoc(inspect.getmodule(rule.write)) or inspect.getdoc(rule.write) or ""
    title, _, rest = said.partition("\n")
    options = list(inspect.signature(rule.write).parameters.values())[1:]
    asked = [f"algo={rule.name!r}", *(f"{o.name}={o.default!r}" for o in options)]
    call = ["etcompile.compile(", "    model, x,", *(f"    {option}," for option in asked), ")"]
    parts = [rule.name, "-" * len(rule.name), "", title, "", code(call, "python")]
    return "\n".join([*parts, *map(paragraph, rest.strip("\n").split("\n\n"))])


def paragraph(text: str) -> str:
    """A paragraph of a docstring; what is indented there is an equation."""
    lines = text.strip("\n").splitlines()
    if lines and all(line.startswith("    ") for line in lines):
        return code(textwrap.dedent("\n".join(lines)).splitlines(), "none")
    return text.strip("\n") + "\n"


def code(lines: list[str], language: str) -> str:
    return "\n".join([f".. code-block:: {language}", "", *(f"   {line}" for line in lines), ""])


def write(app: Sphinx) -> None:
    path = Path(app.srcdir) / "rules_reference.rst"
    text = page()
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", write, priority=100)
    return {"parallel_read_safe": True}
