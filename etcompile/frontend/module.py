"""brainstate modules as models: the only module that uses brainstate's tracing."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
from brainstate._state import TRACE_CONTEXT

from etcompile.errors import EtcompileError, InputError, ModelError
from etcompile.frontend.environment import recorded, traced_with
from etcompile.frontend.explain import known_cause
from etcompile.frontend.given import shape_hint
from etcompile.frontend.jaxpr import (
    in_transformation,
    inputs_used,
    is_staged,
    is_traced,
    looks_into_results,
    run_jaxpr,
    source_line,
)
from etcompile.frontend.plain_attributes import plain_attributes, refuse_assigned
from etcompile.frontend.step_model import TracedStep
from etcompile.frontend.user_code import user_frame

__all__ = ["ModuleStates", "is_module", "trace_module"]


_has_state_hooks = brainstate.has_state_hooks

#: Owners, names of what they hold, and what that is.
_Links = tuple[list[Any], list[Any], list[Any]]


def is_module(model: Any) -> bool:
    return isinstance(model, brainstate.nn.Module)


@dataclasses.dataclass(frozen=True, eq=False)
class ModuleStates:
    """The ``State`` objects of a module by dotted path: trained parameters, and everything else the step touches.

    ``inside`` has the paths of those that are attributes of the module, in parts.
    """

    params: dict[str, Any]
    states: dict[str, Any]
    inside: Mapping[str, tuple[str, ...]]
    #: What lies between the model that was looked at last and its ``State`` objects: owner, name and value of every attribute;
    #: container, key and value of every entry of a list, tuple or dict, or None. None before the first look.
    _links: tuple[_Links, _Links | None] | None = dataclasses.field(default=None, init=False, repr=False)

    def linked(self, model: Any) -> bool:
        """Whether it is clear at once that these are the ``State`` objects that the model holds now."""
        if self._links is None:
            return False
        (owners, names, found), inside = self._links
        try:  # at every call: in C
            return (
                bool(owners)
                and owners[0] is model
                and all(map(operator.is_, map(getattr, owners, names), found))
                and (
                    inside is None
                    or all(map(operator.is_, map(operator.getitem, inside[0], inside[1]), inside[2]))
                )
            )
        except (AttributeError, LookupError):
            return False

    def looked_through(self) -> list[Any] | None:
        """Dicts, lists and tuples that decide which ``State`` objects these are, where nothing else does; else None."""
        if self._links is None:
            return None
        attributes, inside = self._links
        for owner, name, found in zip(*attributes, strict=True):
            if getattr(owner, "__dict__", {}).get(name) is not found:  # a property, an attribute of its class
                return None
        held = [*map(vars, attributes[0]), *(inside[0] if inside else ())]
        return list({id(one): one for one in held}.values())

    def refreshed(self, model: Any) -> ModuleStates:
        """The same paths with the ``State`` objects that the model holds now."""
        if self.linked(model):
            return self
        for owner, held in self._places:
            there = _lies_at(model, owner)
            if there is None or not all(_part(there, name) is state for name, state in held):
                break
        else:
            object.__setattr__(self, "_links", self._links_from(model))
            return self
        now = {".".join(map(str, path)): state for path, state in model.states().items()}
        if all(now.get(p, s) is s for held in (self.params, self.states) for p, s in held.items()):
            return self
        return ModuleStates(
            {p: now.get(p, s) for p, s in self.params.items()},
            {p: now.get(p, s) for p, s in self.states.items()},
            self.inside,
        )

    def _links_from(self, model: Any) -> tuple[_Links, _Links | None]:
        """:attr:`_links` for a model."""
        attributes: _Links = [], [], []
        entries: _Links = [], [], []
        seen: set[tuple[int, Any]] = set()

        def follow(there: Any, part: str) -> Any:
            inside = _is_container(there)
            key = _index(there, part) if inside else part
            value = there[key] if inside else getattr(there, part)
            if (id(there), key) not in seen:
                seen.add((id(there), key))
                for column, one in zip(entries if inside else attributes, (there, key, value), strict=True):
                    column.append(one)
            return value

        for path, held in self._places:
            there = model
            for part in path:
                there = follow(there, part)
            for name, _ in held:
                follow(there, name)
        return attributes, entries if entries[0] else None

    @cached_property
    def _places(self) -> list[tuple[tuple[str, ...], list[tuple[str, Any]]]]:
        """Where the ``State`` objects of the model lie: what holds some, and their names there."""
        places: dict[tuple[str, ...], list[tuple[str, Any]]] = {}
        for path, state in {**self.params, **self.states}.items():
            if path in self.inside:
                *owner, name = self.inside[path]
                places.setdefault(tuple(owner), []).append((name, state))
        return list(places.items())


def _parts(model: Any, path: str) -> tuple[str, ...]:
    """The parts of a path of the model. Keys of a dict may have dots in them, as those of brainpy's projections have."""
    parts, owner, rest = [], model, path
    while rest:
        keys = map(str, owner) if isinstance(owner, dict) else ()
        longest = max((key for key in keys if f"{rest}.".startswith(f"{key}.")), key=len, default="")
        part = longest or rest.partition(".")[0]
        parts.append(part)
        owner, rest = _part(owner, part), rest[len(part) + 1 :]
    return tuple(parts)


def _lies_at(model: Any, parts: Sequence[str]) -> Any:
    """What lies at a path of the model, or None."""
    owner = model
    for part in parts:
        owner = _part(owner, part)
        if owner is None:
            return None
    return owner


def _part(owner: Any, name: str) -> Any:
    """An attribute, or what a container holds under a name; None where there is none."""
    try:
        return owner[_index(owner, name)] if _is_container(owner) else getattr(owner, name)
    except (AttributeError, LookupError, ValueError):
        return None


def initialise(model: Any, batch_size: int, keep: bool = False) -> None:
    """Create or re-create the model's states for a batch size, as ``brainstate.nn.init_all_states`` does.

    With ``keep`` the ``State`` objects stay, with the new values in them: functions that the user compiled around them go on with
    these. Trained parameters keep their values then, and so do long-term states of the same shape.
    """
    before = snapshot(model) if keep else {}
    try:
        brainstate.nn.init_all_states(model, batch_size=batch_size)
    except Exception as error:
        raise ModelError(
            f"the states of {type(model).__name__} cannot be initialised with batch_size={batch_size}.",
            got=f"{type(error).__name__}: {error}",
            expected="init_state(batch_size=None) methods that create every state",
        ) from error
    now = snapshot(model) if keep else {}
    for path, (state, value) in now.items():
        old, old_value = before.get(path, (None, None))
        if old is None or type(old) is not type(state):
            continue
        if state is not old and not _put(model, path, old):
            continue
        old.value = old_value if _outlives(old, old_value, value) else value


def _outlives(state: Any, old: Any, new: Any) -> bool:
    """Whether a value goes on where the states around it are made anew."""
    if isinstance(state, brainstate.ParamState):
        return True
    same = jax.tree.structure(old) == jax.tree.structure(new) and all(
        jnp.shape(a) == jnp.shape(b) for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    )
    return same and not short_lived(state)


def abstract_states(model: Any, batch_size: int) -> dict[str, Any]:
    """Shapes that the states would have for a batch size, by path; the model stays as it is."""
    before = snapshot(model)

    def values() -> dict[str, Any]:
        initialise(model, batch_size)
        now = snapshot(model)
        return {p: value for p, (state, value) in now.items() if not isinstance(state, brainstate.ParamState)}

    try:
        return dict(brainstate.transform.eval_shape(values))
    finally:
        restore(model, before)


def snapshot(model: Any) -> dict[str, tuple[Any, Any]]:
    """The model's ``State`` objects and their values by path."""
    return {".".join(map(str, path)): (state, state.value) for path, state in model.states().items()}


def restore(model: Any, before: dict[str, tuple[Any, Any]]) -> None:
    """Undo a failed initialisation: every path has its old ``State`` object with its old value again."""
    for path, state in snapshot(model).items():
        if path not in before:
            _forget(model, path, None)
        elif before[path][0] is not state[0]:
            _forget(model, path, before[path][0])
    for state, value in before.values():
        state.value = value


def recording() -> bool:
    """Whether brainstate follows which states are read and written."""
    return bool(TRACE_CONTEXT.state_stack)


def are_followed() -> bool:
    """Whether a transformation runs, or somebody is told of the reads or writes of all states."""
    return in_transformation() or recording() or _has_state_hooks()


def gives_nothing_away() -> bool:
    """Whether all buffers have to stay: who follows states may put back what they held, and JAX may run a function once more."""
    return recording() or looks_into_results()


def not_recorded(values: Any) -> bool:
    """Whether states cannot be written, since a transformation of which brainstate knows nothing makes what is written."""
    if not in_transformation() or recording():
        return False
    return is_staged() or any(is_traced(v) for v in jax.tree.leaves(values))


def short_lived(state: Any) -> bool:
    """Whether a state belongs to the running sequence and goes back to its initial value at a reset."""
    return not isinstance(state, (brainstate.LongTermState, brainstate.random.RandomState))


def trace_module(model: Any, inputs: tuple[Any, ...]) -> tuple[TracedStep, ModuleStates]:
    """Trace ``model(*inputs)`` to a jaxpr with all the states it reads or writes."""
    name = type(model).__name__
    traced_inputs = jax.tree.map(_example, inputs)
    before = {".".join(map(str, path)): state for path, state in model.states().items()}
    held = plain_attributes(model)
    try:
        fn, given, asked = _traced_with_environment(model, name, traced_inputs)
    except EtcompileError:
        raise
    except Exception as error:
        raise (known_cause(error, f"one step of {name}") or _explained(model, name, inputs, error)) from error
    refuse_assigned(name, held)
    arguments = (given, *traced_inputs)
    closed = fn.get_jaxpr(*arguments)
    _refuse_created_states(name, model, before)
    found = fn.get_states(*arguments)
    paths, own = _own_states(model, before, found)
    for path, state, written in zip(paths, found, fn.get_state_trace(*arguments).been_writen, strict=True):
        if written and path in own.params:
            raise ModelError(
                f"{name} writes its trained parameter {path} during a step.",
                where=_written_at(closed, found, state),
                got=f"an assignment to {path}.value",
                expected="parameters that only the optimiser changes",
                hint="keep values that change by themselves in a HiddenState, ShortTermState or LongTermState.",
            )
    reads = inputs_used(closed)
    environment = recorded(asked, given, lambda k: k in reads)
    params, states, args = (
        jax.tree.map(_shape, tree) for tree in (_values(own.params), _values(own.states), traced_inputs)
    )
    run = _on_dicts(closed, paths, found, lambda moving: environment.completed(moving, given))
    leaves, tree = jax.tree.flatten((params, states, args, environment.shapes()))
    ordered = jax.make_jaxpr(lambda *leaves: run(*jax.tree.unflatten(tree, leaves)))(*leaves)
    out_shape, _ = fn.get_out_shapes(*arguments)
    owners = {p: type(s).__name__ for p, s in own.states.items()}
    out = jax.tree.map(_shape, out_shape)
    return TracedStep(name, ordered, params, states, args, out, owners, environment), own


def _values(states: Mapping[str, Any]) -> dict[str, Any]:
    return {path: state.value for path, state in states.items()}


def _own_states(
    model: Any, before: Mapping[str, Any], found: Sequence[Any]
) -> tuple[list[str], ModuleStates]:
    """Paths of the states that a step reads or writes, and these states with all parameters, by path."""
    by_id = {id(state): path for path, state in before.items()}
    paths = [by_id.get(id(state)) or _outside_path(state, k) for k, state in enumerate(found)]
    used = dict(zip(paths, found, strict=True))
    params = {p: s for p, s in {**before, **used}.items() if isinstance(s, brainstate.ParamState)}
    states = {p: s for p, s in used.items() if p not in params}
    inside = {path: _parts(model, path) for path in before}
    return paths, ModuleStates(dict(sorted(params.items())), dict(sorted(states.items())), inside)


def _on_dicts(
    closed: Any, paths: Sequence[str], found: Sequence[Any], around: Callable[[Any], Any]
) -> Callable[..., list[Any]]:
    """The traced step as a function of parameters and states by path: leaves of its outputs, then of the new states."""
    counts = [len(jax.tree.leaves(s.value)) for s in found]

    def run(params: dict[str, Any], states: dict[str, Any], args: Any, moving: Any) -> list[Any]:
        values = [params[p] if p in params else states[p] for p in paths]
        results = run_jaxpr(closed, *jax.tree.leaves((around(moving), args, values)))
        at = len(results) - sum(counts)
        outputs, new = results[:at], {}
        for path, count in zip(paths, counts, strict=True):
            new[path] = results[at : at + count]
            at += count
        return [*outputs, *(leaf for p in sorted(states) for leaf in new[p])]

    return run


def _traced_with_environment(
    model: Any, name: str, inputs: tuple[Any, ...]
) -> tuple[Any, dict[str, Any], set[str]]:
    """The traced function ``(environment, *inputs)``, shapes of what it was given of the environment, and what it asked for."""

    def with_entries(given: dict[str, Any]) -> Any:
        def run(around: dict[str, Any], *args: Any) -> Any:
            with brainstate.environ.context(**around):
                return model(*args)

        fn = brainstate.transform.StatefulFunction(run, return_only_write=False, name=name)
        fn.make_jaxpr(given, *inputs)
        return fn

    return traced_with(with_entries)


def _example(value: Any) -> Any:
    return value if isinstance(value, (jax.Array, jax.ShapeDtypeStruct)) else jnp.asarray(value)


def _shape(value: Any) -> Any:
    return jax.ShapeDtypeStruct(
        jnp.shape(value), jnp.result_type(value) if not hasattr(value, "dtype") else value.dtype
    )


def _outside_path(state: Any, k: int) -> str:
    """Name of a state that the step uses but that is no attribute of the model (a global random state, a closure)."""
    name = getattr(state, "name", None)
    if isinstance(state, brainstate.random.RandomState):
        return "random" if state is brainstate.random.DEFAULT else f"random{k}"
    return f"outside.{name or k}"


def _refuse_created_states(name: str, model: Any, before: dict[str, Any]) -> None:
    after = {".".join(map(str, path)): state for path, state in model.states().items()}
    created = [p for p, s in after.items() if before.get(p) is not s]
    if created:
        where = source_line(getattr(after[created[0]], "source_info", None))
        for path in created:
            _forget(model, path, before.get(path))
        raise ModelError(
            f"{name} creates state {created[0]} during a step.",
            where=where,
            got=f"a new {type(after[created[0]]).__name__} made in update()",
            expected="every state to exist before the first step",
            hint="create it in __init__() or init_state().",
        )


def _forget(model: Any, path: str, old: Any) -> None:
    """Undo an attribute that a failed trace left on the model."""
    try:
        _put(model, path, old)
    except (AttributeError, KeyError, IndexError, TypeError):
        return


def _put(model: Any, path: str, state: Any) -> bool:
    """Make ``state`` what lies at a path of the model (None: nothing); False where that is in a tuple."""
    *parents, last = _parts(model, path)
    owner = model
    for part in parents:
        owner = owner[_index(owner, part)] if _is_container(owner) else getattr(owner, part)
    if isinstance(owner, tuple):
        return False
    if _is_container(owner):
        if state is None:
            del owner[_index(owner, last)]
        else:
            owner[_index(owner, last)] = state
    elif state is None:
        delattr(owner, last)
    else:
        setattr(owner, last, state)
    return True


def _is_container(owner: Any) -> bool:
    return isinstance(owner, (dict, list, tuple))


def _index(owner: Any, part: str) -> Any:
    """A key of a dict or an index of a list from its part of a path."""
    if not isinstance(owner, dict):
        return int(part)
    return part if part in owner else next((key for key in owner if str(key) == part), part)


def _written_at(closed: Any, found: Any, state: Any) -> str | None:
    """Source line of the operation that computes the new value of ``state``."""
    count = 0
    total = sum(len(jax.tree.leaves(s.value)) for s in found)
    outs = closed.jaxpr.outvars[len(closed.jaxpr.outvars) - total :]
    for other in found:
        n = len(jax.tree.leaves(other.value))
        if other is state:
            for eqn in closed.jaxpr.eqns:
                if any(v is o for v in eqn.outvars for o in outs[count : count + n]):
                    return source_line(eqn.source_info)
        count += n
    return None


def _explained(model: Any, name: str, inputs: tuple[Any, ...], error: Exception) -> EtcompileError:
    where = user_frame(error)
    shapes = (
        ", ".join(str(jax.tree.map(lambda v: f"{jnp.result_type(v)}{list(jnp.shape(v))}", x)) for x in inputs)
        or "none"
    )
    kind = InputError if isinstance(error, (TypeError, ValueError)) else ModelError
    hint = "check feature size, rank and dtype of the inputs and the batch size of the states; call the model once by itself."
    if not inputs:
        hint = "pass one example of every input of update() to compile(): etcompile.compile(model, x0)."
    states = model.states()
    if isinstance(error, AttributeError) and not any(
        not isinstance(s, brainstate.ParamState) for s in states.values()
    ):
        kind, hint = (
            ModelError,
            "initialise the states first: brainstate.nn.init_all_states(model, batch_size=...), or pass batch_size to compile().",
        )
    hint = shape_hint(error, inputs) or hint
    return kind(
        f"one step of {name} fails on these inputs.",
        where=where,
        got=f"inputs {shapes}; {type(error).__name__}: {error}",
        hint=hint,
    )
