"""Windows for any rule with the true learning signal: exact inside, the rule's trace for what came before.

    grad = d(losses of the window) / dw, the states at its start held constant       (backpropagation in the window)
         + (d(losses of the window) / dh_start) e_start                              (the rule's trace there)

A rule written for one step reads its trace in two places: with L_t for this step's new states, and with K_t for old
states that results read without passing the new ones. Seen from a window, everything inside is a path that starts at
the old states: L_t falls away, and K_t becomes the derivative by the states at the window's start.
"""

from __future__ import annotations

import dataclasses

from etcompile.pass_api import OPS, AlgorithmError, Equation, Ref, TraceProgram

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
        own = next((e for e in program.equations if OPS[e.op].signal == "drive"), None)
        if own is not None:
            raise AlgorithmError(
                f"{program.name} makes a learning signal of its own, so credit inside a window cannot be exact.",
                got=f"{own.name} = {own.op}(...)",
                expected="a rule with the true signal: d_rtrl, e_prop with symmetric feedback, pp_prop, ottt, otpe, ...",
                hint="leave within='exact' out; the rule then gives its own credit at every step of a chunk.",
            )
        same: dict[str, Ref] = {}
        zero: set[str] = set()
        kept: list[Equation] = []
        for e in program.equations:
            e = dataclasses.replace(e, args=tuple(_follow(a, same) for a in e.args))
            empty = [isinstance(a, Ref) and a.name in zero for a in e.args]
            if OPS[e.op].signal == "new" or (
                any(empty) and (e.op not in ("add", "sub", "map") or all(empty))
            ):
                zero.add(e.name)
            elif e.op == "add" and any(empty) and isinstance(other := e.args[empty.index(False)], Ref):
                same[e.name] = other
            elif e.op == "sub" and empty[1] and isinstance(e.args[0], Ref):
                same[e.name] = e.args[0]
            else:
                kept.append(dataclasses.replace(e, op=OPS[e.op].windowed or e.op))
        gradients = tuple(
            dataclasses.replace(g, value=_follow(g.value, same))
            for g in program.gradients
            if g.value.name not in zero
        )
        return dataclasses.replace(program, equations=tuple(kept), gradients=gradients, window=self.window)


def _follow(argument: object, same: dict[str, Ref]) -> object:
    if isinstance(argument, Ref) and argument.name in same and argument.delay == 0:
        return same[argument.name]
    return argument
