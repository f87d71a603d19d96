"""What a step keeps of every compilation: one per set of shapes and switches, found again when they come back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from etcompile.compiled import Compiled
from etcompile.lowering.functions import StepFunctions
from etcompile.runtime.trace_state import TraceState

__all__ = ["Key", "Variant", "Variants", "kinds_of", "shapes_of"]

#: Compilations kept per step; beyond that the one that was used longest ago is dropped.
_KEPT = 16

#: Jitted functions kept per compilation, one for each loss function seen.
_JITTED = 64


@dataclasses.dataclass(frozen=True)
class Key:
    """What a compilation is for: any of these differs, and another one is needed.

    Attributes
    ----------
    inputs, states : hashable
        Structure, shapes and dtypes.
    """

    inputs: Hashable
    states: Hashable


class Variant:
    """One compilation with everything made for it.

    Attributes
    ----------
    compiled : Compiled
    inputs : tuple of pytrees
        Shapes of the inputs of one step.
    found : object
        What the way to the model's states found when it traced the model.
    kinds : tuple
        Structure, shapes and dtypes of the states that it carries.
    traces : TraceState
        Shared by compilations whose traces have the same shapes.
    losses : dict
        Loss functions as they were traced, by what they are and close over; several for several environments.
    """

    def __init__(
        self, compiled: Compiled, inputs: tuple[Any, ...], found: Any, kinds: Any, traces: TraceState
    ) -> None:
        self.compiled = compiled
        self.inputs = inputs
        self.found = found
        self.kinds = kinds
        self.traces = traces
        self._jitted: dict[Any, Callable] = {}
        self.losses: dict[Any, tuple[Any, ...]] = {}

    @property
    def functions(self) -> StepFunctions:
        return self.compiled.functions

    def keep_loss(self, key: Any, traced: tuple[Any, ...]) -> None:
        """Keep what a loss function was traced to for this compilation."""
        while len(self.losses) >= _JITTED:
            self.losses.pop(next(iter(self.losses)))
        self.losses[key] = traced

    def jit(self, key: Any, fn: Callable, donate: tuple[int, ...] = ()) -> Callable:
        """``fn`` jitted, or what was jitted before under the same key."""
        if key not in self._jitted:
            while len(self._jitted) >= _JITTED:
                self._jitted.pop(next(iter(self._jitted)))
            self._jitted[key] = jax.jit(fn, donate_argnums=donate)
        return self._jitted[key]


class Variants:
    """The compilations of one step by :class:`Key` and environment, and the states that hold traces by shape."""

    def __init__(self) -> None:
        self._kept: list[tuple[Key, Variant]] = []  # the last is the one used last
        self.made = 0
        self._traces: dict[Hashable, TraceState] = {}

    def find(self, key: Key) -> Variant | None:
        """The compilation for a key and for the environment as it is, if it is kept."""
        for one in reversed(self._kept):
            if one[0] == key and one[1].functions.model.environment.differs() is None:
                self._kept.remove(one)
                self._kept.append(one)
                return one[1]
        return None

    def add(self, key: Key, variant: Variant) -> None:
        """Keep a compilation."""
        del self._kept[: len(self._kept) - _KEPT + 1]
        self._kept.append((key, variant))
        self.made += 1

    def traces(self, shapes: dict[str, Any]) -> TraceState:
        """The one state for traces of these shapes: functions that the user compiled around it find it again."""
        key = kinds_of(shapes)
        if key not in self._traces:
            self._traces[key] = TraceState(shapes)
        return self._traces[key]


def shapes_of(tree: Any) -> Any:
    """A tree of shapes in the place of arrays and numbers."""
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(jnp.shape(v), _dtype(v)), tree)


def kinds_of(tree: Any) -> tuple[Any, tuple[tuple[tuple[int, ...], Any], ...]]:
    """Structure, and shape and dtype of every leaf."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((v.shape if hasattr(v, "shape") else jnp.shape(v), _dtype(v)) for v in leaves)


def _dtype(value: Any) -> Any:
    return value.dtype if hasattr(value, "dtype") else jnp.result_type(value)
