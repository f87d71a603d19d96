"""Names that a function's code may look something up by."""

from __future__ import annotations

import dis
import functools
import types

__all__ = ["code_names", "global_names"]


@functools.lru_cache(maxsize=1024)
def code_names(code: types.CodeType) -> frozenset[str]:
    """Globals and attributes that code names, functions in it included; texts as well, for ``getattr(x, "name")``."""
    inner = [code_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    texts = (c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
    return frozenset(code.co_names).union(texts, *inner)


@functools.lru_cache(maxsize=1024)
def global_names(code: types.CodeType) -> frozenset[str]:
    """The names among these that are looked up in the module, and not in an object; texts as well, for ``globals()["name"]``."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    if "globals" in found:
        found.update(c for c in code.co_consts if isinstance(c, str))
    return frozenset(found).union(*(global_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))
