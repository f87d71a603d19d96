"""OSTTP: online spatio-temporal learning with target projection.

    e_t    = D_t e_{t-1} + f_t (x) x_t       (recurrent: J_t = H_t J_{t-1} + F_t within each layer)
    grad_t = L_t e_t,   L_t = y*_t B of what the group shows

The target y*, not an error, reaches every layer through a fixed random matrix, so no layer waits for another and nothing is
transported backwards. Targets may come at every step or at the end only: on steps without one, call the step without a loss, and
traces go on. Weights without a trace (readouts) get the gradient of the loss.

Memory and time as D-RTRL, or with ``recurrent`` as OSTL.

Reference: T. Ortner, L. Pes, J. Gentinetta, C. Frenkel and A. Pantazi, "Online spatio-temporal learning with target
projection", IEEE AICAS 2023, arXiv 2304.05124. Departure: class labels become one-hot targets; the sign of the
projection is that of its random matrix.
"""

from __future__ import annotations

from etcompile.pass_api import ProgramBuilder, algorithm
from etcompile.passes.signals import learning_signal

__all__ = ["osttp"]


@algorithm(
    "osttp",
    preserves="changes",
    leaves_out="the learning signal is the target through a random matrix",
)
def osttp(p: ProgramBuilder, recurrent: bool = False, seed: int = 0) -> None:
    """OSTTP: e of D-RTRL or OSTL; grad = (target B) e."""
    if recurrent:
        for layer in p.layers:
            signals = [learning_signal(p, g, "target", seed) for g in layer.groups]
            signal = p.to_layer(layer, signals)
            for effect in p.effects(layer):
                J = p.recur(decay=p.layer_transition(layer), inject=p.layer_immediate(effect))
                p.gradient(effect, p.contract(signal, J), within="none")
        return
    for r in p.relations:
        e = p.recur(decay=p.transition(r.group), inject=p.outer(r))
        p.gradient(r, p.contract(learning_signal(p, r.group, "target", seed), e))
