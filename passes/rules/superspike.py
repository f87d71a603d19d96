"""SuperSpike: the error of a unit times a filter of its surrogate derivative times filtered presynaptic spikes.

    a_t    = α a_{t-1} + x_t            x̄_t = β x̄_{t-1} + a_t           (synapse and membrane)
    e_t    = γ e_{t-1} + (ψ_t f_t) (x) x̄_t
    grad_t = E_t e_t,   E_t = err_t B by random feedback, or dloss_t/dshown_t

ψ is the derivative of what the unit shows by its states, for a spike the surrogate. Unlike in e-prop, the trace holds ψ of
the steps at which it was formed, and E is not multiplied by the current one.

Memory O(B (I O + 2 I)) per weight of I x O at batch B, time O(B I O) per step.

Reference: F. Zenke and S. Ganguli, "SuperSpike: supervised learning in multilayer spiking neural networks", Neural Computation
30, 2018, arXiv 1705.11146. Departures: the filter over the product is one exponential; the error is dloss/dout of any
loss, so that the filter of van Rossum's distance is left to the loss; rates per synapse (r_ij) are left to the optimiser.
"""

from __future__ import annotations

from etcompile.pass_api import ProgramBuilder, algorithm
from etcompile.passes.parts import require_leak
from etcompile.passes.signals import require_feedback, shown_signal

__all__ = ["superspike"]


@algorithm(
    "superspike",
    preserves="changes",
    leaves_out="presynaptic filters stand for what the unit does with its input, and the product with its derivative is filtered",
)
def superspike(
    p: ProgramBuilder,
    alpha: float = 0.8,
    beta: float = 0.9,
    gamma: float = 0.9,
    feedback: str = "random",
    seed: int = 0,
) -> None:
    """SuperSpike: x̄ = filter of x, twice; e = γ e + (ψ f) (x) x̄; grad = (err B) e."""
    for leak in (alpha, beta, gamma):
        require_leak(leak)
    require_feedback(feedback, "random", "symmetric")
    for r in p.relations:
        x = p.recur(decay=beta, inject=p.recur(decay=alpha, inject=p.presynaptic(r)))
        f = p.scale(p.derivative(r.group), p.immediate(r))
        e = p.recur(decay=gamma, inject=p.outer(f, x))
        E = shown_signal(p, r.group, feedback, seed)
        p.gradient(r, p.contract(p.spread(E), e), within="rest" if feedback == "symmetric" else "outside")
