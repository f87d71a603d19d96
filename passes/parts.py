"""Parts that several rules are made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from etcompile.pass_api import Layer, OptionError, ProgramBuilder

__all__ = ["balance", "follow_layers", "require_leak"]

#: Keeps the scales finite where a norm is zero, as in the paper.
EPSILON = 1e-7


def balance(a: jax.Array, b: jax.Array) -> jax.Array:
    """The scale that makes two factors of norms a and b equally large: sqrt(a / b), kept finite.

    Root by root, and with a constant that is a normal number of their type: a / EPSILON is too large for float16.
    """
    epsilon = max(EPSILON, float(jnp.finfo(jnp.result_type(a, b)).tiny))
    return (a + epsilon) ** 0.5 / (b + epsilon) ** 0.5


def follow_layers(p: ProgramBuilder, layers: tuple[Layer, ...]) -> None:
    """The influence of every weight on each layer, by all paths inside of the layer."""
    for layer in layers:
        H = p.layer_transition(layer)
        for effect in p.effects(layer):
            J = p.recur(decay=H, inject=p.layer_immediate(effect))
            p.gradient(effect, p.contract(p.earlier_credit(layer), J.prev), within="one_step")


def require_leak(leak: float) -> None:
    """Refuse a leak outside of [0, 1)."""
    if isinstance(leak, bool) or not isinstance(leak, (int, float)) or not 0.0 <= leak < 1.0:
        raise OptionError("leak must lie in [0, 1).", got=f"leak={leak!r}")
