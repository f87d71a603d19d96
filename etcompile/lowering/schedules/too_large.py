"""Traces that cannot be stored: what a program that has one may still do."""

from __future__ import annotations

from etcompile.ir.kinds import KINDS
from etcompile.lowering.causal import CausalProgram
from etcompile.lowering.schedules.linear import chunk_equations

__all__ = ["refuse_too_large"]


def refuse_too_large(causal: CausalProgram) -> None:
    """Raise :class:`UnsupportedError` where a trace that cannot be stored would have to be."""
    for name, site in causal.carried.too_large.items():
        if not KINDS[causal.program.equation(name).type.kind].trace or causal.program.window is not None:
            raise site.cannot_store("train this parameter by d_rtrl in whole sequences, or exclude it.")
        if causal.keeps:
            raise site.cannot_store(
                "schedule=etcompile.Schedule(keep_traces=False) learns from whole sequences without storing it; "
                "or write the operation as a matmul or convolution."
            )
        chunk_equations(causal.program)  # raises where the rule's traces cannot be chunked
