"""OTPE: online training with postsynaptic estimates.

    R_t    = λ R_{t-1} + f_t (x) x_t
    grad_t = L_t R_t                         (and what of this step's credit does not pass through L_t f_t)

R sums, with the leak of the units that come after, everything that a weight has sent on: an estimate of its effect on the
potentials of the next layer. ``approximate=True`` keeps two factors instead (F-OTPE of the paper):

    ẑ_t = λ ẑ_{t-1} + x_t        ḡ_t = λ ḡ_{t-1} + f_t        grad_t = ẑ_t (x) (L_t ḡ_t)

L_t holds the credit through deeper layers, by autodiff of the step with their weights and derivatives of the moment,
so each layer meets its own R with the credit of all layers above it.

Memory O(B I O) per weight, O(B (I + O)) if approximate.

Reference: T. Summe et al., "Estimating post-synaptic effects for online training of feed-forward SNNs", 2023, arXiv
2311.16151. Departures: the paper filters twice, by the membrane (the trace of OTTT or OSTL) and then by the next
layer's leak, with the spike's derivative in between; here there is the one filter of the equations above, over the
model's own f and x of the step. Where f is constant that is OTTT. ḡ is not normalised. Recurrent models are allowed;
their recurrent credit is left out.
"""

from __future__ import annotations

from etcompile.pass_api import ProgramBuilder, algorithm
from etcompile.passes.parts import require_leak

__all__ = ["otpe"]


@algorithm(
    "otpe",
    leaves_out="the past acts with one constant leak in place of the unit's own transition",
)
def otpe(p: ProgramBuilder, leak: float = 0.9, approximate: bool = False) -> None:
    """OTPE: R = λ R + f (x) x; grad = L R; approximate: R ≈ ḡ (x) ẑ."""
    require_leak(leak)
    for r in p.relations:
        signal = p.signal(r.group)
        if approximate:
            z = p.recur(decay=leak, inject=p.presynaptic(r))
            g = p.recur(decay=leak, inject=p.immediate(r))
            p.gradient(r, p.contract(signal, g, z))
        else:
            p.gradient(r, p.contract(signal, p.recur(decay=leak, inject=p.outer(r))))
