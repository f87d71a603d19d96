"""D-RTRL: real-time recurrent learning with the transition restricted to each unit.

    e_t    = D_t e_{t-1} + f_t (x) x_t
    grad_t = one_step_t + L_t D_t e_{t-1}

D_t = dh_t/dh_{t-1} and f_t = dh_t/dy_t are block diagonal over positions (a block couples the states of one unit). The
first term is ordinary autodiff of the step's loss with h_{t-1} held constant; the second is what earlier steps left in the
trace. Exact where the model has no cut: then the sum over a sequence equals backpropagation through time.

Memory O(B I O) per weight of I x O at batch B, time O(B I O) per step.

Reference: C. Wang et al., "Model-agnostic linear-memory online learning in spiking neural networks", 2024 (D-RTRL); the
influence recursion is that of R. Williams and D. Zipser, "A learning algorithm for continually running fully recurrent
neural networks", Neural Computation 1, 1989. Departure: credit from within the step is full autodiff, so that weights
without a trace (readouts, encoders, gates that act through other weights) get their one-step gradient.
"""

from __future__ import annotations

from etcompile.pass_api import ProgramBuilder, algorithm

__all__ = ["d_rtrl"]


@algorithm("d_rtrl", exact="uncut")
def d_rtrl(p: ProgramBuilder) -> None:
    """D-RTRL: e = D e + f (x) x; grad = one_step + L D e_{t-1}."""
    for r in p.relations:
        e = p.recur(decay=p.transition(r.group), inject=p.outer(r))
        p.gradient(r, p.contract(p.earlier_credit(r.group), e.prev), within="one_step")
