"""What an op, a kind of value or a kind of site *is* is asked of its row in the table, not of its name.

A comparison of ``....op`` or ``....kind`` with a name in a table, a dict of such names that is a constant of a file, and a
``match`` on one are breaches, but in the file that defines the name and in those that implement what it stands for.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from layering.sources import Breach, Source

__all__ = ["EXCEPTED", "TABLES", "Names", "name_tests", "stale_files"]


@dataclass(frozen=True)
class Names:
    """The names of one table."""

    what: str
    #: The file or folder, and the function that is called with each name.
    defined: str
    by: str
    #: What an expression that holds such a name is called: an attribute, a variable or a function.
    said: tuple[str, ...]
    #: Files that compute what the names stand for.
    implemented: tuple[str, ...]
    #: Names that no call in the file tells.
    names: tuple[str, ...] = ()


_EVALUATED = tuple(f"etcompile/lowering/{name}.py" for name in ("evaluate", "feedback", "layers", "snap"))

TABLES = (
    Names("op", "etcompile/ir/ops.py", "register_op", ("op",), _EVALUATED),
    Names(
        "kind of value",
        "etcompile/ir/kinds.py",
        "register_kind",
        ("kind", "kinds"),
        ("etcompile/lowering/carried.py", *_EVALUATED),
    ),
    Names(
        "kind of site",
        "etcompile/sites",
        "",
        ("kind",),
        (),
        ("dot_general", "conv", "embedding", "generic", "opaque", "direct", "gathered"),
    ),
)

#: Files and folders in which such a name is of something else, with what it is.
EXCEPTED: dict[str, str] = {
    "etcompile/viz/style.py": "nodes of the drawing",
    "etcompile/runtime/checks.py": "arguments of a call: each is named as the op that reads it",
}


def name_tests(
    sources: Sequence[Source], tables: Sequence[Names] = TABLES, excepted: Mapping[str, str] = EXCEPTED
) -> Iterator[Breach]:
    """Tests of names outside of the files that may make them."""
    known = {table: _names(sources, table) for table in tables}
    for source in sources:
        if source.within(tuple(excepted)):
            continue
        for table in tables:
            if not source.within((table.defined, *table.implemented)):
                for line, name in _tests(source.tree, table.said, known[table]):
                    yield (
                        source.name,
                        line,
                        f"tests for the {table.what} {name!r}; ask a field of its row in {table.defined}",
                    )


def stale_files(sources: Sequence[Source]) -> list[str]:
    """Excepted files that test no name any more."""
    hits = {name for name, _, _ in name_tests(sources, excepted={})}
    return [place for place in EXCEPTED if not any(name.is_relative_to(place) for name in hits)]


def _names(sources: Sequence[Source], table: Names) -> set[str]:
    found = set(table.names)
    for source in sources:
        if table.by and str(source.name) == table.defined:
            for node in ast.walk(source.tree):
                if isinstance(node, ast.Call) and _called(node.func) == table.by and node.args:
                    found |= set(_strings(node.args[0]))
    return found


def _tests(tree: ast.Module, said: tuple[str, ...], names: set[str]) -> Iterator[tuple[int, str]]:
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, (ast.expr, ast.stmt)):
            continue
        for holder, told in _lookups(node, constants):
            strings = [s for s in told if s in names]
            if strings and any(_says(side, said) for side in holder):
                yield from ((node.lineno, s) for s in strings)
    for value in constants.values():
        keys = _keys(value)
        if len(keys) > 1 and names.issuperset(keys):
            yield value.lineno, keys[0]


def _lookups(
    node: ast.AST, constants: Mapping[str, ast.expr]
) -> Iterator[tuple[Sequence[ast.AST], Sequence[str]]]:
    """Where a node looks a string up: what it looks for, and among which."""

    def value(side: ast.expr) -> ast.expr:
        return constants.get(side.id, side) if isinstance(side, ast.Name) else side

    if isinstance(node, ast.Compare):
        sides = [value(side) for side in (node.left, *node.comparators)]
        yield sides, [s for side in sides for s in _strings(side)]
    elif isinstance(node, ast.Match):
        yield [node.subject], [s for case in node.cases for s in _strings(case.pattern)]
    elif isinstance(node, ast.Subscript):
        yield [node.slice], _keys(value(node.value))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
        yield node.args, _keys(value(node.func.value))


def _says(node: ast.AST, said: tuple[str, ...]) -> bool:
    """Whether an expression holds such a name."""
    return any(
        (isinstance(n, ast.Attribute) and n.attr in said) or (isinstance(n, ast.Name) and n.id in said)
        for n in ast.walk(node)
    )


def _strings(node: ast.AST) -> list[str]:
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def _keys(node: ast.AST | None) -> list[str]:
    if not isinstance(node, ast.Dict):
        return []
    return [k.value for k in node.keys if isinstance(k, ast.Constant) and isinstance(k.value, str)]


def _called(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
