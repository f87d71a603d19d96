"""Flax linen modules as models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from etcompile.adapters.modules import framework_of, needs, pair, refuse_backwards
from etcompile.errors import ModelError
from etcompile.frontend.function import FunctionModel, function_model

__all__ = ["from_linen", "linen_model"]

_EXAMPLE = "etcompile.from_linen(module, variables, carry), with module(carry, x) -> (carry, out)"

#: Collections that outlast a sequence.
_LASTING = "batch_stats"


def from_linen(
    module: Any, variables: Any, carry: Any = None, method: Callable[..., Any] | str | None = None
) -> FunctionModel:
    """Make a model of a Flax linen module, accepted wherever a brainstate module is.

    Parameters
    ----------
    module : flax.linen.Module
    variables : dict
        What ``module.init`` returned: ``variables["params"]`` is trained; other collections go on from step to step, and
        ``"batch_stats"`` from sequence to sequence.
    carry : pytree of arrays, optional
        The initial state, batch axis included, such as ``cell.initialize_carry(key, (4, 3))`` for 4 examples of 3 inputs. None:
        the module keeps its state in collections of its own.
    method : callable or str, optional
        As for ``module.apply``: what is called, ``(module, carry, *inputs) -> (new_carry, out)``; without a carry
        ``(module, *inputs) -> out``. Of an ``nn.RNN`` a step is one of its cell.

    Returns
    -------
    FunctionModel
        Its parameters, ``step.params``, have the tree of ``variables["params"]``, and so have gradients: ``optax`` and
        ``TrainState.apply_gradients`` take them. The state is ``{"carry": carry, "variables": dict, "lasting": dict}``.

    Raises
    ------
    ModelError
        For what is no linen module, for variables without parameters, and for a module that runs backwards in time.

    Examples
    --------
    >>> import flax.linen as nn, jax, jax.numpy as jnp, etcompile
    >>> cell, key, x = nn.GRUCell(5), jax.random.key(0), jnp.ones((4, 3))
    >>> carry = jnp.zeros((4, 5))
    >>> step = etcompile.compile(etcompile.from_linen(cell, cell.init(key, carry, x), carry), x)
    >>> step.params["hn"]["kernel"].shape
    (5, 5)
    """
    nn = framework_of(module, "flax.linen")
    if nn is None:
        raise needs("from_linen", "a flax.linen.Module", module, _EXAMPLE)
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ModelError(
            f"from_linen needs the variables of {type(module).__name__}.",
            got=f"{list(variables)}" if isinstance(variables, Mapping) else f"a {type(variables).__name__}",
            expected='the dict that module.init(key, carry, x) returned, with "params" in it',
        )
    method = method or _usual_method(nn, module)
    others = {name: dict(held) for name, held in variables.items() if name != "params"}
    lasting = {name: held for name, held in others.items() if name == _LASTING}
    kept = {name: held for name, held in others.items() if name != _LASTING}

    def one_step(params: Any, state: Any, *inputs: Any) -> tuple[Any, Any]:
        given = inputs if carry is None else (state["carry"], *inputs)
        held = {**state["variables"], **state["lasting"]}
        result, written = module.apply({"params": params, **held}, *given, method=method, mutable=list(held))
        new, out = (None, result) if carry is None else pair(result, module)
        after = {name: dict(written.get(name, before)) for name, before in held.items()}
        return {
            "carry": new,
            **{part: {k: after[k] for k in state[part]} for part in ("variables", "lasting")},
        }, out

    one_step.__name__ = type(module).__name__
    state = {"carry": carry, "variables": kept, "lasting": lasting}
    return function_model(one_step, variables["params"], state, frozenset(["lasting"]))


def linen_model(module: Any, inputs: tuple[Any, ...]) -> None:
    """None for what is no linen module; one of these has no parameters of its own, so that it is refused."""
    if framework_of(module, "flax.linen") is not None:
        raise ModelError(
            f"compile needs the variables of the linen module {type(module).__name__}, and its carry.",
            got=f"a {type(module).__name__}, which holds no arrays",
            expected=_EXAMPLE,
        )


def _usual_method(nn: Any, module: Any) -> Callable[..., Any] | None:
    """What is called of a module: itself, or the cell of an RNN."""
    backwards = isinstance(module, nn.Bidirectional) or (isinstance(module, nn.RNN) and module.reverse)
    refuse_backwards(backwards, module, _EXAMPLE)
    if isinstance(module, nn.RNN):
        return lambda rnn, carry, *inputs: rnn.cell(carry, *inputs)
    return None
