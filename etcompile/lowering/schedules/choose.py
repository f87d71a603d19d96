"""Which schedule a call over a sequence runs by, and how many steps it handles together: decided here alone."""

from __future__ import annotations

from etcompile.errors import OptionError
from etcompile.lowering.causal import CausalProgram
from etcompile.lowering.schedules.base import Plan, SequenceSchedule
from etcompile.lowering.schedules.by_events import ByEvents
from etcompile.lowering.schedules.chunked import Chunked
from etcompile.lowering.schedules.replayed import Replayed
from etcompile.lowering.schedules.steps import StepByStep
from etcompile.lowering.schedules.windowed import Windowed
from etcompile.schedule import Schedule

__all__ = ["SCHEDULES", "choose", "register_schedule", "schedules_for"]

#: By name. Those that ship are asked in this order, and the last takes what no other does.
SCHEDULES: dict[str, type[SequenceSchedule]] = {
    one.name: one for one in (Windowed, ByEvents, Replayed, Chunked, StepByStep)
}

_SHIPPED = tuple(SCHEDULES.values())


def register_schedule(schedule: type[SequenceSchedule]) -> type[SequenceSchedule]:
    """Make a schedule known by its name, for ``etcompile.Schedule(how=name)``; a decorator of its class.

    See :class:`SequenceSchedule` for what it has to have. A name registered again replaces the schedule.

    Raises
    ------
    OptionError
        The name is missing, or that of a schedule that comes with etcompile.
    """
    name = getattr(schedule, "name", None)
    if (
        not isinstance(schedule, type)
        or not issubclass(schedule, SequenceSchedule)
        or not isinstance(name, str)
    ):
        raise OptionError(
            "a schedule is a subclass of etcompile.SequenceSchedule with a name.",
            got=repr(schedule),
            expected="class TwoSteps(etcompile.SequenceSchedule): name = 'two_steps'; ...",
        )
    if any(one.name == name for one in _SHIPPED):
        raise OptionError(
            f"{name!r} is the name of a schedule that comes with etcompile.",
            got=f"name = {name!r} of {schedule.__qualname__}",
            expected="a name that is not taken",
        )
    SCHEDULES[name] = schedule
    return schedule


def schedules_for(causal: CausalProgram, schedule: Schedule) -> tuple[SequenceSchedule, ...]:
    """Those that a program may run by: the one that the user names, or all that ship."""
    if schedule.events is not None and schedule.how in (None, ByEvents.name):
        refusal = ByEvents(causal).refusal()
        if refusal is not None:
            raise refusal
    if schedule.how is None:
        return tuple(one(causal) for one in _SHIPPED)
    if schedule.how not in SCHEDULES:
        raise OptionError(
            f"there is no schedule {schedule.how!r}.",
            got=f"schedule=etcompile.Schedule(how={schedule.how!r})",
            expected=f"None, or one of {', '.join(map(repr, SCHEDULES))}",
            hint="@etcompile.register_schedule makes one of your own known.",
        )
    return (SCHEDULES[schedule.how](causal),)


def choose(
    among: tuple[SequenceSchedule, ...],
    schedule: Schedule,
    steps: int,
    wanted: int | str | None = None,
    ordered: bool = False,
) -> Plan:
    """How ``steps`` steps are run: by the first of ``among`` that is for them.

    Parameters
    ----------
    among : tuple of SequenceSchedule
        From :func:`schedules_for`.
    schedule : Schedule
        What the user set for all calls.
    steps : int
    wanted : int, "auto" or None
        The steps that this call asks to handle together.
    ordered : bool
        The loss does something beside its results, which comes in the order of the steps.

    Raises
    ------
    EtcompileError
        The program cannot be run as asked.
    """
    how, size = among[-1], 1
    for one in among:
        if found := one.size(schedule, steps, wanted):
            how, size = one, found
            break
    refusal = how.refusal()
    if refusal is not None:
        raise refusal
    if ordered and how.in_order is not how:
        how = how.in_order
        size = how.size(schedule, steps, wanted) or 1
    return Plan(how, 0 if size >= steps and not how.loops else size)
