"""Bytes and counts as people read them."""

from __future__ import annotations

__all__ = ["bytes_text", "count_text"]


def bytes_text(size: float) -> str:
    """A number of bytes with its unit.

    Examples
    --------
    >>> bytes_text(12), bytes_text(2048), bytes_text(37.4e12)
    ('12 B', '2.0 KiB', '34.0 TiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} PiB"


def count_text(number: float) -> str:
    """A count with its prefix; a unit may follow it.

    Examples
    --------
    >>> count_text(512), count_text(4e6) + "flop"
    ('512 ', '4.00 Mflop')
    """
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.2f} {prefix}" if prefix else f"{number:.0f} "
        number /= 1000
    return f"{number:.2f} P"
