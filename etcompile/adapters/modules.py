"""What the adapters have in common: whose an object is, and what is said of one that is not."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp

from etcompile.errors import ModelError
from etcompile.frontend.function import FunctionModel

__all__ = ["framework_of", "is_trained_array", "needs", "pair", "refuse_backwards", "settled"]


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


def pair(result: Any, module: Any) -> tuple[Any, Any]:
    """The new carry and the output of one step, where these are what it returned."""
    if not (isinstance(result, tuple) and len(result) == 2):
        raise ModelError(
            f"one step of {type(module).__name__} must return two values.",
            got=f"a {type(result).__name__}",
            expected="(new_carry, out), from call(module, carry, x)",
        )
    return result


def refuse_backwards(backwards: bool, module: Any, example: str) -> None:
    """Raise :class:`ModelError` for a module that reads a sequence from its end."""
    if backwards:
        raise ModelError(
            f"{type(module).__name__} reads a sequence from its end, which cannot be learned while it runs.",
            got="a module that runs backwards in time",
            expected=example,
            hint="give its forward cell alone.",
        )


def is_trained_array(leaf: Any) -> bool:
    """Whether a leaf is an array of real or complex numbers, or the shape of one."""
    return hasattr(leaf, "shape") and jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.inexact)


def settled(model: FunctionModel, inputs: tuple[Any, ...]) -> FunctionModel:
    """A model of which nobody gave the initial state: it has the dtypes that one step on these inputs returns."""
    try:
        new, _ = jax.eval_shape(model.fn, model.params, model.state, *inputs)
    except Exception:  # compile traces it again, and says what is wrong
        return model
    model.state = jax.tree.map(
        lambda old, v: old if old.dtype == v.dtype else old.astype(v.dtype), model.state, new
    )
    return model
