"""A program: its dataflow as a picture, its text, and a glossary of its letters, explained where one points at one, too."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from etcompile.ir.header import Header
from etcompile.ir.kinds import KINDS
from etcompile.ir.ops import OPS
from etcompile.ir.program import Equation, TraceProgram
from etcompile.markup import Markup, joined, table, tag
from etcompile.paths import short_list
from etcompile.views.graph import dataflow_view

__all__ = ["program_view"]

#: Lines beyond which a program is shut at first.
_MANY = 40
_NAME = re.compile(r"[A-Za-z_]\w*")
_HEADER = {
    "g": "hidden group: states that feed each other position by position",
    "s": "site: a place where a weight meets data, y = op(weight, x)",
    "r": "relation: a site and a hidden group that its result reaches",
    "c": "cut: a place where credit ends",
    "l": "layer: groups that feed each other from step to step by any path",
    "j": "effect: a site and a layer that its result reaches by any path",
}


def program_view(program: TraceProgram, shut: bool = True, sizes: Mapping[str, int] | None = None) -> Markup:
    """The dataflow, the text, its names explained, and the letters in a table; a long text ``shut`` at first, or open.

    ``sizes`` are the bytes of what it carries, where they are known.
    """
    text = str(program)
    told = _explained(program)
    window = "" if program.window is None else f", windows of {program.window or 'all'} steps"
    head = tag("h3", f"program {program.name} \N{MIDDLE DOT} {program.header.model}{window}")
    unfolded = None if shut and text.count("\n") > _MANY else "open"
    body = tag("pre", _marked(text, told))
    return joined(
        head,
        dataflow_view(program, sizes),
        tag("details", tag("summary", f"Equations ({len(program.equations)})"), body, open=unfolded),
        tag("details", tag("summary", "What the letters mean"), _glossary(program), open=unfolded),
    )  # fmt: skip


def _marked(text: str, told: Mapping[str, str]) -> Markup:
    """The text, with an explanation at each name that has one."""
    parts: list[object] = []
    end = 0
    for found in _NAME.finditer(text):
        about = told.get(found[0])
        if about is None:
            continue
        parts += [text[end : found.start()], tag("abbr", found[0], title=about)]
        end = found.end()
    return joined(*parts, text[end:])


def _explained(program: TraceProgram) -> dict[str, str]:
    """What each name of the program is."""
    header = program.header
    told = {e.name: _meaning(header, e, e.name in program.carried) for e in program.equations}
    told |= {g.name: f"hidden group: {short_list([p for p, _ in g.states])}" for g in header.groups}
    told |= {s.name: f"site: {short_list(s.params)} in {s.primitive}, {s.source}" for s in header.sites}
    told |= {r.name: f"relation of {_owner(header, r.site)} and {r.group}" for r in header.relations}
    told |= {c.name: f"cut: {c.meaning}" for c in header.cuts}
    told |= {x.name: f"layer: {short_list(x.groups)}" for x in header.layers}
    return told | {j.name: f"effect of {_owner(header, j.site)} on {j.layer}" for j in header.effects}


def _meaning(header: Header, equation: Equation, carried: bool) -> str:
    """An equation in words: the op, the kind of its result, whose it is."""
    kind = equation.type
    owner = _owner(header, kind.of)
    what = f"{OPS[equation.op].doc}; {kind.kind}" if equation.op in OPS else kind.kind
    return f"{what}{f' of {owner}' if owner else ''}{', carried from step to step' if carried else ''}"


def _owner(header: Header, name: str) -> str:
    """Whose something is, by the paths of the user's own model."""
    params = {s.name: short_list(s.params) for s in header.sites}
    if name in params:
        return params[name]
    for r in header.relations:
        if r.name == name:
            return f"{params[r.site]} in {r.group}"
    for e in header.effects:
        if e.name == name:
            return f"{params[e.site]} in {e.layer}"
    for g in header.groups:
        if g.name == name:
            return short_list([path for path, _ in g.states])
    return name


def _glossary(program: TraceProgram) -> Markup:
    rows = list(dict.fromkeys(_letters(program)))
    return table(("letter", "stands for"), [(tag("code", letter), said) for letter, said in rows])


def _letters(program: TraceProgram) -> Iterator[tuple[str, str]]:
    """Letters that names begin with, and what for; in the order of the program."""
    header = program.header
    carried = set(program.carried)
    named = (header.groups, header.sites, header.relations, header.cuts, header.layers, header.effects)
    for letter, found in zip(_HEADER, named, strict=True):
        if found:
            yield letter, _HEADER[letter]
    seen: dict[str, list[str]] = {}
    for e in program.equations:
        row = KINDS.get(e.type.kind)
        if e.name in carried and row is not None:
            said = f"{e.type.kind}, carried from step to step: {row.doc}"
        elif e.op in OPS:
            said = OPS[e.op].doc
        else:
            said = e.type.kind
        meanings = seen.setdefault(re.sub(r"\d+$", "", e.name), [])
        if said not in meanings:
            meanings.append(said)
    yield from ((letter, "; or ".join(said)) for letter, said in seen.items())
