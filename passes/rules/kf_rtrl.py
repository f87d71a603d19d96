"""KF-RTRL: a random Kronecker-factored estimate of RTRL's influence.

    J_t ≈ A_t (x) u_t for each row of x,   E[A_t (x) u_t] = J_t
    u_t    = c1 p1 u_{t-1} + c2 p2 x_t
    A_t    = (c1 / p1) H_t A_{t-1} + (c2 / p2) dh_t/dy_t                c1, c2: random signs
    p1     = sqrt(|H_t A_{t-1}| / |u_{t-1}|),   p2 = sqrt(|dh_t/dy_t| / |x_t|)
    grad_t = one_step_t + sum over h of (L_t H_t + K_t)[h] A_{t-1}[h, y] u_{t-1}

The influence of a matrix on this step's states, dh_t/dy_t (x) x_t, is a Kronecker product already; only the sum with the past is
estimated. Every example (and every place, for a convolution) has a factor u of its own with its own signs. Element-wise
weights have no x, so A alone is exact for them.

Memory B N (O + I / N) per weight of I x O with N hidden units, time that of O steps.

Reference: A. Mujika, F. Meier and A. Steger, "Approximating real-time recurrent learning with random Kronecker
factors", NeurIPS 2018, arXiv 1805.10842. Departure: recurrences of any model and every linear operation, not only a
matrix in an RNN.
"""

from __future__ import annotations

from etcompile.pass_api import ProgramBuilder, algorithm
from etcompile.passes.parts import balance

__all__ = ["kf_rtrl"]


@algorithm(
    "kf_rtrl",
    leaves_out="the influence is a random Kronecker-factored estimate, right on average",
)
def kf_rtrl(p: ProgramBuilder, seed: int = 0) -> None:
    """KF-RTRL: J ≈ A (x) u with random signs; grad = one_step + (dloss/dh_{t-1} A_{t-1}) u_{t-1}."""
    for effect in p.effects(p.network):
        site = p.header.site(effect.site)
        H = p.layer_transition(p.network)
        now = p.layer_response(effect)
        credit = p.earlier_credit(p.network)
        if not site.contracted:
            A = p.recur(decay=H, inject=now)
            value = p.pullback(site, p.contract(credit, A.prev))
        else:
            x = p.row_factor(effect)
            u, A = p.carry("row_factor", effect), p.carry("response", effect)
            pushed = H @ A.prev
            c1, c2 = p.row_signs(effect, 2 * seed), p.row_signs(effect, 2 * seed + 1)
            p1 = p.map(balance, p.row_norm(pushed), p.row_norm(u.prev))
            p2 = p.map(balance, p.row_norm(now), p.row_norm(x))
            p.define(u, (c1 * p1) * u.prev + (c2 * p2) * x)
            p.define(A, (c1 / p1) * pushed + (c2 / p2) * now)
            value = p.pullback(u.prev, p.contract(credit, A.prev))
        p.gradient(effect, value, within="one_step")
