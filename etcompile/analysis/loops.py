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
    body, n = loop.body, loop.carried
    avals = [body.avals[v] for v in body.inputs]

    def none(k: int) -> Array:
        return np.full(avals[k].shape, NONE, np.int64)

    middle, first_slice = loop.constants, loop.constants + n
    fixed = [none(k) for k in range(middle)]
    carried: list[Array] = [
        none(middle + k) if r is None else np.asarray(r) for k, r in enumerate(results[:n])
    ]
    stacked = [None if r is None else np.asarray(r) for r in results[n:]]
    slices = [np.full((loop.length, *a.shape), NONE, np.int64) for a in avals[first_slice:]]
    order = list(range(loop.length) if loop.reverse else range(loop.length - 1, -1, -1))
    for count, k in enumerate(order):
        if count == ROUNDS_LIMIT:
            return None
        seeds: dict[int, Array] = {}
        for v, r in zip(
            body.outputs, (*carried, *(None if s is None else s[k] for s in stacked)), strict=True
        ):
            if r is not None and (r != NONE).any():
                assert isinstance(v, int)
                seeds[v] = r
        found = walk(seeds)
        got = [found.get(v) for v in body.inputs]
        before = [none(middle + j) if g is None else g for j, g in enumerate(got[middle:first_slice])]
        for j, g in enumerate(got[:middle]):
            fixed[j] = fixed[j] if g is None else join(fixed[j], g)
        alike = all((a == b).all() for a, b in zip(before, carried, strict=True)) and all(
            s is None or (s[order[count:]] == s[k]).all() for s in stacked
        )
        for whole, g in zip(slices, got[first_slice:], strict=True):
            if g is not None:
                whole[order[count:] if alike else k] = g
        carried = before
        if alike:
            break
    return [
        *(r if (r != NONE).any() else None for r in (*fixed, *carried, *slices)),
        *(None,) * loop.known,
    ]


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
