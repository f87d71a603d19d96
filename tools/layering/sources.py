"""The files that are checked, read once."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

__all__ = ["CHECKED", "Breach", "Source", "read_sources"]

#: What is checked. Tests and tools may import what they like.
CHECKED = ("etcompile", "passes")

#: File, line, and what is wrong.
Breach = tuple[Path, int, str]


@dataclass(frozen=True)
class Source:
    """One file: its name from the project's root, and its text."""

    name: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.name))

    @property
    def module(self) -> str:
        """Its dotted name; ``passes`` stands in the package."""
        parts = self.name.with_suffix("").parts
        parts = parts if parts[0] == "etcompile" else ("etcompile", *parts)
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def within(self, places: tuple[str, ...]) -> bool:
        """Whether it is one of these files, or below one of these folders."""
        return any(self.name.is_relative_to(place) for place in places)


def read_sources(root: Path) -> list[Source]:
    """All files below ``root`` that are checked."""
    files = sorted({path.resolve() for top in CHECKED for path in (root / top).rglob("*.py")})
    return [Source(path.relative_to(root.resolve()), path.read_text(encoding="utf-8")) for path in files]
