"""Synthetic gradients (decoupled neural interfaces): truncated windows that end in a prediction of the credit beyond them.

    grad = sum over windows of d(losses of the window) / dw + s(h_end) dh_end / dw,  the states at its start held constant

Truncated backpropagation through time takes zero for the credit that the losses after a window send to the states h_end at its
end. Here a small predictor s per hidden group stands for it. It learns by bootstrapping: what it should have
said at the end of a window is what the next window finds at its start,

    s(h_start) -> d(losses of the window) / dh_start + s(h_end) dh_end / dh_start

The program says where windows end; :class:`etcompile.SyntheticGradient` keeps the predictors, teaches them, and runs
the program with them. The step alone refuses to take a gradient. No trace is kept; memory grows with the window.

Reference: M. Jaderberg, W. M. Czarnecki, S. Osindero, O. Vinyals, A. Graves, D. Silver and K. Kavukcuoglu, "Decoupled neural
interfaces using synthetic gradients", ICML 2017, section 2.1. Departures: one predictor per hidden group, which reads
this group alone; and where a sequence is given whole, its end has no future, so zero is taken there and not a prediction.
"""

from __future__ import annotations

from etcompile.pass_api import ProgramBuilder, algorithm

__all__ = ["dni"]


@algorithm(
    "dni",
    leaves_out="a learned prediction stands for the credit from beyond each window",
)
def dni(p: ProgramBuilder, window: int | None = 10) -> None:
    """Backpropagation in windows that end in a synthetic gradient; no trace."""
    p.window(window, end="synthetic")
