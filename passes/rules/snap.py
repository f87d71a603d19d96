"""SnAp-n: RTRL with the influence kept on a sparse pattern.

    J_t    = M_n o (H_t J_{t-1} + F_t)
    grad_t = one_step_t + (L_t H_t + K_t) J_{t-1}

M_n has ones where a weight can reach a hidden element within n steps: the structural pattern of F + H F + ... +
H^{n-1} F, with all zeros that are known when the model is compiled (constant masks, fixed sparse connections).
Weights that share an output (the taps of a convolution) share their pattern; a parameter that is broadcast before its
use counts as separate weights. n = 1 keeps the entries that a weight reaches in the step itself, with the diagonal of
the true transition, recurrent weights included. With n large enough nothing is left out and the rule is RTRL. Weights
at operations without a closed form keep their whole influence.

Memory B K I per weight of I x O, K being the pairs (output, element) of the pattern: O for n = 1 of a plain RNN, O N
at most. H is formed at needed entries only, from as many Jacobian-vector products as it takes colors to keep its
columns apart.

Reference: J. Menick, E. Elsen, U. Evci, S. Osindero, K. Simonyan and A. Graves, "A practical sparse approximation for
real time recurrent learning", ICLR 2021, arXiv 2006.07232. Departure: patterns come from the model's own step,
whatever cell it is.
"""

from __future__ import annotations

from etcompile.pass_api import ProgramBuilder, algorithm, positive_integer

__all__ = ["snap"]


@algorithm(
    "snap",
    leaves_out="influence outside of the pattern is dropped at every step",
)
def snap(p: ProgramBuilder, n: int = 1) -> None:
    """SnAp-n: J = M_n o (H J + F); grad = one_step + dloss/dh_{t-1} J_{t-1}."""
    n = positive_integer("n", n)
    H = p.layer_transition(p.network)
    credit = p.earlier_credit(p.network)
    for effect in p.effects(p.network):
        closed = p.header.site(effect.site).closed
        J = p.recur(decay=H, inject=p.snap_immediate(effect, n) if closed else p.layer_immediate(effect))
        p.gradient(effect, p.contract(credit, J.prev), within="one_step")
