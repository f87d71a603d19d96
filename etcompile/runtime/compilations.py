"""The compilations of one step: one per set of shapes and switches, found again when they come back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any

import jax.numpy as jnp

from etcompile.compiled import Compiled, without_traces
from etcompile.errors import EtcompileError
from etcompile.frontend.module import gives_nothing_away
from etcompile.lowering.functions import StepFunctions
from etcompile.runtime.changed_attributes import PlainAttributes
from etcompile.runtime.environment import (
    carried_alike,
    completed,
    give_up_traces,
    require_wide_numbers,
    warn_of_many,
)
from etcompile.runtime.foreign_writes import ForeignWrites
from etcompile.runtime.jitted import Constants, Jitted
from etcompile.runtime.model_states import ModelAccess
from etcompile.runtime.shapes import kinds_of, shapes_alone
from etcompile.runtime.trace_state import TraceState

__all__ = ["Compilation", "Compilations", "Lower"]

#: Compiles one step of a live model for inputs of these shapes.
Lower = Callable[[ModelAccess, tuple[Any, ...]], Compiled]

#: Compilations kept per step; beyond that the one that was used longest ago is dropped.
_KEPT = 16

#: Jitted functions kept per compilation, one for each loss function seen.
_JITTED = 64


@dataclasses.dataclass(frozen=True)
class _Key:
    """What a compilation is for, beside the environment: structure, shapes and dtypes of inputs and of the model's states."""

    inputs: Hashable
    states: Hashable


class Compilation:
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
    constants : Constants
        Large arrays that these functions close over.
    jitted : dict
        Jitted functions by what runs and which loss.
    wide : str or None
        The dtype of its parameters, states and inputs that has 64 bits; None if there is none.
    """

    def __init__(
        self, compiled: Compiled, inputs: tuple[Any, ...], found: Any, kinds: Any, traces: TraceState
    ) -> None:
        self.compiled = compiled
        self.inputs = inputs
        self.found = found
        self.kinds = kinds
        self.traces = traces
        self.constants = Constants()
        self.jitted: dict[Any, Jitted] = {}
        self.losses: dict[Any, tuple[Any, ...]] = {}
        self.wide = _wide(compiled)

    @property
    def functions(self) -> StepFunctions:
        return self.compiled.functions

    @functools.cached_property
    def alone(self) -> StepFunctions | None:
        """The functions over sequences that leave no traces; None where these have to be made."""
        return without_traces(self.compiled)

    def keep_loss(self, key: Any, traced: tuple[Any, ...]) -> None:
        """Keep what a loss function was traced to for this compilation."""
        while len(self.losses) >= _JITTED:
            self.losses.pop(next(iter(self.losses)))
        self.losses[key] = traced

    def jit(self, key: Any, fn: Callable, donate: tuple[int, ...] = ()) -> Jitted:
        """``fn`` jitted, its large constants set apart, or what was jitted before under the same key."""
        if donate and gives_nothing_away():
            key, donate = ("nothing given away", key), ()
        if key not in self.jitted:
            while len(self.jitted) >= _JITTED:
                self.jitted.pop(next(iter(self.jitted)))
            self.jitted[key] = Jitted(fn, self.constants, donate)
        return self.jitted[key]


def _wide(compiled: Compiled) -> str | None:
    """A dtype of parameters, states or inputs that has 64 bits for a real number."""
    graph = compiled.functions.model.graph
    avals = {graph.avals[v].dtype: graph.avals[v] for v in graph.inputs}
    wide = (d for d, aval in avals.items() if aval.differentiable and jnp.finfo(d).bits == 64)
    return next(map(str, wide), None)


class Compilations:
    """Those kept for one live model, and the one that runs now.

    Parameters
    ----------
    live : ModelAccess
    lower : callable
        Makes another one, where inputs, states or environment are others than before.
    writes : ForeignWrites
        Is told that writes while the model is traced are ours.
    """

    def __init__(self, live: ModelAccess, lower: Lower, writes: ForeignWrites) -> None:
        self.live = live
        self.lower = lower
        self.now: Compilation
        self.abstract = False  # parameters or states are shapes alone
        self.made = 0
        self.attributes = PlainAttributes(None, "")
        self._writes = writes
        self._kept: list[tuple[_Key, Compilation]] = []  # the last is the one used last
        self._traces: dict[Hashable, TraceState] = {}
        self._required: dict[str, Any] = {}

    def use(self, inputs: tuple[Any, ...]) -> None:
        """Take the compilation for these shapes of inputs, for the model's states and the environment as they are.

        It is found among those kept, or made. An error leaves everything as it was.
        """
        found = self._find(inputs)
        if found is not None:
            self.take(found)
            return
        before = self.live.found
        try:
            new = self.of(self.lowered(inputs), inputs)
        finally:
            self.live.found = before
        self.keep(new)
        self.take(new)

    def lowered(self, inputs: tuple[Any, ...]) -> Compiled:
        """The model as it is now, compiled for these shapes of inputs."""
        self.attributes.say_what_changed()
        with self._writes.own():
            compiled = self.lower(self.live, inputs)
        self.follow_attributes(compiled)
        return compiled

    def of(self, compiled: Compiled, inputs: tuple[Any, ...]) -> Compilation:
        """What was compiled just now, with the state that holds its traces.

        There is one state for traces of the same shapes: functions that the user compiled around it find it again.
        """
        shapes = compiled.causal.init_traces_shapes()
        traces = self._traces.setdefault(kinds_of(shapes), TraceState(shapes))
        return Compilation(compiled, inputs, self.live.found, kinds_of(self.live.states()), traces)

    def _find(self, inputs: tuple[Any, ...]) -> Compilation | None:
        """The one kept for these shapes and for states and environment as they are."""
        key = self._key(inputs)
        for one in reversed(self._kept):
            if one[0] == key and one[1].functions.model.environment.differs() is None:
                self._kept.remove(one)
                self._kept.append(one)
                return one[1]
        return None

    def keep(self, new: Compilation) -> None:
        """Find it again for inputs like its own and the model's states as they are."""
        del self._kept[: len(self._kept) - _KEPT + 1]
        self._kept.append((self._key(new.inputs), new))
        self.made += 1

    def _key(self, inputs: tuple[Any, ...]) -> _Key:
        return _Key(kinds_of(inputs), self.live.kinds())

    def take(self, one: Compilation) -> None:
        """Run this one from now on."""
        self.live.found = one.found
        self.now = one
        self.abstract = shapes_alone((self.live.params(), self.live.states())) is not None

    # -- what the model reads beside its inputs -----------------------------------------------------------------

    def follow_attributes(self, compiled: Compiled) -> None:
        """Remember the plain attributes of the model, as it was traced now."""
        module = getattr(self.live, "module", None)
        self.attributes = PlainAttributes(module, compiled.analysis.model.name)

    def follow_environment(self) -> None:
        """Take another compilation where the model read something in ``brainstate.environ`` that is now another.

        A switch that is no longer set and that the model cannot do without stays what it was compiled for.
        """
        self.attributes.say_what_changed()
        before = self.now
        require_wide_numbers(before.functions.model.name, before.wide)
        environment = before.functions.model.environment
        if not environment.reads:
            return
        with self.completed():
            name = environment.differs()
            if name is None:
                return
            try:
                self.use(before.inputs)
            except EtcompileError:
                if not environment.misses(name):
                    raise
                self._required[name] = environment.switches[name]
        if self.now is before:
            self.follow_environment()
            return
        warn_of_many(name, self.made)
        alike = carried_alike(before.compiled.program, self.now.compiled.program)
        if before.traces is not self.now.traces or not alike:
            give_up_traces(name, before.traces, self.now.traces)

    def differs(self) -> bool:
        """Whether the model read something in ``brainstate.environ`` that is now another than it was compiled for."""
        with self.completed():
            return self.now.functions.model.environment.differs() is not None

    def completed(self) -> AbstractContextManager[Any]:
        """The environment, with what the model cannot do without as it was."""
        return completed(self._required)

    def with_environment(self, inputs: Any, steps: int | None = None) -> Any:
        """Inputs with what the step takes from ``brainstate.environ``; with ``steps``, for each of so many steps."""
        model = self.now.functions.model
        if not model.environment.reads:
            return inputs
        with self.completed():
            return model.with_environment(inputs, steps)

    def goes_on_from(self, other: Compilations) -> None:
        """Be for the same environment as the compilations of another step."""
        self._required = dict(other._required)
