"""Names that a function's code may look something up by."""

from __future__ import annotations

import functools
import types

__all__ = ["code_names"]


@functools.lru_cache(maxsize=1024)
def code_names(code: types.CodeType) -> frozenset[str]:
    """Globals and attributes that code names, functions in it included; texts as well, for ``getattr(x, "name")``."""
    inner = [code_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(code.co_names).union((c for c in code.co_consts if isinstance(c, str)), *inner)
