"""UORO: unbiased online recurrent optimisation, a random rank-one estimate of RTRL's influence.

    J_t ≈ s_t (x) θ_t,   E[s_t (x) θ_t] = J_t
    s_t    = ρ0 H_t s_{t-1} + ρ1 ν_t                    ν_t: a random sign for each hidden unit
    θ_t    = θ_{t-1} / ρ0 + (ν_t F_t) / ρ1
    ρ0     = sqrt(|θ_{t-1}| / |H_t s_{t-1}|),   ρ1 = sqrt(|ν_t F_t| / |ν_t|)
    grad_t = one_step_t + ((L_t H_t + K_t) s_{t-1}) θ_{t-1}

One Jacobian-vector product (H s) and one vector-Jacobian product (ν F) per step, never a Jacobian. The scales ρ lower
the variance; a small constant in each keeps them finite. The whole batch is one system with one estimate; vmap
``apply`` over examples for one estimate each, with less variance.

Memory N + P for N hidden units and P weights, time that of a few steps of backpropagation.

Reference: C. Tallec and Y. Ollivier, "Unbiased online recurrent optimization", 2017, arXiv 1702.05043.
"""

from __future__ import annotations

from etcompile.pass_api import ProgramBuilder, algorithm
from etcompile.passes.parts import balance

__all__ = ["uoro"]


@algorithm(
    "uoro",
    leaves_out="the influence is a random rank-one estimate, right on average",
)
def uoro(p: ProgramBuilder, seed: int = 0) -> None:
    """UORO: J ≈ s (x) θ with random signs; grad = one_step + (dloss/dh_{t-1} s_{t-1}) θ_{t-1}."""
    effects = p.effects(p.network)
    if not effects:
        return
    H = p.layer_transition(p.network)
    nu = p.rademacher(p.network, seed)
    s = p.carry("hidden", p.network)
    theta = [p.carry("gradient", effect.site) for effect in effects]
    pushed = H @ s.prev
    pulled = [p.pullback(p.header.site(e.site), p.reach(e, nu)) for e in effects]
    rho0 = p.map(balance, p.norm(*(v.prev for v in theta)), p.norm(pushed))
    rho1 = p.map(balance, p.norm(*pulled), p.norm(nu))
    p.define(s, rho0 * pushed + rho1 * nu)
    credit = p.earlier_credit(p.network)
    for effect, value, part in zip(effects, theta, pulled, strict=True):
        p.define(value, value.prev / rho0 + part / rho1)
        p.gradient(effect, p.dot(credit, s.prev) * value.prev, within="one_step")
