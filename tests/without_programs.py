"""What libraries compile a program for at every shape, or at every call, and could do without: a third of all that tests compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brainstate.transform._error_if as checks
import jax
import numpy as np
from jax._src.core import stage_p

__all__ = ["without_programs"]

_jit_error_if: Callable = checks.jit_error_if


def without_programs() -> None:
    """Put numpy's arrays onto the device as they are, and check at once what brainstate draws where nothing is traced."""
    stage_p.def_impl(_put)
    checks.jit_error_if = _check_at_once


def _put(value: Any) -> jax.Array:
    return (
        value
        if isinstance(value, jax.Array)
        else jax.device_put(np.array(value) if np.ndim(value) else value)
    )


def _check_at_once(wrong: Any, *error: Any, **named: Any) -> None:
    if isinstance(wrong, jax.core.Tracer) or np.any(wrong):
        _jit_error_if(wrong, *error, **named)
