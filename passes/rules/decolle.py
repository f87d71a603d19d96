"""DECOLLE: deep continuous local learning; each layer has a loss of its own, of a fixed random readout.

    e_t    = D_t e_{t-1} + f_t (x) x_t
    y_t    = s_t Bᵀ                            (s: what the group shows, B: fixed and random)
    grad_t = L_t e_t,   L_t = (y_t - y*_t) B of what the group shows

L is the derivative of the local loss ``|y - y*|² / 2``, through the same matrix that reads: no layer waits for another. Weights
without a trace (the model's readout) get the gradient of the loss given.

Memory O(B I O) per weight of I x O at batch B, time O(B I O) per step.

Reference: J. Kaiser, H. Mostafa and E. Neftci, "Synaptic plasticity dynamics for deep continuous local learning (DECOLLE)",
Frontiers in Neuroscience 14, 2020. Departures: e is the model's own trace, where the paper has the filtered presynaptic
spikes, to which it is equal for leaky units without reset; B is normal with variance 1 / targets; the regularisation of
potentials is left to a penalty in the loss.
"""

from __future__ import annotations

from etcompile.pass_api import ProgramBuilder, algorithm

__all__ = ["decolle"]


@algorithm(
    "decolle",
    preserves="changes",
    leaves_out="each group learns from a loss of its own, of a fixed random readout",
)
def decolle(p: ProgramBuilder, seed: int = 0) -> None:
    """DECOLLE: e = D e + f (x) x; grad = ((s Bᵀ - target) B) e."""
    for r in p.relations:
        B = p.random_projection(r.group, seed)
        error = p.read(p.shown(r.group), B) - p.target()
        e = p.recur(decay=p.transition(r.group), inject=p.outer(r))
        p.gradient(r, p.contract(p.through(p.project(error, B)), e))
