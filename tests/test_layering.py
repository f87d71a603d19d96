"""The checker of layering finds what it is for, on small made-up trees."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"

TABLE = """
def register_op(*row): ...
register_op("outer", "outer(f, x)")
register_op("add", "a + b")
"""


@pytest.fixture(scope="module")
def layering():
    sys.path.insert(0, str(TOOLS))
    try:
        names = ("circles", "interfaces", "names", "private", "sources")
        yield {name: importlib.import_module(f"layering.{name}") for name in names}
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture
def tree(layering, tmp_path):
    """What the files of a tree, given by name and text, breach."""

    def breaches(check, files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        found = check(layering["sources"].read_sources(tmp_path))
        return [(str(name), line, what) for name, line, what in found]

    return breaches


TESTS = [
    'x = e.op == "add"',
    'x = e.op in ("outer", "none")',
    'OURS = ("add",)\nx = e.op in OURS',
    'x = {"add": 1}[e.op]',
    'SIGNS = {"add": 1}\nx = SIGNS.get(e.op)',
    'SIGNS = {"add": 1, "outer": 2}',
    'match e.op:\n    case "add":\n        pass',
    'x = (e.op, e.of) == ("outer", "r0")',
]
FREE = [
    'x = primitive.name == "add"',
    'x = e.op == "another"',
    'x = p.op("add", a, b)',
    'x = {"add": 1}[name]',
]


@pytest.mark.parametrize("text", [*TESTS, *FREE])
def test_names_are_asked_of_the_table(layering, tree, text):
    files = {
        "etcompile/ir/ops.py": TABLE + 'x = e.op == "add"',
        "etcompile/lowering/evaluate.py": text,
        "passes/a.py": text,
    }
    found = tree(layering["names"].name_tests, files)
    assert {name for name, *_ in found} == ({"passes/a.py"} if text in TESTS else set())
    assert all("etcompile/ir/ops.py" in what for *_, what in found)


def test_private_names_stay_in_their_file(layering, tree):
    files = {
        "etcompile/a.py": "class A:\n    def __init__(self):\n        self._own = 1\n\ndef _help(): ...",
        "etcompile/b.py": "from etcompile.a import A, _help\n\nx = A()._own\n",
        "etcompile/c.py": "class C(A):\n    def own(self):\n        return self._own + self.other._mine + x.__dict__\n"
        "    def set(self): self._mine = 0\n",
    }
    found = tree(layering["private"].private_reads, files)
    assert [(name, line) for name, line, _ in found] == [("etcompile/b.py", 1), ("etcompile/b.py", 3)]


LOOK = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from etcompile.low.b import B\n"


@pytest.mark.parametrize(
    ("back", "found"),
    [
        ("from etcompile.high import a", 1),
        ("def f():\n    import etcompile.high.a", 1),
        ("import etcompile.low.c", 0),
    ],
)
def test_imports_make_no_circles_across_folders(layering, tree, back, found):
    files = {
        "etcompile/high/a.py": LOOK,
        "etcompile/low/b.py": back,
        "etcompile/low/c.py": "import etcompile.low.b",
    }
    breaches = tree(layering["circles"].circles, files)
    assert len(breaches) == found
    assert all("etcompile.high.a -> etcompile.low.b -> etcompile.high.a" in what for *_, what in breaches)


def test_outside_interfaces_have_their_places(layering, tree):
    files = {
        "etcompile/a.py": "import jax\n\nx = jax.core.Jaxpr",
        "etcompile/frontend/jaxpr.py": "import jax._src",
    }
    found = tree(layering["interfaces"].foreign_interfaces, files)
    assert [(name, line) for name, line, _ in found] == [("etcompile/a.py", 3)]


#: What only users read, on what the package returns to them.
FOR_USERS = {"Record.td_error"}


def test_every_field_of_every_table_is_read():
    fields, read = set(), set()
    for file in (path for folder in ("etcompile", "passes") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(attr=name, ctx=ast.Load()):
                    read.add(name)
                case ast.Call(func=ast.Name("getattr"), args=[_, ast.Constant(name), *_]):
                    read.add(name)
                case ast.ClassDef(decorator_list=[*how]) if "dataclass" in "".join(map(ast.unparse, how)):
                    fields |= {
                        (node.name, line.target.id) for line in node.body if isinstance(line, ast.AnnAssign)
                    }
    assert {f"{table}.{name}" for table, name in fields if name not in read} == FOR_USERS
