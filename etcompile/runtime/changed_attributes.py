"""Plain attributes of a model that changed since it was traced: numbers, strings and arrays that no compiled step sees.

They are compared at every call, so this has to cost next to nothing: all values lie in a few dicts and lists, whose entries are
compared by identity in one pass that runs in C. Only where one differs is it looked at by name.
"""

from __future__ import annotations

import itertools
import operator
import types
from collections.abc import Iterable, Iterator
from typing import Any

import brainstate
import jax
import numpy as np

from etcompile.errors import PlainAttributeWarning
from etcompile.frontend.code_names import code_names
from etcompile.frontend.jaxpr import is_traced
from etcompile.frontend.user_code import warn

__all__ = ["PlainAttributes"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.generic)
_ARRAYS = (np.ndarray, jax.Array)

#: Methods that run before a step, not in it.
_BEFORE = frozenset({"__init__", "init_state", "reset_state", "__repr__"})

#: Classes whose methods read every attribute, or none of the user's.
_BASES = ("brainstate.nn._module", "brainstate.graph", "brainstate.mixin", "builtins")

#: Containers looked into; a model with more is not followed further.
_LIMIT = 2048

#: Entries of a list or dict that is followed; longer ones hold data, and comparing them would take time at every call.
_ENTRIES = 64

_MISSING = object()


class PlainAttributes:
    """The plain attributes of a module, and of what it holds, as they were when it was traced.

    Parameters
    ----------
    module : brainstate.nn.Module or None
        None: nothing is followed.
    name : str
    """

    def __init__(self, module: Any, name: str) -> None:
        self._name = name
        held = [] if module is None else list(_containers(module))
        self._read = _names_read(owner for _, _, owner in held)
        self._held = [one for one in held if any(self._counts(one[2], k, v) for k, v in _items(one[1]))]
        self._entries: list[Any] = [c.values() if isinstance(c, dict) else c for _, c, _ in self._held]
        self._remember()

    @property
    def containers(self) -> list[Any]:
        """The dicts and lists whose entries are followed."""
        return [container for _, container, _ in self._held]

    def _counts(self, owner: Any, key: Any, value: Any) -> bool:
        """Whether a step may read a value, and would not see it change."""
        return (owner is None or key in self._read) and _is_plain(value)

    def _remember(self) -> None:
        self._then = [dict(_items(c)) for _, c, _ in self._held]
        self._values = list(itertools.chain.from_iterable(self._entries))

    def say_what_changed(self) -> None:
        """Warn of those that are others than when the model was traced; once for each change."""
        if all(map(operator.is_, itertools.chain.from_iterable(self._entries), self._values)):
            return
        changed = list(self._changed())
        self._remember()
        for path, then, now in changed:
            warn(
                f"{path} of {self._name} was {_told(then)} when the step was compiled and is {_told(now)} now: the step goes on "
                "with the old value. Compile again; or make it a brainstate state, or an entry of brainstate.environ, to change "
                "it between calls.",
                PlainAttributeWarning,
            )

    def _changed(self) -> Iterator[tuple[str, Any, Any]]:
        for (path, container, owner), then in zip(self._held, self._then, strict=True):
            now = dict(_items(container))
            for key, old in then.items():
                new = now.get(key, _MISSING)
                if (
                    new is not old
                    and self._counts(owner, key, old)
                    and _is_plain(new)
                    and not _equal(old, new)
                ):
                    yield (
                        (f"{path}.{key}" if path else str(key)) if owner is not None else f"{path}[{key!r}]",
                        old,
                        new,
                    )


def _containers(module: Any) -> Iterator[tuple[str, Any, Any]]:
    """Path, dict or list, and owner of all that can hold plain values; entries of dicts and lists have no owner."""
    waiting: list[tuple[str, Any]] = [
        (".".join(map(str, path)), node) for path, node in module.nodes().items()
    ]
    seen: set[int] = set()
    while waiting and len(seen) < _LIMIT:
        path, value = waiting.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        owner = None if isinstance(value, (dict, list)) else value
        container = value if owner is None else vars(value)
        yield path, container, owner
        for key, child in _items(container):
            below = f"{path}[{key!r}]" if owner is None else f"{path}.{key}" if path else str(key)
            if len(child) <= _ENTRIES if isinstance(child, (dict, list)) else _is_object(child):
                waiting.append((below, child))


def _items(container: Any) -> Iterable[tuple[Any, Any]]:
    return list(container.items()) if isinstance(container, dict) else enumerate(container)


def _is_object(value: Any) -> bool:
    """Whether a value is an object with attributes of its own, made by the user."""
    if isinstance(
        value,
        (
            *_PLAIN,
            *_ARRAYS,
            type,
            types.ModuleType,
            types.FunctionType,
            brainstate.State,
            brainstate.nn.Module,
        ),
    ):
        return False
    package = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and package not in (
        "jax",
        "jaxlib",
        "numpy",
        "saiunit",
        "brainstate",
        "builtins",
    )


def _names_read(owners: Iterable[Any]) -> frozenset[str]:
    """Names in the code of all methods that may run in a step."""
    found: set[str] = set()
    for cls in {base for owner in owners if owner is not None for base in type(owner).__mro__}:
        if cls.__module__.startswith(_BASES):
            continue
        for name, method in vars(cls).items():
            function = getattr(method, "fget", method)
            function = getattr(function, "__func__", function)
            function = getattr(function, "__wrapped__", function)
            if isinstance(function, types.FunctionType) and name not in _BEFORE:
                found.update(code_names(function.__code__))
    return frozenset(found)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    if isinstance(value, _ARRAYS):
        return not is_traced(value)
    return isinstance(value, _PLAIN) or (hasattr(value, "mantissa") and hasattr(value, "unit"))


def _equal(then: Any, now: Any) -> bool:
    try:
        same = jax.tree.structure(then) == jax.tree.structure(now)
        pairs = zip(jax.tree.leaves(then), jax.tree.leaves(now), strict=True)
        return same and all(type(a) is type(b) and np.array_equal(a, b) for a, b in pairs)
    except Exception:  # what cannot be compared is another
        return False


def _told(value: Any) -> str:
    if isinstance(value, _ARRAYS) and value.size > 4:
        return f"another array of shape {value.shape}"
    return repr(value)
