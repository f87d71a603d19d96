"""The processor's caches, which say how much is worth handling together."""

from __future__ import annotations

import functools
from pathlib import Path

__all__ = ["caches", "shared_cache"]

_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

#: Bytes that a shared cache counts at most, and where the system tells nothing. Virtual machines are told of all that they share.
_MOST = 32 << 20


@functools.cache
def shared_cache() -> int:
    """Bytes of the last cache, which cores share, as far as a program may count on it."""
    return min(_MOST, max(caches().values(), default=_MOST))


def caches() -> dict[int, int]:
    """Bytes of the data caches beyond the first that a core reads through, by level; none where the system does not tell."""
    found = {}
    for folder in sorted(_FOLDER.glob("index*")):
        try:
            kind, level, size = (
                (folder / name).read_text(encoding="utf-8").strip() for name in ("type", "level", "size")
            )
        except OSError:
            continue
        if kind != "Instruction" and int(level) > 1:
            found[int(level)] = int(size[:-1]) * _UNITS[size[-1]] if size[-1] in _UNITS else int(size)
    return found
