"""The report: a line on the gradient, parameters with their traces as bars, cuts with their source."""

from __future__ import annotations

from collections.abc import Sequence

from etcompile.amounts import bytes_text
from etcompile.ir.header import Cut
from etcompile.markup import Markup, bar, joined, table, tag
from etcompile.paths import short_list, short_text
from etcompile.report import ParameterLine, Report
from etcompile.report_text import trace_about
from etcompile.views.source import source_view
from etcompile.viz.labels import array_type

__all__ = ["cuts_view", "headline", "parameters_view", "report_view"]

#: Rows beyond which a table is shut at first.
_MANY = 24


def report_view(report: Report, picture: Markup | str = "", shut: bool = True) -> Markup:
    """All of the report, a picture below its first lines; details ``shut`` at first, or open."""
    return joined(
        headline(report),
        picture,
        parameters_view(report, shut),
        cuts_view(report.cuts, shut),
        _folded("Hidden groups and states", _states(report), len(report.states), shut),
        _folded("Traces", _traces(report), len(report.traces), shut),
        _folded("Devices", tag("pre", "\n".join(report.devices)), 0, shut) if report.devices else "",
    )


def headline(report: Report) -> Markup:
    """The model, the rule, and what the gradient is."""
    kind = "exact" if report.exact else ("another" if report.another else "approximate")
    cuts = len(report.cuts)
    said = [
        f"traces {bytes_text(report.trace_bytes)}",
        f"{cuts} cut{'s' * (cuts != 1)}" if cuts else "no cut",
    ]
    notes = [f"{report.algorithm}: {report.leaves_out}"] if report.leaves_out else []
    if report.forgotten:
        notes.append(f"keeps nothing of {short_list(report.forgotten)} from step to step")
    if report.held_back:
        notes.append(report.held_back)
    if report.learning:
        notes.append(
            f"goes on at steps with a loss alone, of which it is made: {short_list(report.learning)}"
        )
    return joined(
        tag("h3", f"{report.model} \N{MIDDLE DOT} {report.algorithm}"),
        tag(
            "p",
            tag("span", kind, class_=f"badge {'yes' if report.exact else 'no'}"),
            f" {report.verdict}; {', '.join(said)}",
        ),
        *(tag("p", note, class_="quiet") for note in notes),
    )


def parameters_view(report: Report, shut: bool = True) -> Markup:
    """How each gradient is made, with the bytes of its trace as a bar."""
    most = max((p.trace_bytes for p in report.parameters), default=0)
    rows = []
    for p in report.parameters:
        size = bar(p.trace_bytes / most, bytes_text(p.trace_bytes)) if p.trace_bytes else "-"
        rows.append((tag("code", p.path), array_type(p.shape), _how(p), size))
    shown = table(("parameter", "shape", "its gradient", "trace"), rows)
    return _folded("Parameters", shown, len(rows), shut and len(rows) > _MANY)


def cuts_view(cuts: Sequence[Cut], shut: bool = True) -> Markup:
    """Where credit ends, with the line of the model."""
    if not cuts:
        return joined()
    rows = [
        (tag("code", c.name), tag("code", c.primitive), source_view(c.source), short_list(c.origins), _meaning(c))
        for c in cuts
    ]  # fmt: skip
    shown = table(("cut", "operation", "line", "credit of", "what is lost"), rows)
    return _folded("Cuts: where credit ends", shown, len(rows), shut and len(rows) > _MANY)


def _how(p: ParameterLine) -> Markup:
    more = [p.part, p.silent, p.zero]
    if p.decays:
        more.append(
            f"factorised into filtered inputs, {p.decays} decay{'s' * (p.decays > 1)}: {bytes_text(p.saved_bytes)} less"
        )
    return joined(p.how, *(tag("div", note, class_="quiet") for note in more if note))


def _meaning(cut: Cut) -> str:
    return short_text(cut.meaning) + ("" if cut.part == "all" else f" ({cut.part})")


def _states(report: Report) -> Markup:
    group_of = {path: g for g in report.groups for path in g.states}
    rows = []
    for s in report.states:
        group = group_of.get(s.path)
        more = tag("div", s.silent, class_="quiet") if s.silent else ""
        where = f"{group.name} {array_type(group.shape)}" if group else "-"
        rows.append((tag("code", s.path), where, joined(s.reason, more)))
    return table(("state", "hidden group", "why"), rows)


def _traces(report: Report) -> Markup:
    most = max(report.traces.values(), default=0)
    rows = [
        (
            tag("code", name),
            bar(size / most if most else 0, bytes_text(size)),
            trace_about(report, name),
        )
        for name, size in report.traces.items()
    ]
    return table(("trace", "bytes", "of"), rows)


def _folded(title: str, inside: Markup, count: int, shut: bool) -> Markup:
    head = f"{title} ({count})" if count else title
    return tag("details", tag("summary", head), inside, open=None if shut else "open")
