"""The documentation is true: its code runs, its table of ops is complete, its links lead somewhere."""

from __future__ import annotations

import doctest
import html
import importlib
import pkgutil
import re
from pathlib import Path

import brainstate
import jax
import pytest

import etcompile
from etcompile.ir.ops import ops_table

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Packages that pages and modules are about, and that need not be installed.
ABOUT = {
    "flax_equinox.md": "equinox flax",
    "etcompile.adapters.equinox": "equinox",
    "etcompile.adapters.linen": "flax",
    "etcompile.adapters.nnx": "flax",
}
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def modules():
    """Every module of the package, except those that are passes by another name or a program."""
    found = pkgutil.walk_packages(etcompile.__path__, "etcompile.")
    return ["etcompile", *(m.name for m in found)]


def _require(name):
    for package in ABOUT.get(name, "").split():
        pytest.importorskip(package)


@pytest.fixture(autouse=True)
def _rules_of_this_test_only(monkeypatch):
    monkeypatch.setattr(etcompile.registry, "_RULES", dict(etcompile.registry._RULES))


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_snippets_run(page):
    _require(page.name)
    text = page.read_text(encoding="utf-8")
    namespace: dict = {"__name__": "__main__"}
    # As for a reader who has set nothing.
    with jax.enable_x64(False), brainstate.environ.context(precision=32):
        for match in FENCE.finditer(text):
            # Blank lines in front: a traceback then shows the line of the page.
            lines = "\n" * text[: match.start(1)].count("\n")
            exec(compile(lines + match[1], str(page), "exec"), namespace)


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name):
    _require(name)
    outcome = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert not outcome.failed


def test_the_table_of_ops_is_the_table_of_the_compiler():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert ops_table() in text, f"docs/architecture.md should hold\n\n{ops_table()}"


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", ["architecture.md", "architecture.dot", "theory.md", "write_a_pass.md"])
def test_files_that_pages_name_are_there(name):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/]+/\w+\.py\b", text))
    missing = [f for f in sorted(named) if not any((at / f).exists() for at in (ROOT, ROOT / "etcompile"))]
    assert not missing


def test_the_figure_of_the_architecture_is_drawn_from_its_source():
    """`python tools/draw_architecture.py` draws it."""
    source, drawn = (
        (ROOT / "docs" / f"architecture.{kind}").read_text(encoding="utf-8") for kind in ("dot", "svg")
    )
    texts = {
        " ".join(html.unescape(text).split()) for text in re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    }
    wanted = {
        " ".join(part.split())
        for label in re.findall(r'label="([^"]*)"', source)
        for part in re.split(r"\\[nl]", label)
    }
    assert texts == wanted - {""}
