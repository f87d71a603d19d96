"""The documentation is true: its code runs, its table of ops is complete, its links lead somewhere."""

from __future__ import annotations

import doctest
import html
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import brainstate
import jax
import pytest
from references import compiled, fresh
from zoo import by_name

import etcompile
from etcompile.ir.ops import ops_table

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Packages that pages and modules are about, and that need not be installed.
ABOUT = {
    "flax_equinox.md": "equinox flax spyx",
    "etcompile.adapters.equinox": "equinox",
    "etcompile.adapters.linen": "flax",
    "etcompile.adapters.nnx": "flax",
    "etcompile.adapters.nir": "nir",
    "nir.md": "nir",
}
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: With those marked as braintrace's too.
BOTH_FENCES = re.compile(r"^```python(?: braintrace)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


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
    _run(page, FENCE)


@pytest.mark.filterwarnings("ignore:ETP primitive:UserWarning")  # braintrace, about readouts
@pytest.mark.filterwarnings("ignore:core.Jaxpr is missing:DeprecationWarning")  # braintrace with JAX 0.12
def test_snippets_with_braintrace_run():
    pytest.importorskip("braintrace")
    _run(ROOT / "docs" / "from_braintrace.md", BOTH_FENCES)


def _run(page, fence):
    text = page.read_text(encoding="utf-8")
    namespace: dict = {"__name__": "__main__"}
    # As for a reader who has set nothing.
    with jax.enable_x64(False), brainstate.environ.context(precision=32):
        for match in fence.finditer(text):
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


#: What the grammar takes for known.
WORDS = {
    "name": r"[^\s,()\[\]]+", "kind": r"\w+", "op": r"\w+", "dtype": r"[a-z0-9]+", "text": r".*?",
    "number": r"-?(?:\d[\d.e+-]*|inf)", "shape": r"\[[\d,]*\]", "spans": r"\[[\d:,]*\]", "bits": r"[01/]+",
}  # fmt: skip
#: Programs that have every part of the grammar.
PROGRAMS = [
    ("lstm", "d_rtrl", {}), ("gif", "pp_prop", {}), ("two_spiking_layers_and_a_leaky_readout", "e_prop", {}), ("lstm", "rtrl", {}),
    ("lstm", "bptt", {}), ("gru_no_batch", "d_rtrl", {"within": "exact"}), ("two_layers_of_linear_attention", "d_rtrl", {}), ("one_weight_of_two_results", "d_rtrl", {}),
    ("lstm_gru", "snap", {}), ("gru_gru", "dni", {"window": 2}), ("gru_gru", "bptt", {"window": 2}), ("second_layer_reads_the_old_first", "d_rtrl", {}),
]  # fmt: skip


def as_pattern(name, grammar):
    """A rule of the grammar as a regular expression; quotes hold what is written, and spaces are free."""
    if name in WORDS:
        return WORDS[name]
    found = []
    for token in re.findall(r'"[^"]*"|\w+|[][()|*]', grammar[name]):
        if token[0] == '"':
            found.append(r"\s*" + r"\s*".join(map(re.escape, token[1:-1].split())))
        elif token in "[(":
            found.append("(?:")
        elif token == "]":
            found.append(")?")
        else:
            found.append(token if token in ")|*" else rf"\s*(?:{as_pattern(token, grammar)})")
    return "".join(found)


def test_the_grammar_is_that_of_programs():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"The grammar, one line each:\n\n((?: {4}.*\n)+)", text)
    grammar = dict(re.findall(r"^    (\w+) +::= (.*(?:\n {6,}.*)*)", block, re.MULTILINE))
    patterns = {name: re.compile(rf"\s*{as_pattern(name, grammar)}\s*") for name in grammar}
    printed = ""
    for name, algo, options in PROGRAMS:
        program = str(compiled(fresh(by_name(name)), algo, **options).program)
        for line in filter(str.strip, program.splitlines()):
            word = line.split()[0]
            assert patterns[word if word in grammar else "equation"].fullmatch(line), line
        printed += program
    unseen = [word for word in re.findall(r'"([a-z]+=?|[-+*/@])"', block) if word not in printed]
    assert not unseen, f"no program has {unseen}"


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


def test_the_picture_in_the_readme_is_that_of_its_first_example(tmp_path):
    """`python tools/draw_readme.py` draws it."""
    pytest.importorskip("pygraphviz")
    drawn = tmp_path / "network.svg"
    subprocess.run(
        [sys.executable, ROOT / "tools" / "draw_readme.py", drawn], check=True, capture_output=True, cwd=ROOT
    )

    def texts(path):
        return sorted(re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8")))

    assert texts(drawn) == texts(ROOT / "docs" / "network.svg")
