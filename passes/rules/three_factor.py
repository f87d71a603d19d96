"""Three-factor learning: D-RTRL's trace, and a modulator in place of the gradient's learning signal.

    e_t    = D_t e_{t-1} + f_t (x) x_t
    grad_t = M_t e_t                           (baseline: (M_t - b_{t-1}) e_t,  b_t = b_{t-1} + ρ (M_t - b_{t-1}))

M_t is given with every call: one number (a reward), an array over a group's units, or a dict of these by group. It acts on what
the group shows to the network, and reaches hidden states through the unit's own derivative. The result is a direction
of change like a gradient: an optimiser subtracts it, so a reward to be increased enters with a minus sign. Weights without a
trace (readouts) get the gradient of the loss.

With ``baseline=ρ`` a modulator is compared with its running mean, which a reset leaves alone. The mean advances at every step:
those without a loss then take ``modulator=``, too.

Memory O(B I O) per weight, time O(B I O) per step.

Reference: N. Frémaux and W. Gerstner, "Neuromodulated spike-timing-dependent plasticity, and theory of three-factor learning
rules", Frontiers in Neural Circuits 9, 2016. Departure: the trace is that of D-RTRL, derived from the model, not a chosen filter
of spike pairs.
"""

from __future__ import annotations

from etcompile.pass_api import OptionError, ProgramBuilder, algorithm
from etcompile.passes.signals import learning_signal

__all__ = ["three_factor"]


@algorithm(
    "three_factor",
    preserves="changes",
    leaves_out="the learning signal is the modulator given with each call",
)
def three_factor(p: ProgramBuilder, baseline: float | None = None) -> None:
    """Three factors: e = D e + f (x) x; grad = M e, M given with every call."""
    if baseline is not None and not (isinstance(baseline, (int, float)) and 0.0 < baseline <= 1.0):
        raise OptionError("baseline must lie in (0, 1], or be None.", got=f"baseline={baseline!r}")
    for r in p.relations:
        e = p.recur(decay=p.transition(r.group), inject=p.outer(r))
        if baseline is None:
            signal = learning_signal(p, r.group, "modulator")
        else:
            M, mean = p.modulator(r.group), p.carry("drive", r.group, lasting=True)
            p.define(mean, mean.prev + baseline * (M - mean.prev))
            signal = p.through(M - mean.prev)
        p.gradient(r, p.contract(signal, e))
