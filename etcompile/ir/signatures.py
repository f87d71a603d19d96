"""Types of ops from a line of text, such as ``"state r.group, trace r -> gradient r.site"``.

Before the arrow stands what an op takes, one argument after another, behind it what it gives:

====================  ==================================================================================================
``trace r``           a value of that kind; what it belongs to is called r
``state r.group``     a value that belongs to the group of r
``trace or snap j``   a value of one of these kinds
``relation r``        the name of a relation, not a value
``number``            a value of a kind that belongs to nothing; a number may stand there as it is
``int``, ``float``    a number that stands there as it is
``any``, ``T``        any value; of one type wherever T stands
``any...``            as many as there are; ``state l.groups...``: one for each group of l
====================  ==================================================================================================

A result that reads like an argument has that argument's type. Of several lines, with ``;`` between them, the first that fits
counts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etcompile.errors import ProgramError
from etcompile.ir.header import Header
from etcompile.ir.kinds import KINDS, OWNERS, type_of
from etcompile.ir.program import Symbol
from etcompile.ir.types import Type

__all__ = ["Arg", "Rule", "rule_of", "shown"]

Arg = Type | Symbol | float | int
#: The type of the result from the header and the arguments; raises ProgramError.
Rule = Callable[[Header, tuple[Arg, ...]], Type]

_PLACE = re.compile(r"(?P<words>\w+(?: or \w+)*)(?: (?P<of>\w+(?:\.\w+)?))?(?P<many>\.\.\.)?")


@dataclasses.dataclass(frozen=True)
class _Place:
    """An argument or a result: ``trace or snap j``."""

    text: str
    words: tuple[str, ...]
    of: str
    many: bool

    def owners(self, records: Mapping[str, Any], share: Sequence[Arg]) -> list[str]:
        """Whose the arguments at this place should be."""
        if not self.of:
            return [_owner(a) for a in share]
        name, _, field = self.of.partition(".")
        found = getattr(records[name], field or "name")
        return list(found) if self.many else [found]


def rule_of(op: str, signature: str) -> Rule:
    """The type rule that a signature says."""
    lines = [_line(op, text) for text in signature.split(";")]
    takes = "; or ".join(", ".join(p.text for p in places) or "nothing" for places, _ in lines)
    if any([p.text for p in places].count("T") > 1 for places, _ in lines):
        takes += " (T: values of the same type)"

    def rule(header: Header, args: tuple[Arg, ...]) -> Type:
        expected = None
        for places, result in lines:
            shares = _shares(places, args)
            if shares is None:
                continue
            # The first argument that is of r says which r is meant.
            records = {
                p.of: _record(op, header, p, share[0]) for p, share in reversed(shares) if p.of.isidentifier()
            }
            owners = [p.owners(records, share) for p, share in shares]
            if owners == [[_owner(a) for a in share] for _, share in shares]:
                alike = [a for p, (a, *_) in shares if p.text == result.text and isinstance(a, Type)]
                of = "".join(result.owners(records, ()))
                return alike[0] if alike else type_of(header, result.words[0], of)
            expected = ", ".join(
                " ".join((" or ".join(p.words), *own)) for p, own in zip(places, owners, strict=True)
            )
        raise ProgramError(f"{op} takes {takes}.", got=shown(args), expected=expected)

    return rule


def shown(args: Sequence[Arg]) -> str:
    """Arguments as an error shows them."""
    return ", ".join(map(str, args)) or "nothing"


def _line(op: str, text: str) -> tuple[list[_Place], _Place]:
    takes, _, gives = text.partition("->")
    places = [_place(op, p.strip()) for p in takes.split(",") if p.strip()]
    result = _place(op, gives.strip())
    for place in (*places, result):
        if place.of and place.of.partition(".")[0] not in {p.of for p in places}:
            raise ProgramError(f"op {op!r}: nothing says what {place.of} is.", got=text)
    return places, result


def _place(op: str, text: str) -> _Place:
    found = _PLACE.fullmatch(text)
    words = found["words"].split(" or ") if found else []
    unknown = set(words) - {*KINDS, *OWNERS, "int", "float", "any", "T"}
    if found is None or unknown:
        raise ProgramError(f"op {op!r}: there is no kind of values {' '.join(sorted(unknown)) or text!r}.")
    return _Place(text, tuple(words), found["of"] or "", bool(found["many"]))


def _shares(places: Sequence[_Place], args: Sequence[Arg]) -> list[tuple[_Place, Sequence[Arg]]] | None:
    """The arguments of each place, by their kinds; None where they do not fit."""
    many = bool(places) and places[-1].many
    if len(args) != len(places) and not (many and len(args) > len(places)):
        return None
    shares = [(p, args[k:] if p.many else args[k : k + 1]) for k, p in enumerate(places)]
    fit = all(not _words(a).isdisjoint(p.words) for p, share in shares for a in share)
    same = {a for p, share in shares if p.words == ("T",) for a in share}
    return shares if fit and len(same) <= 1 else None


def _words(arg: Arg) -> set[str]:
    """What a signature may call an argument."""
    if isinstance(arg, Type):
        return {arg.kind, "any", "T"}
    if isinstance(arg, Symbol):
        return set(OWNERS)
    return {"number", "float", "int"} if isinstance(arg, int) else {"number", "float"}


def _owner(arg: Arg) -> str:
    return arg.of if isinstance(arg, Type) else arg.name if isinstance(arg, Symbol) else ""


def _record(op: str, header: Header, place: _Place, arg: Any) -> Any:
    """The record of what an argument belongs to, or names."""
    owner = KINDS[arg.kind].owner if isinstance(arg, Type) else place.words[0]
    try:
        return OWNERS[owner](header, _owner(arg))
    except KeyError:
        raise ProgramError(f"{op}: there is no {owner} {_owner(arg)!r} in this program.") from None
