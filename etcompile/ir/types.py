"""Types of the values in a trace program.

A type names what a value is (its kind), of which group, relation or site, and its shape. Values that belong to a group
have one row per hidden state of the group; a transition has a row and a column.

===============  ====================================  =========================
kind             shape                                 of
===============  ====================================  =========================
transition       states x states x positions           group
state            states x positions                    group
immediate        states x window of y                  relation
trace            states x window of y x contracted     relation
presynaptic      what the operation reads beside w     site
credit           y                                     site
gradient         weight                                site
number           ()                                    nothing
===============  ====================================  =========================
"""

from __future__ import annotations

import dataclasses

from etcompile.errors import ProgramError
from etcompile.ir.header import Header

__all__ = ["NUMBER", "Type", "type_of"]


@dataclasses.dataclass(frozen=True)
class Type:
    """Kind, owner and shape of a value."""

    kind: str
    of: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        dims = ",".join(map(str, self.shape))
        return (
            f"{self.kind} {self.of} {self.dtype}[{dims}]" if self.of else f"{self.kind} {self.dtype}[{dims}]"
        )


NUMBER = Type("number", "", "f32", ())


def type_of(header: Header, kind: str, of: str) -> Type:
    """The type of this kind that belongs to the group, relation or site named ``of``."""
    if kind in ("transition", "state"):
        group = header.group(of)
        rows = (len(group.states),) * (2 if kind == "transition" else 1)
        return Type(kind, of, group.dtype, (*rows, *group.shape))
    if kind in ("immediate", "trace"):
        relation = header.relation(of)
        site, group = header.site(relation.site), header.group(relation.group)
        if kind == "trace" and site.contracted is None:
            raise ProgramError(f"site {site.name} ({site.primitive}, {site.source}) has no trace.")
        tail = (site.contracted or ()) if kind == "trace" else ()
        return Type(kind, of, site.dtype, (len(group.states), *relation.shape, *tail))
    site = header.site(of)
    if kind == "presynaptic":
        return Type(kind, of, site.dtype, site.presynaptic[0] if site.presynaptic else ())
    if kind == "credit":
        return Type(kind, of, site.dtype, site.y)
    if kind == "gradient":
        return Type(kind, of, site.dtype, site.weight)
    raise ProgramError(f"there is no type {kind!r}.")
