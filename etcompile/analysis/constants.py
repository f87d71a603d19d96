"""Relations whose response is constant in time: where D and f are numbers that the model alone fixes.

D and f are products along paths from old states and from y to the new states. A factor of such a product, the derivative of
one operation, is constant if it reads nothing but constants of the model: no state, no input, and no parameter either, since
learning changes parameters between steps. That is read off the operation's own cotangent map, so it holds for any
operation, and the walk ends at the first that reads anything else.

The numbers are then computed once. Elements of y with the same D, and the same f up to a factor, form a class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.analysis.dependence import Dependence, dependence
from etcompile.analysis.groups import HiddenGroup
from etcompile.analysis.relations import Relation
from etcompile.analysis.sites import SplitStep
from etcompile.frontend.jaxpr import Constant, Graph, Operand, bind, has_effects, vjp_graph
from etcompile.frontend.loops import Use, within
from etcompile.frontend.step_model import StepModel
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


def find_constant_responses(
    model: StepModel,
    split: SplitStep,
    groups: Sequence[HiddenGroup],
    relations: Sequence[Relation],
    uses_cut: Mapping[int, Mapping[Use, Array]],
    dep: Dependence,
) -> dict[str, ConstantResponses]:
    """For each relation whose f is constant in time its classes; D is among them where it is constant as well."""
    walk = _Walk(model, split, groups, uses_cut, dep)
    relations = [r for r in relations if walk.of_one_dtype(r) and walk.immediate(r)]
    if not relations:
        return {}
    fading = {name: walk.transition(walk.groups[name]) for name in {r.group: None for r in relations}}
    with jax.ensure_compile_time_eval():
        known = jax.device_get(jax.jit(walk.values)())
    found = {r.name: _responses(walk, r, fading[r.group], known) for r in relations}
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
    ) -> None:
        self.model, self.body, self.uses_cut, self.frozen = model, split.body, uses_cut, split.frozen
        self.groups = {g.name: g for g in groups}
        self.sites = {s.name: s for s in split.sites}
        self.fixed = [not bits for bits in dep.value]
        for operation in self.body.operations:
            if has_effects(operation) or not all(map(self._known, operation.inputs)):
                for v in operation.outputs:
                    self.fixed[v] = False
        self.made_by = {v: o for o in self.body.operations for v in o.outputs}
        self.read: dict[int, list[bool]] = {}
        self.paths: dict[tuple[int, int], list[_Pull] | None] = {}

    def of_one_dtype(self, relation: Relation) -> bool:
        """Whether a filtered x has the precision of the trace that it stands for."""
        site = self.sites[relation.site]
        dtypes = {self.model.states[s].aval.dtype for s in self.groups[relation.group].states}
        dtypes |= {self.body.avals[site.y].dtype, site.does.x_dtype}
        return len(dtypes) == 1 and bool(jnp.issubdtype(dtypes.pop(), jnp.floating))

    def transition(self, group: HiddenGroup) -> bool:
        """Whether every entry of D is constant."""
        variables = self.model.state_vars
        return all(
            self.path(new, variables[old]) is not None
            for row, new in zip(group.pattern, group.states, strict=True)
            for reaches, old in zip(row, group.states, strict=True)
            if reaches
        )

    def immediate(self, relation: Relation) -> bool:
        """Whether every entry of f is constant."""
        y = self.sites[relation.site].y
        states = self.groups[relation.group].states
        return all(
            self.path(s, y) is not None for s, reached in zip(states, relation.rows, strict=True) if reached
        )

    def path(self, state: int, target: int) -> list[_Pull] | None:
        """The local paths from a variable to a new state, last operation first; None unless constant."""
        key = state, target
        if key not in self.paths:
            self.paths[key] = self._path(state, target)
        return self.paths[key]

    def _path(self, state: int, target: int) -> list[_Pull] | None:
        new = self.model.new_state_vars[state]
        cuts = self.uses_cut[state]
        reach = self._reach(target)
        live, pulls = {new}, []
        for number in range(len(self.body.operations) - 1, -1, -1):
            operation = self.body.operations[number]
            if not live.intersection(operation.outputs) or operation.name == "stop_gradient":
                continue
            moving = tuple(
                k
                for k, v in enumerate(operation.inputs)
                if not isinstance(v, Constant)
                and reach[v]
                and (number, k) not in self.frozen
                and not ((number, k) in cuts and cuts[number, k].all())
            )
            if not moving:
                continue
            if within(cuts, number):
                return None  # cut in some of the uses inside of a loop
            varying = self._varying(number)
            if any(varying[k] for k in moving) or len(pulls) == LONGEST_PATH:
                return None
            pulls.append(_Pull(number, moving))
            live.update(v for k in moving if isinstance(v := operation.inputs[k], int))
        return pulls

    def _reach(self, target: int) -> list[bool]:
        """Variables through which the target acts, itself included."""
        reach = [v == target for v in range(len(self.body.avals))]
        for number, operation in enumerate(self.body.operations):
            if any(
                not isinstance(v, Constant) and reach[v] and (number, k) not in self.frozen
                for k, v in enumerate(operation.inputs)
            ):
                for v in operation.outputs:
                    reach[v] = reach[v] or self.body.avals[v].differentiable
        return reach

    def _varying(self, number: int) -> list[bool]:
        """For each operand of an operation, whether its cotangent reads anything that is not constant."""
        if number not in self.read:
            operation = self.body.operations[number]
            live = [k for k, v in enumerate(operation.inputs) if self.body.aval(v).differentiable]
            graph = self._cotangents(number, live)
            varying = [True] * len(operation.inputs)
            if graph is not None:
                reads = dependence(graph).value
                for k, found in zip(live, graph.outputs, strict=True):
                    bits = 0 if isinstance(found, Constant) else reads[found]
                    varying[k] = any(
                        bits >> j & 1 and not self._known(v) for j, v in enumerate(operation.inputs)
                    )
            self.read[number] = varying
        return self.read[number]

    def _cotangents(self, number: int, moving: Sequence[int]) -> Graph | None:
        """The map from cotangents of an operation's results to those of some operands."""
        operation = self.body.operations[number]
        return vjp_graph(operation, [self.body.aval(v) for v in operation.inputs], moving)

    def _known(self, operand: Operand) -> bool:
        return isinstance(operand, Constant) or self.fixed[operand]

    # -- numbers ------------------------------------------------------------------------------------------------

    def values(self) -> dict[tuple[int, int], Array]:
        """The derivative along each constant path: ones pulled back from the new state."""
        known: dict[int, Array] = {}

        def get(operand: Operand) -> Array:
            if isinstance(operand, Constant):
                return operand.value
            if operand not in known:
                operation = self.made_by[operand]
                results = bind(operation, [get(v) for v in operation.inputs])
                known.update(zip(operation.outputs, results, strict=True))
            return known[operand]

        return {key: self._pulled(*key, pulls, get) for key, pulls in self.paths.items() if pulls is not None}

    def _pulled(self, state: int, target: int, pulls: list[_Pull], get: Any) -> Array:
        new = self.model.new_state_vars[state]
        cuts = self.uses_cut[state]
        avals = self.body.avals
        cotangents = {new: jnp.ones(avals[new].shape, avals[new].dtype)}
        for pull in pulls:
            operation = self.body.operations[pull.operation]
            primals = [
                get(v) if self._known(v) else None for v in operation.inputs
            ]  # the others are not read
            given = [
                cotangents[v] if v in cotangents else jnp.zeros(avals[v].shape, avals[v].dtype)
                for v in operation.outputs
                if avals[v].differentiable
            ]
            graph = self._cotangents(pull.operation, pull.moving)
            assert graph is not None
            for k, found in zip(pull.moving, graph.evaluate(*primals, *given), strict=True):
                mask = cuts.get((pull.operation, k))
                found = found if mask is None else jnp.where(mask, jnp.zeros((), found.dtype), found)
                v = operation.inputs[k]
                assert isinstance(v, int)
                cotangents[v] = cotangents[v] + found if v in cotangents else found
        aval = avals[target]
        return cotangents.get(target, jnp.zeros(aval.shape, aval.dtype))


# ----------------------------------------------------------------------------------------------------------------
# classes


def _responses(
    walk: _Walk, relation: Relation, constant_decay: bool, known: Mapping[tuple[int, int], Array]
) -> ConstantResponses | None:
    group = walk.groups[relation.group]
    n, y = len(group.states), walk.sites[relation.site].y
    parts = [_immediate(relation, k, known.get((s, y))) for k, s in enumerate(group.states)]
    if constant_decay:
        olds = [walk.model.state_vars[s] for s in group.states]
        for k, s in enumerate(group.states):
            for j, old in enumerate(olds):
                value = known[s, old] if group.pattern[k][j] else None
                parts.append(_transition(group, relation, k, j, value))
    table = _squeezed(np.stack(parts).astype(np.float64))
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
    lines, place = np.unique(table[acts], axis=0, return_inverse=True)
    if len(lines) > MOST_CLASSES:
        return None
    number = np.full(acts.shape, -1)
    number[acts] = place.ravel()
    classes = tuple(
        Response(
            _short(line[:n], dtype),
            tuple(_short(row, dtype) for row in line[n:].reshape(n, n)) if constant_decay else None,
        )
        for line in lines
    )
    scale = np.where(acts, scale, 0).astype(dtype)
    return ConstantResponses(classes, number.reshape(shape), scale.reshape(shape))


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


def _squeezed(table: Array) -> Array:
    """The table with size 1 on every axis, but the first, along which nothing differs."""
    for axis in range(1, table.ndim):
        start = table.take([0], axis)
        if (table == start).all():
            table = start
    return table
