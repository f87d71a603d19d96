"""What the adapters have in common: whose an object is, and what is said of one that is not."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp

from etcompile.errors import ModelError

__all__ = ["framework_of", "is_trained_array", "needs"]


def framework_of(model: Any, name: str) -> Any:
    """The framework of this name where the object is one of its modules; else None, and nothing is imported."""
    framework = sys.modules.get(name)
    kind = getattr(framework, "Module", None)
    return framework if kind is not None and isinstance(model, kind) else None


def needs(function: str, what: str, model: Any, example: str) -> ModelError:
    """The exception for an object that is no module of the framework."""
    hint = None
    if isinstance(model, type):
        hint = f"make one: {function}({model.__name__}(...), ...)."
    return ModelError(
        f"{function} needs {what} first.", got=f"a {type(model).__name__}", expected=example, hint=hint
    )


def is_trained_array(leaf: Any) -> bool:
    """Whether a leaf is an array of real or complex numbers, or the shape of one."""
    return hasattr(leaf, "shape") and jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.inexact)
