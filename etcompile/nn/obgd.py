"""Gradient descent that does not overshoot, for learning from one sample at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from etcompile.errors import OptionError
from etcompile.extras import from_extra

__all__ = ["obgd", "optax_module"]


def obgd(learning_rate: Any = 1.0, kappa: float = 2.0) -> Any:
    """Overshooting-bounded gradient descent (ObGD): an optax transformation for temporal-difference learning.

    With an error δ and a trace z, ``Δθ = α δ z / max(1, α κ max(|δ|, 1) ‖z‖₁)`` [1]_: the step shrinks where it would change
    the prediction by more than the error. Of several agents each has its own bound, and changes are their mean.

    Parameters
    ----------
    learning_rate : float, array or callable
        α; a function of the number of updates is a schedule, as for optax.
    kappa : float
        κ; larger is more careful. The paper takes 2 for values and 3 for policies.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its ``update`` needs ``td_error``, shape ``(N,)``, and ``eligibility``, the traces with a leading axis of N, which
        ``step.learn_td`` gives.

    Raises
    ------
    OptionError
        For a kappa that is not positive; at an update outside of ``step.learn_td``.

    References
    ----------
    .. [1] M. Elsayed, G. Vasan and A. R. Mahmood, *Streaming deep reinforcement learning finally works*, 2024,
       arXiv:2410.14606, algorithm 3.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from etcompile.nn import obgd
    >>> optimizer, params = obgd(1.0, kappa=2.0), {"w": jnp.zeros(2)}
    >>> z = {"w": jnp.array([[1.0, 1.0]])}  # one agent
    >>> changes, _ = optimizer.update(
    ...     params, optimizer.init(params), td_error=jnp.array([0.5]), eligibility=z
    ... )
    >>> print(changes["w"])
    [0.125 0.125]
    """
    optax = optax_module("obgd")
    if not kappa > 0:
        raise OptionError("kappa must be positive.", got=f"kappa={kappa!r}", expected="2.0, for example")

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        td_error: Any = None,
        eligibility: Any = None,
        **_: Any,
    ) -> tuple[Any, Any]:
        if td_error is None or eligibility is None:
            raise OptionError(
                "obgd needs the errors and traces of temporal-difference learning.",
                got="gradients alone",
                expected="an update with td_error= and eligibility=",
                hint="it is an optimiser for step.learn_td(obgd(...)); elsewhere take optax.sgd or optax.adam.",
            )
        rate: Any = learning_rate(state.count) if callable(learning_rate) else learning_rate
        leaves = [jnp.abs(z) for z in jax.tree.leaves(eligibility)]
        size: Any = sum(jnp.sum(z.reshape(z.shape[0], -1), axis=1).astype(td_error.dtype) for z in leaves)
        bound = rate * kappa * jnp.maximum(jnp.abs(td_error), 1.0) * size
        step = rate / jnp.maximum(bound, 1.0) * td_error

        def change(z: Any) -> Any:
            return jnp.mean(step.reshape(-1, *(1,) * (z.ndim - 1)).astype(z.real.dtype) * z, axis=0)

        return jax.tree.map(change, eligibility), optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32)), update
    )


def optax_module(what: str) -> Any:
    """The package optax, or an error that says what needs it."""
    return from_extra("train", "optax", f"{what} needs optax.")
