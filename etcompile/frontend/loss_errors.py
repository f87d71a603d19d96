"""What is wrong with a loss function that cannot be called on what a step gives, in a sentence."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from typing import Any

import jax

from etcompile.errors import EtcompileError, InputError, UnsupportedError
from etcompile.frontend.explain import known_cause
from etcompile.frontend.user_code import is_users, user_frame

__all__ = ["check_takes", "explained_loss", "underivable_loss"]


def check_takes(loss_fn: Callable, outputs: Any, targets: tuple[Any, ...]) -> None:
    """Raise :class:`InputError` unless the loss function takes the outputs and so many targets."""
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):  # a function that does not tell
        return
    try:
        signature.bind(outputs, *targets)
    except TypeError as error:
        hint = "targets follow the inputs in the call: (x, *targets)."
        if isinstance(outputs, (tuple, list)):
            hint += f" The outputs are one argument, a {type(outputs).__name__} of {len(outputs)}."
        raise InputError(
            f"the loss function {_name(loss_fn)} takes other arguments than it is given.",
            where=_defined_at(loss_fn),
            got=f"the outputs and {len(targets)} target{'' if len(targets) == 1 else 's'}: {error}",
            expected=f"{_name(loss_fn)}{signature}",
            hint=hint,
        ) from None


def explained_loss(
    error: Exception, loss_fn: Callable, outputs: Any, targets: tuple[Any, ...]
) -> EtcompileError | None:
    """The error to raise for one that JAX or another library raised in a loss; None for one of the loss function's own."""
    known = known_cause(error, f"the loss function {_name(loss_fn)}")
    if known is not None:
        return known
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, (TypeError, ValueError)) or not frames or is_users(frames[-1].filename):
        return None
    given = [f"outputs {_shapes(outputs)}", *(f"target {k} {_shapes(t)}" for k, t in enumerate(targets))]
    return InputError(
        f"the loss function {_name(loss_fn)} fails on what it is given.",
        where=user_frame(error) or _defined_at(loss_fn),
        got=f"{', '.join(given)}; {type(error).__name__}: {str(error).splitlines()[0]}",
        expected="targets that go with the outputs of one step",
        hint="compare these shapes; in a sequence the loss sees one step at a time, without the time axis."
        + (" A list of numbers is an array only after jnp.asarray." if any(map(_numbers, targets)) else ""),
    )


def underivable_loss(error: BaseException) -> EtcompileError | None:
    """The error to raise for one of JAX's where a loss that it traced is differentiated; None for any other.

    JAX keeps where an operation was written in the cause of what its rule raises.
    """
    cause = error.__cause__
    if not isinstance(error, (NotImplementedError, ValueError)) or not isinstance(cause, Exception):
        return None
    where = user_frame(cause)
    if where is None:
        return None
    return UnsupportedError(
        "the gradient of the loss would have to pass an operation that JAX does not differentiate here.",
        where=where,
        got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
        expected="a loss with a derivative by the outputs, states and parameters that it reads",
        hint="give the operation a derivative with jax.custom_jvp or jax.custom_vjp; or, if no credit shall pass, apply it to "
        "jax.lax.stop_gradient(value).",
    )


def _numbers(target: Any) -> bool:
    return isinstance(target, list) and not any(len(v.shape) for v in jax.tree.leaves(target))


def _shapes(tree: Any) -> str:
    return str(jax.tree.map(lambda v: f"{v.dtype}{list(v.shape)}", tree)).replace("'", "")


def _name(loss_fn: Callable) -> str:
    return getattr(loss_fn, "__name__", None) or type(loss_fn).__name__


def _defined_at(loss_fn: Callable) -> str | None:
    code = getattr(inspect.unwrap(loss_fn), "__code__", None)
    return None if code is None else f"{code.co_filename.rpartition('/')[2]}:{code.co_firstlineno}"
