"""Share equal values, recurrences included.

Two traces are equal when their equations are equal up to the names of equal values. The pass starts from the coarsest
guess (values with the same op, type, options and constants are equal) and refines it until it is consistent, so that two
recurrences that refer to themselves are found equal as well.
"""

from __future__ import annotations

import dataclasses

from etcompile.pass_api import Equation, Ref, Rewriter, TraceProgram

__all__ = ["ShareTraces"]


@dataclasses.dataclass(frozen=True)
class ShareTraces:
    """Replace every value by the first one that always equals it."""

    name: str = "share_traces"
    preserves: str = "gradients"

    def __call__(self, program: TraceProgram) -> TraceProgram:
        first = _representatives(program)
        out = Rewriter(program)
        for e in program.equations:
            if first[e.name] == e.name:
                out.keep(e)
            else:
                out.replace(e, Ref(first[e.name]))
        return out.finish()


def _representatives(program: TraceProgram) -> dict[str, str]:
    classes = {e.name: 0 for e in program.equations}
    while True:
        keys: dict[tuple, int] = {}
        refined = {e.name: keys.setdefault(_key(e, classes), len(keys)) for e in program.equations}
        if len(set(refined.values())) == len(set(classes.values())):
            break
        classes = refined
    first: dict[int, str] = {}
    return {e.name: first.setdefault(classes[e.name], e.name) for e in program.equations}


def _key(e: Equation, classes: dict[str, int]) -> tuple:
    args = tuple((classes[a.name], a.delay) if isinstance(a, Ref) else (str(a),) for a in e.args)
    return (classes[e.name], e.op, e.type, args)
