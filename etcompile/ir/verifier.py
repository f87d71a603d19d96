"""The rules that every program keeps, checked after each pass."""

from __future__ import annotations

from collections.abc import Iterable

from etcompile.errors import ProgramError
from etcompile.ir.kinds import KINDS
from etcompile.ir.ops import OPS, infer_type
from etcompile.ir.printer import format_equation
from etcompile.ir.program import Ref, TraceProgram, made_from

__all__ = ["computed_with_loss", "depends_on_loss", "verify"]


def verify(program: TraceProgram) -> None:
    """Raise :class:`ProgramError` unless the program is well formed.

    Names are unique; every reference is defined; a value at ``[t]`` is defined before its use, so that no cycle lacks a
    ``[t-1]``; types follow from the ops; every value is of this step or of the one before; nothing that is carried depends on the
    loss, so that traces advance alike whether or not a gradient is taken, but what is written to learn (:attr:`Op.learns`);
    every site has a gradient.
    """
    types = {}
    for equation in program.equations:
        if equation.name in types:
            _fail(program, equation.name, f"{equation.name} is defined twice")
        types[equation.name] = equation.type
    defined: set[str] = set()
    for equation in program.equations:
        if equation.op not in OPS:
            _fail(program, equation.name, f"there is no op {equation.op!r}")
        for ref in equation.refs:
            _check(program, equation.name, ref, types, defined)
        try:
            found = infer_type(program.header, equation.op, equation.args, types)
        except (ProgramError, KeyError) as error:
            _fail(program, equation.name, str(error))
        else:
            if found != equation.type:
                _fail(
                    program,
                    equation.name,
                    f"{equation.name} has type {equation.type}, but its op gives {found}",
                )
        defined.add(equation.name)
    for gradient in program.gradients:
        _check(program, gradient.value.name, gradient.value, types, defined)
        kind = types[gradient.value.name]
        if not KINDS[kind.kind].gradient or kind.of != gradient.site:
            _fail(program, gradient.value.name, f"the gradient of {gradient.site} is a {kind}")
    loss = depends_on_loss(program)
    for name in program.carried:
        if name in loss and not OPS[program.equation(name).op].learns:
            _fail(
                program,
                name,
                f"{name} is carried and depends on the loss: it would advance only where a gradient is taken",
                hint="where that is meant, write it with p.learning_carry(...).",
            )
    with_gradient = {g.site for g in program.gradients}
    missing = [s.name for s in program.header.sites if s.name not in with_gradient]
    if missing:
        site = program.header.site(missing[0])
        raise ProgramError(
            f"{' and '.join(site.params)} gets no gradient at {site.source}.",
            got=f"program {program.name} without 'grad {site.name} += ...'",
            hint="give every site a gradient, if only p.pullback(site, p.one_step(site)).",
        )


def depends_on_loss(program: TraceProgram) -> set[str]:
    """Names of the values that exist only where a loss is given."""
    return _made_of(program, [e.name for e in program.equations if OPS[e.op].needs_loss])


def computed_with_loss(program: TraceProgram) -> set[str]:
    """What is computed where a loss is given: what depends on it, and what of a call's arguments nothing carried needs."""
    late = depends_on_loss(program)
    needed = made_from(program.equations, [name for name in program.carried if name not in late])
    return late | (_made_of(program, [e.name for e in program.equations if OPS[e.op].keyword]) - needed)


def _made_of(program: TraceProgram, names: Iterable[str]) -> set[str]:
    """Values that are made of any of these, at this or a later step; they themselves included."""
    readers: dict[str, list[str]] = {}
    for e in program.equations:
        for ref in e.refs:
            readers.setdefault(ref.name, []).append(e.name)
    waiting = list(names)
    found = set(waiting)
    while waiting:
        for name in readers.get(waiting.pop(), ()):
            if name not in found:
                found.add(name)
                waiting.append(name)
    return found


def _check(program: TraceProgram, name: str, ref: Ref, types: dict, defined: set[str]) -> None:
    if ref.name not in types:
        _fail(program, name, f"{ref} is not defined")
    if ref.delay == 0 and ref.name not in defined:
        _fail(program, name, f"{ref} is used before it is defined: a cycle needs a [t-1]")
    if ref.delay not in (0, -1):
        _fail(program, name, f"{ref} is neither of this step nor of the one before")


def _fail(program: TraceProgram, name: str, message: str, hint: str | None = None) -> None:
    """Raise, with the equations around the fault."""
    lines = [(e.name, f"{format_equation(e)} : {e.type}") for e in program.equations]
    at = next((k for k, (n, _) in enumerate(lines) if n == name), 0)
    near = [
        f"{'  -> ' if k == at else '     '}{text}" for k, (_, text) in enumerate(lines) if abs(k - at) <= 5
    ]
    raise ProgramError(message + ".", got="\n" + "\n".join(near), hint=hint)
