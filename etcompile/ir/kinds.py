"""The table of kinds: what each value of a trace program is an array of, and whose it is.

One row per kind. What the rest of the compiler asks of a kind is a field of its row: how many leading axes run over the
states of a group (which of these can be zero is known), whether it has an entry per weight and unit, and whether chunks
know it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from etcompile.errors import ProgramError
from etcompile.ir.header import Effect, Group, Header, Layer, Relation, Site
from etcompile.ir.types import Type

__all__ = ["KINDS", "OWNERS", "Kind", "register_kind", "type_of"]

Shape = tuple[int, ...]
DtypeAndShape = tuple[str, Shape]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of value.

    Attributes
    ----------
    name : str
    owner : str
        What a value of this kind belongs to: a group, relation, site, layer or effect; "" for nothing.
    infer : callable
        ``(header, owner) -> (dtype, shape)``.
    doc : str
        The shape in words.
    rows : int
        How many of the leading axes run over the hidden states of a group: entries that can be structurally zero.
    large : bool
        Whether it has an entry for every weight and unit: these are what a narrower ``trace_dtype`` stores narrower.
    trace : bool
        Whether it is an eligibility trace of paths within units: it sums what every step adds, and decays by transitions.
    gradient : bool
        Whether it is a weight gradient: what programs sum over steps and return.
    matrix : bool
        Whether ``@`` applies it to the states of a group or layer.
    number : bool
        Whether it is one number.
    counts : bool
        Whether it counts steps. It then outlives the calls of a program that keeps no traces.
    by_state : bool
        Whether it is one array for each state of a layer, and not one for all.
    every_example : bool
        Whether it is the same for all examples.
    filtered : bool
        Whether it is a presynaptic value that can be filtered, and then stands for a trace whose decay is constant.
    as_array : str
        The op that gives it as an array, to be added and scaled, where it is none by itself.
    carried : str
        First letters of the name of a recurrence of this kind.
    """

    name: str
    owner: str
    infer: Callable[[Header, Any], DtypeAndShape]
    doc: str
    rows: int = 0
    large: bool = False
    trace: bool = False
    gradient: bool = False
    matrix: bool = False
    number: bool = False
    counts: bool = False
    by_state: bool = False
    every_example: bool = False
    filtered: bool = False
    as_array: str = ""
    carried: str = "v"

    @property
    def every_path(self) -> bool:
        """Whether it follows every path between units, and not those within a unit alone."""
        return self.owner in ("layer", "effect")


KINDS: dict[str, Kind] = {}

#: What values belong to: how each is found by its name.
OWNERS: dict[str, Callable[[Header, str], Any]] = {
    "group": Header.group,
    "relation": Header.relation,
    "site": Header.site,
    "layer": Header.layer,
    "effect": Header.effect,
    "": lambda header, name: None,
}


def type_of(header: Header, kind: str, of: str) -> Type:
    """The type of this kind that belongs to the group, relation, site, layer or effect named ``of``."""
    if kind not in KINDS:
        raise ProgramError(f"there is no type {kind!r}.", expected="one of " + ", ".join(sorted(KINDS)))
    row = KINDS[kind]
    dtype, shape = row.infer(header, OWNERS[row.owner](header, of))
    return Type(kind, of if row.owner else "", dtype, shape)


def register_kind(name: str, owner: str, doc: str, **flags: Any) -> Callable[[Callable], Callable]:
    """Add a row to the table: the function that this decorates says dtype and shape; the fields are those of :class:`Kind`."""
    if name in KINDS:
        raise ProgramError(f"the kind of values {name!r} is defined twice.")
    if owner not in OWNERS:
        raise ProgramError(
            f"values of kind {name!r} belong to nothing that there is.",
            got=f"owner {owner!r}",
            expected=", ".join(map(repr, OWNERS)),
        )

    def add(infer: Callable[[Header, Any], DtypeAndShape]) -> Callable:
        KINDS[name] = Kind(name, owner, infer, doc, **flags)
        return infer

    return add


# --- of a group -------------------------------------------------------------------------------------------------------


@register_kind("transition", "group", "states x states x positions", rows=2, matrix=True)
def _transition(header: Header, group: Group) -> DtypeAndShape:
    return group.dtype, (len(group.states), len(group.states), *group.shape)


@register_kind("state", "group", "states x positions", rows=1)
def _state(header: Header, group: Group) -> DtypeAndShape:
    return group.dtype, (len(group.states), *group.shape)


@register_kind("drive", "group", "positions")
def _drive(header: Header, group: Group) -> DtypeAndShape:
    return group.dtype, group.shape


@register_kind(
    "feedback", "group", "positions, one row for each entry of the vector that it projects",
    every_example=True, carried="B",
)  # fmt: skip
def _feedback(header: Header, group: Group) -> DtypeAndShape:
    return group.dtype, group.shape


# --- of a relation ----------------------------------------------------------------------------------------------------


@register_kind("immediate", "relation", "states x span of y", rows=1)
def _immediate(header: Header, relation: Relation) -> DtypeAndShape:
    states = header.group(relation.group).states
    return header.site(relation.site).dtype, (len(states), *relation.shape)


@register_kind(
    "trace", "relation", "states x span of y x contracted", rows=1, large=True, trace=True, carried="e"
)
def _trace(header: Header, relation: Relation) -> DtypeAndShape:
    site = header.site(relation.site)
    if site.contracted is None:
        raise ProgramError(f"site {site.name} ({site.primitive}, {site.source}) has no trace.")
    dtype, shape = _immediate(header, relation)
    return dtype, (*shape, *site.contracted)


# --- of a site --------------------------------------------------------------------------------------------------------


@register_kind("presynaptic", "site", "what the operation reads beside w", as_array="factor")
def _presynaptic(header: Header, site: Site) -> DtypeAndShape:
    return site.dtype, site.presynaptic[0] if site.presynaptic else ()


@register_kind("factor", "site", "x as a plain array, linear in y", filtered=True, carried="x")
def _factor(header: Header, site: Site) -> DtypeAndShape:
    return site.dtype, site.factor


@register_kind("credit", "site", "y")
def _credit(header: Header, site: Site) -> DtypeAndShape:
    return site.dtype, site.y


@register_kind("gradient", "site", "weight", gradient=True, every_example=True)
def _gradient(header: Header, site: Site) -> DtypeAndShape:
    return site.dtype, site.weight


@register_kind("each", "site", "examples x weight", large=True)
def _each(header: Header, site: Site) -> DtypeAndShape:
    return site.dtype, site.weight


# --- of a layer -------------------------------------------------------------------------------------------------------


@register_kind("hidden", "layer", "all elements of the layer's states", by_state=True)
def _hidden(header: Header, layer: Layer) -> DtypeAndShape:
    return layer.dtype, (layer.size,)


@register_kind("jacobian", "layer", "new states x old states, an operator", matrix=True)
def _jacobian(header: Header, layer: Layer) -> DtypeAndShape:
    return layer.dtype, (layer.size, layer.size)


@register_kind("sensitivity", "layer", "units x units of one example", every_example=True, carried="S")
def _sensitivity(header: Header, layer: Layer) -> DtypeAndShape:
    return layer.dtype, (layer.size, layer.size)


# --- of an effect -----------------------------------------------------------------------------------------------------


@register_kind("influence", "effect", "states x weight", large=True, by_state=True, carried="J")
def _influence(header: Header, effect: Effect) -> DtypeAndShape:
    layer = header.layer(effect.layer)
    return layer.dtype, (layer.size, *header.site(effect.site).weight)


@register_kind("response", "effect", "states x y", large=True, by_state=True, carried="A")
def _response(header: Header, effect: Effect) -> DtypeAndShape:
    layer = header.layer(effect.layer)
    return layer.dtype, (layer.size, *header.site(effect.site).y)


@register_kind("snap", "effect", "order n of the pattern", large=True, carried="J")
def _snap(header: Header, effect: Effect) -> DtypeAndShape:
    raise ProgramError(
        "the shape of a snap value follows from the order of its pattern: make it by snap_immediate."
    )


@register_kind("row_factor", "effect", "the rows of x, x contracted")
def _row_factor(header: Header, effect: Effect) -> DtypeAndShape:
    site = header.site(effect.site)
    return site.dtype, (*site.y, *(site.contracted or ()))


@register_kind("unit_factor", "effect", "y x contracted", large=True, carried="V")
def _unit_factor(header: Header, effect: Effect) -> DtypeAndShape:
    return _row_factor(header, effect)


@register_kind("rows", "effect", "the rows of x")
def _rows(header: Header, effect: Effect) -> DtypeAndShape:
    site = header.site(effect.site)
    return site.dtype, site.y


# --- of nothing -------------------------------------------------------------------------------------------------------


@register_kind("vector", "", "as many as outputs or targets")
def _vector(header: Header, owner: None) -> DtypeAndShape:
    return _widest(header), ()


@register_kind("number", "", "()", number=True)
def _number(header: Header, owner: None) -> DtypeAndShape:
    return _widest(header), ()


@register_kind("count", "", "()", counts=True)
def _count(header: Header, owner: None) -> DtypeAndShape:
    return "u32", ()


def _widest(header: Header) -> str:
    """The widest type of the groups' states, at least f32: numbers and outputs must not lose what the states have."""
    return max(("f32", *(g.dtype for g in header.groups if g.dtype != "bf16")), key=lambda d: int(d[1:]))
