"""A picture of all accuracies: a panel for each task, a line for each rule, a dot for each seed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape, unescape

import numpy as np

__all__ = ["chart", "values_of"]

_LABEL = re.compile(r'y="(\d+)" text-anchor="end">(.*?)</text>')
_DOT = re.compile(r'<circle cx="([\d.]+)" cy="(\d+)"')

_LEFT, _TOP, _WIDTH, _GAP, _LINE = 130, 46, 190, 26, 18


def chart(
    panels: Sequence[tuple[str, float, Mapping[str, Sequence[float]]]],
    labels: Sequence[str],
    caption: str,
) -> str:
    """An SVG of panels ``(title, chance, {rule: accuracies})``, accuracies between 0 and 1."""
    height = _TOP + _LINE * len(labels) + 34
    width = _LEFT + len(panels) * (_WIDTH + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f"<title>{escape(caption)}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for row, label in enumerate(labels):
        parts.append(f'<text x="{_LEFT - 10}" y="{_y(row) + 4}" text-anchor="end">{escape(label)}</text>')
    for number, (title, chance, found) in enumerate(panels):
        left = _LEFT + number * (_WIDTH + _GAP)
        bottom = _TOP + _LINE * len(labels)
        parts.append(f'<text x="{left}" y="24" font-weight="bold">{escape(title)}</text>')
        for row in range(len(labels)):
            parts.append(f'<path d="M{left} {_y(row)}h{_WIDTH}" stroke="#e4e4e4"/>')
        x = left + _WIDTH * chance
        parts.append(f'<path d="M{x:.1f} {_TOP - 8}V{bottom}" stroke="#888" stroke-dasharray="3 3"/>')
        for tick in (0.0, 0.5, 1.0):
            parts.append(
                f'<text x="{left + _WIDTH * tick:.1f}" y="{bottom + 16}" text-anchor="middle" fill="#555">{tick:g}</text>'
            )
        for row, label in enumerate(labels):
            values = found.get(label) or ()
            for value in values:
                parts.append(
                    f'<circle cx="{left + _WIDTH * value:.1f}" cy="{_y(row)}" r="4" fill="#2a6fbb" fill-opacity="0.4"/>'
                )
            if values:
                mean = left + _WIDTH * float(np.mean(values))
                parts.append(f'<path d="M{mean:.1f} {_y(row) - 7}v14" stroke="#12395f" stroke-width="2.5"/>')
    return "\n".join([*parts, "</svg>", ""])


def values_of(picture: str) -> list[dict[str, list[float]]]:
    """The accuracies that a picture shows, to half a thousandth: ``{rule: values}`` for each panel."""
    labels = {int(y) - 4: unescape(label) for y, label in _LABEL.findall(picture)}
    found: list[dict[str, list[float]]] = []
    for x, y in _DOT.findall(picture):
        panel, along = divmod(float(x) - _LEFT, _WIDTH + _GAP)
        found += [{} for _ in range(int(panel) + 1 - len(found))]
        found[int(panel)].setdefault(labels[int(y)], []).append(along / _WIDTH)
    return found


def _y(row: int) -> int:
    return _TOP + _LINE * row + _LINE // 2
