"""Dotted paths of states and parameters: patterns that pick some, the order of a model, short lists of many."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

__all__ = ["natural_key", "path_matches", "patterns_of", "short_list", "short_text", "user_line"]

#: Four names or more in a row, as the meaning of a cut lists them.
_ROW = re.compile(r"(?:[^,;:\s]+, ){3,}[^,;:\s]+")


def path_matches(path: str, pattern: str) -> bool:
    """Whether a dotted path is the pattern, lies below it, or matches it as a glob."""
    return path == pattern or path.startswith(pattern + ".") or fnmatch.fnmatchcase(path, pattern)


def natural_key(path: str) -> tuple[tuple[bool, int, str], ...]:
    """A key by which ``cells.2`` sorts before ``cells.10``: numbers count as numbers."""
    return tuple(
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part)
        for part in re.split(r"(\d+)", path)
    )


def short_list(names: Sequence[str], limit: int = 3) -> str:
    """Names in one line: all of them up to ``limit``, else those of one module as one, and a long row by its ends."""
    if len(names) <= limit:
        return ", ".join(names)
    trunks = list(dict.fromkeys(sorted(map(_trunk, names), key=natural_key)))
    if len(trunks) <= limit:
        return f"{', '.join(trunks)} ({len(names)} in all)"
    return f"{trunks[0]} to {trunks[-1]} ({len(names)} in all)"


def short_text(text: str) -> str:
    """A text with :func:`short_list` in the place of long rows of names."""
    return _ROW.sub(lambda row: short_list(row[0].split(", ")), text)


def _trunk(path: str) -> str:
    """The module that a path belongs to: ``cells.0.*`` of ``cells.0.Wh.weight``; a plain name as it is."""
    parts = path.split(".")
    depth = next((k + 1 for k, part in enumerate(parts) if part.isdecimal()), 1)
    return path if depth >= len(parts) else ".".join(parts[:depth]) + ".*"


def user_line(source: str) -> str:
    """The user's line without the library's line behind it: ``a.py:3`` of ``a.py:3 (b.py:9)``."""
    return source.split(" (")[0]


def patterns_of(given: str | Iterable[str]) -> tuple[str, ...]:
    """One pattern, or several, as several."""
    return (given,) if isinstance(given, str) else tuple(given)
