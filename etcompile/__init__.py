"""etcompile: a graph compiler for online learning in recurrent and spiking networks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from etcompile import brainstate_import as _  # noqa: F401  (the first import: see there)
from etcompile import nn
from etcompile.adapters.equinox import from_equinox
from etcompile.adapters.linen import from_linen
from etcompile.adapters.nir import from_nir
from etcompile.adapters.nnx import from_nnx
from etcompile.comparing import compare
from etcompile.comparison import Comparison
from etcompile.compiler import compile
from etcompile.cost.cost import Cost
from etcompile.errors import (
    AlgorithmError,
    CarryError,
    CheckpointError,
    DependencyError,
    EnvironmentWarning,
    EtcompileError,
    EtcompileWarning,
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
from etcompile.lowering.feedback import feedback_matrix
from etcompile.lowering.functions import Carry
from etcompile.lowering.schedules.base import SequenceSchedule
from etcompile.lowering.schedules.choose import register_schedule
from etcompile.nn import FixedRandomFeedback, GradExpon, KappaFilter, LeakyRateReadout, PresynapticTrace
from etcompile.pass_manager import Pass, PassManager
from etcompile.registry import algorithm, algorithm_names
from etcompile.report import Report
from etcompile.runtime.checkpoints import Checkpoints
from etcompile.runtime.executor import Executor
from etcompile.runtime.observing.dashboard import Dashboard
from etcompile.runtime.observing.observer import Observation, Observer
from etcompile.runtime.observing.tensorboard import TensorBoard
from etcompile.runtime.step import Step
from etcompile.runtime.step_data import MultiStepData, SingleStepData, extract_y_target
from etcompile.runtime.synthetic import SyntheticGradient
from etcompile.schedule import Schedule
from etcompile.sites.operation import WeightOperation
from etcompile.sites.table import weight_operation

if TYPE_CHECKING:
    from etcompile import viz

__version__ = "0.1.0"

__all__ = [
    "AlgorithmError", "Carry", "CarryError", "CheckpointError", "Checkpoints", "Comparison", "Cost", "Dashboard",
    "DependencyError", "EnvironmentWarning", "EtcompileError", "EtcompileWarning", "Executor", "FixedRandomFeedback",
    "FunctionModel", "GradExpon", "InputError", "KappaFilter", "LeakyRateReadout", "ModelError", "MultiStepData",
    "Observation", "Observer", "OptionError", "Pass", "PassError", "PassManager", "PresynapticTrace", "ProgramError",
    "Report", "Schedule", "SequenceSchedule", "SingleStepData", "Step", "SyntheticGradient", "TensorBoard",
    "TraceProgram", "UnsupportedError", "WeightOperation", "algorithm", "algorithm_names", "compare", "compile",
    "extract_y_target", "feedback_matrix", "from_equinox", "from_function", "from_linen", "from_nir", "from_nnx",
    "nn", "parse_program", "register_schedule", "viz", "weight_operation",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "viz":  # with the libraries that draw, so at its first use
        return import_module("etcompile.viz")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
