"""Compute effective weights once per call instead of once per step.

``|W| * mask``, ``W1 + W2``, a weight norm: expressions of parameters and constants alone do not change while the weights
are fixed. The trace is kept for their result in any case; this pass moves the computation, and the pullback of the summed
gradient to the raw parameters, out of the time loop.
"""

from __future__ import annotations

import dataclasses

from etcompile.pass_api import TraceProgram

__all__ = ["HoistParameters"]


@dataclasses.dataclass(frozen=True)
class HoistParameters:
    """Mark every site's weight as computed outside of the time loop."""

    name: str = "hoist_parameters"
    preserves: str = "gradients"

    def __call__(self, program: TraceProgram) -> TraceProgram:
        sites = tuple(dataclasses.replace(s, hoisted=True) for s in program.header.sites)
        return dataclasses.replace(program, header=dataclasses.replace(program.header, sites=sites))
