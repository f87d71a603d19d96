"""What a function finds outside of its arguments: a key that differs when it would be traced to something else.

Tracing keeps the numbers and arrays that a function closes over. This finds them again at every call: closure cells, defaults,
global names, and those attributes of the objects there that the code names. Values of brainstate states are not among them:
tracing turns these into arguments.
"""

from __future__ import annotations

import collections
import enum
import functools
import gc
import hashlib
import itertools
import operator
import os
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any

import brainstate
import jax
import numpy as np
import saiunit

from etcompile.errors import EtcompileWarning
from etcompile.frontend.code_names import code_names, global_names
from etcompile.frontend.user_code import warn

__all__ = ["Captured", "Same", "is_captured"]

#: Values looked at for one function; a function that reaches more is not followed further, and that is said.
_LIMIT = 4096

_MISSING = object()

#: Ends what was found.
_END = (object(),)

_call: Any = operator.call

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, np.dtype)


#: Containers of which all that is in them counts.
_SEQUENCES = (list, tuple, set, frozenset, collections.deque)

#: Methods that no calculation calls; those that dataclasses write for themselves are known by their file.
_MAKING = frozenset(
    """__init__ __new__ __post_init__ __init_subclass__ __class_getitem__ __set_name__ __del__ __repr__ __str__ __format__
    __hash__ __dir__ __sizeof__ __setattr__ __delattr__ __getstate__ __setstate__ __reduce__ __reduce_ex__ __copy__
    __deepcopy__""".split()  # noqa: SIM905
)


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


class Captured:
    """What a function reads outside of its arguments, followed from call to call.

    Where everything that the last walk came by is the same object there is no need to walk again: that is asked for in one pass
    that runs in C. What was found is held until then.

    Attributes
    ----------
    unchanged : callable
        Whether nothing has changed since :meth:`key` was asked for the last time.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._walk: _Walk | None = None
        self._warned = False
        self.unchanged: Callable[[], bool] = bool  # nobody has asked

    def key(self) -> tuple[Hashable, ...]:
        """A key of everything plain, and of every array, that the function reads outside of its arguments.

        What cannot be looked into, an object or a function of a library, is in it as itself.
        """
        if self._walk is None or not self._walk.same():
            self._walk = _Walk()
            self._walk.visit(self._function, frozenset())
            self._walk.keep()
            self.unchanged = self._walk.same
            if self._walk.gave_up and not self._warned:
                self._warned = True
                warn(
                    f"{getattr(self._function, '__qualname__', self._function)} reaches more than {_LIMIT} values outside of its "
                    "arguments: where one further away changes, later calls go on with what it was. Give what changes from call "
                    "to call as a target, or keep it in a brainstate state.",
                    EtcompileWarning,
                )
        found = self._walk.found
        return (*found, Same(self._function)) if self._walk.gave_up else tuple(found)


def is_captured(function: Any) -> bool:
    """Whether a key says all of a function: two with the same key do the same.

    So it is with functions made anew where they are passed on, such as a ``lambda`` in a loop.
    """
    return isinstance(function, (types.FunctionType, partial))


class _Walk:
    def __init__(self) -> None:
        self.found: list[Hashable] = []
        self._seen: dict[tuple[int, str], int] = {}
        self._alive: list[Any] = []  # ids are compared: what was made on the way must not go before the end
        self._steady = True  # whether what was found can only change where something below is another object
        self._readers: list[Callable[[str, Any], Any]] = []
        self._names: list[str] = []
        self._read: list[Any] = []
        self._functions: list[types.FunctionType] = []
        self._then: list[Any] = []
        self._containers: list[Any] = []
        self._entries: list[Any] = []

    def keep(self) -> None:
        """Remember, after all was visited, what was found: what was read, and code, defaults and more of functions.

        Of all functions at once, since reading ``__code__`` or ``__defaults__`` tells Python's audit hooks, such as that of a
        library that JAX imports, and these take longer than all else here.
        """
        parts = gc.get_referents(*self._functions)
        self._then = [*self._read, *parts, *_END]
        known = {id(None), *map(id, parts)}
        self._steady &= all({id(f.__code__), id(f.__defaults__)} <= known for f in self._functions)

    def same(self) -> bool:
        """Whether a walk would find what this one found."""
        if not self._steady:
            return False
        read = map(_call, self._readers, self._names, itertools.repeat(_MISSING))
        try:
            now = itertools.chain(read, gc.get_referents(*self._functions), _END)
            if not all(map(operator.is_, now, self._then)):
                return False
        except ValueError:  # a variable of an outer function that is not assigned any more
            return False
        return not self._containers or _same_entries(self._containers, self._entries)

    def _get(self, reader: Callable[[str, Any], Any], name: str) -> Any:
        """What lies under a name, or ``_MISSING``; looked at again by :meth:`same`."""
        value = reader(name, _MISSING)
        self._readers.append(reader)
        self._names.append(name)
        self._read.append(value)
        return value

    def _hold(self, container: Any) -> None:
        """Compare the entries of a container again."""
        if type(container) not in (list, dict):
            self._steady &= isinstance(container, (tuple, frozenset))
            return
        self._containers.append(container)
        self._entries.append(_entries(container))

    @property
    def gave_up(self) -> bool:
        """Whether there was more to look at."""
        return len(self._seen) > _LIMIT

    def visit(self, value: Any, names: frozenset[str]) -> None:
        """Look at a value; ``names`` are those in the code that reaches it."""
        if self.gave_up:
            return
        if isinstance(value, _PLAIN):
            self.found.append((type(value).__name__, repr(value) if isinstance(value, float) else value))
        elif isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
            digest = hashlib.blake2b(np.ascontiguousarray(value).tobytes(), digest_size=16).digest()
            self.found.append((value.shape, value.dtype.str, digest))
            self._steady &= isinstance(value, np.generic)  # an array may change in place
        elif isinstance(value, (jax.Array, brainstate.State)):
            self.found.append(Same(value))
        elif isinstance(value, (types.ModuleType, type)):
            self.found.append(Same(value))
            read = partial(_in_class, value) if isinstance(value, type) else vars(value).get
            for name in names:
                held = self._get(read, name)
                if held is not _MISSING and self._new(value, name):
                    if isinstance(held, classmethod):
                        self._method(held.__func__, value)
                    else:
                        self.visit(held, names)
        elif isinstance(value, types.FunctionType):
            if self._new(value):
                self._function(value)
        elif isinstance(value, types.MethodType):
            if self._new(value.__self__):
                self.found.append(Same(value.__self__))
            self._method(value.__func__, value.__self__)
        elif isinstance(value, partial):
            self._hold(value.keywords)
            self.found.append((len(value.args), *value.keywords))
            self._all((value.func, *value.args, *value.keywords.values()), names)
        elif self._new(value):
            if isinstance(value, (Mapping, *_SEQUENCES)):
                self._hold(value)
            if isinstance(value, Mapping):
                self._all((item for pair in value.items() for item in pair), names)
            elif isinstance(value, _SEQUENCES):
                self.found.append(len(value))
                self._all(value, names)
            elif isinstance(value, saiunit.Quantity):
                self.visit(self._get(partial(getattr, value), "mantissa"), names)
                self.visit(self._get(partial(getattr, value), "unit"), names)
            elif isinstance(wrapped := _asked(value, "__wrapped__", None), types.FunctionType):
                self.found.append(Same(value))
                self._get(partial(getattr, value), "__wrapped__")
                self.visit(wrapped, names)
            else:
                self.found.append(Same(value))
                self._operators(value)
        if not isinstance(value, (*_PLAIN, types.ModuleType, type, types.FunctionType, jax.Array)):
            self._attributes(value, names)

    def _new(self, value: Any, name: str = "") -> bool:
        key = (id(value), name)
        if key in self._seen:
            self.found.append(("again", self._seen[key]))
            return False
        self._seen[key] = len(self._seen)
        self._alive.append(value)
        return True

    def _all(self, values: Iterable[Any], names: frozenset[str]) -> None:
        for value in values:
            self.visit(value, names)

    def _function(self, function: types.FunctionType) -> None:
        if _of_library(function.__code__.co_filename):
            self.found.append(Same(function))
            return
        self._functions.append(function)
        self.found.append(Same(function.__code__))
        names = code_names(function.__code__)
        for cell in function.__closure__ or ():
            try:
                self.visit(self._get(partial(getattr, cell), "cell_contents"), names)
            except ValueError:  # not assigned yet
                self.found.append("unassigned")
                self._steady = False
        self._all(function.__defaults__ or (), names)
        if function.__kwdefaults__:
            self._hold(function.__kwdefaults__)
            self._all(function.__kwdefaults__.values(), names)
        for name in sorted(global_names(function.__code__)):
            held = self._get(function.__globals__.get, name)
            if held is not _MISSING:
                self.visit(held, names)

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
            held = self._get(own.get, name)
            if held is not _MISSING:
                self.visit(held, names)
                continue
            kind = value if isinstance(value, type) else type(value)
            found = self._of_class(value, kind, name)
            if _is_asked_of(value, found):
                # Who answers himself may raise what he likes.
                held = self._get(partial(_asked if found is _MISSING else getattr, value), name)
                self.visit(None if held is _MISSING else held, names)
                continue
            self._found_in_class(found, value)
            if "super" in names:
                for base in kind.__mro__[1:]:
                    self._found_in_class(self._get(vars(base).get, name), value)

    def _of_class(self, value: Any, kind: type, name: str) -> Any:
        """What an object's class, or a class itself, has under a name."""
        read: Callable[[str, Any], Any] = partial(getattr, type(value))
        try:
            found = read(name, _MISSING)
        except Exception:
            found, read = _MISSING, partial(_asked, type(value))
        if found is _MISSING and _in_class(kind, name, _MISSING) is _MISSING:
            return self._get(read, name)
        # As it lies there, where a look at it makes it anew, or where it answers to objects alone.
        anew = found is _MISSING or isinstance(found, types.MethodType)
        return self._get(partial(_in_class, kind) if anew else read, name)

    def _found_in_class(self, found: Any, owner: Any) -> None:
        """Follow what lies in a class under a name that code asks an object for, if that runs something."""
        if isinstance(found, classmethod):
            self._method(found.__func__, owner if isinstance(owner, type) else type(owner))
        elif isinstance(found, property):
            self._method(found.fget, owner)
        elif isinstance(found, functools.cached_property):
            self._method(found.func, owner)
        elif isinstance(found, staticmethod):
            self.visit(found.__func__, frozenset())
        elif isinstance(found, types.FunctionType):
            self._method(found, owner)

    def _operators(self, value: Any) -> None:
        """Follow what runs where an object is called, indexed, added and the like: no name in the code tells of it."""
        for base in type(value).__mro__:
            for name, method in list(vars(base).items()):
                if isinstance(method, types.FunctionType) and _is_operator(name, method):
                    self._get(vars(base).get, name)
                    self._method(method, value)


def _asked(value: Any, name: str, default: Any) -> Any:
    """An attribute; the default where there is none, also where who is asked for it says so in a way of his own."""
    try:
        return getattr(value, name, default)
    except Exception:
        return default


def _in_class(kind: type, name: str, default: Any) -> Any:
    """What lies under a name in a class or its bases, as it lies there."""
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), default)


def _is_asked_of(value: Any, found: Any) -> bool:
    """Whether an attribute of which this was found in an object's class is what the object itself says."""
    if found is _MISSING:
        return hasattr(type(value), "__getattr__")
    if isinstance(found, (types.MemberDescriptorType, *_PLAIN, np.ndarray, jax.Array)):
        return True
    return hasattr(type(found), "__set__") and type(found).__module__ != "builtins"


def _is_operator(name: str, method: types.FunctionType) -> bool:
    """Whether Python calls a method by itself where an object is used; not what makes it, or tells of it."""
    path = method.__code__.co_filename
    special = name.startswith("__") and name.endswith("__") and name not in _MAKING
    return special and path != "<string>" and not _of_library(path)


def _entries(container: Any) -> list[Any]:
    return list(container.items() if isinstance(container, dict) else container)


def _same_entries(containers: list[Any], entries: list[list[Any]]) -> bool:
    for container, then in zip(containers, entries, strict=True):
        if len(container) != len(then):
            return False
        if isinstance(container, dict):
            if not all(a is c and b is d for (a, b), (c, d) in zip(container.items(), then, strict=True)):
                return False
        elif not all(map(operator.is_, container, then)):
            return False
    return True


@functools.lru_cache(maxsize=1024)
def _of_library(path: str) -> bool:
    return "site-packages" in path or f"{os.sep}lib{os.sep}python" in path
