"""What a function finds outside of its arguments: a key that differs when it would be traced to something else.

Tracing keeps the numbers and arrays that a function closes over. This finds them again at every call: closure cells, defaults,
global names, and those attributes of the objects there that the code names. Values of brainstate states are not among them:
tracing turns these into arguments.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import os
import types
import weakref
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import brainstate
import jax
import numpy as np

from etcompile.frontend.code_names import code_names

__all__ = ["Same", "captured"]

#: Values looked at for one function; a function that reaches more is not followed further.
_LIMIT = 4096

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, np.dtype)


class Same:
    """Equal to another one of the same object, as long as it lives."""

    def __init__(self, value: Any) -> None:
        self._id = id(value)
        try:
            self._found: Any = weakref.ref(value)
        except TypeError:
            self._found = lambda: value

    def __hash__(self) -> int:
        return self._id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and (value := self._found()) is not None and value is other._found()


def captured(function: Any) -> tuple[Hashable, ...]:
    """A key of everything plain, and of every array, that ``function`` reads outside of its arguments."""
    walk = _Walk()
    walk.visit(function, frozenset())
    return tuple(walk.found)


class _Walk:
    def __init__(self) -> None:
        self.found: list[Hashable] = []
        self._seen: set[tuple[int, str]] = set()
        self._alive: list[Any] = []  # ids are compared: what was made on the way must not go before the end

    def visit(self, value: Any, names: frozenset[str]) -> None:
        """Look at a value; ``names`` are those in the code that reaches it."""
        if len(self._seen) > _LIMIT:
            return
        if isinstance(value, _PLAIN):
            self.found.append((type(value).__name__, repr(value) if isinstance(value, float) else value))
        elif isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
            digest = hashlib.blake2b(np.ascontiguousarray(value).tobytes(), digest_size=16).digest()
            self.found.append((value.shape, value.dtype.str, digest))
        elif isinstance(value, (jax.Array, brainstate.State)):
            self.found.append(Same(value))
        elif isinstance(value, (types.ModuleType, type)):
            for name in names & vars(value).keys():
                if self._new(value, name):
                    self.visit(vars(value)[name], names)
        elif isinstance(value, types.FunctionType):
            if self._new(value):
                self._function(value)
        elif isinstance(value, types.MethodType):
            self._method(value.__func__, value.__self__)
        elif isinstance(value, functools.partial):
            self._all((value.func, *value.args, *value.keywords.values()), names)
        elif self._new(value):
            if isinstance(value, Mapping):
                self._all((item for pair in value.items() for item in pair), names)
            elif isinstance(value, (list, tuple, set, frozenset)):
                self.found.append(len(value))
                self._all(value, names)
            elif isinstance(wrapped := getattr(value, "__wrapped__", None), types.FunctionType):
                self.visit(wrapped, names)
            else:
                self._method(vars(type(value)).get("__call__"), value)
        if not isinstance(value, (*_PLAIN, types.ModuleType, type, types.FunctionType, jax.Array)):
            self._attributes(value, names)

    def _new(self, value: Any, name: str = "") -> bool:
        key = (id(value), name)
        if key in self._seen:
            return False
        self._seen.add(key)
        self._alive.append(value)
        return True

    def _all(self, values: Iterable[Any], names: frozenset[str]) -> None:
        for value in values:
            self.visit(value, names)

    def _function(self, function: types.FunctionType) -> None:
        self.found.append(Same(function.__code__))
        if _of_library(function.__code__.co_filename):
            return
        names = code_names(function.__code__)
        for cell in function.__closure__ or ():
            try:
                self.visit(cell.cell_contents, names)
            except ValueError:  # not assigned yet
                self.found.append("unassigned")
        self._all(function.__defaults__ or (), names)
        self._all((function.__kwdefaults__ or {}).values(), names)
        for name in sorted(names):
            if name in function.__globals__:
                self.visit(function.__globals__[name], names)

    def _method(self, function: Any, owner: Any) -> None:
        if isinstance(function, types.FunctionType):
            self.visit(function, frozenset())
            if not _of_library(function.__code__.co_filename):
                self._attributes(owner, code_names(function.__code__))

    def _attributes(self, value: Any, names: frozenset[str]) -> None:
        own = getattr(value, "__dict__", {})
        for name in sorted(names):
            if not self._new(value, name):
                continue
            if name in own:
                self.visit(own[name], names)
                continue
            found = getattr(type(value), name, None)
            if isinstance(found, property):
                self._method(found.fget, value)
            elif isinstance(found, types.FunctionType):
                self._method(found, value)
            elif isinstance(found, (types.MemberDescriptorType, *_PLAIN, np.ndarray, jax.Array)):
                self.visit(getattr(value, name, None), names)


@functools.lru_cache(maxsize=1024)
def _of_library(path: str) -> bool:
    return "site-packages" in path or f"{os.sep}lib{os.sep}python" in path
