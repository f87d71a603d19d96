"""What a page said before: rows of what is not measured anew stay, since all of it takes hours."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Earlier"]

Row = tuple[str, ...]


class Earlier:
    """The tables of a page written before; ``""`` for none."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tables: dict[Row, list[Row]] = {}
        table: list[Row] | None = None
        for line in text.splitlines():
            if not line.startswith("| "):
                table = None
            elif table is None:
                table = self._tables.setdefault(_cells(line), [])
            elif not line.startswith("| --- "):
                table.append(_cells(line))

    def rows(self, head: Sequence[str]) -> list[Row]:
        """The rows of the table with this head."""
        return self._tables.get(tuple(head), [])

    def filled(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Row]:
        """``rows``, with what the page had where a cell of theirs is empty."""
        known = {row[0]: row for row in self.rows(head)}
        return [
            tuple(new or old for new, old in zip(row, known.get(row[0], row), strict=True)) for row in rows
        ]

    def kept(self, head: Sequence[str], rows: Sequence[Sequence[str]], names: int) -> list[Row]:
        """``rows`` in place of those with the same first ``names`` cells, or behind them."""
        new = {tuple(row[:names]): tuple(row) for row in rows}
        old = [new.pop(row[:names], row) for row in self.rows(head)]
        return [*old, *new.values()]

    def between(self, start: str, end: str) -> str:
        """The text between two others, the first time that it is found."""
        _, found, rest = self._text.partition(start)
        return rest.partition(end)[0] if found else ""


def _cells(line: str) -> Row:
    return tuple(cell.strip().replace("\\|", "|") for cell in line.strip().strip("|").split(" |"))
