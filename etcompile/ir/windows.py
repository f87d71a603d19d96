"""What keeps a rule from windows in which credit is exact (``within="exact"``)."""

from __future__ import annotations

from etcompile.ir.ops import OPS
from etcompile.ir.program import Equation, TraceProgram

__all__ = ["learnt_step_by_step", "signal_of_its_own"]


def learnt_step_by_step(program: TraceProgram) -> Equation | None:
    """An equation that is carried and depends on the loss, so that it has no place in a window."""
    return next((e for e in program.equations if OPS[e.op].learns), None)


def signal_of_its_own(program: TraceProgram) -> Equation | None:
    """An equation that makes a learning signal which is not the loss's derivative; one of a drive comes first."""
    return next(
        (e for kind in ("drive", "given") for e in program.equations if OPS[e.op].signal == kind), None
    )
