"""What a model reads from ``brainstate.environ``: an input of the compiled step, or part of what a compilation is for.

A step is traced once, so an entry of the environment that it read would stay what it was. Arrays, and the entries that change
with the step (``t``, ``i``), are therefore replaced by tracers while the model is traced and become inputs, which every call
takes from the environment around it. Everything else that was read, ``fit``, ``dt`` or an entry that was not there, is
remembered by its value: where it is another one at a call, the step is compiled again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

from etcompile.errors import InputError, ModelError
from etcompile.frontend.jaxpr import is_traced

__all__ = [
    "CONCRETE",
    "NOTHING",
    "Environment",
    "EnvironmentInput",
    "WithEnvironment",
    "at_one_step",
    "entries",
    "examples",
    "recorded",
    "told",
    "traced_with",
]

#: How an entry that a sequence counts up advances from step to step, by name.
_COUNTED = {brainstate.environ.I: "1", brainstate.environ.T: "dt"}

#: Entries that say how a model is built, not what it reads: always known when it is traced.
_SWITCHES = {"dt", "fit", "precision", "platform", "host_device_count", "mode", "jit_error_check"}


class _Absent:
    def __repr__(self) -> str:
        return "not set"


#: The value of an entry that the model asked for and that was not set.
ABSENT = _Absent()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WithEnvironment:
    """Inputs of a step together with the arrays that it takes from the environment."""

    given: tuple[Any, ...]
    environment: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class EnvironmentInput:
    """An entry of the environment that is an input of the step.

    Attributes
    ----------
    name : str
    structure : PyTreeDef
        Structure of the entry, unit included.
    avals : tuple of ShapeDtypeStruct
        Of its leaves, for one step.
    advances : str
        What a sequence adds from step to step: ``"1"``, ``"dt"``, or nothing.
    """

    name: str
    structure: Any
    avals: tuple[Any, ...]
    advances: str

    def fits(self, value: Any) -> bool:
        """Whether a value of the entry, or a sequence of them, can take the place of the one that was traced."""
        leaves, structure = jax.tree.flatten(value)
        if structure != self.structure:
            return False
        return all(_fits(leaf, aval) for leaf, aval in zip(leaves, self.avals, strict=True))

    def leaves(self, value: Any, steps: int | None, dt: Any) -> list[Any]:
        """Arrays of the entry for one step, or with time on axis 0 for several."""
        found = jax.tree.leaves(value)
        ahead = [jnp.ndim(v) - len(a.shape) for v, a in zip(found, self.avals, strict=True)]
        if any(ahead):
            length = {jnp.shape(v)[0] for v, n in zip(found, ahead, strict=True) if n}
            if steps is None or length != {steps}:
                raise InputError(
                    f"the entry {self.name!r} of brainstate.environ does not fit this call.",
                    got=f"values of {sorted(length)} steps",
                    expected="its value at this step"
                    if steps is None
                    else f"its value at the first step, or one for each of the {steps} steps",
                )
        elif steps is not None and self.advances and steps > 1:
            found = jax.tree.leaves(self._counted(value, steps, dt))
            ahead = [1] * len(found)
        arrays = []
        for leaf, aval, n in zip(found, self.avals, ahead, strict=True):
            array = _as_dtype(leaf, aval.dtype)
            if steps is not None and not n:
                array = jnp.broadcast_to(array, (steps, *aval.shape))
            arrays.append(array)
        return arrays

    def _counted(self, value: Any, steps: int, dt: Any) -> Any:
        if self.advances == "dt" and dt is ABSENT:
            raise InputError(
                "the time 't' of brainstate.environ advances by dt, which is not set.",
                got=f"a sequence of {steps} steps, no 'dt'",
                expected="a time step",
                hint="brainstate.environ.set(dt=0.1 * saiunit.ms), or give the time of every step: "
                "brainstate.environ.context(t=ts).",
            )
        (aval,) = self.avals if len(self.avals) == 1 else (None,)
        if aval is None:
            raise InputError(
                f"the entry {self.name!r} of brainstate.environ is not one number.",
                got=str(self.structure),
                expected="a number, perhaps with a unit",
            )
        number = jnp.arange(steps, dtype=aval.dtype).reshape(-1, *(1,) * len(aval.shape))
        return value + number * (dt if self.advances == "dt" else 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Environment:
    """What one compilation read from the environment.

    Attributes
    ----------
    inputs : tuple of EnvironmentInput
        Their arrays follow the user's inputs.
    switches : dict of str to object
        All else that was read, by its value then.
    kinds : tuple of EnvironmentInput
        Entries of which only shape and dtype matter.
    """

    inputs: tuple[EnvironmentInput, ...] = ()
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kinds: tuple[EnvironmentInput, ...] = ()

    @property
    def reads(self) -> bool:
        """Whether anything was read."""
        return bool(self.inputs or self.switches or self.kinds)

    def differs(self) -> str | None:
        """The name of an entry that is now another than the one that was compiled for; None if there is none."""
        if not self.reads:
            return None
        now = entries()
        for entry in self.inputs:
            if entry.name not in now or not entry.fits(now[entry.name]):
                return entry.name
        for entry in self.kinds:
            if entry.name in now and not entry.fits(now[entry.name]):
                return entry.name
        for name, value in self.switches.items():
            if not _same(name, value, now.get(name, ABSENT)):
                return name
        return None

    def misses(self, name: str) -> bool:
        """Whether a switch that was set is not set now."""
        return self.switches.get(name, ABSENT) is not ABSENT and name not in entries()

    def values(self, steps: int | None = None) -> tuple[Any, ...]:
        """Arrays of the inputs from the environment as it is now; with ``steps``, for each of so many steps."""
        if not self.inputs:
            return ()
        now = entries()
        dt = now.get("dt", ABSENT)
        return tuple(leaf for entry in self.inputs for leaf in entry.leaves(now[entry.name], steps, dt))

    def shapes(self) -> tuple[Any, ...]:
        """Shapes of the inputs for one step."""
        return tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for entry in self.inputs for a in entry.avals)

    def around(self, leaves: tuple[Any, ...]) -> contextlib.AbstractContextManager[Any]:
        """The environment with these arrays as the inputs: those of one step of a sequence."""
        return brainstate.environ.context(**self.named(leaves))

    def named(self, leaves: tuple[Any, ...]) -> dict[str, Any]:
        """Entries by name from the arrays of the inputs."""
        rest = iter(leaves)
        return {
            entry.name: jax.tree.unflatten(entry.structure, [next(rest) for _ in entry.avals])
            for entry in self.inputs
        }

    def completed(self, leaves: tuple[Any, ...], given: Mapping[str, Any]) -> dict[str, Any]:
        """The entries that were traced, of these arrays; zeros for those that the trace did not use."""
        unused = {name: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), v) for name, v in given.items()}
        return {**unused, **self.named(leaves)}

    def supplied(self) -> contextlib.AbstractContextManager[Any]:
        """The environment with what is missing from it as it was when this was compiled: shapes can be found anywhere."""
        now = entries()
        zeros = self.named(tuple(jnp.zeros(a.shape, a.dtype) for a in self.shapes()))
        then = {**zeros, **{name: v for name, v in self.switches.items() if v is not ABSENT}}
        return brainstate.environ.context(**{name: v for name, v in then.items() if name not in now})


#: What JAX raises where a value is needed that is known only when the program runs.
CONCRETE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)

#: A step without an environment.
NOTHING = Environment()


def entries() -> dict[str, Any]:
    """The entries of the environment as they are now."""
    return brainstate.environ.all()


def examples(fixed: bool = False) -> dict[str, Any]:
    """Entries that can be inputs, as shapes; with ``fixed``, only those that change with the step."""
    now = entries()
    reserved = _SWITCHES.union(brainstate.environ.list_registered_behaviors())
    return {
        name: jax.tree.map(_abstract, _advancing(name, value, now))
        for name, value in now.items()
        if isinstance(name, str)
        and name not in reserved
        and _is_numeric(value)
        and (name in _COUNTED or (not fixed and _has_arrays(value)))
    }


def at_one_step(steps: int | None) -> AbstractContextManager[Any]:
    """The environment as one step of a sequence sees it: a count or time with a value for each step has one."""
    firsts = {
        name: jax.tree.map(lambda v: v[0], value)
        for name, value in entries().items()
        if name in _COUNTED
        and steps is not None
        and all(np.shape(v)[:1] == (steps,) for v in jax.tree.leaves(value))
    }
    return brainstate.environ.context(**firsts) if firsts else nullcontext()


def traced_with(trace: Callable[[dict[str, Any]], Any]) -> tuple[Any, dict[str, Any], set[str]]:
    """What ``trace`` returns, given shapes of the entries that shall be inputs; those shapes; and the entries that it read.

    An array that the model needs to know while it is traced, as a size or an index, is no input: the model is traced again, for
    the values of all arrays but those that change with the step.
    """
    given, fewer = examples(), examples(fixed=True)
    try:
        with watched() as asked:
            return trace(given), given, asked
    except CONCRETE:
        if fewer.keys() == given.keys():
            raise
    with watched() as asked:
        return trace(fewer), fewer, asked


def recorded(asked: set[str], given: Mapping[str, Any], used: Callable[[int], bool]) -> Environment:
    """The record of a trace: ``asked`` are the entries it read, ``given`` those that were traced, as shapes.

    ``used`` tells whether the trace used the array number k of these.
    """
    now = entries()
    inputs, kinds, at = [], [], 0
    for name, value in sorted(given.items()):
        leaves, structure = jax.tree.flatten(value)
        entry = EnvironmentInput(name, structure, tuple(leaves), _COUNTED.get(name, ""))
        if any(used(at + k) for k in range(len(leaves))):
            inputs.append(entry)
        elif name in asked:
            kinds.append(entry)
        at += len(leaves)
    switches = {name: _kept(name, now.get(name, ABSENT)) for name in sorted(asked.difference(given))}
    return Environment(tuple(inputs), switches, tuple(kinds))


def told(value: Any) -> str:
    """A value of an entry, shortly."""
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


# -- what is read -----------------------------------------------------------------------------------------------------


class _Entries(ChainMap):
    """The entries that are set, noting which are asked for."""

    def __init__(self, entries: Any, note: Callable[[Any], None]) -> None:
        super().__init__(entries)
        self._note = note

    def __contains__(self, key: Any) -> bool:
        self._note(key)
        return super().__contains__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)


class _Watched:
    """A stand-in for brainstate's environment that notes what is read from it; what the model itself sets is its own."""

    def __init__(self, state: Any, asked: set[str]) -> None:
        self._state = state
        depth = {key: len(stack) for key, stack in state.contexts.items()}

        def note(key: Any) -> None:
            if isinstance(key, str) and len(state.contexts.get(key, ())) <= depth.get(key, 0):
                asked.add(key)

        self.settings = _Entries(state.settings, note)
        self._contexts = note

    @property
    def contexts(self) -> Any:
        return _Stacks(self._state.contexts, self._contexts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


class _Stacks(_Entries):
    """The entries that are set for a while; a stack for each."""

    def __getitem__(self, key: Any) -> Any:
        return self.maps[0][key]


_lock = threading.RLock()


@contextlib.contextmanager
def watched() -> Iterator[set[str]]:
    """Names of the entries of the environment that are read meanwhile.

    Where brainstate keeps its entries in another way than this knows, all that are set count as read.
    """
    asked: set[str] = set()
    module = brainstate.environ
    with _lock:
        state, everything = getattr(module, "_ENV_STATE", None), module.all
        if not (hasattr(state, "settings") and hasattr(state, "contexts")):
            asked.update(name for name in entries() if isinstance(name, str))
            yield asked
            return

        def all_of(*, env: Any = None) -> Any:
            found = everything(env=env)
            if env is None:
                asked.update(name for name in found if isinstance(name, str))
            return found

        setattr(module, "_ENV_STATE", _Watched(state, asked))  # noqa: B010
        module.all = all_of
        try:
            yield asked
        finally:
            setattr(module, "_ENV_STATE", state)  # noqa: B010
            module.all = everything


# -- values -----------------------------------------------------------------------------------------------------------


def _is_numeric(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(
        (isinstance(v, (int, float, complex)) and not isinstance(v, bool)) or _is_array(v) for v in leaves
    )


def _is_array(value: Any) -> bool:
    """Whether a value is an array of numbers or keys; a single truth value is a switch."""
    if isinstance(value, (jax.Array, jax.ShapeDtypeStruct)):
        return value.shape != () or value.dtype != jnp.bool_ or is_traced(value)
    return isinstance(value, (np.ndarray, np.number)) and value.dtype != object


def _has_arrays(value: Any) -> bool:
    return any(isinstance(v, (jax.Array, np.ndarray)) for v in jax.tree.leaves(value))


def _advancing(name: str, value: Any, now: Mapping[str, Any]) -> Any:
    """A time in the dtype that it has once dt was added."""
    dt = now.get("dt")
    if _COUNTED.get(name) != "dt" or dt is None:
        return value
    try:
        return value + 0 * dt
    except Exception:  # the model meets the same misfit, and says where
        return value


def _abstract(value: Any) -> jax.ShapeDtypeStruct:
    aval = value if isinstance(value, jax.ShapeDtypeStruct) else jax.typeof(value)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def _fits(value: Any, aval: Any) -> bool:
    if not (_is_array(value) or isinstance(value, (int, float, complex))):
        return False
    shape = jnp.shape(value)
    if shape != aval.shape and shape[1:] != aval.shape:
        return False
    given = _abstract(value)
    if given.dtype == aval.dtype:
        return True
    if any(jnp.issubdtype(a.dtype, jax.dtypes.extended) for a in (given, aval)):
        return False
    integers = jnp.issubdtype(given.dtype, jnp.integer) and jnp.issubdtype(aval.dtype, jnp.integer)
    return integers or jnp.promote_types(given.dtype, aval.dtype) == aval.dtype or given.weak_type


def _as_dtype(value: Any, dtype: Any) -> Any:
    array = value if isinstance(value, jax.Array) else jnp.asarray(value)
    return array if array.dtype == dtype else array.astype(dtype)


def _kept(name: str, value: Any) -> Any:
    """A copy of a value to compare with later ones."""
    if any(is_traced(v) for v in jax.tree.leaves(value)):
        raise _traced(name)
    return jax.tree.map(lambda v: np.array(v) if isinstance(v, np.ndarray) else v, value)


def _traced(name: str) -> ModelError:
    return ModelError(
        f"the entry {name!r} of brainstate.environ is known only inside of a transformation.",
        got="a traced value",
        expected="a value: the step is compiled for it",
        hint=f"set {name!r} outside of jit, vmap or a loop: brainstate.environ.set({name}=...), or "
        f"brainstate.environ.context({name}=...) around the transformed function.",
    )


def _same(name: str, then: Any, now: Any) -> bool:
    if then is ABSENT or now is ABSENT:
        return then is now
    leaves, structure = jax.tree.flatten(then)
    found, other = jax.tree.flatten(now)
    if any(is_traced(v) for v in found):
        raise _traced(name)
    return structure == other and all(_equal(a, b) for a, b in zip(leaves, found, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (jax.Array, np.ndarray)) or isinstance(b, (jax.Array, np.ndarray)):
        kinds = [getattr(v, "dtype", type(v)) for v in (a, b)]
        return kinds[0] == kinds[1] and np.array_equal(np.asarray(a), np.asarray(b))
    if a is b:
        return True
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # objects that cannot be compared are others
        return False
