"""What each value that gradients are made of counts in them."""

from __future__ import annotations

from typing import Any

from etcompile.ir.ops import OPS
from etcompile.ir.program import Ref
from etcompile.lowering.schedules.chunk_program import ChunkProgram
from etcompile.lowering.schedules.recurrence import referred, value_key

__all__ = ["counts"]

Value = Any


def counts(program: ChunkProgram, values: dict[str, Value]) -> dict[str, Any]:
    """By name: a number, or one for each step."""
    found: dict[str, Any] = {}
    for gradient in program.causal.program.gradients:
        _add(found, gradient.value.name, 1)
    for e in reversed(program.equations.gradients):
        if e.name not in found:
            continue
        op, now = OPS[e.op], found[e.name]
        for sign, argument in zip(op.terms, e.args, strict=bool(op.terms)):
            _add(found, referred(argument).name, now if sign == 1 else sign * now)
        if op.power:
            value, number = e.args if program.is_gradient(e.args[0]) else reversed(e.args)
            factor = values[value_key(number)] if isinstance(number, Ref) else number
            _add(found, referred(value).name, now * factor if op.power == 1 else now / factor)
    return found


def _add(total: dict[str, Any], name: str, value: Any) -> None:
    total[name] = total[name] + value if name in total else value
