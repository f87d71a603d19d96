"""Weights that meet data inside of a loop, taken out of it.

A product with a weight in every round is one site, not one for each round: with x_k what the weight meets in round k,

    y_k = op(w, x_k),    y = op(w, x) for all rounds at once, outside of the loop

Two operations take the loop's place. The first runs it and gives its results and every x_k. The second gives the same
results, and has their derivatives: in its rounds w is held constant, and round k adds d_k to op(w, x_k), where d is zero and
has the derivative of y. So all that y does to the loop's results goes through d, and all that x_k does stays inside.

What every round computes alike, from constants of the loop, is computed once, before it; an expression of parameters with a
slice for each round becomes one of the whole arrays. Both are the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.analysis.dependence import Dependence, dependence_given
from etcompile.analysis.sites import weight_operation_at
from etcompile.frontend.jaxpr import (
    Aval,
    Constant,
    Graph,
    GraphBuilder,
    Operand,
    Operation,
    bind,
    has_effects,
    simplified,
    with_copies,
)
from etcompile.frontend.loops import Loop
from etcompile.frontend.step_model import StepModel

__all__ = ["take_weights_out"]

Array = Any


def take_weights_out(model: StepModel, dep: Dependence) -> StepModel:
    """The model with the weights that meet data in its loops outside of them."""
    graph = model.graph
    if not any(operation.loop for operation in graph.operations):
        return model
    bits = [dep.value[v] for v in graph.inputs]
    moving = [dep.derivative[v] for v in graph.inputs]
    changed = _rewritten(graph, bits, moving, (1 << len(model.params)) - 1)
    first = len(model.outputs)
    return dataclasses.replace(
        model, graph=with_copies(simplified(changed), range(first, len(graph.outputs)))
    )


def _rewritten(graph: Graph, bits: Sequence[int], moving: Sequence[int], params: int) -> Graph:
    """A graph with the weights in its loops taken out, innermost loops first."""
    if not any(operation.loop for operation in graph.operations):
        return graph
    dep = dependence_given(graph, bits, moving)
    builder = GraphBuilder()
    env: dict[int, Operand] = {v: builder.variable(graph.avals[v]) for v in graph.inputs}

    def get(operand: Operand) -> Operand:
        return operand if isinstance(operand, Constant) else env[operand]

    inputs = tuple(v for v in map(get, graph.inputs) if isinstance(v, int))
    for operation in graph.operations:
        operands = [get(v) for v in operation.inputs]
        if operation.loop is None:
            avals = [graph.avals[v] for v in operation.outputs]
            found: Sequence[Operand] = builder.emit(
                operation.primitive, operation.params, operands, avals, operation.source
            )
        else:
            found = _Loop(builder, operation, operation.loop, dep.inside[operation.outputs[0]], params).emit(
                operands
            )
        env.update(zip(operation.outputs, found, strict=True))
    outputs = tuple(get(v) for v in graph.outputs)
    return Graph(tuple(builder.avals), inputs, tuple(builder.operations), outputs)


@dataclasses.dataclass(frozen=True)
class _Meeting:
    """A weight meeting data in the body: the operation, its operands outside of the loop where they are the same there."""

    operation: Operation
    y: int  #: the result in the new body
    added: int  #: the result with d added
    d: int
    shared: tuple[
        tuple[Operand, bool] | None, ...
    ]  #: per operand its outside and whether it has slices; None: data
    data: tuple[int, ...]  #: the other operands, in the new body


class _Loop:
    """One loop being rewritten: ``outer`` is the graph around it, ``inner`` its new body."""

    def __init__(
        self, outer: GraphBuilder, operation: Operation, loop: Loop, inside: Dependence, params: int
    ) -> None:
        bits = [inside.value[v] for v in loop.body.inputs]
        moving = [inside.derivative[v] for v in loop.body.inputs]
        self.outer, self.operation, self.loop = outer, operation, loop
        self.body = _rewritten(loop.body, bits, moving, params)
        self.dep = dependence_given(self.body, bits, moving)
        self.params = params
        self.inner = GraphBuilder()
        self.env: dict[int, int] = {}  # variables of the body in the new one
        self.outside: dict[int, Operand] = {}  # those that are known before the loop, there
        self.sliced: set[int] = set()  # of these the ones with a slice for each round
        self.held: dict[int, int] = {}  # those that derivatives do not pass, in the new body
        self.fixed: list[tuple[int, Operand]] = []
        self.slices: list[tuple[int, Operand]] = []
        self.meetings: list[_Meeting] = []

    def emit(self, operands: Sequence[Operand]) -> Sequence[Operand]:
        """Write the loop into the graph around it; returns its results there."""
        loop, body = self.loop, self.body
        middle, first_slice = loop.constants, loop.constants + loop.carried
        self.outside.update(zip(body.inputs[:middle], operands[:middle], strict=True))
        carried = [
            (self._enter(v), o)
            for v, o in zip(body.inputs[middle:first_slice], operands[middle:], strict=False)
        ]
        for v, o in zip(body.inputs[first_slice:], operands[first_slice : loop.operands], strict=True):
            if self._of_parameters(v):
                self.outside[v] = o
                self.sliced.add(v)
            else:
                self.slices.append((self._enter(v), o))
        for operation in body.operations:
            if not self._before(operation):
                self._in_round(operation)
        results = [self._get(v) for v in body.outputs]
        data = [v for meeting in self.meetings for v in meeting.data]
        inputs: list[tuple[int, Operand]] = [*self.fixed, *carried, *self.slices]
        given = [o for _, o in inputs]
        shape = (len(self.fixed), len(carried))
        if not self.meetings:
            return self._loop([v for v, _ in inputs], results, given, shape)
        plain = {m.added: m.y for m in self.meetings}
        found = self._loop(
            [v for v, _ in inputs],
            [plain.get(v, v) if isinstance(v, int) else v for v in (*results, *data)],
            given,
            shape,
            plain,
        )
        known = [self._held(v) for v in found[: len(results)]]
        met = iter(found[len(results) :])
        added = [(m.d, self._differential(m, met)) for m in self.meetings]
        return self._loop(
            [v for v, _ in (*inputs, *added)],
            results,
            [*given, *(o for _, o in added), *known],
            shape,
            known=len(known),
        )

    # -- the new body -------------------------------------------------------------------------------------------

    def _enter(self, v: int) -> int:
        self.env[v] = self.inner.variable(self.body.avals[v])
        return self.env[v]

    def _get(self, operand: Operand) -> Operand:
        """A value in the new body; one that is known before the loop enters it here."""
        if isinstance(operand, Constant):
            return operand
        if operand in self.env:
            return self.env[operand]
        if isinstance(outside := self.outside[operand], Constant):
            return outside
        enters = self.slices if operand in self.sliced else self.fixed
        enters.append((self._enter(operand), outside))
        return self.env[operand]

    def _of_parameters(self, v: int) -> bool:
        return bool(self.dep.value[v]) and not self.dep.value[v] & ~self.params

    def _before(self, operation: Operation) -> bool:
        """Compute an operation before the loop, if it is the same in every round or reads parameters alone."""
        variables = [v for v in operation.inputs if not isinstance(v, Constant)]
        if has_effects(operation) or not all(v in self.outside for v in variables):
            return False
        operands = [self.outside[v] if isinstance(v, int) else v for v in operation.inputs]
        sliced = [v in self.sliced for v in operation.inputs]
        if any(sliced):
            if not all(map(self._of_parameters, variables)) or not self._mappable(operation):
                return False
            found = self._all_rounds(operation, operands, sliced)
            self.sliced.update(operation.outputs)
        else:
            avals = [self.body.avals[v] for v in operation.outputs]
            found = self.outer.emit(
                operation.primitive, operation.params, operands, avals, operation.source, operation.loop
            )
        self.outside.update(zip(operation.outputs, found, strict=True))
        return True

    def _in_round(self, operation: Operation) -> None:
        weights = [k for k in range(len(operation.inputs)) if self._spreads(operation, k)]
        operands = [
            self._constant(v) if k in weights and isinstance(v, int) else self._get(v)
            for k, v in enumerate(operation.inputs)
        ]
        avals = [self.body.avals[v] for v in operation.outputs]
        found = self.inner.emit(
            operation.primitive, operation.params, operands, avals, operation.source, operation.loop
        )
        self.env.update(zip(operation.outputs, found, strict=True))
        if weights:
            self.env[operation.outputs[0]] = self._meet(operation, operands, found[0])

    def _spreads(self, operation: Operation, k: int) -> bool:
        """Whether an operand is a trained weight that makes a site of its own, and its operation can be taken out."""
        v = operation.inputs[k]
        if isinstance(v, Constant) or v not in self.outside or not self.dep.derivative[v]:
            return False
        return (
            self._of_parameters(v)
            and not weight_operation_at(self.body, operation, k).by_element
            and self._mappable(operation)
        )

    def _mappable(self, operation: Operation) -> bool:
        """Whether an operation can be done for many rounds at once; a weight at another stays in the loop."""
        avals = [self.body.aval(v) for v in operation.inputs]
        shapes = [jax.ShapeDtypeStruct((1, *a.shape), a.dtype) for a in avals]
        try:
            jax.eval_shape(jax.vmap(lambda *values: bind(operation, values)), *shapes)
        except NotImplementedError:
            return False
        return True

    def _constant(self, v: int) -> int:
        """A weight in the new body, held constant."""
        if v not in self.held:
            self.held[v] = self.inner.variable(self.body.avals[v])
            enters = self.slices if v in self.sliced else self.fixed
            enters.append((self.held[v], self._held(self.outside[v])))
        return self.held[v]

    def _meet(self, operation: Operation, operands: Sequence[Operand], y: int) -> int:
        def known(v: Operand) -> tuple[Operand, bool] | None:
            if isinstance(v, Constant):
                return v, False
            return (self.outside[v], v in self.sliced) if v in self.outside else None

        shared = tuple(map(known, operation.inputs))
        data = tuple(v for v, s in zip(operands, shared, strict=True) if s is None and isinstance(v, int))
        aval = self.inner.avals[y]
        d = self.inner.variable(aval)
        (added,) = self.inner.emit(lax.add_p, {}, [y, d], [aval], operation.source)
        self.meetings.append(_Meeting(operation, y, added, d, shared, data))
        return added

    # -- around it ----------------------------------------------------------------------------------------------

    def _loop(
        self,
        inputs: Sequence[int],
        results: Sequence[Operand],
        operands: Sequence[Operand],
        shape: tuple[int, int],
        plain: dict[int, int] | None = None,
        known: int = 0,
    ) -> list[int]:
        """Emit a loop over the new body; with ``plain`` nothing is added to what the weights make of their data."""
        operations: list[Operation] = []
        for o in self.inner.operations:
            if plain is not None and o.outputs[0] in plain:
                continue
            replaced = [(plain or {}).get(v, v) if isinstance(v, int) else v for v in o.inputs]
            operations.append(dataclasses.replace(o, inputs=tuple(replaced)))
        graph = Graph(tuple(self.inner.avals), tuple(inputs), tuple(operations), tuple(results))
        body = with_copies(simplified(graph), range(len(results)))
        loop = Loop(body, self.loop.length, self.loop.reverse, *shape, known)
        avals = [body.aval(v) for v in results]
        n = self.loop.carried
        stacked = [Aval((loop.length, *a.shape), a.dtype) for a in avals[n:]]
        return self.outer.emit(
            self.operation.primitive,
            self.operation.params,
            operands,
            [*avals[:n], *stacked],
            self.operation.source,
            loop,
        )

    def _held(self, operand: Operand) -> Operand:
        """A value that no derivative passes."""
        if not self.outer.aval(operand).differentiable:
            return operand
        return self.outer.call(lax.stop_gradient, [operand], self.operation.source)[0]

    def _differential(self, meeting: _Meeting, met: Any) -> Operand:
        """Zero for every round, with the derivative of what the weight makes of its data in that round."""
        operands: list[Operand] = []
        sliced = []
        for outside in meeting.shared:
            operands.append(self._held(next(met)) if outside is None else outside[0])
            sliced.append(outside is None or outside[1])
        y = self._all_rounds(meeting.operation, operands, sliced)
        return self.outer.call(differential, y[:1], meeting.operation.source)[0]

    def _all_rounds(
        self, operation: Operation, operands: Sequence[Operand], sliced: Sequence[bool]
    ) -> list[Operand]:
        """An operation for all rounds at once."""
        axes = [0 if s else None for s in sliced]
        fn = jax.vmap(lambda *values: bind(operation, values), in_axes=axes)
        return self.outer.call(fn, operands, operation.source)


@jax.custom_jvp
def differential(y: Array) -> Array:
    """Zero, with the derivative of ``y``."""
    return jnp.zeros_like(y)


@differential.defjvp
def _differential_jvp(primals: Any, tangents: Any) -> Any:
    return jnp.zeros_like(primals[0]), tangents[0]
