"""What chunks need of a program: traces and gradients that are linear in what each step adds, with the weights fixed.

Its other equations are sorted by what they need of other steps.
"""

from __future__ import annotations

import dataclasses

from etcompile.errors import UnsupportedError
from etcompile.ir.kinds import KINDS
from etcompile.ir.ops import OPS
from etcompile.ir.program import Equation, Ref, TraceProgram, made_from
from etcompile.ir.types import Type
from etcompile.ir.verifier import computed_with_loss
from etcompile.lowering.schedules.recurrence import TraceClass, trace_classes

__all__ = ["ChunkEquations", "chunk_equations"]


@dataclasses.dataclass(frozen=True)
class ChunkEquations:
    """The equations of a program, in the order in which a chunk computes them.

    Attributes
    ----------
    alone : tuple of Equation
        They need nothing of other steps, and not the loss: for all steps at once.
    signals : tuple of Equation
        They need nothing of other steps, and the loss.
    filters : tuple of Equation
        They need earlier steps, and not the loss: recurrences of the size of states or presynaptic values.
    late : tuple of Equation
        They need both.
    gradients : tuple of Equation
        What the gradients are made of.
    classes : tuple of TraceClass
        Traces, which are never computed within a chunk.
    """

    alone: tuple[Equation, ...]
    signals: tuple[Equation, ...]
    filters: tuple[Equation, ...]
    late: tuple[Equation, ...]
    gradients: tuple[Equation, ...]
    classes: tuple[TraceClass, ...]


def chunk_equations(program: TraceProgram) -> ChunkEquations:
    """The equations of a program for chunks.

    Raises
    ------
    UnsupportedError
        Its traces are not linear in what each step adds, or follow every path.
    """
    earlier = _of_earlier_steps(program)
    for e in program.equations:
        reason = _refusal(program, e, earlier)
        if reason:
            raise UnsupportedError(
                f"{program.name} cannot run in chunks: {reason}.",
                got=f"{e.name} = {e.op}(...) : {e.type}",
                expected="traces made of recur, outer, contract and sums, with the weights fixed",
                hint="run it step by step: chunk=1.",
            )
    loss = computed_with_loss(program)
    plain = [e for e in program.equations if not _summed(e.type)]
    return ChunkEquations(
        alone=tuple(e for e in plain if e.name not in earlier and e.name not in loss),
        signals=tuple(e for e in plain if e.name not in earlier and e.name in loss),
        filters=tuple(e for e in plain if e.name in earlier and e.name not in loss),
        late=tuple(e for e in plain if e.name in earlier and e.name in loss),
        gradients=tuple(e for e in program.equations if KINDS[e.type.kind].gradient),
        classes=trace_classes(program),
    )


def _summed(kind: Type) -> bool:
    """Whether a value is summed over steps: a trace, or what gradients are made of."""
    return KINDS[kind.kind].trace or KINDS[kind.kind].gradient


def _of_earlier_steps(program: TraceProgram) -> set[str]:
    """Values that depend on an earlier step."""
    found: set[str] = set()
    while True:
        grown = {e.name for e in program.equations if any(r.delay == -1 or r.name in found for r in e.refs)}
        if grown == found:
            return found
        found = grown


def _refusal(program: TraceProgram, e: Equation, earlier: set[str]) -> str:
    """Why an equation has no place in a chunk; empty where it has one."""
    kind, op = KINDS[e.type.kind], OPS[e.op]
    if op.learns:
        return "it carries a value that depends on the loss, and so on the step before"
    if kind.every_path:
        return f"it keeps a value of kind {kind.name}, which follows every path"
    if kind.counts:
        return "it counts steps"
    if op.signal == "drive" and op.needs_loss and any(ref.name in earlier for ref in e.refs):
        made = made_from(program.equations, [e.name])
        if any(
            KINDS[program.equation(name).type.kind].every_example and name in program.carried for name in made
        ):
            return "its feedback matrix changes with the weights, which are fixed in a chunk"
        return "its learning signal is made of earlier steps"
    if kind.gradient and e.name in program.carried:
        return "it carries a gradient"
    if _summed(e.type) and not op.terms:
        summed = [
            k for k, a in enumerate(e.args) if isinstance(a, Ref) and _summed(program.equation(a.name).type)
        ]
        if not op.linear or not set(summed) <= set(op.linear):
            return f"{e.op} of a trace is not linear"
        if len(summed) > 1:
            return "a product of two traces is not linear"
    return ""
