"""Remove equations that no gradient reads, traces included.

A trace that only feeds itself is dead as well: what counts is reachability from the gradients, not the number of uses. A
gradient that is zero for every input (its signal meets no nonzero entry of the trace) is removed wherever the site keeps another
one.
"""

from __future__ import annotations

import dataclasses

from etcompile.pass_api import TraceProgram, made_from, support

__all__ = ["DeadTraces"]


@dataclasses.dataclass(frozen=True)
class DeadTraces:
    """Keep what the gradients need."""

    name: str = "dead_traces"
    preserves: str = "gradients"

    def __call__(self, program: TraceProgram) -> TraceProgram:
        can = support(program)
        asked = {g.site for g in program.gradients if can[g.value.name]}
        last = {g.site: g for g in program.gradients}  # a site keeps one line, if all of them are zero
        gradients = tuple(
            g for g in program.gradients if can[g.value.name] or (g.site not in asked and g is last[g.site])
        )
        needed = made_from(program.equations, (g.value.name for g in gradients))
        equations = tuple(e for e in program.equations if e.name in needed)
        return dataclasses.replace(program, equations=equations, gradients=gradients)
