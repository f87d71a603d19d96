"""What goes wrong inside of a learning rule, told with the rule, its line, and the relation at hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import FrameType
from typing import Any

from etcompile.errors import EtcompileError, PassError, ProgramError
from etcompile.ir.header import Effect, Header, Relation
from etcompile.paths import short_list

__all__ = ["rule_failure"]


def rule_failure(
    name: str, write: Callable[..., None], error: Exception, header: Header
) -> EtcompileError | None:
    """The exception to raise in place of ``error``; None where that says it all, as a bad option does."""
    if isinstance(error, EtcompileError) and not isinstance(error, ProgramError):
        return None
    where, at = _place(write, error, header)
    if isinstance(error, ProgramError):
        return ProgramError(f"rule {name}{at}: {error}", where=where)
    return PassError(f"pass {name} (after no other pass){at}: {type(error).__name__}: {error}", where=where)


def _place(write: Callable[..., None], error: Exception, header: Header) -> tuple[str | None, str]:
    """``file:line`` of the rule, and the relation that its loop had come to."""
    code = getattr(write, "__code__", None)
    where, item, trace = None, None, error.__traceback__
    while trace is not None and code is not None:
        if trace.tb_frame.f_code.co_filename == code.co_filename:
            where = f"{os.path.basename(code.co_filename)}:{trace.tb_lineno}"
            item = _at_hand(trace.tb_frame) or item
        trace = trace.tb_next
    if item is None:
        return where, ""
    target = item.group if isinstance(item, Relation) else item.layer
    kind = "relation" if isinstance(item, Relation) else "effect"
    return where, f", at {kind} {item.name} ({short_list(header.site(item.site).params)} in {target})"


def _at_hand(frame: FrameType) -> Any:
    return next((v for v in reversed(frame.f_locals.values()) if isinstance(v, (Relation, Effect))), None)
