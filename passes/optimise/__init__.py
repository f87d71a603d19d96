"""Rewrites of programs, one per file: a frozen dataclass with ``name`` and ``preserves``, called with a program."""
