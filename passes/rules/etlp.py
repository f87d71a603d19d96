"""ETLP: event-based three-factor local plasticity; presynaptic trace, postsynaptic derivative, projected label.

    x̄_t    = λ x̄_{t-1} + x_t
    grad_t = x̄_t (x) (L_t f_t),   L_t = y*_t B of what the group shows

The label y* reaches every layer through a fixed random matrix, and no error is computed. It is the event that triggers an update:
at steps without one, call the step without a loss or mask it, and the traces go on. Weights without a trace (readouts) get the
gradient of the loss.

Memory O(B I) per weight of I x O at batch B, time O(B I O) where a gradient is taken.

Reference: F. M. Quintana, F. Perez-Peña, P. L. Galindo, E. O. Neftci, E. Chicca and L. Khacef, "ETLP: event-based three-factor
local plasticity for online learning with neuromorphic hardware", Neuromorphic Computing and Engineering 4, 2024, arXiv
2301.08281. Departures: f and the derivative in L are the model's own; of adaptive thresholds the derivative of the moment
counts, and not their trace of earlier spikes; the sign of the projection is that of its random matrix.
"""

from __future__ import annotations

from etcompile.pass_api import ProgramBuilder, algorithm
from etcompile.passes.parts import require_leak
from etcompile.passes.signals import learning_signal

__all__ = ["etlp"]


@algorithm(
    "etlp",
    preserves="changes",
    leaves_out="the learning signal is the target through a random matrix, and the past a leaky presynaptic trace",
)
def etlp(p: ProgramBuilder, leak: float = 0.9, seed: int = 0) -> None:
    """ETLP: x̄ = λ x̄ + x; grad = x̄ (x) ((target B) f)."""
    require_leak(leak)
    for r in p.relations:
        x = p.recur(decay=leak, inject=p.presynaptic(r))
        p.gradient(r, p.contract(learning_signal(p, r.group, "target", seed), p.immediate(r), x))
