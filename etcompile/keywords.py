"""Keywords that a function does not have: an error with the one that was probably meant."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from etcompile.errors import OptionError

__all__ = ["COMPILE", "named_arguments", "refuse_others", "unknown_keyword", "unknown_option"]

#: Keywords of :func:`etcompile.compile`; options of rules are given beside them.
COMPILE = ("algo", "batch_size", "schedule", "within", "exclude", "manager", "optimise")

#: What others call them, and where they go.
_OTHER_NAMES = {
    "algorithm": "algo='...'",
    "rule": "algo='...'",
    "chunk": "schedule=etcompile.Schedule(chunk=...)",
    "chunks": "schedule=etcompile.Schedule(chunk=...)",
    "batch": "batch_size=...",
    "optimize": "optimise=...",
}

_Function = TypeVar("_Function", bound=Callable[..., Any])


def unknown_keyword(
    owner: str, key: str, value: Any, known: Sequence[str], other_names: Mapping[str, str] | None = None
) -> OptionError:
    """The error for a keyword that ``owner`` does not have."""
    near = difflib.get_close_matches(key, known, 1, 0.6)
    meant = (other_names or {}).get(key) or (repr(near[0]) if near else None)
    hint = f"did you mean {meant}?" if meant else None
    if hint is None and _is_data(value):
        hint = "data are given by their place in the call, without names: inputs first, then targets."
    return OptionError(
        f"{owner} has no option {key!r}.",
        got=f"{key}={value!r}",
        expected=f"one of {', '.join(known)}" if known else "no options",
        hint=hint,
    )


def unknown_option(rule: str, key: str, value: Any, options: Sequence[str]) -> OptionError:
    """The error for a keyword of :func:`etcompile.compile` that is neither its own nor an option of the rule."""
    known = [*options, *COMPILE]
    error = unknown_keyword(rule, key, value, known, _OTHER_NAMES)
    expected = f"one of {', '.join(options)}" if options else "no options"
    return OptionError(
        f"{rule} has no option {key!r}.", got=error.got, expected=f"{expected} of the rule", hint=error.hint
    )


def refuse_others(owner: str, others: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise :class:`OptionError` for the first keyword that ``owner`` does not have, if there is one."""
    for key, value in others.items():
        raise unknown_keyword(owner, key, value, known)


def named_arguments(owner: str, then: str = "") -> Callable[[_Function], _Function]:
    """Refuse keywords that the function does not have with :class:`OptionError`, which knows the near ones.

    A method that gives a function of the data says with ``then`` how that is called: data given to the method itself are
    refused.
    """

    def decorate(fn: _Function) -> _Function:
        parameters = inspect.signature(fn).parameters
        known = [name for name, p in parameters.items() if name != "self" and p.kind != p.VAR_POSITIONAL]

        @functools.wraps(fn)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if then and (len(args) > len(parameters) or any(map(_is_data, args[1:]))):
                raise OptionError(
                    f"{owner} takes no data.",
                    got=f"{len(args) - 1} arguments: {', '.join(type(a).__name__ for a in args[1:])}",
                    expected="a loss, and options",
                    hint=f"it gives a function, and that takes the data: {then}.",
                )
            if kwargs:
                refuse_others(owner, {k: v for k, v in kwargs.items() if k not in known}, known)
            return fn(*args, **kwargs)

        return checked  # pyright: ignore[reportReturnType]

    return decorate


def _is_data(value: Any) -> bool:
    """Whether an argument is an array with axes, or a container of some; an optimiser may be a tuple."""
    return bool(getattr(value, "shape", ())) or isinstance(value, (list, dict))
