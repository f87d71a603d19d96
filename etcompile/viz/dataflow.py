"""The second view: the dataflow of a program, from what a step reads (x, f, D, L) to what it carries (e) and its gradients (G).

Equations of the same form are one node with a count, whatever weight or group they are of, so the picture of a deep network is
as small as that of one layer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from etcompile.amounts import bytes_text
from etcompile.ir.ops import OPS
from etcompile.ir.program import Argument, Equation, Ref, Symbol, TraceProgram
from etcompile.viz.labels import shorten, wrap
from etcompile.viz.picture import Edge, Node, Picture

__all__ = ["program_picture"]

_GRADIENT = "gradients of the weights"


def program_picture(program: TraceProgram, sizes: Mapping[str, int] | None = None) -> Picture:
    """The picture of a program; ``sizes`` are the bytes of the values that it carries."""
    form = _forms(program)
    members: dict[int, list[Equation]] = {}
    for equation in program.equations:
        members.setdefault(form[equation.name], []).append(equation)
    letters = _letters(members)
    carried = set(program.carried)
    nodes = [_node(key, equations, letters, form, carried, sizes or {}) for key, equations in members.items()]
    edges: dict[tuple[Hashable, Hashable, str], None] = {}
    for key, equations in members.items():
        for ref in equations[0].refs:
            edges[form[ref.name], key, _way(ref)] = None
    for gradient in program.gradients:
        edges[form[gradient.value.name], _GRADIENT, _way(gradient.value)] = None
    sites = len({gradient.site for gradient in program.gradients})
    if sites:
        nodes.append(
            Node(_GRADIENT, "gradient", (_times("grad", sites),), ("added up over steps,", "by weight"))
        )
    after = _followers([(tail, head) for tail, head, way in edges if way == "now"])
    lines = tuple(
        Edge(tail, head, way, f"{_said(tail, letters)} \N{RIGHTWARDS ARROW} {_said(head, letters)}",
             back=way == "before" and tail in after(head))
        for tail, head, way in edges
    )  # fmt: skip
    return Picture(_title(program), tuple(nodes), lines)


def _followers(edges: Iterable[tuple[Hashable, Hashable]]) -> Callable[[Hashable], set[Hashable]]:
    """What can be reached from a node, itself included."""
    onward: dict[Hashable, list[Hashable]] = {}
    for tail, head in edges:
        onward.setdefault(tail, []).append(head)

    def reached(start: Hashable) -> set[Hashable]:
        found, waiting = {start}, [start]
        while waiting:
            fresh = set(onward.get(waiting.pop(), ())) - found
            found |= fresh
            waiting += fresh
        return found

    return reached


def _title(program: TraceProgram) -> str:
    carried = len(program.carried)
    values = f"{len(program.equations)} equations, {carried} value{'s' * (carried != 1)} carried"
    return f"{program.header.model} \N{MIDDLE DOT} program {program.name} \N{MIDDLE DOT} {values}"


def _forms(program: TraceProgram) -> dict[str, int]:
    """A number for each equation, the same for those which are computed in the same way from values of the same form."""
    carried = set(program.carried)
    look: dict[str, Hashable] = {
        e.name: (_letter(e), e.op, e.type.kind, e.name in carried, *_numbers(program, e))
        for e in program.equations
    }
    while True:
        number = {look: k for k, look in enumerate(dict.fromkeys(look.values()))}
        form = {name: number[found] for name, found in look.items()}
        look = {
            e.name: (form[e.name], *((form[ref.name], ref.delay) for ref in e.refs))
            for e in program.equations
        }
        # Looks only ever become finer: as many as before are the same.
        if len(set(look.values())) == len(number):
            return form


def _numbers(program: TraceProgram, equation: Equation) -> Iterable[Hashable]:
    """What an equation names beside values; records of the model tell whose it is, and not its form."""
    header = program.header
    named = (header.groups, header.sites, header.relations, header.layers, header.effects)
    own = {record.name for records in named for record in records}
    return [
        str(a) for a in equation.args if not isinstance(a, Ref) and not (isinstance(a, Symbol) and a.name in own)
    ]  # fmt: skip


def _letter(equation: Equation) -> str:
    return re.sub(r"\d+$", "", equation.name)


def _letters(members: Mapping[int, Sequence[Equation]]) -> dict[Hashable, str]:
    """What each form is called: by its letter, or as its first equation where forms share a letter."""
    shared = Counter(_letter(equations[0]) for equations in members.values())
    return {
        key: _letter(first) if shared[_letter(first)] == 1 else first.name
        for key, (first, *_) in members.items()
    }


def _node(
    key: int,
    equations: Sequence[Equation],
    letters: Mapping[Hashable, str],
    form: Mapping[str, int],
    carried: set[str],
    sizes: Mapping[str, int],
) -> Node:
    first, op = equations[0], OPS.get(equations[0].op)
    bytes_in_all = sum(sizes.get(e.name, 0) for e in equations)
    style = _style(first, first.name in carried)
    makes = "" if style in ("read", "of the loss") else _right_side(first, letters, form)
    meaning = op.doc if op and not (op.infix and makes) else first.type.kind
    return Node(
        name=key,
        style=style,
        head=(_times(letters[key], len(equations)), *([makes] if makes else [])),
        details=tuple(shorten(wrap(meaning, 30), 2)),
        tip="\n".join(f"{e.name} = {e.op}: {e.type}" for e in equations),
        amount=bytes_in_all,
        said=bytes_text(bytes_in_all) if bytes_in_all else "",
    )


def _style(equation: Equation, carried: bool) -> str:
    op = OPS.get(equation.op)
    if carried:
        return "carried"
    if equation.refs or op is None or op.fixed:
        return "value"
    return "of the loss" if op.needs_loss else "read"


def _right_side(equation: Equation, letters: Mapping[Hashable, str], form: Mapping[str, int]) -> str:
    """``D @ e[t-1]`` of ``v0[t] = D0[t] @ e0[t-1]``: forms in the place of values."""

    def said(argument: Argument) -> str:
        if isinstance(argument, Ref):
            return f"{letters[form[argument.name]]}{'[t-1]' if argument.delay else ''}"
        return f"{argument:g}" if isinstance(argument, float) else str(argument)

    op, arguments = OPS.get(equation.op), [said(argument) for argument in equation.args]
    if op and op.infix and len(arguments) == 2:
        return f"{arguments[0]} {op.infix} {arguments[1]}"
    return f"{equation.op}({', '.join(arguments)})"


def _way(ref: Ref) -> str:
    return "before" if ref.delay else "now"


def _said(key: Hashable, letters: Mapping[Hashable, str]) -> str:
    return letters.get(key, str(key))


def _times(word: str, count: int) -> str:
    return word if count == 1 else f"{word} \N{MULTIPLICATION SIGN} {count}"
