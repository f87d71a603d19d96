"""Parameters, states and traces as a call finds them, held against what a call needs: arrays, alive, of the compiled shapes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax

from etcompile.errors import CarryError, ModelError, UnsupportedError
from etcompile.frontend.jaxpr import is_traced
from etcompile.frontend.module import not_recorded
from etcompile.frontend.step_model import leaf_names
from etcompile.runtime.shapes import shapes_alone

__all__ = ["other_states", "refuse_unrecorded", "require_alive", "require_arrays"]

#: Of an array; what is none has no such method.
_is_deleted = operator.methodcaller("is_deleted")


def require_arrays(model: str, params: Any, states: Any) -> None:
    """Raise :class:`ModelError` where parameters or states are shapes alone."""
    path = shapes_alone({"params": params, "state": states})
    if path is not None:
        raise ModelError(
            f"{model} was given by shapes alone: it can be analysed, but not run.",
            got=f"a jax.ShapeDtypeStruct at {path}",
            expected="arrays",
            hint="report() and cost() need no arrays; to run, compile a model that has its parameters and states.",
        )


def refuse_unrecorded(model: str, values: Any) -> None:
    """Raise :class:`UnsupportedError` in a transformation of JAX's own, in which writes of states would be lost."""
    if not_recorded(values):
        raise UnsupportedError(
            f"a step of {model} is called inside of jax.jit, jax.lax.scan, jax.vmap or jax.grad.",
            got="a transformation of JAX's own, which does not see the states",
            expected="brainstate's, which do: brainstate.transform.jit, for_loop, grad",
            hint="or use the pure function: carry, out = step.apply(step.params, carry, x) from step.init_carry().",
        )


def require_alive(model: str, what: str, tree: Any, leaves: Sequence[Any], lost: str) -> None:
    """Raise :class:`CarryError` where an array of a tree, whose leaves these are, was given away.

    ``lost`` is what a call said that failed while it ran; empty where none did.
    """
    try:
        if not any(map(_is_deleted, leaves)):
            return
    except (AttributeError, jax.errors.ConcretizationTypeError):  # numbers, or tracers
        pass
    for k, leaf in enumerate(leaves):
        gone = getattr(leaf, "is_deleted", None)
        if gone is None or is_traced(leaf) or not gone():
            continue
        failed = f", or was lost in a call that failed while it ran ({lost})" if lost else ""
        back = (
            "step.params = ... puts other parameters in"
            if what == "parameter"
            else "step.reset() brings states and traces back"
        )
        raise CarryError(
            f"{what} {leaf_names(tree)[k]} of {model} is an array that was deleted.",
            got=f"a buffer that was donated to a jitted function{failed}",
            expected="arrays of the model's own",
            hint=f"{back}; what is donated elsewhere has to be a copy (step.init_carry(), jnp.copy).",
        )


def other_states(model: str, states: Any, found: Any, compiled: Any) -> CarryError:
    """What to raise for states of another structure, shape or dtype than the compiled ones (both as of :func:`kinds_of`)."""
    (tree, leaves), (now, others) = compiled, found
    path, got, expected = "", str(now), str(tree)
    if tree == now:
        name, a, b = next(
            (n, a, b) for n, a, b in zip(leaf_names(states), leaves, others, strict=True) if a != b
        )
        path, got, expected = f" {name}", *(f"{dtype} {shape}" for shape, dtype in (b, a))
    return CarryError(
        f"state{path} of {model} is not what it was when the model was compiled.",
        got=got,
        expected=expected,
        hint="call step.reset(batch_size=...) to change the batch size; compile again for another dtype.",
    )
