"""KF-RTRL: a random Kronecker-factored estimate of RTRL's influence.

    J_t ≈ A_t (x) u_t for each row of x,   E[A_t (x) u_t] = J_t
    u_t    = c1 p1 u_{t-1} + c2 p2 x_t
    A_t    = (c1 / p1) H_t A_{t-1} + (c2 / p2) dh_t/dy_t                c1, c2: random signs
    p1     = sqrt(|H_t A_{t-1}| / |u_{t-1}|),   p2 = sqrt(|dh_t/dy_t| / |x_t|)
    grad_t = one_step_t + sum over h of (L_t H_t + K_t)[h] A_{t-1}[h, y] u_{t-1}

The influence of a matrix on this step's states, dh_t/dy_t (x) x_t, is a Kronecker product already; only the sum with the past is
estimated. Every example (and every place, for a convolution) has a factor u of its own with its own signs. Element-wise
weights have no x, so A alone is exact for them.

With ``rank=r`` it is the optimal Kronecker sum: r pairs A (x) u, and the r + 1 pairs H Σ A (x) u + dh_t/dy_t (x) x_t become the
unbiased estimate by r pairs that has the least variance: singular values that are large enough are kept, the others mixed by
random signs. One pair of this kind is never worse than the balanced one above; with more the noise falls quickly.

Memory B r (N O + I) per weight of I x O with N hidden units, r = 1 without a rank, time that of r O steps.

References: A. Mujika, F. Meier and A. Steger, "Approximating real-time recurrent learning with random Kronecker
factors", NeurIPS 2018, arXiv 1805.10842; F. Benzing, M. M. Gauy, A. Mujika, A. Martinsson and A. Steger, "Optimal
Kronecker-sum approximation of real time recurrent learning", ICML 2019, arXiv 1902.03993. Departure: recurrences of any model
and every linear operation, not only a matrix in an RNN.
"""

from __future__ import annotations

from functools import reduce
from operator import add

from etcompile.pass_api import Effect, ProgramBuilder, Value, algorithm, positive_integer
from etcompile.passes.parts import balance

__all__ = ["kf_rtrl"]


@algorithm(
    "kf_rtrl",
    leaves_out="the influence is a random Kronecker-factored estimate, right on average",
)
def kf_rtrl(p: ProgramBuilder, seed: int = 0, rank: int | None = None) -> None:
    """KF-RTRL: J ≈ A (x) u with random signs; grad = one_step + (dloss/dh_{t-1} A_{t-1}) u_{t-1}."""
    rank = rank if rank is None else positive_integer("rank", rank, otherwise=", or None")
    H = p.layer_transition(p.network)
    credit = p.earlier_credit(p.network)
    for effect in p.effects(p.network):
        site = p.header.site(effect.site)
        now = p.layer_response(effect)
        if not site.contracted:
            A = p.recur(decay=H, inject=now)
            value = p.pullback(site, p.contract(credit, A.prev))
        else:
            pairs = (
                _balanced(p, effect, H, now, seed) if rank is None else _best(p, effect, H, now, seed, rank)
            )
            value = reduce(add, (p.pullback(u.prev, p.contract(credit, A.prev)) for u, A in pairs))
        p.gradient(effect, value, within="one_step")


def _balanced(
    p: ProgramBuilder, effect: Effect, H: Value, now: Value, seed: int
) -> list[tuple[Value, Value]]:
    """One pair whose factors are of one size."""
    x = p.row_factor(effect)
    u, A = p.carry("row_factor", effect), p.carry("response", effect)
    pushed = H @ A.prev
    c1, c2 = p.row_signs(effect, 2 * seed), p.row_signs(effect, 2 * seed + 1)
    p1 = p.map(balance, p.row_norm(pushed), p.row_norm(u.prev))
    p2 = p.map(balance, p.row_norm(now), p.row_norm(x))
    p.define(u, (c1 * p1) * u.prev + (c2 * p2) * x)
    p.define(A, (c1 / p1) * pushed + (c2 / p2) * now)
    return [(u, A)]


def _best(
    p: ProgramBuilder, effect: Effect, H: Value, now: Value, seed: int, rank: int
) -> list[tuple[Value, Value]]:
    """So many pairs, of the least variance."""
    pairs = [(p.carry("row_factor", effect), p.carry("response", effect)) for _ in range(rank)]
    left = [*(u.prev for u, _ in pairs), p.row_factor(effect)]
    right = [*(H @ A.prev for _, A in pairs), now]
    for (u, A), (new_u, new_A) in zip(pairs, p.fewer_terms(left, right, seed), strict=True):
        p.define(u, new_u)
        p.define(A, new_A)
    return pairs
