"""Learning signals: what tells a unit whether its activity was good.

===========  ================================================  ==========================================
name         L of a group                                      from
===========  ================================================  ==========================================
symmetric    dloss_t/dh_t                                      autodiff of the step, readout weights included
random       err_t B of what the group shows                   a fixed random matrix on the output error
adaptive     the same, with B following the readout's weight   updates of the weight, with decay
target       y*_t B of what the group shows                    a fixed random matrix on the target
modulator    M_t of what the group shows                       given with every call
===========  ================================================  ==========================================

The error is err_t = dloss_t/dout_t. What a group shows is what a readout or another layer reads of it; a unit's own
derivative (of a spike by its potential, say) takes the credit on to its hidden states.

References: T. Lillicrap et al., "Random synaptic feedback weights support error backpropagation for deep learning", Nature
Communications 7, 2016 (random); G. Bellec et al., "A solution to the learning dilemma for recurrent networks of spiking neurons",
Nature Communications 11, 2020 (random, adaptive); C. Frenkel et al., "Learning without feedback: fixed random
learning signals allow for feedforward training of deep neural networks", Frontiers in Neuroscience 15, 2021 (target).
"""

from __future__ import annotations

from etcompile.pass_api import OptionError, ProgramBuilder, Value

__all__ = ["SIGNALS", "learning_signal", "require_feedback", "shown_signal"]

SIGNALS = ("symmetric", "random", "adaptive", "target", "modulator")


def learning_signal(
    p: ProgramBuilder, group: str, kind: str = "symmetric", seed: int = 0, feedback_decay: float = 0.01
) -> Value:
    """The learning signal of a group, by name.

    ``feedback_decay`` is for ``"adaptive"``: what the feedback matrix loses at every update of the readout.
    """
    if kind == "symmetric":
        return p.signal(group)
    if kind == "random":
        return p.through(p.project(p.error(), p.random_feedback(group, seed)))
    if kind == "adaptive":
        return p.through(p.project(p.error(), _adaptive_feedback(p, group, seed, feedback_decay)))
    if kind == "target":
        return p.through(p.project(p.target(), p.random_projection(group, seed)))
    if kind == "modulator":
        return p.through(p.modulator(group))
    raise OptionError(
        "there is no such learning signal.", got=repr(kind), expected="one of " + ", ".join(SIGNALS)
    )


def require_feedback(feedback: str, *known: str) -> None:
    """Refuse a feedback that a rule does not have."""
    if feedback not in known:
        raise OptionError(
            "there is no such feedback.",
            got=repr(feedback),
            expected=f"{', '.join(known[:-1])} or {known[-1]}",
        )


def shown_signal(p: ProgramBuilder, group: str, kind: str, seed: int) -> Value:
    """A drive of what a group shows, for traces that hold the unit's derivative: the loss by it, or the error at random."""
    return (
        p.shown_signal(group) if kind == "symmetric" else p.project(p.error(), p.random_feedback(group, seed))
    )


def _adaptive_feedback(p: ProgramBuilder, group: str, seed: int, decay: float) -> Value:
    """B_t = (1 - decay) B_{t-1} + (W_t - W_{t-1}) after an update of the readout W, from a random start."""
    started = p.recur(decay=0.0, inject=p.number(1.0))
    weight = p.readout_weight(group)
    update = started.prev * (weight - weight.prev)
    first = (1.0 - started.prev) * p.random_feedback(group, seed)
    return p.recur(decay=1.0 - decay * p.changed(update), inject=update + first)
