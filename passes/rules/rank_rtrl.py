"""Rank-RTRL: RTRL with a few products for each unit in place of the influence of its incoming weights.

    J_t[h, y, i] ≈ Σ_k A^k_t[h, y] V^k_t[y, i],   k = 1 .. r
    Σ_k A^k_t V^k_t = the nearest of rank r to  Σ_k (H_t A^k_{t-1}) V^k_{t-1} + dh_t/dy_t x_t,   for each y by itself
    grad_t = one_step_t + sum over h of (L_t H_t + K_t)[h] Σ_k A^k_{t-1}[h, y] V^k_{t-1}[y]

The weights that lead to one element y of an operation's result act on the network's states by a matrix, states x inputs. A step
multiplies it by H and adds a product of a column and a row. What is kept is the best approximation by r such
products, from its singular values; nothing is random. Where y acts on all states with one time course, rank 1 is exact; each
other time course, such as that of units above that forget at another rate, adds one to the rank. H follows every path, so credit
passes between units and from layer to layer.

A weight without inputs (a bias, an element-wise weight) has A alone, and is exact.

Memory B r O (N + I) per weight of I x O with N hidden units, time that of r O steps and of O decompositions of matrices with
r + 1 columns.

The nearest matrix of a rank: C. Eckart and G. Young, "The approximation of one matrix by another of lower rank", Psychometrika
1, 1936. Related: KF-RTRL (``kf_rtrl``) has one factor of inputs for all units, and random signs that make it right on average;
F. Benzing et al., "Optimal Kronecker-sum approximation of real time recurrent learning", ICML 2019, arXiv 1902.03993.
"""

from __future__ import annotations

from functools import reduce
from operator import add

from etcompile.pass_api import Effect, ProgramBuilder, Value, algorithm, positive_integer

__all__ = ["rank_rtrl"]


@algorithm(
    "rank_rtrl",
    leaves_out="of the influence of each unit's incoming weights what is beyond the rank is dropped at every step",
)
def rank_rtrl(p: ProgramBuilder, rank: int = 1) -> None:
    """Rank-RTRL: J ≈ Σ A V for each unit, nearest of rank r; grad = one_step + (dloss/dh_{t-1} A_{t-1}) V_{t-1}."""
    rank = positive_integer("rank", rank)
    H = p.layer_transition(p.network)
    credit = p.earlier_credit(p.network)
    for effect in p.effects(p.network):
        now = p.layer_response(effect)
        if not p.header.site(effect.site).contracted:
            A = p.recur(decay=H, inject=now)
            value = p.pullback(p.header.site(effect.site), p.contract(credit, A.prev))
        else:
            pairs = _nearest(p, effect, H, now, rank)
            value = reduce(add, (p.pullback(V.prev, p.contract(credit, A.prev)) for V, A in pairs))
        p.gradient(effect, value, within="one_step")


def _nearest(p: ProgramBuilder, effect: Effect, H: Value, now: Value, rank: int) -> list[tuple[Value, Value]]:
    """So many pairs, which are the nearest to those of the step before and what this step adds."""
    pairs = [(p.carry("unit_factor", effect), p.carry("response", effect)) for _ in range(rank)]
    left = [*(V.prev for V, _ in pairs), p.unit_factor(effect)]
    right = [*(H @ A.prev for _, A in pairs), now]
    for (V, A), (new_V, new_A) in zip(pairs, p.nearest(left, right), strict=True):
        p.define(V, new_V)
        p.define(A, new_A)
    return pairs
