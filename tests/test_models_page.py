"""`docs/models.md` says what the compiler finds."""

from __future__ import annotations

from pathlib import Path

from models_page import models_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"


def test_the_table_of_models_is_what_the_compiler_finds():
    table = models_table()
    assert table in PAGE.read_text(encoding="utf-8"), f"docs/models.md should hold\n\n{table}"
