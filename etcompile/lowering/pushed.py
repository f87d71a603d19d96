"""Transitions between units of many elements, which are not written down: D e is a push of tangents, L D a pull of cotangents.

A trace is an array for each state of the group, with the contracted axes of a weight beside those of the state. What the step
makes of a tangent of its old states, with uses cut, it makes of each of these: a shift of slots is a shift of the trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.analysis.groups import HiddenGroup
from etcompile.lowering.geometry import TraceGeometry
from etcompile.lowering.places import as_places, taken

__all__ = ["PushedTransition", "by_cuts", "same_cuts"]

Array = Any
Row = tuple[Array | None, ...]
Cuts = Mapping[Any, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class PushedTransition:
    """D of a group at one step, times a number.

    ``step`` is the step with its derivatives (:class:`etcompile.lowering.derivatives.StepDerivatives`).
    """

    step: Any
    group: HiddenGroup
    factor: Any = 1.0

    def scaled(self, factor: Any) -> PushedTransition:
        return dataclasses.replace(self, factor=self.factor * factor)

    def of_trace(self, geometry: TraceGeometry, rows: Row) -> Row:
        """D e."""
        back = np.argsort(geometry.order).tolist()
        n_y, contracted = len(geometry.relation.shape), geometry.contracted
        width = int(np.prod(contracted, dtype=np.int64))

        def leading(row: Array) -> Array:
            """Contracted axes as one in front."""
            logical = jnp.transpose(row, back)
            flat = logical.reshape(*logical.shape[:n_y], width)
            return jnp.moveaxis(flat, -1, 0)

        def trailing(row: Array) -> Array:
            logical = jnp.moveaxis(row, 0, -1)
            return geometry.store(logical.reshape(*logical.shape[:-1], *contracted))

        given = tuple(None if row is None else leading(row) for row in rows)
        found = jax.vmap(lambda given: self._pushed(geometry, given, zeros=True))(given)
        return tuple(None if row is None else trailing(row) for row in found)

    def of_immediate(self, geometry: TraceGeometry, rows: Row) -> Row:
        """D f."""
        return self._pushed(geometry, rows)

    def of_signal(self, signal: Row) -> Row:
        """L D."""
        model, tape = self.step.model.analysis.model, self.step.tape
        old = [model.state_vars[s] for s in self.group.states]
        total: dict[int, Array] = {}
        for cuts, rows in self._by_cuts:
            seeds = {}
            for k in rows:
                new = model.new_state_vars[self.group.states[k]]
                if signal[k] is not None:
                    value = self._of_state(k, signal[k])
                    seeds[new] = seeds[new] + value if new in seeds else value
            found = tape.pull(seeds, set(old), cuts) if seeds else {}
            for v in old:
                if v in found:
                    total[v] = total[v] + found[v] if v in total else found[v]
        asked = self.step.model.credits_of(self.group.name, [total.get(v) for v in old])
        return tuple(None if v is None else self._times(v) for v in asked)

    def _pushed(self, geometry: TraceGeometry, rows: Row, zeros: bool = False) -> Row:
        """D times a column over the span of y."""
        inside = geometry.relation.position >= 0
        placed = self.of_positions(
            tuple(None if row is None else _to_positions(geometry, row) for row in rows), zeros
        )
        dtype = next(row.dtype for row in rows if row is not None)
        return tuple(
            None if row is None else jnp.where(inside, geometry.from_positions(row), 0).astype(dtype)
            for row in placed
        )

    def of_positions(self, rows: Row, zeros: bool = False) -> Row:
        """D times a column over the group's positions; ``zeros`` as of :meth:`Tape.push`."""
        model = self.step.model.analysis.model
        tangents: dict[int, Array] = {}
        for k, (s, row) in enumerate(zip(self.group.states, rows, strict=True)):
            if row is not None:
                old = model.state_vars[s]
                value = self._of_state(k, row).astype(self.step.tape.graph.avals[old].dtype)
                tangents[old] = tangents[old] + value if old in tangents else value
        found: dict[int, Array] = {}
        with self.step.tape.inner():
            for cuts, of in self._by_cuts:
                targets = [model.new_state_vars[self.group.states[k]] for k in of]
                pushed = self.step.tape.push(tangents, targets, cuts=cuts, zeros=zeros)
                found.update((k, pushed[v]) for k, v in zip(of, targets, strict=True) if v in pushed)
        placed = self.step.model.rows_of(self.group.name, [found.get(k) for k in range(len(rows))])
        return tuple(None if row is None else self._times(row) for row in placed)

    def _times(self, value: Array) -> Array:
        plain = isinstance(self.factor, float) and self.factor == 1.0
        return value if plain else value * jnp.asarray(self.factor, value.dtype)

    @property
    def _by_cuts(self) -> list[tuple[Cuts, list[int]]]:
        return by_cuts(self.group, self.step.model.analysis.uses_cut)

    def _of_state(self, k: int, value: Array) -> Array:
        """An array over positions as one over the elements of state k."""
        shape = self.step.model.analysis.model.states[self.group.states[k]].aval.shape
        elements = self.group.maps[k]
        if elements is None:
            return value.reshape(shape)
        return taken(value, as_places(_inverse(elements), value.size)).reshape(shape)


def _inverse(elements: np.ndarray) -> np.ndarray:
    there = np.flatnonzero(elements >= 0)
    places = np.zeros(there.size, np.int64)
    places[elements[there]] = there
    return places


def _to_positions(geometry: TraceGeometry, row: Array) -> Array:
    """A column over the span as one over positions: what no element of y reaches is zero."""
    position = geometry.relation.position
    row = row if (position >= 0).all() else jnp.where(position >= 0, row, jnp.zeros((), row.dtype))
    like = jax.ShapeDtypeStruct(geometry.group_shape, row.dtype)
    (found,) = jax.linear_transpose(geometry.from_positions, like)(row)
    return found


def same_cuts(a: Cuts, b: Cuts) -> bool:
    """Whether the same elements are cut at the same uses."""
    return a is b or (a.keys() == b.keys() and all(np.array_equal(a[use], b[use]) for use in a))


def by_cuts(group: HiddenGroup, uses_cut: Mapping[int, Cuts]) -> list[tuple[Cuts, list[int]]]:
    """Numbers of a group's states, those together toward which the same uses are cut."""
    found: list[tuple[Cuts, list[int]]] = []
    for k, s in enumerate(group.states):
        like = next((of for known, of in found if same_cuts(known, uses_cut[s])), None)
        if like is None:
            found.append((uses_cut[s], [k]))
        else:
            like.append(k)
    return found
