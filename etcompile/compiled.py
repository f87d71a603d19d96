"""What the compiler makes of one model at one set of shapes."""

from __future__ import annotations

import dataclasses

from etcompile.analysis.analysis import Analysis
from etcompile.ir.program import TraceProgram
from etcompile.lowering.carried import outlasts
from etcompile.lowering.causal import CausalProgram
from etcompile.lowering.functions import StepFunctions
from etcompile.pass_manager import PassRecord
from etcompile.precision import promoting
from etcompile.report import Report, make_report
from etcompile.schedule import Schedule

__all__ = ["Compiled", "without_traces"]


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """The compiler's result.

    Attributes
    ----------
    analysis : Analysis
    program : TraceProgram
    records : tuple of PassRecord
        What each pass did.
    functions : StepFunctions
        The program as pure functions of parameters, carry and inputs.
    schedule : Schedule
    leaves_out : str
        What the gradient leaves out beside the cuts, in words.
    changes : bool
        Whether the gradient is another one by intent.
    """

    analysis: Analysis
    program: TraceProgram
    records: tuple[PassRecord, ...]
    functions: StepFunctions
    schedule: Schedule
    leaves_out: str
    changes: bool

    @property
    def causal(self) -> CausalProgram:
        """The program bound to its model."""
        return self.functions.causal

    def report(self) -> Report:
        """What is trained how, what is cut, and how much memory the traces take."""
        return make_report(
            self.analysis,
            self.program,
            self.causal.init_traces_shapes(),
            self.leaves_out,
            self.causal.placement.lines(),
            self.changes,
            self.functions.bytes_of_a_step,
            self.functions.events,
            self.functions.held_back,
            {name: how.every for name, how in self.causal.carried.deferred.items()},
        )


@promoting
def without_traces(compiled: Compiled) -> StepFunctions | None:
    """The same program over sequences that start anew and leave no traces, where the schedule may choose that.

    None where the user has said how sequences run, where there is nothing to save, where traces hold what a rule learns, and
    where a step may not be run once more.
    """
    schedule, program, functions = compiled.schedule, compiled.program, compiled.functions
    causal = functions.causal
    asked = schedule.mesh is not None or schedule.how is not None or schedule.events is not None
    if asked or not schedule.keep_traces or isinstance(schedule.chunk, int):
        return None
    carried = [program.equation(name) for name in program.carried]
    if not carried or program.window is not None or causal.carried.too_large:
        return None
    if any(map(outlasts, carried)) or {e.name for e in causal.late} & set(program.carried):
        return None
    if causal.model.effects is not None or functions.asks_host:
        return None
    return StepFunctions(causal.without_traces())
