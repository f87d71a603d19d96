"""Truncated backpropagation through time: the baseline, through the same interface.

    grad = sum over windows of d(losses of the window) / dw, the states at its start held constant

No trace is kept. ``window`` steps are differentiated together, with memory that grows with the window; credit ends at
its start. With ``window=None`` every call of ``scan_value_and_grad`` is one window: the exact gradient of a sequence
given whole. Taken step by step, a window is one step.

Reference: R. J. Williams and J. Peng, "An efficient gradient-based algorithm for on-line training of recurrent network
trajectories", Neural Computation 2, 1990.
"""

from __future__ import annotations

from etcompile.pass_api import ProgramBuilder, algorithm

__all__ = ["bptt"]


@algorithm(
    "bptt",
    exact=lambda header, window=None: window is None,
    leaves_out="credit ends at the start of each window",
)
def bptt(p: ProgramBuilder, window: int | None = None) -> None:
    """Backpropagation through time inside of windows; no trace."""
    p.window(window)
