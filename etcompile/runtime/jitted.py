"""Compiled functions whose large constants are arguments.

A model closes over arrays: the indices of a sparse matrix, a mask, positions that the compiler found. JAX writes what a jitted
function closes over into the compiled program, where a large array costs compile time and memory several times over, once in each
program. So a function is traced first; arrays above some kilobytes among what it closes over become its arguments, and
those that are alike are one array on the device, for all functions of a compilation.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

from etcompile.frontend.captured import Same
from etcompile.frontend.jaxpr import is_traced, run_jaxpr

__all__ = ["Around", "Constants", "Jitted", "MissingConstants", "NotSeen"]

Array = Any

#: Bytes; smaller arrays stay in the program, where XLA may compute with them.
_LARGE = 1 << 14

#: Large constants that a function around this one takes as its own arguments, by :data:`Key`.
_GIVEN: ContextVar[Mapping[Any, Array] | None] = ContextVar("given_constants", default=None)

#: Of a constant: what it holds.
Key = tuple[Any, ...]


class MissingConstants(Exception):
    """Constants that a function turned out to close over, and was not given as arguments: it has to be called with them."""

    def __init__(self, keys: Sequence[Key]) -> None:
        super().__init__(f"{len(keys)} constant(s)")
        self.keys = tuple(keys)


class NotSeen(Exception):
    """A function was to be called for arguments as some before, and JAX began to trace it for others."""


class Constants:
    """Large arrays that compiled functions close over, each once."""

    def __init__(self) -> None:
        self._arrays: dict[Key, Array] = {}
        self._known: dict[int, tuple[Any, Key]] = {}

    def __getitem__(self, key: Key) -> Array:
        return self._arrays[key]

    def key(self, value: Any) -> Key | None:
        """The key under which a constant is kept; None where it is small, or known only inside of a transformation."""
        if getattr(value, "nbytes", 0) < _LARGE or is_traced(value) or not _plain(value):
            return None
        if id(value) in self._known:
            return self._known[id(value)][1]
        array = np.ascontiguousarray(value)
        key = array.shape, str(array.dtype), hashlib.sha256(array.view(np.uint8).data).digest()
        if key not in self._arrays:
            free = isinstance(value, jax.Array) and not value.committed
            with (
                jax.ensure_compile_time_eval()
            ):  # bound to no device: it goes wherever the other arguments are
                self._arrays[key] = value if free else jnp.asarray(array)
        if isinstance(value, jax.Array):  # it cannot change, and while it is held here its id is its own
            self._known[id(value)] = value, key
        return key


def _plain(value: Any) -> bool:
    """Whether numpy can hold it, and it lies on one device."""
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return False
    return not isinstance(value, jax.Array) or len(value.devices()) == 1


class Jitted:
    """``fn`` jitted, with its large constants as arguments.

    Parameters
    ----------
    fn : callable
    constants : Constants
        Where they are kept.
    donate : tuple of int
        Arguments that it may give away.
    """

    def __init__(self, fn: Callable, constants: Constants, donate: tuple[int, ...] = ()) -> None:
        @functools.wraps(fn)
        def traced(*args: Any) -> Any:
            if self._again:
                raise NotSeen
            return fn(*args)

        self._again = False
        self._constants = constants
        self._keys: tuple[Key, ...] = ()
        self._plain: Any = jax.jit(traced, donate_argnums=donate)
        self._apart = jax.jit(self._with_constants, donate_argnums=tuple(k + 1 for k in donate))
        self._run: Callable = self._first

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def again(self, *args: Any) -> Any:
        """What it gives for arguments like those of an earlier call; raises :class:`NotSeen` where they are not."""
        self._again = True
        try:
            return self._run(*args)
        finally:
            self._again = False

    def _first(self, *args: Any) -> Any:
        """Decide, once, whether there is anything to set apart."""
        self._keys = tuple(filter(None, map(self._constants.key, self._plain.trace(*args).jaxpr.consts)))
        self._keys = tuple(dict.fromkeys(self._keys))
        self._run = self._called if self._keys else self._plain
        return self._run(*args)

    def _called(self, *args: Any) -> Any:
        while True:
            try:
                return self._apart(_values(self._constants, self._keys), *args)
            except MissingConstants as missing:
                if set(missing.keys) <= set(self._keys):  # those of a function around this one
                    raise
                self._keys = (*self._keys, *missing.keys)

    def _with_constants(self, values: Sequence[Array], *args: Any) -> Any:
        """What ``fn`` computes, its constants given."""
        traced = self._plain.trace(*args)
        given, closed = dict(zip(self._keys, values, strict=True)), traced.jaxpr
        keys = [self._constants.key(c) for c in closed.consts]
        missing = [key for key in dict.fromkeys(keys) if key is not None and key not in given]
        if missing:
            raise MissingConstants(missing)
        consts = [c if key is None else given[key] for c, key in zip(closed.consts, keys, strict=True)]
        self._plain.clear_cache()  # it would keep what it closes over
        found = run_jaxpr(closed, *jax.tree.leaves(args), consts=consts)
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), found)


def _values(constants: Constants, keys: Sequence[Key]) -> list[Array]:
    """Constants as a function around this one has them, or as they are kept."""
    given = _GIVEN.get()
    if given is None:
        return [constants[key] for key in keys]
    missing = [key for key in keys if key not in given]
    if missing:
        raise MissingConstants(missing)
    return [given[key] for key in keys]


class Around:
    """``fn`` compiled by brainstate's ``jit``; the constants of what it runs of :class:`Jitted` are its arguments as well.

    Parameters
    ----------
    fn : callable
        It may read and write ``State`` objects.
    constants : Constants
        Where those constants are kept.
    """

    def __init__(self, fn: Callable, constants: Constants) -> None:
        def with_constants(values: Sequence[Array], *args: Any) -> Any:
            if self._again:
                raise NotSeen
            with self._given(values):
                return fn(*args)

        self._again = False
        self._constants = constants
        self._keys: tuple[Key, ...] = ()
        self._compiled: Any = brainstate.transform.jit(with_constants)
        self._states: tuple[Any, ...] | None = None

    def __call__(self, *args: Any) -> Any:
        while True:
            try:
                return self._compiled(_values(self._constants, self._keys), *args)
            except MissingConstants as missing:
                if set(missing.keys) <= set(self._keys):
                    raise
                self._keys = (*self._keys, *missing.keys)

    def states(self, *args: Any) -> tuple[Sequence[Any], Sequence[bool]] | None:
        """The ``State`` objects that it reads for arguments with which it was called, and which of them it writes.

        None where they are others for other arguments.
        """
        found = self._compiled.stateful_fun.get_state_trace(_values(self._constants, self._keys), *args)
        now = *map(Same, found.states), *found.been_writen
        self._states = now if self._states is None or self._states == now else ()
        return (found.states, found.been_writen) if self._states else None

    def again(self, values: list[Any], *args: Any) -> tuple[Sequence[Any], Any]:
        """New values of these states, for those that they have, and what it gives; no state is read or written.

        Raises :class:`NotSeen` for arguments that are not like those of an earlier call.
        """
        self._again = True
        try:
            return self._compiled.jitted_fun(values, _values(self._constants, self._keys), *args)
        finally:
            self._again = False

    @contextmanager
    def _given(self, values: Sequence[Array]) -> Iterator[None]:
        token = _GIVEN.set(dict(zip(self._keys, values, strict=True)))
        try:
            yield
        finally:
            _GIVEN.reset(token)
