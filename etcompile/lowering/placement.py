"""Where arrays lie on a device mesh: examples over the mesh axes named ``batch``, units over those named ``units``.

Nothing here changes a number: a placement says where elements lie, and JAX's partitioner does the rest. An axis whose size
is no multiple of the number of devices stays whole, and the report says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from etcompile.errors import ModelError
from etcompile.frontend.state_forms import StateForm
from etcompile.ir.kinds import KINDS, Kind
from etcompile.ir.program import Equation, TraceProgram
from etcompile.lowering.axes import Axes, ModelAxes
from etcompile.lowering.deferred import Deferral, DeferredTrace
from etcompile.schedule import Schedule, require_divisible_batch

if TYPE_CHECKING:
    from etcompile.lowering.derivatives import LoweredModel

__all__ = ["Placed", "Placement", "placement_of"]

Array = Any
Tree = Any


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where one array lies.

    Attributes
    ----------
    path : str
    shape : tuple of int
    axes : tuple of tuple of str
        For each axis of the array the mesh axes that it is split over; empty where it is whole.
    note : str
        Why an axis that could be split is whole.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]
    note: str = ""

    @property
    def spec(self) -> PartitionSpec:
        return PartitionSpec(*[names or None for names in self.axes])

    def __str__(self) -> str:
        sizes = (f"{n}@{'+'.join(a)}" if a else str(n) for n, a in zip(self.shape, self.axes, strict=True))
        return f"{self.path} [{', '.join(sizes)}]" + (f" ({self.note})" if self.note else "")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of one compiled program lie; without a mesh, a placement that leaves everything where it is.

    Attributes
    ----------
    mesh : Mesh or None
        The user's mesh with axes that the partitioner may handle by itself.
    batch : tuple of str
        Mesh axes for the examples.
    examples : int or None
        Size of the example axis.
    params, states : tuple of Placed
        By leaf of the model's trees.
    weights : mapping of str to Placed
        Effective weights by site.
    traces : mapping of str to (Placed or tuple of Placed)
        One entry of each carried value, or one for each of its arrays where they differ.
    deferred : mapping of str to DeferredTrace of Placed
        All of the traces that are written later.
    note : str
        Why nothing is split over units, where that is so.
    """

    mesh: Mesh | None = None
    batch: tuple[str, ...] = ()
    examples: int | None = None
    params: tuple[Placed, ...] = ()
    states: tuple[Placed, ...] = ()
    weights: Mapping[str, Placed] = dataclasses.field(default_factory=dict)
    traces: Mapping[str, Placed | tuple[Placed, ...]] = dataclasses.field(default_factory=dict)
    deferred: Mapping[str, DeferredTrace] = dataclasses.field(default_factory=dict)
    note: str = ""

    # -- inside of compiled functions ---------------------------------------------------------------------------

    def hold_params(self, leaves: Sequence[Array]) -> list[Array]:
        """Parameters, or their gradients, held in place."""
        return self._hold_leaves(leaves, self.params)

    def hold_states(self, leaves: Sequence[Array]) -> list[Array]:
        return self._hold_leaves(leaves, self.states)

    def hold_batch(self, values: Tree) -> Tree:
        """Inputs or outputs of one step."""
        return jax.tree.map(lambda v: self._hold(v, self._leading(v.shape)), values)

    def hold_weights(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Arrays of the shape of effective weights, by site."""
        return {s: v if self.mesh is None else self._hold(v, self.weights[s]) for s, v in values.items()}

    def hold_trace(self, name: str, value: Tree) -> Tree:
        """One carried value of the program; its entries that are zero for every input stay None."""
        if self.mesh is None or value is None:
            return value
        leaves, structure = jax.tree.flatten(value)
        return jax.tree.unflatten(structure, self._hold_leaves(leaves, self._of_trace(name, value)))

    def hold_traces(self, traces: Mapping[str, Tree]) -> dict[str, Tree]:
        return {name: self.hold_trace(name, value) for name, value in traces.items()}

    def hold_whole(self, value: Array) -> Array:
        """The same on every device."""
        return self._hold(value, Placed("", value.shape, ((),) * value.ndim))

    def _hold_leaves(self, leaves: Sequence[Array], placed: Sequence[Placed]) -> list[Array]:
        if self.mesh is None:
            return list(leaves)
        return [self._hold(v, p) for v, p in zip(leaves, placed, strict=True)]

    def _hold(self, value: Array, placed: Placed) -> Array:
        return value if self.mesh is None else lax.with_sharding_constraint(value, self._sharding(placed))

    # -- between calls ------------------------------------------------------------------------------------------

    def put_params(self, tree: Tree) -> Tree:
        return self._put_leaves(tree, self.params)

    def put_states(self, tree: Tree, forms: Sequence[StateForm]) -> Tree:
        """States of the model; those that stand as their parts have as many places in :attr:`states`."""
        if self.mesh is None:
            return tree
        first, placed = 0, []
        for form in forms:
            placed.append(_of_whole(self.states[first], form))
            first += form.parts
        return self._put_leaves(tree, placed)

    def put_traces(self, traces: Mapping[str, Tree]) -> Mapping[str, Tree]:
        if self.mesh is None:
            return traces
        return {name: self._put_leaves(value, self._of_trace(name, value)) for name, value in traces.items()}

    def put_batch(self, tree: Tree, axis: int) -> Tree:
        """Data of a call, whose axis number ``axis`` counts the examples where it has their number."""
        if self.mesh is None:
            return tree
        return self._put_leaves(
            tree, [self._leading(v.shape, axis) for v in map(_array, jax.tree.leaves(tree))]
        )

    def _put_leaves(self, tree: Tree, placed: Sequence[Placed]) -> Tree:
        if self.mesh is None:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        return jax.tree.unflatten(structure, jax.device_put(leaves, [self._sharding(p) for p in placed]))

    def _of_trace(self, name: str, value: Tree) -> list[Placed]:
        """Where the arrays of one carried value lie, in their order."""
        if value is None:
            return []
        placed = self.deferred[name] if isinstance(value, DeferredTrace) else self.traces[name]
        return jax.tree.leaves(
            jax.tree.map(lambda one, part: jax.tree.map(lambda _: one, part), placed, value)
        )

    def _leading(self, shape: tuple[int, ...], axis: int = 0) -> Placed:
        here = self.examples is not None and len(shape) > axis and shape[axis] == self.examples
        return Placed("", shape, tuple(self.batch if here and a == axis else () for a in range(len(shape))))

    def _sharding(self, placed: Placed) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, placed.spec)

    # -- in words -----------------------------------------------------------------------------------------------

    def lines(self) -> tuple[str, ...]:
        """The mesh, then each array with the mesh axes behind the sizes that they split."""
        if self.mesh is None:
            return ()
        sizes = ", ".join(f"{name}={size}" for name, size in self.mesh.shape.items())
        lines = [f"mesh {sizes}" + (f" ({self.note})" if self.note else "")]
        lines += [f"parameter {p}" for p in self.params]
        lines += [f"state {p}" for p in self.states]
        for name, placed in self.traces.items():
            lines += [f"trace {p}" for p in jax.tree.leaves(self.deferred.get(name, placed))]
        return tuple(lines)


def placement_of(
    model: LoweredModel,
    program: TraceProgram,
    schedule: Schedule,
    entries: Mapping[str, Any],
    deferred: Mapping[str, Deferral],
) -> Placement:
    """Where the arrays of a program lie.

    Parameters
    ----------
    model : LoweredModel
    program : TraceProgram
    schedule : Schedule
    entries : mapping of str to (shape or list of shapes)
        Shapes of one entry of every carried value.
    deferred : mapping of str to Deferral
        How traces are written that are not written at every step.

    Raises
    ------
    ModelError
        The examples shall be split, and the step has no example axis.
    OptionError
        The number of examples is no multiple of the devices that they shall go to.
    """
    if schedule.mesh is None:
        return Placement()
    mesh = Mesh(
        schedule.mesh.devices,
        schedule.mesh.axis_names,
        axis_types=(AxisType.Auto,) * len(schedule.mesh.axis_names),
    )
    if schedule.batch_axes:
        if model.examples is None:
            raise ModelError(
                f"{model.analysis.model.name} has no example axis that could be split over {schedule.batch!r}.",
                got="a step of one example, or one in which examples meet",
                expected="a batch as the leading axis of all inputs, hidden states and outputs",
                hint="compile with batch_size=..., or leave out batch= and split the units alone.",
            )
        require_divisible_batch(schedule, model.examples)
    # Large values in which every unit meets every other from step to step: splitting their units would move all of them.
    kinds = [KINDS[e.type.kind] for e in program.equations]
    every_path = any(kind.large and kind.every_path for kind in kinds)
    units = () if every_path else schedule.unit_axes
    return _Placing(model, program, mesh, schedule.batch_axes, units, entries, deferred).placement(
        f"{program.name} follows every path between units, so nothing is split over {'+'.join(schedule.unit_axes)}"
        if every_path and schedule.unit_axes
        else ""
    )


class _Placing:
    def __init__(
        self,
        model: LoweredModel,
        program: TraceProgram,
        mesh: Mesh,
        batch: tuple[str, ...],
        units: tuple[str, ...],
        entries: Mapping[str, Any],
        deferred: Mapping[str, Deferral],
    ) -> None:
        self.model, self.program, self.mesh = model, program, mesh
        self.batch, self.units, self.entries, self.deferred = batch, units, entries, deferred
        self.parts = math.prod(mesh.shape[a] for a in units)
        self.axes = ModelAxes(model, self.parts)

    def placement(self, note: str) -> Placement:
        model = self.model.analysis.model
        return Placement(
            mesh=self.mesh,
            batch=self.batch,
            examples=self.model.examples if self.batch else None,
            params=tuple(
                self._place(leaf.path, leaf.aval.shape, a)
                for leaf, a in zip(model.params, self.axes.params, strict=True)
            ),
            states=tuple(
                self._place(leaf.path, leaf.aval.shape, a)
                for leaf, a in zip(model.states, self.axes.states, strict=True)
            ),
            weights={
                name: self._place(name, self.model.sites[name].weight.shape, a)
                for name, a in self.axes.weights.items()
            },
            traces={name: self._of_carried(self.program.equation(name)) for name in self.entries},
            deferred={name: self._of_deferred(name, how) for name, how in self.deferred.items()},
            note=note,
        )

    def _place(self, path: str, shape: tuple[int, ...], axes: Axes) -> Placed:
        found: list[tuple[str, ...]] = [()] * len(shape)
        note = ""
        if axes.examples is not None and self.batch:
            found[axes.examples] = self.batch
        if axes.units is not None and self.units:
            if shape[axes.units] % self.parts:
                note = f"{shape[axes.units]} units are no multiple of {self.parts}"
            else:
                found[axes.units] = self.units
        return Placed(path, shape, tuple(found), note)

    def _of_carried(self, equation: Equation) -> Placed | tuple[Placed, ...]:
        """One entry of a carried value."""
        kind, of, name = KINDS[equation.type.kind], equation.type.of, equation.name
        shapes = self.entries[name]
        if kind.by_state:
            layer = of if kind.owner == "layer" else self.model.analysis.effect(of).layer
            states = self.model.analysis.layer(layer).states
            return tuple(
                self._place(name, s, self.axes.states[k]) for s, k in zip(shapes, states, strict=True)
            )
        if isinstance(shapes, list):  # of all that an operation reads
            return tuple(self._place(name, s, self.axes.leading(s)) for s in shapes)
        return self._place(name, shapes, self._axes_of(kind, of, shapes))

    def _of_deferred(self, name: str, how: Deferral) -> DeferredTrace:
        """One entry of each part of a trace that is written later; what is kept of many steps has them on axis 0."""
        equation = self.program.equation(name)
        relation = how.geometry.relation

        def place(what: str, shape: tuple[int, ...], axes: Axes) -> Any:
            return self._place(f"{name} {what}", shape, axes)

        def of_steps(what: str, of_step: Any, axes: Axes) -> Any:
            return place(what, (how.every, *of_step.shape), _one_further(axes))

        def read(outer: str, x: Any) -> Any:
            return jax.tree.map(lambda v: of_steps(f"x of {outer}", v, self.axes.leading(v.shape)), x)

        written: Any = self._of_carried(equation)
        spans = self.axes.relations[equation.type.of]
        return DeferredTrace(
            written,
            place("since", how.position.shape, self.axes.groups[relation.group]),
            {o: (of_steps(f"f of {o}", how.span, spans), read(o, x)) for o, x in how.read.items()},
            Placed(f"{name} count", (), ()),
        )

    def _axes_of(self, kind: Kind, of: str, shape: tuple[int, ...]) -> Axes:
        if kind.owner == "relation":
            axes = self.axes.relations[of]
            return _in_memory(axes, self.model.traces[of].order) if kind.trace else axes
        if kind.owner == "group":
            group = self.axes.groups[of]
            if not kind.every_example:
                return group
            # A matrix to the units of one example.
            one = [a for a in range(len(self.model.analysis.group(of).shape)) if a != group.examples]
            return Axes(None, 1) if one == [group.units] else Axes()
        if kind.gradient:
            return self.axes.weights[of]
        return self.axes.leading(shape)


def _one_further(axes: Axes) -> Axes:
    """Of an array with one more axis before them."""
    return Axes(*[None if a is None else a + 1 for a in (axes.examples, axes.units)])


def _in_memory(axes: Axes, order: Sequence[int]) -> Axes:
    """Axes of a trace row, whose logical axes lie in another order in memory."""
    return Axes(*[None if a is None else order.index(a) for a in (axes.examples, axes.units)])


def _of_whole(part: Placed, form: StateForm) -> Placed:
    """Where a state lies of which this is the first part; an axis that is two in its view is whole."""
    if not form.view:
        return part
    divided = next(d for d, (a, b) in enumerate(zip((*form.own, 0), form.view, strict=True)) if a != b)
    axes = (*part.axes[:divided], (), *part.axes[divided + 2 :])
    return dataclasses.replace(part, shape=form.own, axes=axes)


def _array(value: Any) -> Any:
    return value if hasattr(value, "shape") else np.asarray(value)
