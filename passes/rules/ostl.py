"""OSTL: online spatio-temporal learning.

    J_t    = H_t J_{t-1} + F_t               for each layer by itself
    grad_t = one_step_t + sum over layers of (L_t H_t + K_t) J_{t-1}

A layer is a set of hidden states that feed each other from step to step. Within it the transition H_t and the
immediate influence F_t follow every path; across layers credit is spatial only: L_t holds what later layers make of
this one within the step. For one recurrent layer that is backpropagation through time.

``recurrent=False`` keeps the local transition D_t of each unit in place of H_t: the form of the paper for
feed-forward spiking layers, and D-RTRL here.

Memory N_l P_l for N_l units (batch included) and P_l weights of each layer.

Reference: T. Bohnstingl et al., "Online spatio-temporal learning in deep neural networks", IEEE Transactions on
Neural Networks and Learning Systems 34, 2023, arXiv 2007.12723. Departure: layers are found from the model.
"""

from __future__ import annotations

from etcompile.pass_api import Header, ProgramBuilder, algorithm
from etcompile.passes.parts import follow_layers
from etcompile.passes.rules.d_rtrl import d_rtrl

__all__ = ["ostl"]


def one_layer(header: Header, recurrent: bool = True) -> bool:
    """Whether the model is one recurrent layer; the local form follows no layers, and loses at its cuts alone."""
    return not recurrent or len(header.layers) <= 2


@algorithm(
    "ostl",
    exact=one_layer,
    leaves_out="credit from one layer to another counts within the step only",
)
def ostl(p: ProgramBuilder, recurrent: bool = True) -> None:
    """OSTL: J = H J + F within each layer; grad = one_step + sum over layers of dloss/dh_{t-1} J_{t-1}."""
    if recurrent:
        follow_layers(p, p.layers)
    else:
        d_rtrl.write(p)
