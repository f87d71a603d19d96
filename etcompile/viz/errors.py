"""The exception for everything a user can get wrong about a drawing."""

from __future__ import annotations

from etcompile.errors import EtcompileError

__all__ = ["VizError"]


class VizError(EtcompileError, ValueError):
    """A drawing cannot be made; the message says what was got and what to do."""
