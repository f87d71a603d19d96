"""Integers that users give: anything that Python would index with, numpy's included."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from etcompile.errors import EtcompileError, OptionError

__all__ = ["as_integer", "positive_integer"]


def as_integer(value: Any) -> int | None:
    """``value`` as a Python integer; None where it is none. A truth value is none."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def positive_integer(
    name: str, value: Any, *, otherwise: str = "", error: type[EtcompileError] = OptionError
) -> int:
    """``value`` as a Python integer above zero; ``otherwise`` says in words what else the option takes."""
    number = as_integer(value)
    if number is None or number < 1:
        raise error(
            f"{name} must be a positive integer{otherwise}.", got=f"{name}={value!r}", expected="1, 2, ..."
        )
    return number
