"""Which states are hidden: carried floating-point states that a trained parameter can reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from etcompile.analysis.dependence import Dependence, dependence
from etcompile.errors import ModelError, OptionError
from etcompile.frontend.jaxpr import Constant, Operand
from etcompile.frontend.step_model import StepModel
from etcompile.paths import path_matches

__all__ = ["StateRole", "state_roles"]


@dataclasses.dataclass(frozen=True)
class StateRole:
    """Whether a state is hidden, and why (or why not)."""

    path: str
    hidden: bool
    reason: str
    excluded: bool = False


def state_roles(model: StepModel, dep: Dependence, exclude: Sequence[str]) -> tuple[StateRole, ...]:
    """Decide for every state of the model; ``exclude`` holds paths or patterns of states to leave out."""
    paths = [leaf.path for leaf in model.states]
    for pattern in exclude:
        if not any(path_matches(path, pattern) for path in paths):
            raise OptionError(
                f"exclude={pattern!r} matches no state of {model.name}.",
                got=repr(pattern),
                expected=f"a path or pattern among {', '.join(paths)}",
            )
    left_out = {k for k, path in enumerate(paths) if any(path_matches(path, pattern) for pattern in exclude)}
    first_bit = len(model.params)
    reached = _reached(model, dep, left_out)
    loops = _Loops(model, left_out)
    # Only a state that would be hidden is a loss where it is left out; the others have a reason of their own.
    otherwise = state_roles(model, dep, ()) if left_out else ()
    roles = []
    for k, leaf in enumerate(model.states):
        read = any(dep.on(v, 1 << (first_bit + k)) for v in model.graph.outputs)
        if not leaf.aval.differentiable:
            role = StateRole(leaf.path, False, f"{leaf.aval.dtype} has no derivative")
        elif k in left_out and not otherwise[k].hidden:
            role = otherwise[k]
        elif k in left_out:
            role = StateRole(leaf.path, False, "left out by exclude=", excluded=True)
        elif k not in reached:
            reason = loops.before(k) or "no trained parameter reaches it with a derivative"
            role = StateRole(leaf.path, False, reason)
        elif not read:
            reason = loops.after(k) or "its old value is not read with a derivative: a result, not a memory"
            role = StateRole(leaf.path, False, reason)
        else:
            role = StateRole(leaf.path, True, "carried, and reached by a trained parameter")
        roles.append(role)
    return tuple(roles)


def _reached(model: StepModel, dep: Dependence, left_out: set[int]) -> set[int]:
    """States that a trained parameter reaches with a derivative, through other states too."""
    first_bit = len(model.params)
    reached: set[int] = set()
    while True:
        mask = (1 << first_bit) - 1 | sum(1 << (first_bit + k) for k in reached)
        grown = {k for k, v in enumerate(model.new_state_vars) if k not in left_out and dep.on(v, mask)}
        if grown == reached:
            return reached
        reached = grown


class _Loops:
    """Which while loop keeps a parameter from a state, or a state from being read: it passes no derivative."""

    def __init__(self, model: StepModel, left_out: set[int]) -> None:
        self.model = model
        self.left_out = left_out
        self.found = [o for o in model.graph.operations if o.name == "while"]
        #: What would depend on what if the loops passed derivatives.
        self.open = dependence(model.graph, through=frozenset({"while"})) if self.found else None

    def before(self, state: int) -> str | None:
        if self.open is None:
            return None
        reached = _reached(self.model, self.open, self.left_out)
        first_bit = len(self.model.params)
        mask = (1 << first_bit) - 1 | sum(1 << (first_bit + k) for k in reached - {state})
        source = self._on_the_way(mask, [self.model.new_state_vars[state]]) if state in reached else None
        return source and f"a trained parameter reaches it only through the while loop at {source}{_NONE}"

    def after(self, state: int) -> str | None:
        if self.open is None:
            return None
        source = self._on_the_way(1 << (len(self.model.params) + state), self.model.graph.outputs)
        return source and f"its old value is read only in the while loop at {source}{_NONE}"

    def _on_the_way(self, mask: int, ends: Sequence[Operand]) -> str | None:
        """The first loop with an operand on ``mask`` that one of ``ends`` is computed from."""
        assert self.open is not None
        needed = {v for v in ends if not isinstance(v, Constant)}
        source = None
        for operation in reversed(self.model.graph.operations):
            if needed.isdisjoint(operation.outputs):
                continue
            needed.update(v for v in operation.inputs if not isinstance(v, Constant))
            if operation.name == "while" and any(self.open.on(v, mask) for v in operation.inputs):
                source = operation.source
        return source


_NONE = ", which passes no derivative"


def require_hidden(model: StepModel, roles: Sequence[StateRole]) -> None:
    if any(role.hidden for role in roles):
        return
    by_reason: dict[str, list[str]] = {}
    for role in roles:
        by_reason.setdefault(role.reason, []).append(role.path)
    told = [f"{', '.join(paths)}: {reason}" for reason, paths in by_reason.items()]
    listed = "; ".join(told) or "the step uses no state"
    raise ModelError(
        f"{model.name} has no hidden state to keep a trace for.",
        got=listed,
        expected="a floating-point state that is read, updated, and reached by a trained parameter",
        hint="give the while loop a fixed number of rounds (lax.scan, lax.fori_loop with constant bounds, "
        "brainstate.transform.for_loop): an integrator of fixed step, for example."
        if _NONE in listed
        else "a model without memory needs no online learning: jax.grad of one step is its whole gradient.",
    )
