"""What starts with an underscore is read in the file that defines it, and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence

from layering.sources import Breach, Source

__all__ = ["ALLOWED", "private_reads", "stale_reads"]

#: File to the private names that it reads of others. All are of other libraries.
ALLOWED: dict[str, set[str]] = {
    # Where kernels of other libraries keep what they compute (jax has no public way to ask).
    "etcompile/frontend/implementations.py": {"_lowerings", "_platform_specific_lowerings", "_kernels"},
    # What State.value does beside telling of it (brainstate has no public way that tells nobody).
    "etcompile/frontend/state_values.py": {"_read_value", "_write_value", "_been_writen"},
    "etcompile/runtime/foreign_writes.py": {"_getframe"},  # of sys: documented, though named so
}

#: What every named tuple has for all to use, though it is named so.
_OF_NAMED_TUPLES = {"_replace", "_asdict", "_fields"}


def private_reads(sources: Sequence[Source], allowed: Mapping[str, set[str]] = ALLOWED) -> Iterator[Breach]:
    """Private names that a file reads of something that it does not define."""
    for source in sources:
        for line, name in _reads(source):
            if name not in allowed.get(str(source.name), set()):
                yield source.name, line, f"reads {name}, which is private to another file"


def stale_reads(sources: Sequence[Source]) -> list[tuple[str, str]]:
    """What is allowed and not read any more."""
    read = {str(s.name): {name for _, name in _reads(s)} for s in sources}
    return [
        (file, name)
        for file, names in ALLOWED.items()
        for name in sorted(names)
        if name not in read.get(file, ())
    ]


def _reads(source: Source) -> Iterator[tuple[int, str]]:
    own = _defined(source.tree)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("etcompile"):
            yield from ((node.lineno, a.name) for a in node.names if _is_private(a.name))
        elif isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own:
            # What a class inherits is its own.
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.lineno, node.attr


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in _OF_NAMED_TUPLES


def _defined(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found
