"""What a loss keeps from step to step in states of its own, where a derivative would pass through what it kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from etcompile.analysis.dependence import dependence
from etcompile.frontend.jaxpr import Constant, Graph, Operand, flatten_jaxpr
from etcompile.frontend.loss import TracedLoss

__all__ = ["remembered_with_derivative"]


def remembered_with_derivative(traced: TracedLoss, own: Sequence[bool]) -> list[Any]:
    """States that the loss writes from outputs, states or weights of the model and reads again, both with a derivative.

    ``own`` says which of the loss's states are the model's.
    """
    candidates = [k for k, state in enumerate(traced.states) if traced.written[k] and not own[k]]
    if not candidates:
        return []
    graph = flatten_jaxpr(traced.closed)
    depends = dependence(graph).derivative
    inputs = {k: _bits(traced.layout.states[k]) for k in range(len(own))}
    moved = _bits(traced.layout.outputs) | sum(inputs[k] for k, is_own in enumerate(own) if is_own)
    made = {k: _union(graph, depends, traced.layout.results[k]) for k in candidates}
    remembered: set[int] = set()
    while True:  # one may be written from another
        reached = moved | sum(inputs[k] for k in remembered)
        more = {k for k in candidates if made[k] & reached}
        if more == remembered:
            break
        remembered = more
    read = _derivative(graph.outputs[traced.layout.value], depends)
    while True:  # what the loss reads through another state counts as well
        wider = read
        for k in remembered:
            wider |= made[k] if read & inputs[k] else 0
        if wider == read:
            break
        read = wider
    return [traced.states[k] for k in candidates if k in remembered and read & inputs[k]]


def _bits(numbers: range) -> int:
    return sum(1 << k for k in numbers)


def _union(graph: Graph, depends: Sequence[int], numbers: range) -> int:
    found = 0
    for k in numbers:
        found |= _derivative(graph.outputs[k], depends)
    return found


def _derivative(operand: Operand, depends: Sequence[int]) -> int:
    return 0 if isinstance(operand, Constant) else depends[operand]
