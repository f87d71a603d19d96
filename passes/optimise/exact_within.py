"""Windows for any rule with the true learning signal: exact inside, the rule's trace for what came before.

    grad = d(losses of the window) / dw, the states at its start held constant       (backpropagation in the window)
         + (d(losses of the window) / dh_start) e_start                              (the rule's trace there)

A rule written for one step reads its trace in two places: with L_t for this step's new states, and with K_t for old
states that results read without passing the new ones. Seen from a window, everything inside is a path that starts at
the old states: L_t falls away, and K_t becomes the derivative by the states at the window's start.
"""

from __future__ import annotations

import dataclasses

from etcompile.pass_api import (
    OPS,
    AlgorithmError,
    Equation,
    Ref,
    Rewriter,
    TraceProgram,
    learnt_step_by_step,
    signal_of_its_own,
)

__all__ = ["ExactWithin"]


@dataclasses.dataclass(frozen=True)
class ExactWithin:
    """Turn a rule for steps into one for windows of ``window`` steps (0: the whole call)."""

    window: int = 0
    name: str = "exact_within"
    preserves: str = "approximates"
    keeps_exact: bool = True  #: a rule without losses has none in windows either

    def __call__(self, program: TraceProgram) -> TraceProgram:
        if program.window is not None:
            raise AlgorithmError(
                f"{program.name} works on windows by itself, so within='exact' adds nothing.",
                got=f"window={program.window or 'all'}",
                hint="leave within='exact' out.",
            )
        if (carried := learnt_step_by_step(program)) is not None:
            raise AlgorithmError(
                f"{program.name} carries a value that depends on the loss, step by step, so it has no place in a window.",
                got=f"{carried.name} = {carried.op}(...)",
                hint="leave within='exact' out.",
            )
        if (own := signal_of_its_own(program)) is not None:
            raise AlgorithmError(
                f"{program.name} makes a learning signal of its own, so credit inside a window cannot be exact.",
                got=f"{own.name} = {own.op}(...)",
                expected="a rule with the true signal: d_rtrl, e_prop with symmetric feedback, pp_prop, ottt, otpe, ...",
                hint="leave within='exact' out; the rule then gives its own credit at every step of a chunk.",
            )
        out = Rewriter(program)
        zero: set[str] = set()
        for e in program.equations:
            op = OPS[e.op]
            left = [ref for ref in e.refs if ref.name not in zero]
            if op.signal == "new" or _is_zero(e, zero):
                zero.add(e.name)
            elif op.terms and len(left) == 1 < len(e.refs):
                factor = op.terms[e.args.index(left[0])]
                if factor == 1:
                    out.replace(e, left[0])
                else:
                    out.define(e, out.op("mul", factor, left[0]))
            else:
                out.keep(dataclasses.replace(e, op=op.windowed or e.op))
        return dataclasses.replace(out.finish(), window=self.window)


def _is_zero(e: Equation, zero: set[str]) -> bool:
    """Whether a value falls away with those that it is made of: all of them, or one in which it is linear."""
    gone = [isinstance(a, Ref) and a.name in zero for a in e.args]
    return any(gone) and (sum(gone) == len(e.refs) or any(gone[k] for k in OPS[e.op].linear))
