"""etcompile: a graph compiler for online learning in recurrent and spiking networks."""

from __future__ import annotations

from etcompile.compiler import compile
from etcompile.errors import (
    AlgorithmError,
    CarryError,
    EtcompileError,
    InputError,
    ModelError,
    OptionError,
    PassError,
    ProgramError,
    UnsupportedError,
)
from etcompile.frontend.function import FunctionModel, from_function
from etcompile.ir.parser import parse_program
from etcompile.ir.program import TraceProgram
from etcompile.lowering.functions import Carry
from etcompile.pass_manager import Pass, PassManager
from etcompile.registry import algorithm, algorithm_names
from etcompile.report import Report
from etcompile.runtime.step import Step

__version__ = "0.1.0"

__all__ = [
    "AlgorithmError", "Carry", "CarryError", "EtcompileError", "FunctionModel", "InputError", "ModelError", "OptionError", "Pass",
    "PassError", "PassManager", "ProgramError", "Report", "Step", "TraceProgram", "UnsupportedError", "algorithm",
    "algorithm_names", "compile", "from_function", "parse_program",
]  # fmt: skip
