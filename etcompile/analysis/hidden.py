"""Which states are hidden: carried floating-point states that a trained parameter can reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from etcompile.analysis.dependence import Dependence
from etcompile.errors import ModelError, OptionError
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
    params_mask = (1 << first_bit) - 1
    reached: set[int] = set()
    while True:
        mask = params_mask | sum(1 << (first_bit + k) for k in reached)
        grown = {k for k, v in enumerate(model.new_state_vars) if k not in left_out and dep.on(v, mask)}
        if grown == reached:
            break
        reached = grown
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
            role = StateRole(leaf.path, False, "no trained parameter reaches it with a derivative")
        elif not read:
            role = StateRole(
                leaf.path, False, "its old value is not read with a derivative: a result, not a memory"
            )
        else:
            role = StateRole(leaf.path, True, "carried, and reached by a trained parameter")
        roles.append(role)
    return tuple(roles)


def require_hidden(model: StepModel, roles: Sequence[StateRole]) -> None:
    if any(role.hidden for role in roles):
        return
    listed = "; ".join(f"{role.path}: {role.reason}" for role in roles) or "the step uses no state"
    raise ModelError(
        f"{model.name} has no hidden state to keep a trace for.",
        got=listed,
        expected="a floating-point state that is read, updated, and reached by a trained parameter",
        hint="a model without memory needs no online learning: jax.grad of one step is its whole gradient.",
    )
