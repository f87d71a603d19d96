"""The report as text: short where the record is long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from etcompile.amounts import bytes_text
from etcompile.paths import short_list, short_text, user_line

if TYPE_CHECKING:
    from etcompile.ir.header import Cut
    from etcompile.report import ParameterLine, Report

__all__ = ["report_text", "trace_about"]

#: Rules that follow every path within a layer at least.
_FOLLOWING = "rtrl, ostl, snap, uoro, kf_rtrl, rank_rtrl, and bptt on whole sequences"


def report_text(report: Report) -> str:
    """What ``print(step.report())`` shows."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    yield f"{report.model} compiled with {report.algorithm}"
    yield f"  gradient   {report.verdict}; {len(report.cuts)} cut(s); traces {bytes_text(report.trace_bytes)}"
    if report.leaves_out:
        yield f"  rule       {report.leaves_out}"
    if report.forgotten:
        groups = short_list(report.forgotten)
        yield f"  memory     {report.algorithm} keeps nothing of {groups} from step to step: all of its credit ends at the cuts;"
        yield f"             rules that keep a memory of it: {_FOLLOWING}"
    if report.learning:
        told = short_list([_named(report, name) for name in report.learning])
        yield f"  learning   goes on at steps with a loss alone, of which it is made: {told}"
    held = (
        f"; each step of one holds about {bytes_text(report.bytes_of_a_step)}"
        if report.bytes_of_a_step
        else ""
    )
    for path, share in report.events.items():
        yield f"  events     of {path} a step of a sequence takes the synapses of those that send, up to {share:.3g} of all;"
        yield "             where more is sent it takes all of them"
    if report.held_back:
        yield f"  sequences  {report.held_back}"
    if report.windows:
        yield f"  windows    chunk= of scan_value_and_grad is their length{held}"
    if report.between_layers:
        yield f'  hint       within="exact" keeps credit between layers inside of windows{held}'
    yield "  hidden groups"
    for g in report.groups:
        yield f"    {g.name}  {', '.join(g.states)}  {list(g.shape)}"
    yield "  states"
    for s in report.states:
        yield f"    {s.path}: {'hidden' if s.hidden else 'not hidden'} ({s.reason})"
        if s.silent:
            yield f"        {s.silent}"
    yield "  parameters"
    width = max((len(p.path) for p in report.parameters), default=0)
    for p in report.parameters:
        yield from _parameter(p, width)
    if report.traces:
        yield "  traces"
    for name, size in report.traces.items():
        yield "  ".join(filter(None, (f"    {name}", bytes_text(size), trace_about(report, name))))
    if report.bytes_of_a_step and any(p.positions > 1 for p in report.parameters):
        yield from _many_positions(report)
    if report.devices:
        yield "  devices"
        yield from (f"    {line}" for line in report.devices)
    yield "  cuts" if report.cuts else "  cuts: none"
    for cut in report.cuts:
        yield from _cut(cut)


def _many_positions(report: Report) -> Iterator[str]:
    """What traces cost beside a chunk, where they have an entry for each of many positions and input."""
    if report.traces:
        size = bytes_text(report.bytes_of_a_step)
        yield f"    in a chunk no trace appears, and a step holds {size}; a whole sequence"
        yield "    needs none of these, with Schedule(keep_traces=False)"
    else:
        yield f"  traces: none is kept; in a chunk a step holds {bytes_text(report.bytes_of_a_step)}"


def trace_about(report: Report, name: str) -> str:
    """Whose a carried value is, and when it is written where that is not at every step."""
    owner, every = report.trace_owners.get(name, ""), report.written_every.get(name)
    when = f"written every {every} steps" if every else ""
    return ", ".join(filter(None, (owner, when)))


def _named(report: Report, name: str) -> str:
    """A carried value with whose it is."""
    owner = report.trace_owners.get(name)
    return f"{name} ({owner})" if owner else name


def _parameter(p: ParameterLine, width: int) -> Iterator[str]:
    size = f", {bytes_text(p.trace_bytes)}" if p.trace_bytes else ""
    yield f"    {p.path.ljust(width)}  {p.how}{size}{f' ({p.part})' if p.part else ''}"
    for said in filter(None, (p.silent, p.zero)):
        yield f"    {' ' * width}  {said}"
    if p.decays:
        count = "1 decay" if p.decays == 1 else f"{p.decays} decays"
        saved = bytes_text(p.saved_bytes)
        yield f"    {' ' * width}  its trace is factorised into filtered inputs, {count}: {saved} less"


def _cut(cut: Cut) -> Iterator[str]:
    yield f"    {cut.name}  {user_line(cut.source)}  {cut.primitive}: {short_list(cut.origins)}"
    yield f"        {short_text(cut.meaning)}" + ("" if cut.part == "all" else f" ({cut.part})")
