"""Equinox modules as models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from etcompile.adapters.modules import framework_of, is_trained_array, needs, pair, settled
from etcompile.errors import ModelError
from etcompile.frontend.function import FunctionModel, from_function

__all__ = ["equinox_model", "from_equinox"]

#: ``call(module, carry, *inputs) -> (carry, out)``.
Call = Callable[..., tuple[Any, Any]]

_EXAMPLE = "etcompile.from_equinox(module, carry, call=lambda module, carry, x: module(carry, x))"


def from_equinox(
    module: Any, carry: Any, call: Call | None = None, filter_spec: Any = is_trained_array
) -> FunctionModel:
    """Make a model of an Equinox module, accepted wherever a brainstate module is.

    Parameters
    ----------
    module : equinox.Module
        It is not changed. Its arrays that are not trained, and all else in it, stay what they are now.
    carry : pytree of arrays
        The initial state, in the shapes and dtypes that a step returns, batch axis included.
    call : callable, optional
        One step, ``call(module, carry, *inputs) -> (new_carry, out)``. ``eqx.nn.GRUCell`` and ``eqx.nn.LSTMCell`` need none:
        their output is their hidden state, and where the carry has a batch axis they are mapped over it. For a batch and
        another module map it yourself, ``call=lambda module, carry, x: jax.vmap(module)(carry, x)``.
    filter_spec : callable or pytree of bools
        Which leaves are trained, as for ``eqx.partition``; by default those of floating-point or complex numbers.

    Returns
    -------
    FunctionModel
        Its parameters, ``step.params``, are the module with None in place of what is not trained, as ``eqx.partition`` makes it,
        and so are gradients: ``optax`` and ``eqx.apply_updates`` take them. ``eqx.combine(step.params, module)`` is the trained
        module. The state is ``{"carry": carry}``.

    Raises
    ------
    ModelError
        For what is no Equinox module, and for a module of which nothing says how it is called.

    Examples
    --------
    >>> import equinox as eqx, jax, jax.numpy as jnp, etcompile
    >>> cell = eqx.nn.GRUCell(3, 5, key=jax.random.key(0))
    >>> step = etcompile.compile(etcompile.from_equinox(cell, jnp.zeros((4, 5))), jnp.ones((4, 3)))
    >>> step.params.weight_ih.shape
    (15, 3)
    """
    eqx = framework_of(module, "equinox")
    if eqx is None:
        raise needs("from_equinox", "an equinox.Module", module, _EXAMPLE)
    call = call or _stock_call(eqx, module, carry)
    trained, rest = eqx.partition(module, filter_spec)

    def one_step(params: Any, state: Any, *inputs: Any) -> tuple[Any, Any]:
        # Containers of its own: an eqx.nn.State can be used once.
        carry = jax.tree.map(lambda leaf: leaf, state["carry"])
        new, out = pair(call(eqx.combine(params, rest), carry, *inputs), module)
        return {"carry": new}, out

    one_step.__name__ = type(module).__name__
    return from_function(one_step, trained, {"carry": carry})


def equinox_model(module: Any, inputs: tuple[Any, ...]) -> FunctionModel | None:
    """The model of an Equinox module that was given to ``compile`` as it is, where it is clear what it means; None for others.

    A stock cell starts at zero, with a batch axis where its input has one.
    """
    eqx = framework_of(module, "equinox")
    if eqx is None:
        return None
    stock = isinstance(module, (eqx.nn.GRUCell, eqx.nn.LSTMCell))
    if not (stock and len(inputs) == 1 and hasattr(inputs[0], "shape")):
        raise ModelError(
            f"compile needs the carry of the Equinox module {type(module).__name__}, and how it is called.",
            got=f"a {type(module).__name__}",
            expected=_EXAMPLE,
        )
    batch = inputs[0].shape[:-1]
    zeros = jnp.zeros((*batch, module.hidden_size), module.weight_hh.dtype)
    carry = (zeros, zeros) if isinstance(module, eqx.nn.LSTMCell) else zeros
    return settled(from_equinox(module, carry), inputs)


def _stock_call(eqx: Any, module: Any, carry: Any) -> Call:
    """How a stock cell is called, ``(x, carry) -> carry``, mapped over a batch axis of its carry."""
    if not isinstance(module, (eqx.nn.GRUCell, eqx.nn.LSTMCell)):
        raise ModelError(
            f"from_equinox needs to know how {type(module).__name__} is called.",
            got="no call",
            expected=_EXAMPLE,
            hint="call(module, carry, x) -> (new_carry, out); for a batch, jax.vmap of it with in_axes=(None, 0, 0).",
        )

    def call(cell: Any, carry: Any, x: Any) -> tuple[Any, Any]:
        new = cell(x, carry)
        return new, jax.tree.leaves(new)[0]

    batched = max((jnp.ndim(v) for v in jax.tree.leaves(carry)), default=1) > 1
    return jax.vmap(call, in_axes=(None, 0, 0)) if batched else call
