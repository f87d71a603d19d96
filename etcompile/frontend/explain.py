"""What an exception from the user's model means, where its own words do not say what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator

from etcompile.errors import ModelError
from etcompile.frontend.environment import CONCRETE
from etcompile.frontend.user_code import user_frame

__all__ = ["known_cause"]

_UNITS = {"dt": "0.1 * saiunit.ms", "t": "0 * saiunit.ms", "i": "0", "fit": "True"}


def known_cause(error: Exception, what: str) -> ModelError | None:
    """The error to raise for one whose cause is known: an entry of the environment not set, or a value needed too early.

    ``what`` failed: ``"one step of Net"``.
    """
    if isinstance(error, CONCRETE):
        return ModelError(
            f"{what} needs the value of an array while it is traced.",
            where=user_frame(error),
            got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            expected="operations that hold for every value",
            hint="instead of a Python if or while on an array use jnp.where(condition, a, b), jax.lax.cond or "
            "brainstate.transform.cond; sizes and indices for Python must be numbers.",
        )
    found = next(filter(None, map(_missing_entry, _causes(error))), None)
    if found is not None:
        error, key = found
        value = _UNITS.get(key, "...")
        return ModelError(
            f"{what} reads {key!r} from brainstate.environ, where it is not set.",
            where=user_frame(error),
            got=f"no entry {key!r}",
            expected="a value at compile and at every call",
            hint=f"brainstate.environ.set({key}={value}), or around compile and every call: "
            f"with brainstate.environ.context({key}={value}): ...",
        )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it: libraries raise their own in the place of what a layer inside of theirs raised."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _missing_entry(error: BaseException) -> tuple[KeyError, str] | None:
    """An error that says that an entry of the environment is not set, and the name of the entry."""
    entry = re.match(r"[\"']?Key '(\w+)' not found in environment", str(error))
    return (error, entry.group(1)) if isinstance(error, KeyError) and entry is not None else None
