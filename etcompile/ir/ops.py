"""The table of ops: one row for each, with all that the compiler asks of an op but how it is computed.

That stands in :mod:`etcompile.lowering.evaluate`, which knows arrays; the table here knows types only, so that programs can be
built, checked and printed without a model. What an op takes and gives is a line of text, which
:mod:`etcompile.ir.signatures` reads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etcompile.errors import ProgramError
from etcompile.ir import zeros as zero
from etcompile.ir.header import Header
from etcompile.ir.kinds import KINDS
from etcompile.ir.program import Argument, Ref, Symbol
from etcompile.ir.signatures import Arg, Rule, rule_of, shown
from etcompile.ir.types import Type
from etcompile.ir.zeros import Reads, Zeros

__all__ = ["OPS", "Op", "infer_type", "ops_table", "register_op"]


@dataclasses.dataclass(frozen=True)
class Op:
    """One op.

    Attributes
    ----------
    name : str
    signature : str
        What it takes and gives (:mod:`etcompile.ir.signatures`).
    text : str
        How it is written in a program, with arguments for an example.
    doc : str
        What it means.
    rule : callable
        Type of the result from the header and the arguments (types, symbols, numbers); raises ProgramError.
    linear : tuple of int
        Arguments in which the op is linear, each with the others fixed.
    terms : tuple of float
        The op is the sum of its arguments, each times this number.
    power : int
        1 for a product of a value and a number (or of two values, entry by entry), -1 for a quotient.
    derivative : str
        The field of a constant :class:`~etcompile.ir.header.Response` that holds its numbers: "decay" for D, "inject" for f.
    injects : bool
        Whether it is what a step adds to a trace.
    by_unit : bool
        Whether its first argument has a number for each unit of the group, which multiplies what the second has of that unit.
    couples : bool
        Whether the rows of its second argument meet, by the matrix that is the first.
    contracts : bool
        Whether it makes of a signal and a trace what the signal asks of the weight.
    pulls_back : bool
        Whether it makes a weight gradient of a credit of y, which needs no trace.
    by_row : bool
        Whether row k of the result reads nothing but row k of this step's arguments.
    needs_loss : bool
        Whether its value depends on the loss of this step, so that it exists only where a gradient is taken.
    learns : bool
        Whether what it gives may be carried although it depends on the loss: it goes on at steps with a loss alone.
    lasts : bool
        Whether a reset leaves alone what is carried of it.
    fixed : bool
        Whether its value is the same at every step.
    unknown : bool
        Whether what it computes is the caller's, so that nothing is known of it.
    signal : str
        What it has to do with learning signals: it is one, of the loss by the new states ("new"), by the old ones ("old") or
        by those at a window's start ("start"); it brings in what such a signal may be made of otherwise ("given": error,
        target, modulator); or it makes one of that ("drive").
    of_old : str
        The op that is the same of the group's old states, along paths that avoid the new ones.
    keyword : str
        The argument of a call that it reads.
    within : bool
        Whether it is credit within the step, which in a window is part of backpropagation.
    windowed : str
        The op that takes its place in a window, where credit inside is exact.
    vectors : bool
        Whether its arguments are taken as vectors: a presynaptic value enters as a factor.
    infix : str
        The sign between its two arguments, where it is written so.
    prefix : str
        First letters of the names of its results.
    zeros : callable
        Which entries of the result can differ from zero (:mod:`etcompile.ir.zeros`).
    reads : callable
        Which entries of its arguments it reads.
    """

    name: str
    signature: str
    text: str
    doc: str
    rule: Rule
    linear: tuple[int, ...] = ()
    terms: tuple[float, ...] = ()
    power: int = 0
    derivative: str = ""
    injects: bool = False
    by_unit: bool = False
    couples: bool = False
    contracts: bool = False
    pulls_back: bool = False
    by_row: bool = False
    needs_loss: bool = False
    learns: bool = False
    lasts: bool = False
    fixed: bool = False
    unknown: bool = False
    signal: str = ""
    of_old: str = ""
    keyword: str = ""
    within: bool = False
    windowed: str = ""
    vectors: bool = False
    infix: str = ""
    prefix: str = "v"
    zeros: Zeros = zero.anywhere
    reads: Reads = zero.wholly

    @property
    def together(self) -> bool:
        """Whether it is linear in all its arguments taken together, as a sum is."""
        return len(self.terms) > 1


OPS: dict[str, Op] = {}


def register_op(name: str, signature: str, text: str, doc: str, rule: Rule | None = None, **row: Any) -> None:
    """Add a row to the table; the fields are those of :class:`Op`. What a signature cannot say a ``rule`` says in its place."""
    if name in OPS:
        raise ProgramError(f"op {name!r} is defined twice.")
    OPS[name] = Op(name, signature, text, doc, rule or rule_of(name, signature), **row)


def ops_table() -> str:
    """The table as the documentation shows it."""
    words = {(): "", (0,): "first", (1,): "second", (0, 1): "each"}
    lines = ["| op | text | type | linear in | meaning |", "| --- | --- | --- | --- | --- |"]
    for op in OPS.values():
        types = "<br>".join(f"`{line.strip()}`" for line in op.signature.split(";"))
        linear = "both together" if op.together else words[op.linear]
        loss = "; needs the loss" if op.needs_loss else ""
        lines.append(f"| `{op.name}` | `{op.text}` | {types} | {linear} | {op.doc}{loss} |")
    return "\n".join(lines)


def infer_type(header: Header, op: str, args: tuple[Argument, ...], types: dict[str, Type]) -> Type:
    """Type of ``op(*args)`` where references have the given types."""
    if op not in OPS:
        raise ProgramError(f"there is no op {op!r}.", expected="one of " + ", ".join(sorted(OPS)))
    return OPS[op].rule(header, tuple(types[a.name] if isinstance(a, Ref) else a for a in args))


# --- types that a signature alone does not say ----------------------------------------------------------------------------


def _gain(header: Header, args: tuple[Arg, ...]) -> Type:
    found = rule_of("gain", OPS["gain"].signature)(header, args)
    relation, (_, response, state) = header.relation(found.of), args
    if response not in range(len(relation.constant)) or state not in range(len(relation.rows)):
        raise ProgramError(
            f"gain: {relation.name} has no such constant response, or no such state.", got=shown(args)
        )
    return found


def _row(header: Header, args: tuple[Arg, ...]) -> Type:
    found = rule_of("row", OPS["row"].signature)(header, args)
    if args[1] not in range(len(header.relation(found.of).rows)):
        raise ProgramError(f"row: the group of {found.of} has no such state.", got=shown(args))
    return found


def _snap(header: Header, args: tuple[Arg, ...]) -> Type:
    found = rule_of("snap_immediate", "effect j, int -> influence j")(header, args)
    return dataclasses.replace(found, kind="snap", shape=(int(str(args[1])),))


def _map(header: Header, args: tuple[Arg, ...]) -> Type:
    types = [a for a in args[1:] if isinstance(a, Type)]
    values = [a for a in types if not KINDS[a.kind].number] or types
    if not args or not isinstance(args[0], Symbol) or not values or any(t != values[0] for t in values):
        raise ProgramError("map takes a function and values of one type, numbers apart.", got=shown(args))
    return values[0]


def _fewer_terms(factor: str, gives: str, before: int) -> Rule:
    """Of as many first factors, then as many second ones, behind other arguments; ``gives`` says which of a pair it is like."""
    pair = rule_of("a term", f"{factor} j, response j -> {gives}")

    def rule(header: Header, args: tuple[Arg, ...]) -> Type:
        terms = args[before:]
        half = len(terms) // 2
        types = {pair(header, both) for both in zip(terms[:half], terms[half:], strict=False)}
        if len(types) != 1 or len(terms) != 2 * half or args[0] not in range(half - 1):
            raise ProgramError(
                f"a sum of products has {factor}s and as many responses, of one effect; one term less is left of it.",
                got=shown(args),
            )
        return types.pop()

    return rule


#: Of ops that need the loss of the step.
_LOSS: dict[str, Any] = dict(needs_loss=True)

# --- of one step, by paths within units -------------------------------------------------------------------------------

register_op(
    "transition", "group g -> transition g",
    "transition(g)", "D_t = dh_t/dh_{t-1} of a group, block by position",
    derivative="decay", prefix="D", zeros=zero.of_transition,
)  # fmt: skip
register_op(
    "immediate", "relation r -> immediate r",
    "immediate(r)", "f_t = dh_t/dy_t of a relation",
    derivative="inject", prefix="f", zeros=zero.of_immediate,
)  # fmt: skip
register_op(
    "gain", "relation r, int, int -> immediate r",
    "gain(r, 0, 1)", "a constant f in units of what response 0 injects, in the row of state 1 alone",
    rule=_gain, fixed=True, prefix="u", zeros=zero.of_state,
)  # fmt: skip
register_op(
    "presynaptic", "site s -> presynaptic s",
    "presynaptic(s)", "x_t: what the operation at a site reads beside the weight",
    prefix="x",
)  # fmt: skip
register_op(
    "factor", "site s -> factor s",
    "factor(s)", "x_t as an array in which y is linear, so that it can be filtered: one-hot rows for an embedding",
    prefix="x",
)  # fmt: skip
register_op(
    "row", "immediate r, int -> immediate r",
    "row(f, 1)", "f in the row of state 1 alone",
    rule=_row, prefix="f", zeros=zero.of_row,
)  # fmt: skip
register_op(
    "state", "group g -> state g",
    "state(g)", "h_t: the group's new states",
    prefix="h",
)  # fmt: skip
register_op(
    "shown", "group g -> drive g",
    "shown(g)", "what a group shows to the rest of the network, a spike or the state itself; the sum of several values",
    prefix="s",
)  # fmt: skip
register_op(
    "derivative", "group g -> state g",
    "derivative(g)", "dshown_t/dh_t: what a group shows, differentiated by its new states, position by position",
    prefix="d",
)  # fmt: skip
register_op(
    "signal", "group g -> state g",
    "signal(g)", "L_t = dloss_t/dh_t, the group's new states taken as independent",
    signal="new", of_old="bypass", prefix="L", **_LOSS,
)  # fmt: skip
register_op(
    "shown_signal", "group g -> drive g",
    "shown_signal(g)", "dloss_t/dshown_t: the loss differentiated by what a group shows",
    signal="new", prefix="L", **_LOSS,
)  # fmt: skip
register_op(
    "bypass", "group g -> state g",
    "bypass(g)", "K_t = dloss_t/dh_{t-1} along paths that avoid the group's new states",
    signal="old", windowed="start", prefix="K", zeros=zero.of_bypass, **_LOSS,
)  # fmt: skip
register_op(
    "start", "group g -> state g",
    "start(g)", "the losses of a window differentiated by the old states at its start, by all paths",
    signal="start", **_LOSS,
)  # fmt: skip
register_op(
    "one_step", "site s -> credit s",
    "one_step(s)", "dloss_t/dy_t by ordinary autodiff, h_{t-1} held constant",
    within=True, prefix="q", **_LOSS,
)  # fmt: skip

# --- arithmetic -------------------------------------------------------------------------------------------------------

register_op(
    "outer", "immediate r, presynaptic or factor r.site -> trace r",
    "outer(f, x)", "f (x) x, the part of a trace that this step adds",
    linear=(0, 1), injects=True, by_row=True, prefix="o", zeros=zero.of_first,
)  # fmt: skip
register_op(
    "matmul",
    "transition r.group, trace or immediate r -> trace or immediate r;"
    "transition g, transition g -> transition g; state g, transition g -> state g;"
    "jacobian j.layer, influence or response or snap j -> influence or response or snap j;"
    "jacobian l, hidden l -> hidden l; hidden l, jacobian l -> hidden l",
    "a @ b", "product over the group's states, position by position; an operator applied",
    linear=(0, 1), couples=True, by_row=True, infix="@", zeros=zero.of_matrix, reads=zero.by_columns,
)  # fmt: skip
register_op(
    "add", "T, T -> T",
    "a + b", "sum",
    terms=(1.0, 1.0), by_row=True, vectors=True, infix="+", zeros=zero.of_sum,
)  # fmt: skip
register_op(
    "sub", "T, T -> T",
    "a - b", "difference",
    terms=(1.0, -1.0), by_row=True, vectors=True, infix="-", zeros=zero.of_sum,
)  # fmt: skip
register_op(
    "mul",
    "number, T -> T; T, number -> T; T, T -> T; rows j, row_factor or response j -> row_factor or response j;"
    "row_factor or response j, rows j -> row_factor or response j",
    "a * b", "product with a number, or element by element",
    linear=(0, 1), power=1, by_row=True, vectors=True, infix="*", zeros=zero.of_product,
)  # fmt: skip
register_op(
    "scale",
    "state or drive r.group, trace or immediate r -> trace or immediate r;"
    "hidden j.layer, influence or response j -> influence or response j",
    "scale(a, e)", "each entry times the number of its unit: of its state, or of the unit whatever the state",
    linear=(0, 1), by_unit=True, by_row=True, zeros=zero.of_product,
)  # fmt: skip
register_op(
    "div",
    "T, number -> T; rows or row_factor or response j, rows j -> rows or row_factor or response j",
    "a / b", "quotient by a number, or by one number per row",
    linear=(0,), power=-1, by_row=True, vectors=True, infix="/", zeros=zero.of_first,
)  # fmt: skip
register_op(
    "number", "float -> number",
    "number(0.1)", "a constant",
    fixed=True,
)  # fmt: skip
register_op(
    "copy", "T -> T",
    "copy(a)", "the same value under another name",
    linear=(0,), terms=(1.0,), by_row=True, zeros=zero.of_first,
)  # fmt: skip
register_op(
    "lasting", "T -> T",
    "lasting(a)", "the same value; a reset leaves alone what is carried of it",
    linear=(0,), lasts=True, zeros=zero.of_first,
)  # fmt: skip
register_op(
    "learn", "T -> T",
    "learn(a)", "the same value, which may be carried: it goes on at steps with a loss alone",
    linear=(0,), learns=True, by_row=True, zeros=zero.of_first, **_LOSS,
)  # fmt: skip
register_op(
    "changed", "any -> number",
    "changed(a)", "1 where any entry differs from zero, else 0",
)  # fmt: skip
register_op(
    "map", "function, T or number... -> T",
    "map(fn, a, b)", "a jax function of the caller, entry by entry",
    rule=_map, unknown=True, vectors=True, zeros=zero.of_arguments,
)  # fmt: skip
register_op(
    "norm", "any... -> number",
    "norm(a, b)", "Euclidean norm of all entries of all arguments",
)  # fmt: skip
register_op(
    "dot", "hidden l, hidden l -> number",
    "dot(a, b)", "scalar product",
    linear=(0, 1),
)  # fmt: skip

# --- gradients --------------------------------------------------------------------------------------------------------

register_op(
    "contract",
    "state r.group, trace r -> gradient r.site; hidden j.layer, influence or snap j -> gradient j.site;"
    "hidden j.layer, response j -> credit j.site",
    "contract(L, e)", "sum over states and positions: a weight gradient, or a credit of y",
    linear=(0, 1), contracts=True, prefix="G", zeros=zero.of_contraction, reads=zero.by_signal,
)  # fmt: skip
register_op(
    "back", "state r.group, immediate r -> credit r.site",
    "back(L, f)", "sum over states of signal times immediate Jacobian: a credit of y",
    linear=(0, 1),
)  # fmt: skip
register_op(
    "outside", "credit s -> credit s",
    "outside(q)", "the credit of those elements of y that no trace covers",
    linear=(0,),
)  # fmt: skip
register_op(
    "pullback",
    "presynaptic or factor s, credit s -> gradient s; row_factor or unit_factor j, credit j.site -> gradient j.site",
    "pullback(x, q)", "the weight gradient of a credit: the operation transposed",
    linear=(0, 1), pulls_back=True, prefix="P",
)  # fmt: skip

register_op(
    "by_example", "presynaptic or factor s, credit s -> each s",
    "by_example(x, q)", "the weight gradient of a credit, of each example by itself",
    linear=(1,),
)  # fmt: skip
register_op(
    "weigh", "vector, each s -> gradient s",
    "weigh(v, G)", "gradients of examples, each times the one number of its example, summed",
    linear=(0, 1),
)  # fmt: skip

# --- learning signals of other kinds ----------------------------------------------------------------------------------

register_op(
    "error", "-> vector",
    "error()", "dloss_t/dout_t, all outputs of an example in one row",
    signal="given", **_LOSS,
)  # fmt: skip
register_op(
    "target", "-> vector",
    "target()", "the target of this step, in one row per example",
    signal="given", keyword="target", **_LOSS,
)  # fmt: skip
register_op(
    "modulator", "group g -> drive g",
    "modulator(g)", "what was given for a group with this call",
    signal="given", keyword="modulator",
)  # fmt: skip
register_op(
    "reward", "-> vector",
    "reward()", "the modulator given with this call, as one number for each example",
    signal="given", keyword="modulator",
)  # fmt: skip
register_op(
    "of_example", "group g, vector -> drive g",
    "of_example(g, v)", "the one number of each example, for each of its units",
    linear=(1,),
)  # fmt: skip
register_op(
    "mask", "group g -> drive g",
    "mask(g)", "the mask of this step, or of each example: 1 where there is none",
    **_LOSS,
)  # fmt: skip
register_op(
    "constant", "group g, float -> drive g",
    "constant(g, 0.1)", "the same number for each unit",
    fixed=True,
)  # fmt: skip
register_op(
    "random_feedback", "group g, int -> feedback g",
    "random_feedback(g, 0)", "a fixed random matrix from an error or target to what a group shows",
    prefix="B",
)  # fmt: skip
register_op(
    "random_projection", "group g, int -> feedback g",
    "random_projection(g, 0)", "a fixed random matrix from a target to what a group shows",
    prefix="B", **_LOSS,
)  # fmt: skip
register_op(
    "readout_weight", "group g -> feedback g",
    "readout_weight(g)", "the transposed weight of the readout that reads a group",
    prefix="W",
)  # fmt: skip
register_op(
    "project", "vector, feedback g -> drive g",
    "project(v, B)", "an error or target times a matrix: a drive of a group's units",
    linear=(0, 1),
)  # fmt: skip
register_op(
    "read", "drive g, feedback g -> vector",
    "read(d, B)", "what a readout with the matrix B, transposed, makes of what a group shows",
    linear=(0, 1),
)  # fmt: skip
register_op(
    "spread", "drive g -> state g",
    "spread(d)", "a drive as a learning signal of each new state, past the unit's own derivative",
    linear=(0,), signal="drive", prefix="L",
)  # fmt: skip
register_op(
    "through", "drive g -> state g",
    "through(d)", "a drive of what a group shows, as a learning signal of its new states; zero where the mask is",
    linear=(0,), signal="drive", of_old="through_old", prefix="L", **_LOSS,
)  # fmt: skip
register_op(
    "through_old", "drive g -> state g",
    "through_old(d)", "the same of its old states, along paths that avoid the new ones",
    linear=(0,), signal="drive", prefix="K", **_LOSS,
)  # fmt: skip

# --- by all paths of a layer ------------------------------------------------------------------------------------------

register_op(
    "layer_transition", "layer l -> jacobian l",
    "layer_transition(l)", "H_t = dh_t/dh_{t-1} of a layer, by all paths, an operator",
    prefix="H",
)  # fmt: skip
register_op(
    "layer_immediate", "effect j -> influence j",
    "layer_immediate(j)", "dh_t/dw of an effect, by all paths",
    prefix="F",
)  # fmt: skip
register_op(
    "layer_response", "effect j -> response j",
    "layer_response(j)", "dh_t/dy_t of an effect, by all paths",
    prefix="R",
)  # fmt: skip
register_op(
    "layer_signal", "layer l -> hidden l",
    "layer_signal(l)", "dloss_t/dh_t of a layer, its new states taken as independent",
    signal="new", prefix="L", **_LOSS,
)  # fmt: skip
register_op(
    "layer_bypass", "layer l -> hidden l",
    "layer_bypass(l)", "dloss_t/dh_{t-1} of a layer along paths that avoid its new states",
    signal="old", windowed="layer_start", prefix="K", **_LOSS,
)  # fmt: skip
register_op(
    "layer_start", "layer l -> hidden l",
    "layer_start(l)", "the losses of a window differentiated by a layer's old states at its start, by all paths",
    signal="start", **_LOSS,
)  # fmt: skip
register_op(
    "to_layer", "layer l, state l.groups... -> hidden l",
    "to_layer(l, L, L)", "signals of groups as one of their layer",
)  # fmt: skip
register_op(
    "reach", "effect j, hidden j.layer -> credit j.site",
    "reach(j, v)", "the credit of y for cotangents of a layer's new states",
    linear=(1,),
)  # fmt: skip
register_op(
    "snap_immediate", "effect j, int -> snap j",
    "snap_immediate(j, 1)", "dh_t/dw on the pattern of what a weight reaches within so many steps",
    rule=_snap,
)  # fmt: skip
register_op(
    "row_factor", "effect j -> row_factor j",
    "row_factor(j)", "x_t of an effect, one row for each example and place",
    prefix="x",
)  # fmt: skip
register_op(
    "row_norm", "row_factor or response j -> rows j",
    "row_norm(a)", "Euclidean norm of the entries that belong to each row of x",
)  # fmt: skip
register_op(
    "row_signs", "effect j, int, count -> rows j",
    "row_signs(j, 0, n)", "random signs for the rows of an effect: seed, count of steps",
)  # fmt: skip
register_op(
    "rademacher", "layer l, int, count -> hidden l",
    "rademacher(l, 0, n)", "random signs for a layer's states: seed, count of steps",
)  # fmt: skip
register_op(
    "identity", "layer l -> sensitivity l",
    "identity(l)", "1 for each unit with itself",
    fixed=True,
)  # fmt: skip
register_op(
    "relate", "sensitivity l, hidden l -> hidden l",
    "relate(S, v)", "S v, of each example",
    linear=(0, 1),
)  # fmt: skip
register_op(
    "relate_back", "hidden l, sensitivity l -> hidden l",
    "relate_back(v, S)", "v S, of each example",
    linear=(0, 1),
)  # fmt: skip
register_op(
    "correlate", "hidden l, hidden l -> sensitivity l",
    "correlate(a, b)", "a (x) b, mean over examples",
    linear=(0, 1),
)  # fmt: skip
register_op(
    "over_examples", "hidden l -> hidden l",
    "over_examples(v)", "the mean over examples, for each",
    linear=(0,),
)  # fmt: skip
register_op(
    "of_layer", "group g, hidden l -> state g",
    "of_layer(g, v)", "of a value of a layer that of a group",
    linear=(1,), prefix="L",
)  # fmt: skip
register_op(
    "direction", "site s, int, count -> gradient s",
    "direction(s, 0, n)", "random signs for the weight of a site: seed, count of steps",
    prefix="u",
)  # fmt: skip
register_op(
    "along", "effect j, gradient j.site -> hidden j.layer",
    "along(j, u)", "F u: a layer's new states along a direction of a weight",
    linear=(1,),
)  # fmt: skip
register_op(
    "subset", "layer l, int, int -> hidden l; layer l, int, int, count -> hidden l",
    "subset(l, 4, 0, n)",
    "1 for so many units of each group, drawn by a seed, else 0; with a count anew at each step, of mean 1",
)  # fmt: skip
register_op(
    "kronecker_left", "int, int, count, row_factor j, any... -> row_factor j",
    "kronecker_left(0, 0, n, u, x, A, R)",
    "of a sum u (x) A + ... + x (x) R, estimated with one term less: the first factor of a term; term, seed, count of steps",
    rule=_fewer_terms("row_factor", "row_factor j", 3),
)  # fmt: skip
register_op(
    "kronecker_right", "int, int, count, row_factor j, any... -> response j",
    "kronecker_right(0, 0, n, u, x, A, R)", "the same: the second factor",
    rule=_fewer_terms("row_factor", "response j", 3),
)  # fmt: skip
register_op(
    "unit_factor", "effect j -> unit_factor j",
    "unit_factor(j)", "x_t of an effect, for each element of y",
    prefix="x",
)  # fmt: skip
register_op(
    "nearest_left", "int, unit_factor j, any... -> unit_factor j",
    "nearest_left(0, V, x, A, R)",
    "of a sum V (x) A + ... + x (x) R for each element of y, the nearest with one term less: the first factor of a term",
    rule=_fewer_terms("unit_factor", "unit_factor j", 1),
)  # fmt: skip
register_op(
    "nearest_right", "int, unit_factor j, any... -> response j",
    "nearest_right(0, V, x, A, R)", "the same: the second factor",
    rule=_fewer_terms("unit_factor", "response j", 1),
)  # fmt: skip
register_op(
    "tick", "count -> count",
    "tick(n)", "a count, one higher",
)  # fmt: skip
