"""Remove equations that no gradient reads, traces included.

A trace that only feeds itself is dead as well: what counts is reachability from the gradients, not the number of uses. A
contraction that is zero for every input (its signal meets no nonzero entry of the trace) is removed with its gradient line
wherever the site keeps another one.
"""

from __future__ import annotations

import dataclasses

from etcompile.pass_api import TraceProgram, support

__all__ = ["DeadTraces"]


@dataclasses.dataclass(frozen=True)
class DeadTraces:
    """Keep what the gradients need."""

    name: str = "dead_traces"
    preserves: str = "gradients"

    def __call__(self, program: TraceProgram) -> TraceProgram:
        program = _without_zero_contractions(program)
        needed = {g.value.name for g in program.gradients}
        waiting = list(needed)
        by_name = {e.name: e for e in program.equations}
        while waiting:
            for ref in by_name[waiting.pop()].refs:
                if ref.name not in needed:
                    needed.add(ref.name)
                    waiting.append(ref.name)
        return dataclasses.replace(program, equations=tuple(e for e in program.equations if e.name in needed))


def _without_zero_contractions(program: TraceProgram) -> TraceProgram:
    can = support(program)
    by_name = {e.name: e for e in program.equations}

    def zero(name: str) -> bool:
        e = by_name[name]
        if e.op != "contract":
            return False
        signal, trace = (can[ref.name] for ref in e.refs)
        if not isinstance(signal, tuple):
            return not (signal and trace)
        return not any(a and b for a, b in zip(signal, trace, strict=True))

    kept = []
    for k, g in enumerate(program.gradients):
        others = any(o.site == g.site for j, o in enumerate(program.gradients) if j > k) or any(
            o.site == g.site for o in kept
        )
        if not (zero(g.value.name) and others):
            kept.append(g)
    return dataclasses.replace(program, gradients=tuple(kept))
