"""KeRNL: how units answer to each other later on is a matrix times an exponential kernel, both learned from perturbations.

    dh_i(t + n) / dh_j(t) ≈ β_ij k_jⁿ
    e_t    = k e_{t-1} + f_t (x) x_t                          (k of each unit and state)
    grad_t = one_step_t + ((L_t H_t + K_t) β) e_{t-1}

    s_t = H_t s_{t-1} + ν_t          what small noise ν does to the states (random signs, new at every step)
    Ω_t = k Ω_{t-1} + ν_t            what the kernel makes of it,       Γ_t = dΩ_t/dk = k Γ_{t-1} + Ω_{t-1}
    err = β Ω_t - s_t
    β  -= η err (x) Ω_t,             k -= η (err β) Γ_t, kept within [0, 1)      (means over examples)

β starts as the identity and k as ``kernel``; both are learned at every step, with or without a loss, and a reset leaves them
alone, while e, s, Ω and Γ start anew. Matrices are small where units are few: N² numbers for N hidden units of one example.

Memory B I O per weight of I x O, and N² + 4 B N; time O(B I O + B N²) per step and a step forward.

Reference: C. Roth, I. Kanitscheider and I. Fiete, "Kernel RNN learning (KeRNL)", ICLR 2019. Departures: the noise is infinitely
small, so that its effect is a tangent and not the difference of two runs; the step itself is full autodiff, and the kernel stands
for earlier ones alone, by the loss's derivative by the old states; k is learned in place of its logarithm; matrices are over all
states of a model, whatever its cell.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from etcompile.pass_api import OptionError, ProgramBuilder, algorithm
from etcompile.passes.parts import require_leak

__all__ = ["kernl"]


def learnt(change: jax.Array, start: jax.Array) -> jax.Array:
    """The kernel after what was learned of it."""
    return jnp.clip(start.astype(change.dtype) + change, 0.0, 0.999)


@algorithm(
    "kernl",
    leaves_out="a learned kernel stands for how units answer to each other later on",
)
def kernl(p: ProgramBuilder, kernel: float = 0.8, rate: float = 0.01, seed: int = 0) -> None:
    """KeRNL: e = k e + f (x) x; grad = one_step + (dloss/dh_{t-1} β) e_{t-1}, β and k learned from noise."""
    require_leak(kernel)
    if not (isinstance(rate, (int, float)) and rate >= 0.0):
        raise OptionError("rate must be a number from 0 on.", got=f"rate={rate!r}")
    if not p.relations:
        return
    network = p.network
    H, noise = p.layer_transition(network), p.rademacher(network, seed)
    learned, change = (p.carry(kind, network, lasting=True) for kind in ("sensitivity", "hidden"))
    beta = p.identity(network) + learned.prev
    k = p.map(learnt, change.prev, p.number(kernel))
    s = p.recur(decay=H, inject=noise)
    omega, gamma = p.carry("hidden", network), p.carry("hidden", network)
    p.define(omega, k * omega.prev + noise)
    p.define(gamma, k * gamma.prev + omega.prev)
    error = p.relate(beta, omega) - s
    p.define(learned, learned.prev - rate * p.correlate(error, omega))
    p.define(change, change.prev - rate * p.over_examples(p.relate_back(error, beta) * gamma))
    credit = p.relate_back(p.earlier_credit(network), beta)
    for r in p.relations:
        e = p.carry("trace", r)
        p.define(e, p.scale(p.of_layer(r.group, k), e.prev) + p.outer(r))
        p.gradient(r, p.contract(p.of_layer(r.group, credit), e.prev), within="one_step")
