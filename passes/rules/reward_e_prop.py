"""Reward-based e-prop: the learning signal times the trace is filtered, and a reward, or its error, multiplies that later.

    e_t    = D_t e_{t-1} + f_t (x) x_t
    ē_t    = κ ē_{t-1} + e_t
    F_t    = γ F_{t-1} + L_t ē_t
    grad_t = δ_t F_t

The loss says how probable what was done should be, and how large the value: -log π(a_t) - c V_t, say, whose derivatives by
the outputs are the errors of the policy and the value. δ_t, for an actor and a critic r_t + γ V_{t+1} - V_t, is the
``modulator=`` of the call: a number, or one for each example. The result is a direction of change like a gradient, which an
optimiser subtracts. What does not pass through L, weights without a trace such as readouts above all, is filtered alike, for
each example by itself.

F goes on at steps with a loss alone, and starts at zero after a reset. Such a program runs step by step.

Memory B (3 I O + P): e, ē and F of a weight of I x O at batch B, and P more for one with credit past its trace; time O(B I O)
per step, B times the readout's own gradient.

Reference: G. Bellec et al., "A solution to the learning dilemma for recurrent networks of spiking neurons", Nature
Communications 11, 2020, reward-based e-prop. Departures: the loss and δ are the caller's, so that the regularisation of
rates and the critic's own target are too; the true signal by default, ``feedback="random"`` or ``"adaptive"`` as there; δ is that
of the step whose loss enters F, so who knows it a step later gives the loss and δ of one step together.
"""

from __future__ import annotations

from etcompile.pass_api import ProgramBuilder, algorithm
from etcompile.passes.parts import require_leak
from etcompile.passes.signals import learning_signal, require_feedback

__all__ = ["reward_e_prop"]


@algorithm(
    "reward_e_prop",
    preserves="changes",
    leaves_out="a reward, given with each call, meets what the loss asked of the traces, filtered",
)
def reward_e_prop(
    p: ProgramBuilder,
    gamma: float = 0.9,
    kappa: float = 0.9,
    feedback: str = "symmetric",
    seed: int = 0,
    feedback_decay: float = 0.01,
) -> None:
    """Reward-based e-prop: e = D e + f (x) x; ē = κ ē + e; F = γ F + L ē; grad = δ F."""
    for leak in (gamma, kappa):
        require_leak(leak)
    require_feedback(feedback, "symmetric", "random", "adaptive")
    reward = p.reward()
    for r in p.relations:
        e = p.recur(decay=p.transition(r.group), inject=p.outer(r))
        filtered = p.recur(decay=kappa, inject=e) if kappa else e
        F = p.learning_carry("trace", r)
        signal = learning_signal(p, r.group, feedback, seed, feedback_decay)
        p.define(F, gamma * F.prev + p.weighted(signal, filtered))
        p.gradient(r, p.contract(p.spread(p.of_example(r.group, reward)), F), within="none")
    for site in p.sites:
        relations = [r for r in p.relations if r.site == site.name]
        credit = p.one_step(site)
        if feedback == "symmetric":
            if any(r.whole for r in relations):
                continue
            for r in relations:
                credit = credit - p.back(p.signal(r.group), p.immediate(r))
        elif relations:
            credit = p.op("outside", credit)
        G = p.learning_carry("each", site)
        p.define(G, gamma * G.prev + p.by_example(site, credit))
        p.gradient(site, p.weigh(reward, G), within="none")
