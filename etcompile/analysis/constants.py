"""Relations whose response is constant in time: where D and f are numbers that the model alone fixes.

D and f are products along paths from old states and from y to the new states. A factor of such a product, the derivative of
one operation, is constant if it reads nothing but constants of the model: no state, no input, and no parameter either, since
learning changes parameters between steps. That is read off the operation's own cotangent map, so it holds for any
operation, and the walk ends at the first that reads anything else.

The numbers are then computed once. Elements of y with the same D, and the same f up to a factor, form a class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.analysis.dependence import Dependence, dependence
from etcompile.analysis.groups import HiddenGroup
from etcompile.analysis.relations import Relation
from etcompile.analysis.sites import SplitStep
from etcompile.frontend.jaxpr import (
    Constant,
    Graph,
    Operand,
    Operation,
    computed,
    has_effects,
    is_traced,
    read,
    vjp_graph,
)
from etcompile.frontend.loops import Use, within
from etcompile.frontend.step_model import StepModel
from etcompile.frontend.walks import BackwardWalk
from etcompile.ir.header import Response

__all__ = ["ConstantResponses", "find_constant_responses"]

Array = Any

#: Classes that are worth keeping; a unit that has a decay of its own gains nothing from sharing a filter.
MOST_CLASSES = 16
#: Operations between y or an old state and a new state that are looked at.
LONGEST_PATH = 256


@dataclasses.dataclass(frozen=True, eq=False)
class ConstantResponses:
    """What a relation adds to its trace and how that fades, where both are constant.

    Attributes
    ----------
    classes : tuple of Response
    number : array of int
        For each element of y's span its class, -1 where f is zero. Axes along which nothing differs have size 1.
    scale : array
        The factor between f and its class's ``inject``, of the same shape.
    """

    classes: tuple[Response, ...]
    number: Array
    scale: Array


@dataclasses.dataclass(frozen=True)
class _Pull:
    """One operation on the path, and the operands to which the path goes on."""

    operation: int
    moving: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Entries:
    """Which entries of f, and of D, are taken as constant; ``decay`` is None where nothing of D is."""

    inject: tuple[bool, ...]
    decay: tuple[tuple[bool, ...], ...] | None


#: Operations, last one first, with the uses to follow, (operand, variable); and which starts reach a variable, as bits.
_Region = tuple[list[tuple[int, tuple[tuple[int, int], ...]]], dict[int, int]]


def find_constant_responses(
    model: StepModel,
    split: SplitStep,
    groups: Sequence[HiddenGroup],
    relations: Sequence[Relation],
    uses_cut: Mapping[int, Mapping[Use, Array]],
    dep: Dependence,
) -> dict[str, ConstantResponses]:
    """For each relation whose f is constant in time its classes; D is among them where it is constant as well.

    So are rows of D and f that are constant beside others that are not. Where an element of y reaches many positions rows stay
    together: all credits of a chunk are then pulled through the step in one loop, which is for whole traces.
    """
    walk = _Walk(model, split, groups, uses_cut, dep, by_rows=all(r.fan_out is None for r in relations))
    relations = [r for r in relations if r.fan_out is None and walk.of_one_dtype(r)]
    wanted = {r.name: (r, entries) for r in relations if (entries := walk.entries(r))}
    if not wanted:
        return {}
    known = jax.device_get(walk.values())
    found = {
        name: next(filter(None, (_responses(walk, r, some, known) for some in entries)), None)
        for name, (r, entries) in wanted.items()
    }
    return {name: responses for name, responses in found.items() if responses is not None}


class _Walk:
    """Paths along which derivatives are constant."""

    def __init__(
        self,
        model: StepModel,
        split: SplitStep,
        groups: Sequence[HiddenGroup],
        uses_cut: Mapping[int, Mapping[Use, Array]],
        dep: Dependence,
        by_rows: bool,
    ) -> None:
        self.by_rows = by_rows
        self.model, self.body, self.uses_cut, self.frozen = model, split.body, uses_cut, split.frozen
        self.groups = {g.name: g for g in groups}
        self.sites = {s.name: s for s in split.sites}
        self.fixed = [not bits for bits in dep.value]
        for operation in self.body.operations:
            if has_effects(operation) or not all(map(self.known, operation.inputs)):
                for v in operation.outputs:
                    self.fixed[v] = False
        #: A bit for each variable from which a path may start: old states, and results of sites.
        starts = dict.fromkeys((*model.state_vars, *(s.y for s in split.sites)))
        self.bits = {v: 1 << bit for bit, v in enumerate(starts)}
        self.regions: dict[int, _Region] = {}
        self.reads: dict[int, tuple[Graph, Sequence[int]]] = {}
        self.read: dict[int, list[bool]] = {}
        self.paths: dict[tuple[int, int], list[_Pull] | None] = {}

    def of_one_dtype(self, relation: Relation) -> bool:
        """Whether a filtered x has the precision of the trace that it stands for."""
        site = self.sites[relation.site]
        dtypes = {self.model.states[s].aval.dtype for s in self.groups[relation.group].states}
        dtypes |= {self.body.avals[site.y].dtype, site.does.x_dtype}
        return len(dtypes) == 1 and bool(jnp.issubdtype(dtypes.pop(), jnp.floating))

    def entries(self, relation: Relation) -> list[_Entries]:
        """What is constant of a relation's response, the most useful first; nothing where it is of no use."""
        group = self.groups[relation.group]
        inject = self._immediate(relation)
        whole = (True,) * len(inject)
        if inject != whole and not self.by_rows:
            return []
        decay = self._transition(group)
        if inject == whole and all(map(all, decay)):
            return [_Entries(inject, decay)]
        found = []
        if self.by_rows and any(closed := _closed_rows(group, relation, inject, decay)):
            of_closed = tuple(
                tuple(known and (closed[j] or not reaches) for j, (known, reaches) in enumerate(line))
                for line in map(zip, decay, group.pattern)
            )
            found.append(_Entries(inject, of_closed))
        return [*found, _Entries(inject, None)] if inject == whole else found

    def _transition(self, group: HiddenGroup) -> tuple[tuple[bool, ...], ...]:
        """Which entries of D are constant."""
        variables = self.model.state_vars
        return tuple(
            tuple(
                not reaches or self.path(new, variables[old]) is not None
                for reaches, old in zip(row, group.states, strict=True)
            )
            for row, new in zip(group.pattern, group.states, strict=True)
        )

    def _immediate(self, relation: Relation) -> tuple[bool, ...]:
        """Which entries of f are constant."""
        y = self.sites[relation.site].y
        states = self.groups[relation.group].states
        return tuple(
            not reached or self.path(s, y) is not None
            for s, reached in zip(states, relation.rows, strict=True)
        )

    def path(self, state: int, target: int) -> list[_Pull] | None:
        """The local paths from a variable to a new state, last operation first; None unless constant."""
        key = state, target
        if key not in self.paths:
            self.paths[key] = self._path(state, target)
        return self.paths[key]

    def _path(self, state: int, target: int) -> list[_Pull] | None:
        bit = self.bits[target]
        uses, reached = self._region(state)
        if not reached.get(self.model.new_state_vars[state], 0) & bit:
            return []
        pulls: list[_Pull] = []
        cuts = self.uses_cut[state]
        for number, followed in uses:
            operation = self.body.operations[number]
            moving = tuple(k for k, v in followed if reached.get(v, 0) & bit)
            if not moving:
                continue
            if operation.loop is not None and within(cuts, number):
                return None  # cut in some of the uses inside of a loop
            varying = self._varying(number)
            if any(varying[k] for k in moving) or len(pulls) == LONGEST_PATH:
                return None
            pulls.append(_Pull(number, moving))
        return pulls

    def _region(self, state: int) -> _Region:
        """What leads to a new state without a cut; and for each variable there, which targets reach it."""
        if state not in self.regions:
            self.regions[state] = self._found_region(state)
        return self.regions[state]

    def _found_region(self, state: int) -> _Region:
        body, cuts = self.body, self.uses_cut[state]
        new = self.model.new_state_vars[state]
        uses: list[tuple[int, tuple[tuple[int, int], ...]]] = []
        walk = BackwardWalk(body, [new])
        for number in walk:
            operation = body.operations[number]
            if operation.name == "stop_gradient":
                continue
            followed = tuple(
                (k, v)
                for k, v in enumerate(operation.inputs)
                if not isinstance(v, Constant)
                and (number, k) not in self.frozen
                and not ((number, k) in cuts and cuts[number, k].all())
            )
            uses.append((number, followed))
            for _, v in followed:
                walk.add(v)
        reached = {v: self.bits[v] for _, followed in uses for _, v in followed if v in self.bits}
        for number, followed in reversed(uses):
            found = reduce(or_, [reached.get(v, 0) for _, v in followed], 0)
            for v in body.operations[number].outputs if found else ():
                if body.avals[v].differentiable:
                    reached[v] = reached.get(v, 0) | found
        return uses, reached

    def _varying(self, number: int) -> list[bool]:
        """For each operand of an operation, whether its cotangent reads anything that is not constant."""
        if number not in self.read:
            operation = self.body.operations[number]
            live = [k for k, v in enumerate(operation.inputs) if self.body.aval(v).differentiable]
            graph = self.cotangents(number, live)
            varying = [True] * len(operation.inputs)
            if graph is not None:
                if id(graph) not in self.reads:  # operations that are equal have one graph
                    self.reads[id(graph)] = graph, dependence(graph).value
                reads = self.reads[id(graph)][1]
                for k, found in zip(live, graph.outputs, strict=True):
                    bits = 0 if isinstance(found, Constant) else reads[found]
                    varying[k] = any(
                        bits >> j & 1 and not self.known(v) for j, v in enumerate(operation.inputs)
                    )
            self.read[number] = varying
        return self.read[number]

    def cotangents(self, number: int, moving: Sequence[int]) -> Graph | None:
        """The map from cotangents of an operation's results to those of some operands."""
        operation = self.body.operations[number]
        return vjp_graph(operation, [self.body.aval(v) for v in operation.inputs], moving)

    def known(self, operand: Operand) -> bool:
        return isinstance(operand, Constant) or self.fixed[operand]

    def values(self) -> dict[tuple[int, int], Array]:
        """The derivative along each constant path: ones pulled back from the new state."""
        pulled: dict[int, dict[int, set[int]]] = {}
        for (state, _), pulls in self.paths.items():
            moving = pulled.setdefault(state, {})
            for pull in pulls or ():
                moving.setdefault(pull.operation, set()).update(pull.moving)
        numbers = _Numbers(self)
        found = {state: numbers.pulled(state, moving) for state, moving in pulled.items()}
        return {
            (state, target): found[state].get(target, numbers.zeros(target))
            for (state, target), pulls in self.paths.items()
            if pulls is not None
        }


class _Numbers:
    """Derivatives along constant paths as numbers. What is computed from the same numbers is computed once."""

    def __init__(self, walk: _Walk) -> None:
        self.walk, self.body = walk, walk.body
        self.known: dict[int, Array] = {}
        self.made: dict[Any, tuple[Any, Any]] = {}

    def pulled(self, state: int, moving: Mapping[int, set[int]]) -> dict[int, Array]:
        """Cotangents of all variables on the way from a new state; ``moving``: through which operands of which operations."""
        walk, avals = self.walk, self.body.avals
        new, cuts = walk.model.new_state_vars[state], walk.uses_cut[state]
        cotangents = {
            new: self.once("ones", (), avals[new], lambda: np.ones(avals[new].shape, avals[new].dtype))
        }
        for number in sorted(moving, reverse=True):
            operation, operands = self.body.operations[number], sorted(moving[number])
            primals = [
                self.value(v) if walk.known(v) else None for v in operation.inputs
            ]  # the others are not read
            given = [cotangents.get(v, self.zeros(v)) for v in operation.outputs if avals[v].differentiable]
            graph = walk.cotangents(number, operands)
            assert graph is not None
            found = self.once(
                "pull", (graph, *primals, *given), (), lambda g=graph, v=(*primals, *given): _evaluated(g, v)
            )
            for k, cotangent in zip(operands, found, strict=True):
                mask = cuts.get((number, k))
                if mask is not None:
                    cotangent = np.where(mask, np.zeros((), cotangent.dtype), cotangent)
                v = operation.inputs[k]
                assert isinstance(v, int)
                if v in cotangents:
                    before = cotangents[v]
                    cotangent = self.once(
                        "sum", (before, cotangent), (), lambda a=before, b=cotangent: np.add(a, b)
                    )
                cotangents[v] = cotangent
        return cotangents

    def once(self, what: str, of: tuple[Any, ...], key: Any, make: Callable[[], Any]) -> Any:
        """``make()``; of the same objects the same."""
        at = what, tuple(map(id, of)), key
        if at not in self.made:
            self.made[at] = of, make()  # an object that is kept is the only one with its id
        return self.made[at][1]

    def zeros(self, variable: int) -> Array:
        aval = self.body.avals[variable]
        return self.once("zeros", (), aval, lambda: np.zeros(aval.shape, aval.dtype))

    def value(self, operand: Operand) -> Array:
        """What a constant operand is."""
        if isinstance(operand, Constant):
            value, aval = operand.value, operand.aval
            if is_traced(value) or aval.size > 1 or not aval.differentiable:
                return value
            return self.once("number", (), (aval, np.asarray(value).tobytes()), lambda: value)
        if operand not in self.known:
            operation = self.body.operations[self.body.made_by[operand]]
            results = _applied(self.body, operation, [self.value(v) for v in operation.inputs])
            self.known.update(zip(operation.outputs, results, strict=True))
        return self.known[operand]


def _evaluated(graph: Graph, args: Sequence[Any]) -> list[Any]:
    """A graph on known values, operation by operation."""
    env = dict(zip(graph.inputs, args, strict=True))
    for operation in graph.operations:
        results = _applied(graph, operation, [read(env, v) for v in operation.inputs])
        env.update(zip(operation.outputs, results, strict=True))
    return [read(env, v) for v in graph.outputs]


def _applied(graph: Graph, operation: Operation, values: Sequence[Any]) -> list[Any]:
    """The results of an operation; of any size by numpy, which is where they are looked at."""
    return computed(operation, values, [graph.avals[v] for v in operation.outputs], limit=None)


# ----------------------------------------------------------------------------------------------------------------
# classes


def _closed_rows(
    group: HiddenGroup, relation: Relation, inject: Sequence[bool], decay: Sequence[Sequence[bool]]
) -> tuple[bool, ...]:
    """The rows of a trace that are filters by themselves: constant, and reading no others; of those that can be nonzero."""
    states = range(len(inject))
    closed = {k for k in states if inject[k] and all(decay[k])}
    while len(closed) != len(
        closed := {k for k in closed if all(j in closed for j in states if group.pattern[k][j])}
    ):
        pass
    live = {k for k in states if relation.rows[k]}
    while len(live) != len(live := live | {k for k in states if any(group.pattern[k][j] for j in live)}):
        pass
    return tuple(k in closed and k in live for k in states)


def _responses(
    walk: _Walk, relation: Relation, entries: _Entries, known: Mapping[tuple[int, int], Array]
) -> ConstantResponses | None:
    group = walk.groups[relation.group]
    n, y = len(group.states), walk.sites[relation.site].y
    parts = [
        _immediate(relation, k, known.get((s, y)) if entries.inject[k] else None)
        for k, s in enumerate(group.states)
    ]
    for k, line in enumerate(entries.decay or ()):
        for j, old in enumerate(group.states):
            value = (
                known[group.states[k], walk.model.state_vars[old]]
                if line[j] and group.pattern[k][j]
                else None
            )
            parts.append(_transition(group, relation, k, j, value))
    table = _table(parts)
    shape, table = table.shape[1:], table.reshape(table.shape[0], -1).T  # one line per element
    if not np.isfinite(table).all():
        return None
    acts = (table[:, :n] != 0).any(axis=1)
    first = np.argmax(table[:, :n] != 0, axis=1)
    scale = np.where(acts, np.take_along_axis(table[:, :n], first[:, None], 1)[:, 0], 1)
    dtype = walk.body.avals[y].dtype
    table = np.concatenate([table[:, :n] / scale[:, None], table[:, n:]], axis=1).astype(dtype)
    if not acts.any():
        return None
    table = table.astype(np.float64) + 0.0  # -0.0 is 0.0
    found = _lines(table, acts)
    if found is None:
        return None
    lines, number = found
    classes = tuple(_response(line, entries, dtype) for line in lines)
    scale = np.where(acts, scale, 0).astype(dtype)
    return ConstantResponses(classes, number.reshape(shape), scale.reshape(shape))


def _response(line: Array, entries: _Entries, dtype: Any) -> Response:
    """One line of the table as f and D, None where they are not constant."""

    def shown(values: Array, known: Sequence[bool]) -> tuple[float | None, ...]:
        return tuple(v if k else None for v, k in zip(_short(values, dtype), known, strict=True))

    n = len(entries.inject)
    if entries.decay is None:
        return Response(shown(line[:n], entries.inject), None)
    rows = zip(line[n:].reshape(n, n), entries.decay, strict=True)
    return Response(shown(line[:n], entries.inject), tuple(shown(row, known) for row, known in rows))


def _lines(table: Array, acts: Array) -> tuple[Array, Array] | None:
    """The different lines of a table in order, and for each line that ``acts`` which it is (-1: it does not); None: too many.

    Lines are picked one after the other, since few are expected among very many.
    """
    number = np.where(acts, -2, -1)
    found: list[Array] = []
    while (number == -2).any():
        if len(found) == MOST_CLASSES:
            return None
        line = table[np.argmax(number == -2)]
        number[(number == -2) & (table == line).all(axis=1)] = len(found)
        found.append(line)
    order = np.lexsort(np.stack(found).T[::-1])
    rank = np.argsort(order)
    return np.stack(found)[order], np.where(number < 0, number, rank[number])


def _short(values: Array, dtype: Any) -> tuple[float, ...]:
    """The shortest decimal numbers that are these values in this precision."""
    return tuple(float(str(v)) for v in values.astype(dtype))


def _immediate(relation: Relation, k: int, value: Array | None) -> Array:
    """Row k of f over the window."""
    if not relation.rows[k] or value is None:
        return np.zeros(relation.shape)
    window = np.asarray(value)[relation.slices]
    return np.where(relation.masks[k], window, 0) if k in relation.masks else window


def _transition(group: HiddenGroup, relation: Relation, k: int, j: int, value: Array | None) -> Array:
    """Entry (k, j) of D at the position of each element of the window."""
    if value is None:
        return np.zeros(relation.shape)
    elements = group.elements(j)
    there = np.where(elements >= 0, np.asarray(value).ravel()[np.maximum(elements, 0)], 0)
    mask = group.masks.get((k, j))
    there = there if mask is None else np.where(mask.ravel(), there, 0)
    return np.where(relation.position >= 0, there[np.maximum(relation.position, 0)], 0)


def _table(parts: Sequence[Array]) -> Array:
    """The parts side by side, with size 1 on every axis along which nothing differs."""
    small = [_squeezed(part.astype(np.float64)) for part in parts]
    return np.stack(np.broadcast_arrays(*small))


def _squeezed(table: Array) -> Array:
    """The table with size 1 on every axis along which nothing differs."""
    for axis in range(table.ndim):
        start = table.take([0], axis)
        if (table == start).all():
            table = start
    return table
