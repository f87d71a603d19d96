"""Gradients summed over steps: by the effective weights of the sites, and by the parameters that a loss reads itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from etcompile.lowering.causal import CausalProgram
from etcompile.lowering.losses import Loss
from etcompile.precision import accumulator

__all__ = ["Sums", "added", "by_name", "by_parameters", "zero_sums"]

Array = Any

#: By name of the site; and by :func:`_own` what the loss itself adds to a parameter's gradient.
Sums = dict[str, Array]


def _own(leaf: int) -> str:
    return f"param {leaf}"


def by_name(sites: Mapping[str, Array], own: Mapping[int, Array]) -> Sums:
    """Gradients of the sites, and by parameters that the loss reads."""
    return {**sites, **{_own(k): v for k, v in own.items()}}


def zero_sums(causal: CausalProgram, loss: Loss) -> Sums:
    """Those over no steps at all."""
    sites = causal.model.sites
    zeros = {name: jnp.zeros(g.weight.shape, accumulator(g.weight.dtype)) for name, g in sites.items()}
    params = causal.model.analysis.model.params
    own = {k: jnp.zeros(params[k].aval.shape, params[k].aval.dtype) for k in loss.program.params}
    return by_name(causal.placement.hold_weights(zeros), own)


def added(total: Sums, gradients: Sums) -> Sums:
    """Sums with the gradients of more steps."""
    return {k: v + gradients[k].astype(v.dtype) if k in gradients else v for k, v in total.items()}


def by_parameters(causal: CausalProgram, params: list[Array], sums: Sums) -> list[Array]:
    """Gradients of the leaves of the parameters."""
    sites = {name: v for name, v in sums.items() if name in causal.model.sites}
    found = causal.model.unhoist(params, causal.placement.hold_weights(sites))
    found = [g + sums[_own(k)] if _own(k) in sums else g for k, g in enumerate(found)]
    return causal.placement.hold_params(found)
