"""The user's loss of one step: what it must be, and its derivatives by all that the step makes and that it reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.errors import InputError
from etcompile.frontend.step_model import StepModel

__all__ = [
    "Loss",
    "LossCotangents",
    "LossProgram",
    "LossValue",
    "StepLoss",
    "as_loss_value",
    "checked_loss",
    "loss_and_cotangents",
    "masked",
    "replaced",
    "step_loss",
]

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class LossProgram:
    """A loss as a pure function, and what of the step it reads beside the outputs.

    Attributes
    ----------
    run : callable
        ``run(outputs, new states, params, fixed, carried, args) -> ((loss, aux), carried)``; the first three are trees of the
        user, ``args`` the step's targets and its mask of examples.
    states, params : tuple of int
        Leaves of the new states, as the compiler has them, and of the parameters by which it must be differentiated.
    asks_host : bool
        It calls back to Python while it runs, and may fail there.
    effects : bool
        It does something beside its results: it prints, or calls back to Python.
    """

    run: Callable[..., tuple[tuple[Array, Any], Any]]
    states: tuple[int, ...] = ()
    params: tuple[int, ...] = ()
    asks_host: bool = False
    effects: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """A loss with what it finds outside of the step at this call.

    Attributes
    ----------
    program : LossProgram
    fixed : pytree of arrays
        The same at every step.
    carried : pytree of arrays
        What it also writes: it goes from step to step.
    """

    program: LossProgram = dataclasses.field(metadata={"static": True})
    fixed: Any = ()
    carried: Any = ()

    @classmethod
    def plain(cls, loss_fn: Callable) -> Loss:
        """A function that reads outputs and targets alone."""

        def run(outputs: Any, _s: Any, _p: Any, _f: Any, carried: Any, args: Any) -> Any:
            return (checked_loss(loss_fn(outputs, *args[0])), None), carried

        return cls(LossProgram(run))


class LossValue(NamedTuple):
    """What a step's loss gives: the number, what else the function returned, and what it carries to the next step."""

    value: Array
    aux: Any
    carried: Any


#: One of a tuple of its fields, as ``LossValue._make`` makes it, in a third of the time.
as_loss_value: Callable[[tuple[Array, Any, Any]], LossValue] = functools.partial(tuple.__new__, LossValue)


@dataclasses.dataclass(frozen=True, eq=False)
class LossCotangents:
    """Derivatives of a step's loss by output leaves and new states (None: it has none) and by parameters that it reads."""

    outputs: list[Array | None]
    states: list[Array | None]
    params: dict[int, Array]


#: Loss of one step: (output leaves, new state leaves, parameter leaves, carried, what belongs to the step) -> its results.
StepLoss = Callable[[list[Array], list[Array], list[Array], Any, Any], LossValue]


def step_loss(model: StepModel, loss: Loss) -> StepLoss:
    """The user's loss on leaves, as the compiler has them; what belongs to a step is its arguments and its mask."""

    def of_step(outputs: list, states: list, params: list, carried: Any, item: Any) -> LossValue:
        args, mask = item

        def run(outputs: list, states: list, params: list, carried: Any) -> LossValue:
            (value, aux), after = loss.program.run(
                jax.tree.unflatten(model.output_tree, outputs),
                model.unflatten_states(states),
                jax.tree.unflatten(model.param_tree, params),
                loss.fixed,
                carried,
                args,
            )
            return LossValue(value, aux, after)

        given = outputs, states, params, carried
        return run(*given) if mask is None else masked(run, mask, *given)

    return of_step


def masked(run: Callable[..., LossValue], mask: Array, *moving: Any) -> LossValue:
    """``run(*moving)`` times ``mask``, a number; where that is zero, no derivative and no NaN comes from it."""
    on = mask != 0

    def still(*held: Any) -> LossValue:
        return run(*lax.stop_gradient(held))

    found = lax.cond(on, run, still, *moving)
    value = jnp.where(on, found.value * mask.astype(found.value.dtype), jnp.zeros_like(found.value))
    return found._replace(value=value)


def checked_loss(loss: Any) -> Array:
    """A loss must be one real number; a quantity without a unit is one."""
    if hasattr(loss, "is_unitless") and hasattr(loss, "to_decimal"):
        if not loss.is_unitless:
            raise InputError(
                "the loss has a unit.",
                got=f"a loss in {loss.unit}",
                expected="a number",
                hint=f"divide by the unit: loss / {loss.unit}, or (loss / {loss.unit}).to_decimal().",
            )
        loss = loss.to_decimal()
    try:
        value = jnp.asarray(loss)
    except (TypeError, ValueError) as error:
        raise InputError(
            "the loss function must return one number.", got=type(loss).__name__, expected="a scalar array"
        ) from error
    if value.shape != ():
        raise InputError(
            "the loss function must return one number per step.",
            got=f"shape {value.shape}",
            expected="shape ()",
            hint="take the mean or sum over the batch.",
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise InputError(
            "the loss must be a real floating-point number.",
            got=str(value.dtype),
            expected="float32 or another float",
        )
    return value


def loss_and_cotangents(
    loss: StepLoss,
    reads: LossProgram,
    outputs: Sequence[Array],
    states: Sequence[Array],
    params: Sequence[Array],
    carried: Any,
    item: Any,
) -> tuple[LossValue, LossCotangents]:
    """The loss of one step with its derivatives."""
    moving = [k for k, o in enumerate(outputs) if jnp.issubdtype(o.dtype, jnp.inexact)]

    def of_moving(some_outputs: list[Array], some_states: list[Array], some_params: list[Array]) -> Any:
        found = loss(
            replaced(outputs, moving, some_outputs),
            replaced(states, reads.states, some_states),
            replaced(params, reads.params, some_params),
            carried,
            item,
        )
        return found.value, found

    _, pull, found = jax.vjp(
        of_moving,
        [outputs[k] for k in moving],
        [states[k] for k in reads.states],
        [params[k] for k in reads.params],
        has_aux=True,
    )
    by_outputs, by_states, by_params = pull(jnp.ones_like(found.value))
    of_outputs: list[Array | None] = [None] * len(outputs)
    of_states: list[Array | None] = [None] * len(states)
    for k, c in zip(moving, by_outputs, strict=True):
        of_outputs[k] = c
    for k, c in zip(reads.states, by_states, strict=True):
        of_states[k] = c
    return found, LossCotangents(of_outputs, of_states, dict(zip(reads.params, by_params, strict=True)))


def replaced(values: Sequence[Array], places: Sequence[int], new: Sequence[Array]) -> list[Array]:
    """A list with some of its entries exchanged."""
    result = list(values)
    for k, v in zip(places, new, strict=True):
        result[k] = v
    return result
