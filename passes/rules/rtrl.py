"""RTRL: real-time recurrent learning, without approximation.

    J_t    = H_t J_{t-1} + F_t
    grad_t = one_step_t + (L_t H_t + K_t) J_{t-1}

H_t = dh_t/dh_{t-1} and F_t = dh_t/dw are the derivatives of all hidden states by all paths, layers and recurrent
weights included; nothing is cut. The sum over a sequence equals backpropagation through time for every model.

Memory N P for N hidden units (batch included) and P weights, time N P per step and once the cost of the step for each weight: for
small models, and as a reference.

Reference: R. Williams and D. Zipser, "A learning algorithm for continually running fully recurrent neural networks", Neural
Computation 1, 1989.
"""

from __future__ import annotations

from etcompile.pass_api import ProgramBuilder, algorithm
from etcompile.passes.parts import follow_layers

__all__ = ["rtrl"]


@algorithm("rtrl", exact="always")
def rtrl(p: ProgramBuilder) -> None:
    """RTRL: J = H J + F over all hidden states; grad = one_step + dloss/dh_{t-1} J_{t-1}."""
    follow_layers(p, (p.network,))
