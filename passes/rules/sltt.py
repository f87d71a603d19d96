"""SLTT: spatial learning through time; the derivative of each step's loss through that step alone.

    grad_t = dloss_t/dw,  h_{t-1} held constant

Nothing is carried. It is backpropagation in windows of one step (``bptt`` with ``window=1``) as a rule of single steps, which
runs in chunks and mixes with other rules, and the immediate derivative of RTRL's recursion without what it propagates. For one
claim about it see the second reference: with an optimiser that normalises each parameter's gradient (``optax.rmsprop``,
``optax.adam``) it should do what RTRL does. Try it with ``step.learn(loss_fn, optax.rmsprop(1e-3))(xs, ys)``.

Memory 0, time O(B I O) per step and weight of I x O at batch B.

References: Q. Meng, M. Xiao, S. Yan, Y. Wang, Z. Lin and Z.-Q. Luo, "Towards memory- and time-efficient backpropagation
for training spiking neural networks", ICCV 2023, arXiv 2302.14311; A. Shalev Merin, "Temporal credit is free", 2026, arXiv
2603.28750. Departure: credit at every step; SLTT-K, at K of them, is a ``mask`` of ``scan_value_and_grad``.
"""

from __future__ import annotations

from etcompile.pass_api import ProgramBuilder, algorithm

__all__ = ["sltt"]


@algorithm("sltt", leaves_out="credit for earlier steps")
def sltt(p: ProgramBuilder) -> None:
    """SLTT: grad = dloss/dw within the step."""
    for r in {r.site: r for r in p.relations}.values():
        p.gradient(r, p.pullback(r, p.one_step(r)), within="none")
