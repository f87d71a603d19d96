"""Where a compiled step finds the model's parameters and states: modules and plain functions behind one interface."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

from etcompile.errors import CarryError, EtcompileError, InputError, ModelError
from etcompile.frontend.explain import known_cause
from etcompile.frontend.function import FunctionModel, function_model, own_copy, trace_function
from etcompile.frontend.given import shape_hint
from etcompile.frontend.module import (
    ModuleStates,
    abstract_states,
    initialise,
    is_module,
    restore,
    short_lived,
    snapshot,
    trace_module,
)
from etcompile.frontend.state_values import read_values, write_values
from etcompile.frontend.step_model import TracedStep
from etcompile.frontend.user_code import user_frame
from etcompile.runtime.shapes import kinds_of

__all__ = ["ModelAccess", "access"]


class ModelAccess(Protocol):
    """Reads and writes parameters and states of a live model.

    ``initial`` is what a reset goes back to; it is kept in a brainstate state, so that a function that a transformation compiled
    finds what it is now. ``found`` is what :meth:`trace` found; it belongs to a compilation. The objects of a module are looked
    up at every use, but by ``params`` of a call that has ``looked_up`` the states before.
    """

    initial: Any
    found: Any

    @property
    def source(self) -> Any:
        """What the model was made of, where trained weights can be put back into it; else None."""
        ...

    @property
    def holders(self) -> Any:
        """What stays the same object as long as the ``State`` objects are the same, as they were last looked up."""
        ...

    def look_up(self) -> None: ...

    def as_looked_up(self) -> bool: ...

    def looked_through(self) -> list[Any] | None: ...

    def initialise(self, batch_size: int) -> None: ...

    def trace(self, inputs: tuple[Any, ...]) -> TracedStep: ...

    @property
    def param_states(self) -> dict[str, Any]: ...

    def as_params(self, values: list[Any]) -> Any: ...

    def of_params(self, params: Any) -> list[Any]: ...

    def as_states(self, values: list[Any]) -> Any: ...

    def of_states(self, states: Any) -> list[Any]: ...

    def by_param_state(self, grads: Any) -> dict[str, Any]: ...

    def of_param_states(self, values: dict[str, Any]) -> Any: ...

    @property
    def state_objects(self) -> dict[str, Any]: ...

    def by_state(self, values: Any) -> dict[str, Any]: ...

    def params(self, looked_up: bool = False) -> Any: ...

    def set_params(self, values: Any) -> None: ...

    def states(self) -> Any: ...

    def set_states(self, values: Any) -> None: ...

    def remember(self) -> None: ...

    def hidden_states(self) -> dict[str, Any]: ...

    def kinds(self) -> Hashable: ...

    def restart(self) -> None: ...

    def to_resize(self) -> list[Any]: ...

    def resize(self, batch_size: int, along: Sequence[int | None]) -> None: ...

    def unchanged(self) -> AbstractContextManager[None]: ...

    def unchanged_on_error(self) -> AbstractContextManager[None]: ...

    def resized(self, batch_size: int, along: Sequence[int | None]) -> AbstractContextManager[None]: ...

    def copied(self, memo: dict[int, Any]) -> ModelAccess: ...


def access(model: Any) -> ModelAccess:
    """The way to a model's states: a brainstate module's own, or those that a plain function was given."""
    if is_module(model):
        return ModuleAccess(model)
    if isinstance(model, FunctionModel):
        return FunctionAccess(model)
    hint = None
    if isinstance(model, type):
        hint = f"make one: etcompile.compile({model.__name__}(...), x)."
    elif callable(model):
        hint = "etcompile.from_function(fn, params, state) makes a model of a function."
    raise ModelError(
        "compile needs a model.",
        hint=hint,
        got=repr(model)
        if not callable(model)
        else f"the {type(model).__name__} {getattr(model, '__name__', model)!r}",
        expected="a brainstate.nn.Module, or etcompile.from_function(fn, params, state)",
    )


@dataclasses.dataclass(eq=False)
class ModuleAccess:
    """A brainstate module."""

    module: Any
    found: ModuleStates | None = None
    initial_state: brainstate.LongTermState = dataclasses.field(default_factory=lambda: _initial({}))

    @property
    def initial(self) -> dict[str, Any]:
        return self.initial_state.value

    @initial.setter
    def initial(self, values: dict[str, Any]) -> None:
        self.initial_state.value = values

    @property
    def source(self) -> None:
        return None

    def initialise(self, batch_size: int) -> None:
        """Make the states for a batch size, before anything is traced."""
        initialise(self.module, batch_size)

    def trace(self, inputs: tuple[Any, ...]) -> TracedStep:
        traced, self.found = trace_module(self.module, inputs)
        return traced

    @property
    def _states(self) -> ModuleStates:
        """The states by path, looked up anew: init_state() makes new objects."""
        assert self.found is not None
        self.found = self.found.refreshed(self.module)
        return self.found

    @property
    def holders(self) -> Any:
        return self.found

    def look_up(self) -> None:
        """Find the ``State`` objects that the module has now."""
        self.found = self._states

    def as_looked_up(self) -> bool:
        """Whether the module has the ``State`` objects that were found the last time."""
        found = self.found
        return found is not None and (found.linked(self.module) or found.refreshed(self.module) is found)

    def looked_through(self) -> list[Any] | None:
        """Dicts, lists and tuples that decide which ``State`` objects the module has, where nothing else does; else None."""
        return None if self.found is None else self.found.looked_through()

    def as_params(self, values: list[Any]) -> Any:
        """Parameters as the compiled functions take them, of values in the order of :attr:`param_states`."""
        assert self.found is not None
        return dict(zip(self.found.params, values, strict=True))

    def of_params(self, params: Any) -> list[Any]:
        """The values again of which :meth:`as_params` makes the parameters."""
        assert self.found is not None
        return list(map(params.__getitem__, self.found.params))

    def as_states(self, values: list[Any]) -> Any:
        """States as the compiled functions take them, of values in the order of :attr:`state_objects`."""
        assert self.found is not None
        return dict(zip(self.found.states, values, strict=True))

    def of_states(self, states: Any) -> list[Any]:
        """The values again of which :meth:`as_states` makes the states."""
        assert self.found is not None
        return list(map(states.__getitem__, self.found.states))

    @property
    def param_states(self) -> dict[str, Any]:
        return dict(self._states.params)

    def by_param_state(self, grads: Any) -> dict[str, Any]:
        return grads

    def of_param_states(self, values: dict[str, Any]) -> Any:
        """What is given by parameter, with the structure of :meth:`params`."""
        return values

    @property
    def state_objects(self) -> dict[str, Any]:
        return dict(self._states.states)

    def by_state(self, values: Any) -> dict[str, Any]:
        return values

    def params(self, looked_up: bool = False) -> Any:
        found = self.found if looked_up and self.found is not None else self._states
        return dict(zip(found.params, read_values(found.params.values()), strict=True))

    def set_params(self, values: Any) -> None:
        for path, state in self._states.params.items():
            state.value = values[path]

    def states(self) -> Any:
        states = self._states.states
        return dict(zip(states, read_values(states.values()), strict=True))

    def set_states(self, values: Any) -> None:
        assert self.found is not None  # and looked up by the states() of the same call
        states = self.found.states
        write_values(states.values(), [values[path] for path in states])

    def remember(self) -> None:
        self.initial = {p: s.value for p, s in self._states.states.items() if short_lived(s)}

    def hidden_states(self) -> dict[str, Any]:
        """The ``State`` objects that go back to initial values at a reset."""
        return {p: s for p, s in self._states.states.items() if short_lived(s)}

    def kinds(self) -> Hashable:
        """Shapes and dtypes of all that the module holds beside its parameters."""
        held = {
            p: v for p, (s, v) in snapshot(self.module).items() if not isinstance(s, brainstate.ParamState)
        }
        return kinds_of(held)

    def restart(self) -> None:
        for path, value in self.initial.items():
            self._states.states[path].value = value

    def to_resize(self) -> list[Any]:
        """The states whose batch axis :meth:`resize` has to be told: none, since the module makes them itself."""
        return []

    def resize(self, batch_size: int, along: Sequence[int | None]) -> None:
        initialise(self.module, batch_size, keep=True)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """States, what was found and initial values are afterwards as they were."""
        put_back = self._as_now()
        try:
            yield
        finally:
            put_back()

    @contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """An exception leaves states, what was found and initial values as they were."""
        put_back = self._as_now()
        try:
            yield
        except BaseException:
            put_back()
            raise

    def _as_now(self) -> Callable[[], None]:
        """What makes the module again what it is now."""
        before, found, initial = snapshot(self.module), self.found, self.initial
        outside = {} if found is None else {s: s.value for s in found.states.values()}

        def put_back() -> None:
            restore(self.module, before)
            for state, value in outside.items():
                state.value = value
            self.found, self.initial = found, initial

        return put_back

    @contextmanager
    def resized(self, batch_size: int, along: Sequence[int | None]) -> Iterator[None]:
        """Meanwhile the states are shapes for another batch size."""
        found = self.found
        shapes = abstract_states(self.module, batch_size)
        held = {p: s for p, s in self._states.states.items() if p in shapes}
        before = {p: s.value for p, s in held.items()}
        try:
            for path, state in held.items():
                state.restore_value(shapes[path])
            yield
        finally:
            for path, state in held.items():
                state.restore_value(before[path])
            self.found = found

    def copied(self, memo: dict[int, Any]) -> ModuleAccess:
        """The same for a deep copy of the module; states outside of it are shared."""
        module = copy.deepcopy(self.module, memo)
        for state, _ in snapshot(module).values():
            state.restore_value(jax.tree.map(own_copy, state.value))
        assert self.found is not None
        new = ModuleAccess(module, self.found.refreshed(module))
        new.initial = self.initial
        return new


@dataclasses.dataclass(eq=False)
class FunctionAccess:
    """A plain function with its parameters and state, kept in brainstate states so that transformations see them."""

    model: FunctionModel
    found: None = None
    initial_state: brainstate.LongTermState = dataclasses.field(default_factory=lambda: _initial(None))

    @property
    def initial(self) -> Any:
        return self.initial_state.value

    @initial.setter
    def initial(self, values: Any) -> None:
        self.initial_state.value = values

    @property
    def source(self) -> Any:
        return self.model.source

    def initialise(self, batch_size: int) -> None:
        """Nothing: the state is given with the function."""

    def trace(self, inputs: tuple[Any, ...]) -> TracedStep:
        try:
            return trace_function(self.model, inputs)
        except EtcompileError:
            raise
        except Exception as error:
            known = known_cause(error, f"one step of {self.model.name}")
            if known is not None:
                raise known from error
            shapes = jax.tree.map(lambda v: f"{jnp.result_type(v)}{list(jnp.shape(v))}", inputs)
            raise InputError(
                f"one step of {self.model.name} fails on these inputs.",
                where=user_frame(error),
                got=f"inputs {shapes}; {type(error).__name__}: {error}",
                hint=shape_hint(error, inputs)
                or "check feature size, rank and dtype of the inputs, and call the function once by itself.",
            ) from error

    @property
    def holders(self) -> Any:
        return self.model

    def look_up(self) -> None:
        """Nothing: they stay the same."""

    def as_looked_up(self) -> bool:
        return True

    def looked_through(self) -> list[Any] | None:
        return []

    def as_params(self, values: list[Any]) -> Any:
        return values[0]

    def of_params(self, params: Any) -> list[Any]:
        return [params]

    def as_states(self, values: list[Any]) -> Any:
        return values[0]

    def of_states(self, states: Any) -> list[Any]:
        return [states]

    @property
    def param_states(self) -> dict[str, Any]:
        return {"params": self.model.param_state}

    def by_param_state(self, grads: Any) -> dict[str, Any]:
        return {"params": grads}

    def of_param_states(self, values: dict[str, Any]) -> Any:
        return values["params"]

    @property
    def state_objects(self) -> dict[str, Any]:
        return {"state": self.model.state_state}

    def by_state(self, values: Any) -> dict[str, Any]:
        return {"state": values}

    def params(self, looked_up: bool = False) -> Any:
        return self.model.params

    def set_params(self, values: Any) -> None:
        self.model.params = values

    def states(self) -> Any:
        return self.model.state

    def set_states(self, values: Any) -> None:
        self.model.state = values

    def remember(self) -> None:
        state, lasting = self.model.state, self.model.lasting
        self.initial = {k: v for k, v in state.items() if k not in lasting} if lasting else state

    def _restarted(self) -> Any:
        """The initial state; what lasts is as it is."""
        return {**self.model.state, **self.initial} if self.model.lasting else self.initial

    def hidden_states(self) -> dict[str, Any]:
        """The ``State`` object that goes back to its initial value at a reset."""
        return {"": self.model.state_state}

    def kinds(self) -> Hashable:
        """Shapes and dtypes of the state."""
        return kinds_of(self.model.state)

    def restart(self) -> None:
        self.model.state = self._restarted()

    def to_resize(self) -> list[Any]:
        """The states whose batch axis :meth:`resize` has to be told."""
        return jax.tree.leaves(self.model.state)

    def resize(self, batch_size: int, along: Sequence[int | None]) -> None:
        leaves, tree = jax.tree.flatten(self._restarted())
        resized = [
            v if axis is None else _resized(v, batch_size, axis)
            for v, axis in zip(leaves, along, strict=True)
        ]
        self.model.state = jax.tree.unflatten(tree, resized)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """The state and its initial value are afterwards as they were."""
        before, initial = self.model.state, self.initial
        try:
            yield
        finally:
            self.model.state, self.initial = before, initial

    @contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """An exception leaves the state and its initial value as they were."""
        before, initial = self.model.state, self.initial
        try:
            yield
        except BaseException:
            self.model.state, self.initial = before, initial
            raise

    @contextmanager
    def resized(self, batch_size: int, along: Sequence[int | None]) -> Iterator[None]:
        """Meanwhile the state is shapes for another batch size."""
        before = self.model.state
        leaves, tree = jax.tree.flatten(before)
        shapes = [
            v if axis is None else jax.ShapeDtypeStruct(_shape_at(v.shape, axis, batch_size), v.dtype)
            for v, axis in zip(leaves, along, strict=True)
        ]
        self.model.state = jax.tree.unflatten(tree, shapes)
        try:
            yield
        finally:
            self.model.state = before

    def copied(self, memo: dict[int, Any]) -> FunctionAccess:
        """The same with parameters and state of its own."""
        model = self.model
        new = FunctionAccess(function_model(model.fn, model.params, model.state, model.lasting, model.source))
        new.initial = self.initial
        return new


def _initial(values: Any) -> brainstate.LongTermState:
    return brainstate.LongTermState(values, name="initial values")


def _shape_at(shape: tuple[int, ...], axis: int, batch_size: int) -> tuple[int, ...]:
    return (*shape[:axis], batch_size, *shape[axis + 1 :])


def _resized(value: Any, batch_size: int, axis: int) -> Any:
    """Another number of equal entries along an axis."""
    entries = np.asarray(value)
    first = entries.take([0], axis)
    if entries.shape[axis] != batch_size and not (entries == first).all():
        raise CarryError(
            "the initial state has rows that differ, so it cannot be resized.",
            got=f"batch_size={batch_size} for a state of shape {entries.shape}",
            hint="build the model again with from_function(fn, params, state) for this batch size.",
        )
    return jnp.broadcast_to(
        value[(slice(None),) * axis + (slice(1),)], _shape_at(entries.shape, axis, batch_size)
    )
