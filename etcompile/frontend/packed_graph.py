"""A graph written again with the arrays by which its states stand.

The parts of a packed state are variables as if each had been a state of its own: what reads such a state, or one of the values
that are put into it, has the part on its way. So learning signals find the same as for states in arrays of their own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from etcompile.frontend.jaxpr import Constant, Graph, GraphBuilder, Operand, Operation
from etcompile.frontend.state_forms import StateForm, put_together

__all__ = ["with_parts"]

Shape = tuple[int, ...]


def with_parts(graph: Graph, n_params: int, n_outputs: int, forms: tuple[StateForm, ...]) -> Graph:
    """``graph`` with the parts of its states among its inputs and outputs, in place of the states."""
    builder = GraphBuilder()
    end = n_params + len(forms)
    states = graph.inputs[n_params:end]
    env: dict[int, Operand] = {v: builder.variable(graph.avals[v]) for v in graph.inputs[:n_params]}
    parts = [
        [builder.variable(a) for a in form.avals(graph.avals[v])]
        for v, form in zip(states, forms, strict=True)
    ]
    env |= {v: builder.variable(graph.avals[v]) for v in graph.inputs[end:]}
    given = [env[v] for v in graph.inputs[:n_params]], *parts, [env[v] for v in graph.inputs[end:]]
    for v, found, form in zip(states, parts, forms, strict=True):
        (env[v],) = (
            builder.call(lambda *p, form=form: [form.join(p)], found, "?") if form.parts > 1 else found
        )
    new = _NewParts.of(graph, n_params, n_outputs, forms)
    held = dict(zip(states, zip(parts, forms, strict=True), strict=True))
    for operation in graph.operations:
        part = _part_read(graph, operation, held)
        if part is not None:
            env[operation.outputs[0]] = new.passed(builder, operation.outputs[0], part)
            continue
        results = builder.emit(
            operation.primitive,
            operation.params,
            [v if isinstance(v, Constant) else env[v] for v in operation.inputs],
            [graph.avals[v] for v in operation.outputs],
            operation.source,
            operation.loop,
        )
        for v, result in zip(operation.outputs, results, strict=True):
            env[v] = new.passed(builder, v, result)
    outputs = [v if isinstance(v, Constant) else env[v] for v in graph.outputs]
    made = [new.parts_of(builder, k, value) for k, value in enumerate(outputs[n_outputs:])]
    inputs: tuple[Any, ...] = tuple(itertools.chain(*given))
    return Graph(
        tuple(builder.avals),
        inputs,
        tuple(builder.operations),
        (*outputs[:n_outputs], *itertools.chain(*made)),
    )


def _part_read(
    graph: Graph, operation: Operation, held: Mapping[int, tuple[list[int], StateForm]]
) -> int | None:
    """The one part of a packed state that an operation takes out of it."""
    base = operation.inputs[0] if operation.name == "slice" else None
    if not isinstance(base, int) or base not in held or not held[base][1].bounds:
        return None
    parts, form = held[base]
    start, stop = (operation.params[key][form.axis] for key in ("start_indices", "limit_indices"))
    bounds = list(itertools.pairwise(form.bounds))
    if (start, stop) not in bounds:
        return None
    part = bounds.index((start, stop))
    whole = graph.avals[operation.outputs[0]].shape == form.avals(graph.avals[base])[part].shape
    return parts[part] if whole else None


@dataclasses.dataclass(frozen=True, eq=False)
class _NewParts:
    """The parts of new states while a graph is written again.

    Attributes
    ----------
    forms : tuple of StateForm
    whole : mapping of int to int
        By variable of the old graph the state in parts that it is, as a whole.
    pieces : mapping of int to (int, int, shape)
        By variable that is put into a packed state: state, part, and the part's shape.
    found : dict of (int, int) to Operand
        The parts that are written by now, in the new graph.
    """

    forms: tuple[StateForm, ...]
    whole: Mapping[int, int]
    pieces: Mapping[int, tuple[int, int, Shape]]
    found: dict[tuple[int, int], Operand]

    @classmethod
    def of(cls, graph: Graph, n_params: int, n_outputs: int, forms: tuple[StateForm, ...]) -> _NewParts:
        whole: dict[int, int] = {}
        pieces: dict[int, tuple[int, int, Shape]] = {}
        for k, (new, form) in enumerate(zip(graph.outputs[n_outputs:], forms, strict=True)):
            if form.parts == 1 or not isinstance(new, int) or new not in graph.made_by or new in whole:
                continue
            whole[new] = k
            if form.complex:
                continue
            shapes = [a.shape for a in form.avals(graph.avals[new])]
            bounds = list(itertools.pairwise(form.bounds))
            for start, stop, piece in put_together(graph, graph.operations[graph.made_by[new]], form.axis):
                origin = _unmoved(graph, piece)
                if (start, stop) in bounds and origin is not None and graph.avals[origin].differentiable:
                    part = bounds.index((start, stop))
                    pieces.setdefault(origin, (k, part, shapes[part]))
        return cls(forms, whole, pieces, {})

    def passed(self, builder: GraphBuilder, variable: int, value: Operand) -> Operand:
        """What readers of a variable of the old graph read: a part, or what parts make together."""
        if variable in self.pieces:
            k, part, shape = self.pieces[variable]
            own = builder.aval(value).shape
            (self.found[k, part],) = builder.call(lambda v: [v.reshape(shape)], [value], "?")
            (value,) = builder.call(lambda v: [v.reshape(own)], [self.found[k, part]], "?")
        if variable in self.whole:
            k = self.whole[variable]
            (value,) = builder.call(lambda *p: [self.forms[k].join(p)], self.parts_of(builder, k, value), "?")
        return value

    def parts_of(self, builder: GraphBuilder, k: int, value: Operand) -> list[Operand]:
        """The parts of new state k, which is this value."""
        form = self.forms[k]
        if form.parts == 1:
            return [value]
        if any((k, part) not in self.found for part in range(form.parts)):
            for part, sliced in enumerate(builder.call(form.split, [value], "?")):
                self.found.setdefault((k, part), sliced)
        return [self.found[k, part] for part in range(form.parts)]


def _unmoved(graph: Graph, piece: Operand) -> int | None:
    """What a piece was before axes of size one were added; None where it is an input, or a part of one."""
    origin = piece
    while (operation := _made_by(graph, origin)) is not None and operation.name in _RESHAPES:
        operand = operation.inputs[0]
        if graph.aval(operand).size != graph.aval(origin).size or _made_by(graph, operand) is None:
            break
        origin = operand
    source = origin
    while (operation := _made_by(graph, source)) is not None and operation.name in (*_RESHAPES, "slice"):
        source = operation.inputs[0]
    return origin if isinstance(origin, int) and _made_by(graph, source) is not None else None


def _made_by(graph: Graph, operand: Operand) -> Operation | None:
    made = graph.made_by.get(operand) if isinstance(operand, int) else None
    return None if made is None else graph.operations[made]


_RESHAPES = ("broadcast_in_dim", "reshape", "squeeze")
