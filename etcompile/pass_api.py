"""Everything a pass may use: programs, the builder, the rewriter, registration. Passes import from here and nowhere else."""

from __future__ import annotations

from etcompile.errors import AlgorithmError, OptionError, PassError, ProgramError, UnsupportedError
from etcompile.integers import positive_integer
from etcompile.ir.builder import ProgramBuilder, Value
from etcompile.ir.header import Cut, Effect, Group, Header, Layer, Relation, Response, Site
from etcompile.ir.ops import OPS, infer_type
from etcompile.ir.program import Argument, Equation, Gradient, Ref, Symbol, TraceProgram, made_from
from etcompile.ir.rewriter import Rewriter
from etcompile.ir.support import carried_rows, support
from etcompile.ir.types import Type
from etcompile.ir.windows import learnt_step_by_step, signal_of_its_own
from etcompile.pass_manager import Pass
from etcompile.registry import Algorithm, Rule, algorithm

__all__ = [
    "OPS", "Algorithm", "AlgorithmError", "Argument", "Cut", "Effect", "Equation", "Gradient", "Group", "Header",
    "Layer", "OptionError", "Pass", "PassError", "ProgramBuilder", "ProgramError", "Ref", "Relation", "Response", "Rewriter",
    "Rule", "Site", "Symbol", "TraceProgram", "Type", "UnsupportedError", "Value", "algorithm", "carried_rows", "infer_type",
    "learnt_step_by_step", "made_from", "positive_integer", "signal_of_its_own", "support",
]  # fmt: skip
