"""Derivatives that exist and that no rule follows: those of ``while`` loops, which have a forward derivative only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from etcompile.analysis.dependence import NO_DERIVATIVE, NO_REVERSE, dependence
from etcompile.analysis.hidden import StateRole
from etcompile.analysis.loops import everywhere
from etcompile.frontend.jaxpr import Constant, Graph
from etcompile.frontend.step_model import StepModel

__all__ = ["Unfollowed", "find_unfollowed", "with_reasons"]


@dataclasses.dataclass(frozen=True)
class Unfollowed:
    """An operation at which credit of some states ends for every rule."""

    primitive: str
    source: str
    states: tuple[int, ...]


def find_unfollowed(model: StepModel) -> tuple[Unfollowed, ...]:
    """Loops that states reach which depend on trained parameters; parameters themselves are refused there."""
    graph, first = model.graph, len(model.params)
    followed = dependence(graph, through=frozenset(NO_REVERSE))
    if not any(o.name in NO_REVERSE for _, o, _ in everywhere(graph, followed)):
        return ()
    bits = _forward(graph)
    mask = sum(1 << k for k, leaf in enumerate(model.params) if leaf.aval.differentiable)
    learns: set[int] = set()
    while True:
        grown = {
            k for k, v in enumerate(model.new_state_vars) if not isinstance(v, Constant) and bits[v] & mask
        }
        if grown <= learns:
            break
        learns |= grown
        mask |= sum(1 << (first + k) for k in learns)
    goes_on = {v for v in graph.outputs if not isinstance(v, Constant)}
    found = []
    for operation in reversed(graph.operations):
        moving = [v for v in operation.outputs if v in goes_on and graph.avals[v].differentiable]
        if not moving or operation.name in NO_DERIVATIVE:
            continue
        inputs = [v for v in operation.inputs if not isinstance(v, Constant)]
        goes_on |= set(inputs)
        if operation.loop is not None:
            inside = followed.inside[operation.outputs[0]]
            for _, inner, there in everywhere(operation.loop.body, inside):
                reached = sorted(
                    k for k in learns if any(there.on(v, 1 << (first + k)) for v in inner.inputs)
                )
                if inner.name in NO_REVERSE and reached:
                    found.append(Unfollowed(inner.name, inner.source, tuple(reached)))
        if operation.name in NO_REVERSE:
            reached = sorted(k for k in learns if any(bits[v] >> (first + k) & 1 for v in inputs))
            if reached:
                found.append(Unfollowed(operation.name, operation.source, tuple(reached)))
    return tuple(reversed(found))


def with_reasons(roles: Sequence[StateRole], unfollowed: Sequence[Unfollowed]) -> tuple[StateRole, ...]:
    """The roles, with the loop named where a state is not hidden since a loop reads or makes it."""
    named = {k: u for u in unfollowed for k in u.states}
    return tuple(
        dataclasses.replace(
            role,
            reason=f"{role.reason}; the {named[k].primitive} loop at {named[k].source} reads it, and passes no credit back",
        )
        if k in named and not role.hidden and not role.excluded and named[k].source not in role.reason
        else role
        for k, role in enumerate(roles)
    )


def _forward(graph: Graph) -> list[Any]:
    """What every variable depends on with a derivative in forward mode, as bit sets."""
    bits = [0] * len(graph.avals)
    for bit, variable in enumerate(graph.inputs):
        bits[variable] = (1 << bit) if graph.avals[variable].differentiable else 0
    for operation in graph.operations:
        if operation.name in NO_DERIVATIVE:
            continue
        together = 0
        for v in operation.inputs:
            together |= 0 if isinstance(v, Constant) else bits[v]
        for v in operation.outputs:
            bits[v] = together if graph.avals[v].differentiable else 0
    return bits
