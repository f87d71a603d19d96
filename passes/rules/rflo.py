"""RFLO: random feedback local online learning.

    e_t    = λ e_{t-1} + f_t (x) x_t
    grad_t = L_t e_t,   L_t = err_t B of what the group shows

For the model of the paper, h_t = (1 - 1/τ) h_{t-1} + φ(u_t)/τ, the immediate Jacobian f_t = φ'(u_t)/τ already holds the 1/τ, and
λ = 1 - 1/τ. With ``leak=None`` the model's own transition D_t takes the place of λ: the same for that model, and right for
every other.

Memory O(B I O) per weight, time O(B I O) per step.

Reference: J. Murray, "Local online learning in recurrent networks with random feedback", eLife 8, 2019. Departure:
the error is dloss/dout of any loss.
"""

from __future__ import annotations

from etcompile.pass_api import ProgramBuilder, algorithm
from etcompile.passes.parts import require_leak
from etcompile.passes.signals import learning_signal

__all__ = ["rflo"]


@algorithm(
    "rflo",
    preserves="changes",
    leaves_out="the learning signal is the output error through a random matrix",
)
def rflo(p: ProgramBuilder, leak: float | None = None, seed: int = 0) -> None:
    """RFLO: e = λ e + f (x) x; grad = (err B) e."""
    if leak is not None:
        require_leak(leak)
    for r in p.relations:
        decay = p.transition(r.group) if leak is None else leak
        e = p.recur(decay=decay, inject=p.outer(r))
        p.gradient(r, p.contract(learning_signal(p, r.group, "random", seed), e))
