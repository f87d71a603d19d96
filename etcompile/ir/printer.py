"""Programs as text."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from etcompile.ir.header import Cut, Group, Relation, Response, Site
from etcompile.ir.ops import OPS
from etcompile.ir.program import Argument, Equation, TraceProgram

__all__ = ["format_equation", "format_program"]


def format_program(program: TraceProgram) -> str:
    """The whole program, in the form that :func:`etcompile.ir.parser.parse_program` reads back."""
    header = program.header
    window = "" if program.window is None else f"  window={program.window or 'all'}"
    window += "" if program.end is None else f"  end={program.end}"
    lines = [
        f"program {program.name}  model={header.model}  exact={'yes' if program.exact else 'no'}{window}"
    ]
    lines += [f"  group {_group(g)}" for g in header.groups]
    lines += [f"  site {_site(s)}" for s in header.sites]
    lines += [f"  relation {_relation(r)}" for r in header.relations]
    lines += [f"  cut {_cut(c)}" for c in header.cuts]
    lines += [f"  layer {x.name} ({', '.join(x.groups)}) {x.dtype}[{x.size}]" for x in header.layers]
    lines += [f"  effect {x.name} {x.site} -> {x.layer}" for x in header.effects]
    texts = [(e, format_equation(e)) for e in program.equations]
    width = max((len(text) for _, text in texts), default=0)
    carried = set(program.carried)
    for equation, text in texts:
        note = "   carried" if equation.name in carried else ""
        lines.append(f"  {text.ljust(width)} : {equation.type}{note}")
    lines += [f"  grad {g.site} += {g.value}" for g in program.gradients]
    return "\n".join(lines)


def format_equation(equation: Equation) -> str:
    """One equation without its type."""
    infix = OPS[equation.op].infix if equation.op in OPS else ""
    if infix:
        left, right = map(_argument, equation.args)
        return f"{equation.name}[t] = {left} {infix} {right}"
    return f"{equation.name}[t] = {equation.op}({', '.join(map(_argument, equation.args))})"


def _argument(argument: Argument) -> str:
    return repr(argument) if isinstance(argument, (int, float)) else str(argument)


def _dims(shape: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _group(g: Group) -> str:
    states = ", ".join(f"{_path(path)}:{dtype}" for path, dtype in g.states)
    text = (
        f"{g.name} ({states}) {g.dtype}{_dims(g.shape)} pattern={'/'.join(_bits(row) for row in g.pattern)}"
    )
    return text + (f" bypass={_bits(g.bypass)}" if any(g.bypass) else "")


def _path(path: str) -> str:
    """A path in which the separators of the text form are escaped; ordinary dotted names stay as they are."""
    return quote(path, safe="._-<>{}'=*/")


def _bits(flags: tuple[bool, ...]) -> str:
    return "".join("1" if flag else "0" for flag in flags)


def _site(s: Site) -> str:
    reads = " ".join(_dims(x) for x in s.presynaptic)
    contracted = "none" if s.contracted is None else _dims(s.contracted)
    hoisted = " hoisted" if s.hoisted else ""
    return (
        f"{s.name} {s.kind} {'+'.join(map(_path, s.params))} {s.dtype}{_dims(s.weight)}, {reads or '-'} -> {_dims(s.y)}"
        f" contracted={contracted}{hoisted}  # {s.primitive} {s.source}"
    )


def _relation(r: Relation) -> str:
    window = ",".join(f"{start}:{stop}" for start, stop in r.span)
    fan = f" fan={r.fan[0]}" if r.fan else ""
    text = f"{r.name} {r.site} -> {r.group} window=[{window}]{fan} rows={_bits(r.rows)}" + " whole" * r.whole
    if r.constant:
        text += f" constant={';'.join(map(_response, r.constant))}"
    return text + (f" filtered={r.filtered} decays={r.decays}" if r.filtered else "")


def _response(r: Response) -> str:
    """``D:f``, with D's rows apart by slashes; a question mark where they are not constant."""
    decay = "?" if r.decay is None else "/".join(map(_numbers, r.decay))
    return f"{decay}:{_numbers(r.inject)}"


def _numbers(values: Sequence[float | None]) -> str:
    return ",".join("?" if v is None else repr(v) for v in values)


def _cut(c: Cut) -> str:
    origins = ", ".join(map(_path, c.origins))
    return f"{c.name} in {c.group or '-'}: {origins} through {c.primitive}, part={c.part}: {c.meaning}  # {c.source}"
