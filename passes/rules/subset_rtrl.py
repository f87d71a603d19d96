"""Random-subset RTRL: RTRL's influence passes from step to step through a few units alone, drawn at random.

    J_t    = H_t P J_{t-1} + F_t              P: 1 for k units of each group, else 0
    grad_t = one_step_t + (L_t H_t + K_t) J_{t-1}

With ``redraw=True`` units are drawn anew at every step and P has n / k in place of 1 for a group of n units: the gradient is
then right on average, with a variance that grows with n / k at each step of its way. By default they are drawn once, for good,
and P J is smaller than J: a biased estimate that is stable where RTRL's would grow. With k of n units or more it is RTRL.

Memory B N P for P weights and N hidden units, time B N² P, as ``rtrl``: H is one operator for all units here, so a subset saves
no time. The rule is there to see for what a subset is enough.

Reference: A. Shalev Merin, "Massive redundancy in gradient transport enables sparse online learning", 2026, arXiv 2603.15195,
which keeps k = 4 of 64 to 256 units, drawn once. Departures: this follows its account of paths through k units, not code;
units are drawn for each group of states; the unbiased form is not the paper's.
"""

from __future__ import annotations

from etcompile.pass_api import ProgramBuilder, algorithm, positive_integer

__all__ = ["subset_rtrl"]


@algorithm(
    "subset_rtrl",
    leaves_out="influence goes on through a random subset of the units",
)
def subset_rtrl(p: ProgramBuilder, k: int = 4, redraw: bool = False, seed: int = 0) -> None:
    """Random-subset RTRL: J = H P J + F, P a few units at random; grad = one_step + dloss/dh_{t-1} J_{t-1}."""
    k = positive_integer("k", k)
    H, P = p.layer_transition(p.network), p.subset(p.network, k, seed, redraw)
    credit = p.earlier_credit(p.network)
    for effect in p.effects(p.network):
        J = p.carry("influence", effect)
        p.define(J, H @ p.scale(P, J.prev) + p.layer_immediate(effect))
        p.gradient(effect, p.contract(credit, J.prev), within="one_step")
