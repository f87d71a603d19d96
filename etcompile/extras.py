"""Packages that extras of etcompile bring: each is imported at its first use, or the error says what to install."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from etcompile.errors import DependencyError

__all__ = ["from_extra"]


def from_extra(extra: str, module: str, needs: str) -> Any:
    """The module of a package that an extra brings.

    Parameters
    ----------
    extra, module : str
    needs : str
        The sentence that says who needs the package.

    Raises
    ------
    DependencyError
        Where it is not installed.

    Examples
    --------
    >>> from_extra("train", "optax", "obgd needs optax.").__name__
    'optax'
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise DependencyError(
            needs,
            got=str(error),
            expected=f"the extra {extra!r} of etcompile",
            hint=f"pip install 'etcompile[{extra}]'",
        ) from error
