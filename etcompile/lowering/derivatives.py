"""The model's side of a program: D, f and x of one step, and with a loss L, the bypass and the one-step credits.

Values that belong to a group are tuples with one entry per hidden state, transitions tuples of tuples; ``None`` stands
for an entry that is zero for every input.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.analysis.analysis import Analysis
from etcompile.analysis.examples import Examples, find_examples
from etcompile.analysis.groups import HiddenGroup
from etcompile.analysis.relations import Relation
from etcompile.analysis.visible import Visible, visible_of
from etcompile.frontend.jaxpr import Constant, calls_out, has_effects
from etcompile.lowering.geometry import TraceGeometry, trace_geometry
from etcompile.lowering.places import added_at, as_places, taken
from etcompile.lowering.pushed import PushedTransition, by_cuts
from etcompile.lowering.tape import Tape
from etcompile.sites.operation import WeightOperation

__all__ = ["LossDerivatives", "LoweredModel", "StepDerivatives"]

Array = Any
Row = tuple[Array | None, ...]


class LoweredModel:
    """An analysis with the array geometry of its sites and relations; shared by every step.

    ``divided``: arrays are split over devices. ``unwritten``: groups whose transition is pushed through the step, beside those
    of which it has to be.
    """

    def __init__(self, analysis: Analysis, divided: bool = False) -> None:
        self.analysis = analysis
        self.divided = divided
        self.sites: dict[str, WeightOperation] = {s.name: s.does for s in analysis.sites}
        self.traces: dict[str, TraceGeometry] = {
            r.name: trace_geometry(analysis, r, divided) for r in analysis.relations
        }
        self.frozen = analysis.split.frozen
        self.unwritten: frozenset[str] = frozenset()
        self._visible: dict[str, tuple[Visible, ...]] = {}
        self.patterns: dict[Any, Any] = {}

    def pushing(self, groups: frozenset[str]) -> LoweredModel:
        """The same model, with the transitions of these groups not written down."""
        other = copy.copy(self)
        other.unwritten = groups
        return other

    @cached_property
    def batch(self) -> Examples:
        """The example axis."""
        return find_examples(self.analysis)

    @property
    def examples(self) -> int | None:
        """Size of the example axis, or None where the step is one example."""
        return self.batch.size

    def rows_of(self, group: str, values: Sequence[Array | None]) -> Row:
        """Values of a group's states as rows over its positions."""
        found = self.analysis.group(group)
        return tuple(None if v is None else _at_positions(found, k, v, None) for k, v in enumerate(values))

    def credits_of(self, group: str, cotangents: Sequence[Array | None]) -> Row:
        """Cotangents of a group's states as rows over its positions, each counted once."""
        counted = self.analysis.group(group).counted
        rows = self.rows_of(group, cotangents)
        return tuple(
            row if row is None or k not in counted else jnp.where(counted[k], row, jnp.zeros((), row.dtype))
            for k, row in enumerate(rows)
        )

    def visible(self, group: str) -> tuple[Visible, ...]:
        """What a group shows to the rest of the network."""
        if group not in self._visible:
            self._visible[group] = visible_of(self.analysis, self.analysis.group(group))
        return self._visible[group]

    @property
    def weight_vars(self) -> tuple[int, ...]:
        return self.analysis.split.weights

    def hoist(self, params: list[Array]) -> list[Array]:
        """Effective weights from raw parameters."""
        return self.analysis.split.hoisted.evaluate(*params)

    def unhoist(self, params: list[Array], gradients: Mapping[str, Array]) -> list[Array]:
        """Gradients of the raw parameters from gradients of the sites' effective weights."""
        analysis = self.analysis
        moving = [k for k, leaf in enumerate(analysis.model.params) if leaf.aval.differentiable]
        live = [k for k, v in enumerate(self.weight_vars) if analysis.split.body.avals[v].differentiable]

        def fn(moved: list[Array]) -> list[Array]:
            full = list(params)
            for k, v in zip(moving, moved, strict=True):
                full[k] = v
            weights = self.hoist(full)
            return [weights[k] for k in live]

        found: dict[int, list[Array]] = {}
        for site in analysis.sites:
            if gradients.get(site.name) is not None:
                found.setdefault(site.weight, []).append(gradients[site.name])
        weights, pull = jax.vjp(fn, [params[k] for k in moving])
        cotangents = []
        for k, weight in zip(live, weights, strict=True):
            total = sum(found.get(self.weight_vars[k], ()), jnp.zeros_like(weight))
            cotangents.append(total.astype(weight.dtype))  # sums over steps may be wider
        (pulled,) = pull(cotangents)
        result = [jnp.zeros_like(p) for p in params]
        for k, v in zip(moving, pulled, strict=True):
            result[k] = v
        return result

    def step(
        self,
        weights: list[Array],
        states: list[Array],
        inputs: list[Array],
        known: Mapping[int, Array] | None = None,
        quiet: bool = False,
    ) -> StepDerivatives:
        """One step; ``known`` are variables of the body that were computed already; ``quiet`` as in :class:`Tape`."""
        body = self.analysis.split.body
        return StepDerivatives(self, Tape(body, [*weights, *states, *inputs], self.frozen, known, quiet))

    def one_of_many(
        self, weights: list[Array], states: list[Array], inputs: list[Array], known: Mapping[int, Array]
    ) -> StepDerivatives:
        """One of many steps with the same weights, after they were run: it does nothing beside its results again."""
        body = self.analysis.split.body
        tape = Tape(body, [*weights, *states, *inputs], self.frozen, known, quiet=True, parts=True)
        return StepDerivatives(self, tape)

    @cached_property
    def effects(self) -> tuple[int, ...] | None:
        """Results that a step gets from outside; None where it does nothing beside its results."""
        found = [operation for operation in self.analysis.split.body.operations if has_effects(operation)]
        return tuple(v for op in found if calls_out(op) for v in op.outputs) if found else None

    def perform(
        self, weights: list[Array], states: list[Array], inputs: list[Array]
    ) -> dict[int, Array] | None:
        """Do what a step does beside its results, once, and return the results of the operations that do it.

        The step can then be run quietly, under any transformation. None where it does nothing else.
        """
        if self.effects is None:
            return None
        body = self.analysis.split.body
        fixed = jax.tree.map(jax.lax.stop_gradient, [*weights, *states, *inputs])
        tape = Tape(body, fixed, self.frozen)
        return {v: tape.values[v] for v in self.effects}


class StepDerivatives:
    """One executed step with its local derivatives."""

    def __init__(self, model: LoweredModel, tape: Tape) -> None:
        self.model = model
        self.tape = tape
        self._rows: dict[int, dict[int, Array]] = {}

    @cached_property
    def outputs(self) -> list[Array]:
        return [self.tape.read(v) for v in self.model.analysis.model.output_vars]

    @cached_property
    def new_states(self) -> list[Array]:
        return [self.tape.read(v) for v in self.model.analysis.model.new_state_vars]

    def presynaptic(self, site: str) -> tuple[Array, ...]:
        return self.model.sites[site].presynaptic(self.tape.values)

    def transition(self, name: str) -> tuple[Row, ...] | PushedTransition:
        """D of a group: per new state a row over old states, each an array over positions or None."""
        analysis = self.model.analysis
        group = analysis.group(name)
        if group.pushed or name in self.model.unwritten:
            return PushedTransition(self, group)
        rows = []
        forwards = {j: self._of_shared(group, j) for j in sorted({j for _, j in group.shared})}
        for k in range(len(group.states)):
            found = self._local(group, k) if any(group.pattern[k]) else {}
            row: list[Array | None] = []
            for j, old in enumerate(group.states):
                if (k, j) in group.shared:
                    row.append(forwards[j][k])
                    continue
                cotangent = found.get(analysis.model.state_vars[old]) if group.pattern[k][j] else None
                row.append(
                    None if cotangent is None else _at_positions(group, j, cotangent, group.masks.get((k, j)))
                )
            rows.append(tuple(row))
        return tuple(rows)

    def _of_shared(self, group: HiddenGroup, j: int) -> Row:
        """Column j of D where many positions read an element of old state j: ones pushed forward from it."""
        model = self.model.analysis.model
        old, new = model.state_vars[group.states[j]], [model.new_state_vars[s] for s in group.states]
        aval = self.tape.graph.avals[old]
        targets = [new[k] for k in range(len(new)) if (k, j) in group.shared]
        found = self.tape.push({old: jnp.ones(aval.shape, aval.dtype)}, targets, cuts={})
        return self.model.rows_of(group.name, [found.get(v) for v in new])

    def immediate(self, name: str) -> Row:
        """F of a relation: per state of its group an array over the span of y, or None."""
        geometry = self.model.traces[name]
        relation = geometry.relation
        group = self.model.analysis.group(relation.group)
        site = self.model.analysis.site(relation.site)
        forwards = self._forwards(relation, group) if relation.fan_out is not None else None
        rows: list[Array | None] = []
        for k in range(len(group.states)):
            if forwards is not None:
                found = forwards[k]
            else:
                found = self._local(group, k).get(site.y) if relation.rows[k] else None
                found = None if found is None else geometry.span(found)
            if found is None:
                rows.append(None)
                continue
            mask = relation.masks.get(k)
            rows.append(found if mask is None else jnp.where(mask, found, jnp.zeros((), found.dtype)))
        return tuple(rows)

    def _forwards(self, relation: Relation, group: HiddenGroup) -> Row:
        """The same where an element of y reaches many positions: ones pushed forward from y; each position reads one of them."""
        fan_out, analysis = relation.fan_out, self.model.analysis
        assert fan_out is not None
        y, aval = analysis.site(relation.site).y, self.tape.graph.avals[analysis.site(relation.site).y]
        ones = jnp.asarray(fan_out.elements, aval.dtype)
        variables = analysis.model.new_state_vars
        every = list(range(len(group.states)))
        found: dict[int, Array] = {}
        for cuts, of in by_cuts(group, analysis.uses_cut) if group.pushed else [(fan_out.cuts, every)]:
            targets = [variables[group.states[k]] for k in of if relation.rows[k]]
            found.update(self.tape.push({y: ones}, targets, cuts=cuts))
        rows = self.model.rows_of(group.name, [found.get(variables[s]) for s in group.states])
        from_positions = self.model.traces[relation.name].from_positions
        return tuple(None if row is None else from_positions(row) for row in rows)

    def state(self, name: str) -> Row:
        """The group's new states."""
        variables = self.model.analysis.model.new_state_vars
        states = self.model.analysis.group(name).states
        return self.model.rows_of(name, [self.tape.values[variables[s]] for s in states])

    def shown(self, name: str) -> Array:
        """What a group shows, over its positions; the sum of several values."""
        group = self.model.analysis.group(name)
        values = [
            added_at(self.tape.values[seen.variable], seen.position, group.size)
            for seen in self.model.visible(name)
        ]
        return reduce(add, values).reshape(group.shape)

    # -- cotangents of a group's states ----------------------------------------------------------------------------

    def pull_to_states(
        self, name: str, seeds: Mapping[int, Array], cuts: Mapping[Any, np.ndarray] | None = None
    ) -> dict[int, Array]:
        """Cotangents of a group's new states, taken as independent, and of its old ones."""
        model = self.model.analysis.model
        group = self.model.analysis.group(name)
        new = {model.new_state_vars[s] for s in group.states}
        old = {model.state_vars[s] for s in group.states}
        return self.tape.pull(seeds, new | old, cuts, independent=new)

    def filled(self, variable: int, found: Mapping[int, Array]) -> Array:
        """A cotangent or tangent, zero where there is none."""
        aval = self.tape.graph.avals[variable]
        value = found.get(variable)
        return jnp.zeros(aval.shape, aval.dtype) if value is None else value

    def pull_of_shown(self, name: str, drive: Array) -> dict[int, Array]:
        """Cotangents of a group's new and old states for those of what it shows, which ``drive`` has over its positions."""
        total: dict[int, Array] = {}
        for seen in self.model.visible(name):
            aval = self.tape.graph.avals[seen.variable]
            flat = taken(drive, as_places(np.maximum(seen.position, 0), drive.size))
            seed = jnp.where(seen.position >= 0, flat, jnp.zeros((), flat.dtype)).astype(aval.dtype)
            for variable, value in self.pull_to_states(name, {seen.variable: seed}, seen.cuts).items():
                total[variable] = value if variable not in total else total[variable] + value
        return total

    def of_new_states(self, name: str, found: Mapping[int, Array]) -> Row:
        variables = self.model.analysis.model.new_state_vars
        return self.model.credits_of(
            name, [found.get(variables[s]) for s in self.model.analysis.group(name).states]
        )

    def of_old_states(self, name: str, found: Mapping[int, Array]) -> Row:
        variables = self.model.analysis.model.state_vars
        return self.model.credits_of(
            name, [found.get(variables[s]) for s in self.model.analysis.group(name).states]
        )

    def _local(self, group: HiddenGroup, k: int) -> dict[int, Array]:
        """Row k of the local Jacobian: pull ones back from one new state with the uses cut."""
        analysis = self.model.analysis
        state = group.states[k]
        if state not in self._rows:
            new = analysis.model.new_state_vars[state]
            targets = {
                analysis.model.state_vars[old]
                for j, old in enumerate(group.states)
                if group.pattern[k][j] and (k, j) not in group.shared
            }
            for relation in analysis.relations:
                if relation.group == group.name and relation.rows[k] and relation.fan_out is None:
                    targets.add(analysis.site(relation.site).y)
            ones = jnp.ones_like(self.tape.values[new])
            self._rows[state] = self.tape.pull({new: ones}, targets, analysis.uses_cut[state])
        return self._rows[state]

    def with_loss(
        self,
        outputs: list[Array | None],
        new_states: list[Array | None],
        call: Mapping[str, Any] | None = None,
    ) -> LossDerivatives:
        """Add the loss: its cotangents with respect to the step's outputs and new states, and what came with the call."""
        model = self.model.analysis.model
        seeds: dict[int, Array] = {}
        for operand, cotangent in zip(
            (*model.output_vars, *model.new_state_vars), (*outputs, *new_states), strict=True
        ):
            if (
                cotangent is None
                or isinstance(operand, Constant)
                or not self.tape.graph.avals[operand].differentiable
            ):
                continue
            seeds[operand] = cotangent if operand not in seeds else seeds[operand] + cotangent
        return LossDerivatives(self, seeds, outputs, call or {})


class LossDerivatives:
    """Derivatives of one step's loss."""

    def __init__(
        self,
        step: StepDerivatives,
        seeds: dict[int, Array],
        outputs: list[Array | None],
        call: Mapping[str, Any],
    ) -> None:
        self.step = step
        self.seeds = seeds
        self.outputs = outputs
        self.call = call
        self._signals: dict[str, dict[int, Array]] = {}
        self._layers: dict[str, tuple[tuple[Array, ...], tuple[Array, ...]]] = {}

    def signal(self, name: str) -> Row:
        """L of a group: the loss differentiated by its new states, all of them taken as independent."""
        return self.step.of_new_states(name, self._signal(name))

    def shown_signal(self, name: str) -> Array:
        """The loss differentiated by what the group shows, its new states taken as independent."""
        model = self.step.model
        group = model.analysis.group(name)
        (seen,) = model.visible(name)
        new = {model.analysis.model.new_state_vars[s] for s in group.states}
        found = self.step.tape.pull(self.seeds, {seen.variable}, independent=new)
        return added_at(self.step.filled(seen.variable, found), seen.position, group.size).reshape(
            group.shape
        )

    def bypass(self, name: str) -> Row:
        """The loss differentiated by the group's old states along paths that avoid its new ones."""
        return self.step.of_old_states(name, self._signal(name))

    def _signal(self, name: str) -> dict[int, Array]:
        if name not in self._signals:
            self._signals[name] = self.step.pull_to_states(name, self.seeds)
        return self._signals[name]

    def start(self, name: str) -> Row:
        """The loss differentiated by the group's old states, by all paths: a window of one step."""
        model = self.step.model.analysis.model
        group = self.step.model.analysis.group(name)
        found = self.step.tape.pull(self.seeds, {model.state_vars[s] for s in group.states})
        return self.step.of_old_states(name, found)

    def layer_signal(self, name: str) -> tuple[Array, ...]:
        """The loss differentiated by a layer's new states, all of them taken as independent."""
        return self._of_layer(name)[0]

    def layer_bypass(self, name: str) -> tuple[Array, ...]:
        """The loss differentiated by a layer's old states along paths that avoid its new ones."""
        return self._of_layer(name)[1]

    def layer_start(self, name: str) -> tuple[Array, ...]:
        """The loss differentiated by a layer's old states, by all paths: a window of one step."""
        variables = self.step.model.analysis.model.state_vars
        states = self.step.model.analysis.layer(name).states
        found = self.step.tape.pull(self.seeds, {variables[s] for s in states})
        return tuple(self.step.filled(variables[s], found) for s in states)

    def _of_layer(self, name: str) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        if name not in self._layers:
            model = self.step.model.analysis.model
            states = self.step.model.analysis.layer(name).states
            new = [model.new_state_vars[s] for s in states]
            old = [model.state_vars[s] for s in states]
            found = self.step.tape.pull(self.seeds, {*new, *old}, independent=set(new))
            self._layers[name] = (
                tuple(self.step.filled(v, found) for v in new),
                tuple(self.step.filled(v, found) for v in old),
            )
        return self._layers[name]

    @cached_property
    def _one_step(self) -> dict[int, Array]:
        targets = {s.y for s in self.step.model.analysis.sites}
        return self.step.tape.pull(self.seeds, targets)

    def one_step(self, name: str) -> Array | None:
        """Ordinary cotangent of y at a site, old states held constant."""
        return self._one_step.get(self.step.model.analysis.site(name).y)

    def inputs(self) -> list[Array | None]:
        """Ordinary cotangents of the step's inputs."""
        variables = self.step.model.analysis.model.input_vars
        targets = {v for v in variables if self.step.tape.graph.avals[v].differentiable}
        found = self.step.tape.pull(self.seeds, targets)
        return [found.get(v) for v in variables]


def _at_positions(group: HiddenGroup, k: int, value: Array, mask: np.ndarray | None) -> Array:
    """An array over the elements of state k as one over the group's positions."""
    elements = group.maps[k]
    if elements is None:
        value = value.reshape(group.shape)
    else:
        there = taken(value, as_places(np.maximum(elements, 0), value.size))
        value = jnp.where(elements >= 0, there, jnp.zeros((), value.dtype)).reshape(group.shape)
    return value if mask is None else jnp.where(mask, value, jnp.zeros((), value.dtype))
