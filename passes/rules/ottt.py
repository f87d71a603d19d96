"""OTTT: online training through time, with a trace of presynaptic activity alone.

    â_t    = λ â_{t-1} + x_t
    grad_t = â_t (x) (L_t f_t)               (and what of this step's credit does not pass through L_t f_t)

The past acts through one leaky trace per presynaptic value; what the unit did with it (resets, adaptation, other time constants)
is left out. It equals D-RTRL for a leaky integrator with constant leak λ whose reset passes no gradient.

Memory O(B I) per weight, time O(B I O) where a gradient is taken. The trace goes on either way, so gradients may be
accumulated over a sequence (OTTT_A of the paper) or applied at every step (OTTT_O).

Reference: M. Xiao et al., "Online training through time for spiking neural networks", NeurIPS 2022, arXiv 2210.04195.
Departure: any model, not only feed-forward leaky integrate-and-fire layers; f_t is the model's own.
"""

from __future__ import annotations

from etcompile.pass_api import ProgramBuilder, algorithm
from etcompile.passes.parts import require_leak

__all__ = ["ottt"]


@algorithm(
    "ottt",
    leaves_out="the past acts through a leaky presynaptic trace; what the unit did with it is left out",
)
def ottt(p: ProgramBuilder, leak: float = 0.9) -> None:
    """OTTT: â = λ â + x; grad = â (x) (L f)."""
    require_leak(leak)
    for r in p.relations:
        a = p.recur(decay=leak, inject=p.presynaptic(r))
        p.gradient(r, p.contract(p.signal(r.group), p.immediate(r), a))
