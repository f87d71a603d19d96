"""Flax NNX modules as models."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax

from etcompile.adapters.modules import framework_of, needs, pair, refuse_backwards, settled
from etcompile.errors import ModelError
from etcompile.frontend.function import FunctionModel, function_model

__all__ = ["from_nnx", "nnx_model"]

_EXAMPLE = "etcompile.from_nnx(model, carry), with model(carry, x) -> (carry, out)"


def from_nnx(
    model: Any, carry: Any = None, call: Callable[..., Any] | None = None, wrt: Any = None
) -> FunctionModel:
    """Make a model of a Flax NNX module, accepted wherever a brainstate module is.

    Parameters
    ----------
    model : flax.nnx.Module
        It is not changed; its variables are copied.
    carry : pytree of arrays, optional
        The initial state, batch axis included, such as ``cell.initialize_carry((4, 3), rngs)`` for 4 examples of 3 inputs.
        None: the model keeps its state in variables of its own.
    call : callable, optional
        One step, ``call(model, carry, *inputs) -> (new_carry, out)``, by default ``model(carry, *inputs)``; without a carry
        ``call(model, *inputs) -> out``. Of an ``nnx.RNN`` a step is one of its cell.
    wrt : nnx filter, optional
        Which variables are trained, by default ``nnx.Param``.

    Returns
    -------
    FunctionModel
        Its parameters, ``step.params``, are an ``nnx.State``, and so are gradients: ``nnx.Optimizer`` takes them, and
        ``nnx.update(model, step.params)`` puts the trained values into the module. The state is ``{"carry": carry,
        "variables": State, "lasting": State}``: variables that a step writes go on from step to step, and ``nnx.BatchStat``
        and random streams, which are the lasting ones, from sequence to sequence.

    Raises
    ------
    ModelError
        For what is no NNX module; for a step that writes a trained variable; for one that runs backwards in time.

    Examples
    --------
    >>> from flax import nnx
    >>> import jax.numpy as jnp, etcompile
    >>> cell = nnx.GRUCell(3, 5, rngs=nnx.Rngs(0))
    >>> step = etcompile.compile(etcompile.from_nnx(cell, jnp.zeros((4, 5))), jnp.ones((4, 3)))
    >>> step.params["dense_i"]["kernel"].shape
    (3, 15)
    """
    nnx = framework_of(model, "flax.nnx")
    if nnx is None:
        raise needs("from_nnx", "a flax.nnx.Module", model, _EXAMPLE)
    wrt, call = nnx.Param if wrt is None else wrt, call or _usual_call(nnx, model, carry)
    lasts = nnx.Any(nnx.BatchStat, nnx.RngState)
    graph, params, lasting, variables = nnx.split(model, wrt, lasts, ...)

    def one_step(params: Any, state: Any, *inputs: Any) -> tuple[Any, Any]:
        before = jax.tree_util.tree_flatten_with_path(params)[0]  # the module holds the same variables
        live = nnx.merge(graph, params, state["lasting"], state["variables"])
        result = call(live, *inputs) if carry is None else call(live, state["carry"], *inputs)
        new, out = (None, result) if carry is None else pair(result, model)
        _, after, lasting, variables = nnx.split(live, wrt, lasts, ...)
        _refuse_written(model, before, after)
        return {"carry": new, "lasting": lasting, "variables": variables}, out

    one_step.__name__ = type(model).__name__
    state = {"carry": carry, "lasting": lasting, "variables": variables}
    return function_model(one_step, params, state, frozenset(["lasting"]))


def nnx_model(model: Any, inputs: tuple[Any, ...]) -> FunctionModel | None:
    """The model of an NNX module that was given to ``compile`` as it is, where it is clear what it means; None for others.

    A stock cell, or an ``nnx.RNN`` of one, starts at its ``initialize_carry``; a module that takes no more than the inputs keeps
    its state itself.
    """
    nnx = framework_of(model, "flax.nnx")
    if nnx is None:
        return None
    cell = model.cell if isinstance(model, nnx.RNN) else model
    if isinstance(cell, nnx.RNNCellBase) and len(inputs) == 1 and hasattr(inputs[0], "shape"):
        return settled(from_nnx(model, cell.initialize_carry(inputs[0].shape, nnx.Rngs(0))), inputs)
    try:
        inspect.signature(type(model).__call__).bind(model, *inputs)
    except TypeError as error:
        raise ModelError(
            f"compile needs the carry of the NNX module {type(model).__name__}.",
            got=f"{len(inputs)} input(s): {error}",
            expected=_EXAMPLE,
            hint="call= says how another one is called.",
        ) from error
    return from_nnx(model)


def _usual_call(nnx: Any, model: Any, carry: Any) -> Callable[..., Any]:
    """How a module is called: itself, or the cell of an RNN."""
    backwards = isinstance(model, nnx.Bidirectional) or getattr(model, "reverse", False) is True
    refuse_backwards(backwards, model, _EXAMPLE)
    if isinstance(model, nnx.RNN):
        return lambda rnn, carry, *inputs: rnn.cell(carry, *inputs)
    return lambda module, *given: module(*given)


def _refuse_written(model: Any, before: list[Any], after: Any) -> None:
    """Trained variables stay as they are during a step."""
    for (path, old), new in zip(before, jax.tree.leaves(after), strict=True):
        if new is not old:
            name = ".".join(str(key.key) for key in path if hasattr(key, "key"))
            raise ModelError(
                f"{type(model).__name__} writes its trained variable {name} during a step.",
                got=f"an assignment to {name}",
                expected="parameters that only the optimiser changes",
                hint="keep values that change by themselves in another nnx.Variable; wrt= says which are trained.",
            )
