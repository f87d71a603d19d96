"""Through the rounds of a loop: what is found by walking back through its body, round by round, last one first.

What a result of the loop influences is passed on to the carried values of the round before, until nothing changes: then all
earlier rounds are alike. In most loops that is the case after one or two rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from etcompile.analysis.dependence import Dependence
from etcompile.analysis.index_rules import NONE, join
from etcompile.frontend.jaxpr import Constant, Graph, Operand, Operation
from etcompile.frontend.loops import Loop, Use

__all__ = ["ROUNDS_LIMIT", "everywhere", "located", "moving_inside", "through_rounds"]

Array = Any

#: Rounds that are looked at one by one where each differs from the next; beyond it a loop is taken to mix everything.
ROUNDS_LIMIT = 512


def through_rounds(
    loop: Loop,
    results: Sequence[Array | None],
    walk: Callable[[dict[int, Array]], Mapping[int, Array]],
) -> list[Array | None] | None:
    """What each operand of a loop influences, given what its results do; None where the rounds go on differing.

    ``walk`` goes back through the body once, from its results to its inputs. What an operand that all rounds read
    influences through one round is joined with what it does through the others.
    """
    shapes = [loop.body.avals[v].shape for v in loop.body.inputs]
    first_carried, first_slice = loop.constants, loop.constants + loop.carried
    constants = [_nothing(shape) for shape in shapes[:first_carried]]
    carried = [
        _nothing(shape) if r is None else np.asarray(r)
        for shape, r in zip(shapes[first_carried:first_slice], results, strict=False)
    ]
    stacked = [None if r is None else np.asarray(r) for r in results[loop.carried :]]
    slices = [_nothing((loop.length, *shape)) for shape in shapes[first_slice:]]
    rounds = list(range(loop.length) if loop.reverse else range(loop.length - 1, -1, -1))
    for count, k in enumerate(rounds):
        if count == ROUNDS_LIMIT:
            return None
        of_round = [*carried, *(None if s is None else s[k] for s in stacked)]
        found = walk(_seeds(loop.body, of_round))
        got = [found.get(v) for v in loop.body.inputs]
        constants = [c if g is None else join(c, g) for c, g in zip(constants, got, strict=False)]
        before = [
            _nothing(shape) if g is None else g
            for shape, g in zip(shapes[first_carried:first_slice], got[first_carried:], strict=False)
        ]
        rest = rounds[count:]
        alike = _equal(before, carried) and all(s is None or (s[rest] == s[k]).all() for s in stacked)
        for whole, g in zip(slices, got[first_slice:], strict=True):
            if g is not None:
                whole[rest if alike else k] = g
        carried = before
        if alike:
            break
    operands = [r if _influences(r) else None for r in (*constants, *carried, *slices)]
    return [*operands, *(None,) * loop.known]


def _nothing(shape: Sequence[int]) -> Array:
    return np.full(shape, NONE, np.int64)


def _influences(influence: Array) -> bool:
    return bool((influence != NONE).any())


def _equal(some: Sequence[Array], others: Sequence[Array]) -> bool:
    return all((a == b).all() for a, b in zip(some, others, strict=True))


def _seeds(body: Graph, influences: Sequence[Array | None]) -> dict[int, Array]:
    """Where to walk back from: the results of a round that influence anything."""
    return {
        v: r
        for v, r in zip(body.outputs, influences, strict=True)
        if r is not None and _influences(r) and not isinstance(v, Constant)
    }


def moving_inside(loop: Loop, moving: Sequence[bool]) -> list[bool]:
    """Variables of a loop's body that move with any of the operands that do."""
    body = loop.body
    reached = [False] * len(body.avals)
    for v, m in zip(body.inputs, moving, strict=False):
        reached[v] = m
    while True:
        before = list(reached)
        for operation in body.operations:
            if operation.name != "stop_gradient" and any(
                not isinstance(v, Constant) and reached[v] for v in operation.inputs
            ):
                for v in operation.outputs:
                    reached[v] = body.avals[v].differentiable
        for k, v in enumerate(body.outputs[: loop.carried], loop.constants):
            assert isinstance(v, int)
            reached[body.inputs[k]] |= reached[v]
        if reached == before:
            return reached


def located(graph: Graph, dep: Dependence, use: Use) -> tuple[Operation, Operand, int]:
    """The operation of a use, its operand, and what that depends on with a derivative, in bodies of loops as well."""
    number, *rest = use
    operation = graph.operations[number]
    if len(rest) > 1:
        assert operation.loop is not None
        return located(operation.loop.body, dep.inside[operation.outputs[0]], tuple(rest))
    operand = operation.inputs[rest[0]]
    return operation, operand, 0 if isinstance(operand, Constant) else dep.derivative[operand]


def everywhere(graph: Graph, dep: Dependence) -> Iterator[tuple[Graph, Operation, Dependence]]:
    """The operations of a graph and of the bodies of its loops, with what the variables there depend on."""
    for operation in graph.operations:
        yield graph, operation, dep
        if operation.loop is not None:
            yield from everywhere(operation.loop.body, dep.inside[operation.outputs[0]])
