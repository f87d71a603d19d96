"""Step by step: the trace program as it is written."""

from __future__ import annotations

from jax import lax

from etcompile.lowering.schedules.base import Found, Loop, Run, SequenceSchedule, Steps
from etcompile.schedule import Schedule

__all__ = ["StepByStep"]


class StepByStep(SequenceSchedule):
    """One step after the other."""

    name = "steps"
    loops = True

    def size(self, schedule: Schedule, steps: int, wanted: int | str | None) -> int:
        return 1

    def part(self, run: Run, loop: Loop, steps: Steps) -> tuple[Loop, Found]:
        return lax.scan(run.step, loop, steps)
