"""DODGE: the directional derivative along one random direction of all weights, forward in time.

    u      : a random sign for each weight, drawn when a sequence begins
    s_t    = H_t s_{t-1} + F_t u                                    (s = dh/dw u, one tangent)
    grad_t = one_step_t + ((L_t H_t + K_t) s_{t-1}) u,              E[u uᵀ] = 1

The sum over a sequence of what earlier steps left is (g · u) u, its projection on u, and right on average. No Jacobian is ever
formed; s follows all paths, recurrent weights included. The whole batch is one system with one direction; vmap ``apply`` over
examples for one each, with less variance. Without a ``reset`` the direction stays, and so does the line on which weights change
by what earlier steps left: in a stream without end reset now and then, or take ``uoro``.

Memory N + P for N hidden units (batch included) and P weights, time that of two steps for each weight.

Reference: D. Silver, A. Goyal, I. Danihelka, M. Hessel and H. van Hasselt, "Learning by directional gradient descent", ICLR
2022. Departures: the random direction alone, not the ones that approximate the gradient; credit from within the step is full
autodiff, of the weights of a readout as well, and only what earlier steps left is estimated.
"""

from __future__ import annotations

from functools import reduce
from operator import add

from etcompile.pass_api import ProgramBuilder, algorithm

__all__ = ["dodge"]


@algorithm(
    "dodge",
    leaves_out="the influence is known along one random direction of the weights, right on average",
)
def dodge(p: ProgramBuilder, seed: int = 0) -> None:
    """DODGE: s = H s + F u along a random u; grad = one_step + (dloss/dh_{t-1} s_{t-1}) u."""
    effects = p.effects(p.network)
    if not effects:
        return
    going_on = p.recur(decay=0.0, inject=p.number(1.0)).prev
    along = []
    for effect in effects:
        u = p.carry("gradient", effect.site)
        p.define(u, going_on * u.prev + (1.0 - going_on) * p.direction(effect.site, seed))
        along.append((effect, u))
    moved = reduce(add, (p.along(effect, u) for effect, u in along))
    s = p.recur(decay=p.layer_transition(p.network), inject=moved)
    change = p.dot(p.earlier_credit(p.network), s.prev)
    for effect, u in along:
        p.gradient(effect, change * u, within="one_step")
