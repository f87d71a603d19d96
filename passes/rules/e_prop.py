"""E-prop: D-RTRL's trace, low-pass filtered, with a learning signal by true, random or adaptive feedback.

    e_t    = D_t e_{t-1} + f_t (x) x_t
    ē_t    = κ ē_{t-1} + e_t                 (normalize: κ ē_{t-1} + (1 - κ) e_t)
    grad_t = L_t ē_t                         (and what of this step's credit does not pass through L_t f_t)
           + c (z̄_t - f*) ψ_t e_t            (with a rate: z̄_t = μ z̄_{t-1} + (1 - μ) z_t, ψ = dz_t/dh_t)

The filter stands for a leaky readout with decay κ that is not part of the model; with a leaky readout among the model's
states, κ = 0 is the consistent choice with ``feedback="symmetric"`` only if credit through the readout's memory is given up. It
advances on every step, whether a gradient is taken or not.

With ``rate=f*`` each unit is drawn towards that mean of what it shows (for spikes the firing rate), with the unfiltered trace;
``rate_weight`` is c and ``rate_decay`` μ.

Memory O(B I O) twice per weight (the trace and its filter), time O(B I O) per step.

Reference: G. Bellec et al., "A solution to the learning dilemma for recurrent networks of spiking neurons", Nature
Communications 11, 2020. Departures: the error of the random feedback is dloss/dout of any loss; feedback matrices are
per group with variance 1 / outputs; the adaptive matrix decays when the readout is updated, not at every step; the rate
is a running mean of each unit in each example, where the paper has the mean over a trial and the batch.
"""

from __future__ import annotations

from etcompile.pass_api import Header, OptionError, ProgramBuilder, Value, algorithm
from etcompile.passes.parts import require_leak
from etcompile.passes.signals import learning_signal, require_feedback

__all__ = ["e_prop"]


def what_is_left_out(
    header: Header, kappa: float = 0.9, feedback: str = "symmetric", rate: float | None = None
) -> str:
    """What e-prop leaves out under its options, in words."""
    said = []
    if kappa:
        said.append("the trace is low-pass filtered")
    if feedback != "symmetric":
        said.append(
            f"the learning signal is the output error through a matrix of its own ({feedback} feedback)"
        )
    if rate is not None:
        said.append(f"a term of its own draws the mean of what units show to {rate}")
    return "; ".join(said)


def nothing_left_out(
    header: Header, kappa: float = 0.9, feedback: str = "symmetric", rate: float | None = None
) -> bool:
    """Whether e-prop is D-RTRL: no filter, and the true signal."""
    return not what_is_left_out(header, kappa, feedback, rate)


@algorithm("e_prop", exact=nothing_left_out, leaves_out=what_is_left_out)
def e_prop(
    p: ProgramBuilder,
    kappa: float = 0.9,
    feedback: str = "symmetric",
    normalize: bool = False,
    seed: int = 0,
    feedback_decay: float = 0.01,
    rate: float | None = None,
    rate_weight: float = 0.1,
    rate_decay: float = 0.99,
) -> None:
    """E-prop: e = D e + f (x) x; ē = κ ē + e; grad = L ē."""
    if not 0.0 <= kappa < 1.0:
        raise OptionError("kappa must lie in [0, 1).", got=f"kappa={kappa!r}")
    require_feedback(feedback, "symmetric", "random", "adaptive")
    require_leak(rate_decay)
    for r in p.relations:
        e = p.recur(decay=p.transition(r.group), inject=p.outer(r))
        filtered = p.recur(decay=kappa, inject=(1.0 - kappa) * e if normalize else e) if kappa else e
        signal = learning_signal(p, r.group, feedback, seed, feedback_decay)
        value = p.contract(signal, filtered)
        if rate is not None:
            value = value + p.contract(rate_signal(p, r.group, rate, rate_weight, rate_decay), e)
        p.gradient(r, value)


def rate_signal(p: ProgramBuilder, group: str, rate: float, weight: float, decay: float) -> Value:
    """C (z̄ - f*) ψ: what draws the mean of what a group shows to a rate."""
    mean = p.recur(decay=decay, inject=(1.0 - decay) * p.shown(group))
    return p.spread(weight * (mean - p.constant(group, rate))) * p.derivative(group)
