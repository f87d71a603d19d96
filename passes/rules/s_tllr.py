"""S-TLLR: a temporal local learning rule after spike-timing-dependent plasticity, causal and not.

    x̄_t    = λ_post x̄_{t-1} + x_t              (what came in, for what the unit does now)
    Ψ_t    = λ_pre Ψ_{t-1} + ψ_t f_t            (what the unit did, for what comes in now)
    grad_t = E_t (α_post (ψ_t f_t) (x) x̄_t + α_pre Ψ_{t-1} (x) x_t)

ψ is the derivative of what the unit shows by its states, and E_t the loss differentiated by what it shows, or the error through a
random matrix. No trace has the size of a weight. With α_pre = 0 only causes before their effects count.

Memory O(B (I + O)) per weight of I x O at batch B, time O(B I O) where a gradient is taken.

Reference: M. Apolinario and K. Roy, "S-TLLR: STDP-inspired temporal local learning rule for spiking neural networks", TMLR
2025, arXiv 2306.15220; the traces are those of the authors' code. Departures: ψ is the model's own surrogate
derivative, not a second function; biases have traces like other weights.
"""

from __future__ import annotations

from etcompile.pass_api import ProgramBuilder, algorithm
from etcompile.passes.parts import require_leak
from etcompile.passes.signals import require_feedback, shown_signal

__all__ = ["s_tllr"]


@algorithm(
    "s_tllr",
    preserves="changes",
    leaves_out="the past acts through one trace of what came in and one of what the unit did",
)
def s_tllr(
    p: ProgramBuilder,
    lambda_pre: float = 0.2,
    lambda_post: float = 0.75,
    alpha_pre: float = -1.0,
    alpha_post: float = 1.0,
    feedback: str = "symmetric",
    seed: int = 0,
) -> None:
    """S-TLLR: x̄ = λ x̄ + x; Ψ = λ' Ψ + ψ f; grad = E (α (ψ f) (x) x̄ + α' Ψ_{t-1} (x) x)."""
    for leak in (lambda_pre, lambda_post):
        require_leak(leak)
    require_feedback(feedback, "symmetric", "random")
    for r in p.relations:
        now = p.scale(p.derivative(r.group), p.immediate(r))
        came_in = p.recur(decay=lambda_post, inject=p.presynaptic(r))
        did = p.recur(decay=lambda_pre, inject=now)
        E = p.spread(shown_signal(p, r.group, feedback, seed))
        causal = alpha_post * p.contract(E, now, came_in)
        other = alpha_pre * p.contract(E, did.prev, p.presynaptic(r))
        p.gradient(r, causal + other, within="rest" if feedback == "symmetric" else "outside")
