"""New states that are another arrangement of what others read: a mapped axis moved back, a reshape at the end.

A learning signal is what the loss asks of a new state, with the new states taken as they are. What reads the values before they
were moved would go round the state, so it reads the state, moved back. Then credit is the same wherever the last move stands,
as for the parts of a packed state (`packed_graph`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax import lax

from etcompile.frontend.jaxpr import Constant, Graph, GraphBuilder, Operand, Operation

__all__ = ["with_states_read"]

Array = Any
#: One move and the one that takes it back.
_Move = tuple[Operation, Callable[[Array], Array]]


def with_states_read(graph: Graph, first: int) -> Graph:
    """``graph`` where values that outputs from number ``first`` on are an arrangement of are read from these outputs."""
    chains: dict[int, tuple[_Move, ...]] = {}
    taken: set[int] = set()
    for new in graph.outputs[first:]:
        chain = _moves_to(graph, new)
        variables = {v for move, _ in chain for v in (*move.outputs, *move.inputs) if isinstance(v, int)}
        if chain and not variables & taken and _read_elsewhere(graph, chain, first):
            (origin,) = chain[0][0].inputs
            assert isinstance(origin, int)
            chains[origin] = chain
            taken |= variables
    return _rewritten(graph, chains) if chains else graph


def _moves_to(graph: Graph, new: Operand) -> tuple[_Move, ...]:
    """The moves that end in a new state, first one first, from a variable that the step computes."""
    moves: list[_Move] = []
    while isinstance(new, int) and new in graph.made_by:
        operation = graph.operations[graph.made_by[new]]
        back = _back(graph, operation)
        source = operation.inputs[0] if back is not None else None
        if back is None or not isinstance(source, int) or source not in graph.made_by:
            break
        moves.insert(0, (operation, back))
        new = source
    return tuple(moves)


def _back(graph: Graph, operation: Operation) -> Callable[[Array], Array] | None:
    """What takes an operation back that gives every element of its one operand one place; None for any other."""
    name, params = operation.name, operation.params
    if name == "transpose":
        order = tuple(int(d) for d in np.argsort(params["permutation"]))
        return lambda v: lax.transpose(v, order)
    if name == "rev":
        return lambda v: lax.rev(v, params["dimensions"])
    if name in ("reshape", "squeeze", "broadcast_in_dim"):
        shape = graph.aval(operation.inputs[0]).shape
        if len(operation.inputs) == 1 and np.prod(shape) == graph.avals[operation.outputs[0]].size:
            return lambda v: lax.reshape(v, shape)
    return None


def _read_elsewhere(graph: Graph, chain: tuple[_Move, ...], first: int) -> bool:
    """Whether anything but the moves reads what they start from, or what lies between them."""
    between = {v for operation, _ in chain for v in operation.inputs if isinstance(v, int)}
    readers = sum(len(graph.read_by.get(v, ())) for v in between)
    return readers > len(chain) or any(v in between for v in graph.outputs[:first])


def _rewritten(graph: Graph, chains: Mapping[int, tuple[_Move, ...]]) -> Graph:
    builder = GraphBuilder()
    inputs = tuple(builder.variable(graph.avals[v]) for v in graph.inputs)
    env: dict[int, Operand] = dict(zip(graph.inputs, inputs, strict=True))
    moves = {id(operation) for chain in chains.values() for operation, _ in chain}

    def emit(operation: Operation) -> None:
        operands = [v if isinstance(v, Constant) else env[v] for v in operation.inputs]
        avals = [graph.avals[v] for v in operation.outputs]
        results = builder.emit(
            operation.primitive, operation.params, operands, avals, operation.source, operation.loop
        )
        env.update(zip(operation.outputs, results, strict=True))

    for operation in graph.operations:
        if id(operation) in moves:
            continue
        emit(operation)
        for v in operation.outputs:
            chain = chains.get(v, ())
            for move, _ in chain:
                emit(move)
            for move, back in reversed(chain):
                (source,) = move.inputs
                assert isinstance(source, int)
                (env[source],) = builder.call(
                    lambda u, back=back: [back(u)], [env[move.outputs[0]]], move.source
                )
    outputs = tuple(v if isinstance(v, Constant) else env[v] for v in graph.outputs)
    return Graph(tuple(builder.avals), inputs, tuple(builder.operations), outputs)
