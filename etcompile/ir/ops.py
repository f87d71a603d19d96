"""The table of ops: one row for each, with all that the compiler asks of an op but how it is computed.

That stands in :mod:`etcompile.lowering.evaluate`, which knows arrays; the table here knows types only, so that programs can be
built, checked and printed without a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from etcompile.errors import ProgramError
from etcompile.ir import zeros as zero
from etcompile.ir.header import Header
from etcompile.ir.kinds import type_of
from etcompile.ir.program import Argument, Ref, Symbol
from etcompile.ir.types import Type
from etcompile.ir.zeros import Reads, Zeros

__all__ = ["OPS", "Op", "infer_type", "ops_table", "register_op"]

Arg = Type | Symbol | float | int
Rule = Callable[[Header, tuple[Arg, ...]], Type]


@dataclasses.dataclass(frozen=True)
class Op:
    """One op.

    Attributes
    ----------
    name : str
    rule : callable
        Type of the result from the header and the arguments (types, symbols, numbers); raises ProgramError.
    text : str
        How it is written in a program, with arguments for an example.
    doc : str
        What it means.
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
    rule: Rule
    text: str
    doc: str
    linear: tuple[int, ...] = ()
    terms: tuple[float, ...] = ()
    power: int = 0
    derivative: str = ""
    injects: bool = False
    couples: bool = False
    contracts: bool = False
    pulls_back: bool = False
    by_row: bool = False
    needs_loss: bool = False
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


def register_op(name: str, rule: Rule, text: str, doc: str, **row: Any) -> None:
    """Add a row to the table; the fields are those of :class:`Op`."""
    if name in OPS:
        raise ProgramError(f"op {name!r} is defined twice.")
    OPS[name] = Op(name, rule, text, doc, **row)


def ops_table() -> str:
    """The table as the documentation shows it."""
    words = {(): "", (0,): "first", (1,): "second", (0, 1): "each"}
    lines = ["| op | text | linear in | meaning |", "| --- | --- | --- | --- |"]
    for op in OPS.values():
        linear = "both together" if op.together else words[op.linear]
        lines.append(
            f"| `{op.name}` | `{op.text}` | {linear} | {op.doc}{'; needs the loss' if op.needs_loss else ''} |"
        )
    return "\n".join(lines)


def infer_type(header: Header, op: str, args: tuple[Argument, ...], types: dict[str, Type]) -> Type:
    """Type of ``op(*args)`` where references have the given types."""
    if op not in OPS:
        raise ProgramError(f"there is no op {op!r}.", expected="one of " + ", ".join(sorted(OPS)))
    return OPS[op].rule(header, tuple(types[a.name] if isinstance(a, Ref) else a for a in args))


def _of_symbol(kind: str, op: str = "") -> Rule:
    op = op or kind

    def rule(header: Header, args: tuple[Arg, ...]) -> Type:
        if len(args) != 1 or not isinstance(args[0], Symbol):
            raise ProgramError(f"{op} takes the name of a group, relation or site.", got=f"{args}")
        try:
            return type_of(header, kind, args[0].name)
        except KeyError:
            raise ProgramError(f"{op}: there is no {args[0].name!r} in this program.") from None

    return rule


def _kinds(args: tuple[Arg, ...]) -> tuple[str, ...]:
    return tuple(
        a.kind if isinstance(a, Type) else "number" if isinstance(a, (int, float)) else "symbol" for a in args
    )


def _outer(header: Header, args: tuple[Arg, ...]) -> Type:
    if _kinds(args) not in {("immediate", "presynaptic"), ("immediate", "factor")}:
        raise ProgramError("outer takes an immediate Jacobian and a presynaptic value.", got=_show(args))
    f, x = args
    assert isinstance(f, Type) and isinstance(x, Type)
    if header.relation(f.of).site != x.of:
        raise ProgramError(f"outer: relation {f.of} is not at site {x.of}.")
    return type_of(header, "trace", f.of)


def _gain(header: Header, args: tuple[Arg, ...]) -> Type:
    if len(args) != 3 or not isinstance(args[0], Symbol) or not all(isinstance(a, int) for a in args[1:]):
        raise ProgramError("gain takes a relation, one of its responses and a state.", got=_show(args))
    try:
        relation = header.relation(args[0].name)
    except KeyError:
        raise ProgramError(f"gain: there is no {args[0].name!r} in this program.") from None
    if not 0 <= int(args[1]) < len(relation.constant) or not 0 <= int(args[2]) < len(relation.rows):  # pyright: ignore[reportArgumentType]
        raise ProgramError(
            f"gain: {relation.name} has no such constant response, or no such state.", got=_show(args)
        )
    return type_of(header, "immediate", relation.name)


def _matmul(header: Header, args: tuple[Arg, ...]) -> Type:
    kinds = _kinds(args)
    if kinds in _OPERATORS:
        return _operator(header, args)
    if kinds not in {("transition", k) for k in ("trace", "immediate", "transition")} | {
        ("state", "transition")
    }:
        raise ProgramError(
            "@ takes a transition and a trace, immediate Jacobian or transition; or a signal and a transition.",
            got=_show(args),
        )
    a, b = args
    assert isinstance(a, Type) and isinstance(b, Type)
    group = header.relation(b.of).group if b.kind in ("trace", "immediate") else b.of
    if a.of != group:
        raise ProgramError(f"@: the left side belongs to {a.of}, the right side to {group}.")
    return a if b.kind == "transition" and a.kind == "state" else b


_OPERATORS = {("jacobian", k) for k in ("influence", "response", "snap", "hidden")} | {("hidden", "jacobian")}


def _operator(header: Header, args: tuple[Arg, ...]) -> Type:
    a, b = args
    assert isinstance(a, Type) and isinstance(b, Type)
    value, operator = (a, b) if b.kind == "jacobian" else (b, a)
    layer = value.of if value.kind == "hidden" else header.effect(value.of).layer
    if layer != operator.of:
        raise ProgramError(f"@: the operator is of {operator.of}, the value of {layer}.")
    return value


def _add(header: Header, args: tuple[Arg, ...]) -> Type:
    if len(args) != 2 or not all(isinstance(a, Type) for a in args) or args[0] != args[1]:
        raise ProgramError("+ and - take two values of the same type.", got=_show(args))
    assert isinstance(args[0], Type)
    return args[0]


def _mul(header: Header, args: tuple[Arg, ...]) -> Type:
    types = [a for a in args if isinstance(a, Type)]
    values = [a for a in types if a.kind not in ("number", "rows")] or types
    values = [a for a in values if a.kind != "number"] or values
    if len(args) != 2 or not values or (len(values) == 2 and values[0] != values[1]):
        raise ProgramError("* takes a number and a value, or two values of the same type.", got=_show(args))
    return values[0]


def _div(header: Header, args: tuple[Arg, ...]) -> Type:
    if len(args) != 2 or not isinstance(args[0], Type) or _kinds(args)[1] not in ("number", "rows"):
        raise ProgramError("/ takes a value and a number, or one number per row.", got=_show(args))
    return args[0]


def _number(header: Header, args: tuple[Arg, ...]) -> Type:
    if len(args) != 1 or not isinstance(args[0], (int, float)):
        raise ProgramError("number takes a constant.", got=_show(args))
    return type_of(header, "number", "")


def _vector(header: Header, args: tuple[Arg, ...]) -> Type:
    if args:
        raise ProgramError("error and target take nothing.", got=_show(args))
    return type_of(header, "vector", "")


def _random_feedback(header: Header, args: tuple[Arg, ...]) -> Type:
    if len(args) != 2 or not isinstance(args[0], Symbol) or not isinstance(args[1], int):
        raise ProgramError("random_feedback takes a group and a whole number, the seed.", got=_show(args))
    return type_of(header, "feedback", args[0].name)


def _project(header: Header, args: tuple[Arg, ...]) -> Type:
    if _kinds(args) != ("vector", "feedback"):
        raise ProgramError("project takes an error or target and a feedback matrix.", got=_show(args))
    assert isinstance(args[1], Type)
    return type_of(header, "drive", args[1].of)


def _through(header: Header, args: tuple[Arg, ...]) -> Type:
    if _kinds(args) != ("drive",):
        raise ProgramError(
            "through takes a drive: a projected error or target, or a modulator.", got=_show(args)
        )
    assert isinstance(args[0], Type)
    return type_of(header, "state", args[0].of)


def _copy(header: Header, args: tuple[Arg, ...]) -> Type:
    if len(args) != 1 or not isinstance(args[0], Type):
        raise ProgramError("copy takes a value.", got=_show(args))
    return args[0]


def _tick(header: Header, args: tuple[Arg, ...]) -> Type:
    if _kinds(args) != ("count",):
        raise ProgramError("tick takes a count.", got=_show(args))
    return type_of(header, "count", "")


def _random(kind: str) -> Rule:
    def rule(header: Header, args: tuple[Arg, ...]) -> Type:
        if len(args) != 3 or not isinstance(args[0], Symbol) or _kinds(args)[1:] != ("number", "count"):
            raise ProgramError("random signs take a layer or effect, a seed and a count.", got=_show(args))
        return type_of(header, kind, args[0].name)

    return rule


def _snap(header: Header, args: tuple[Arg, ...]) -> Type:
    if len(args) != 2 or not isinstance(args[0], Symbol) or not isinstance(args[1], int):
        raise ProgramError("snap_immediate takes an effect and the order of the pattern.", got=_show(args))
    effect = header.effect(args[0].name)
    return Type("snap", effect.name, header.layer(effect.layer).dtype, (int(args[1]),))


def _reach(header: Header, args: tuple[Arg, ...]) -> Type:
    if _kinds(args) != ("symbol", "hidden"):
        raise ProgramError("reach takes an effect and a cotangent of its layer's states.", got=_show(args))
    symbol, cotangent = args
    assert isinstance(symbol, Symbol) and isinstance(cotangent, Type)
    effect = header.effect(symbol.name)
    if effect.layer != cotangent.of:
        raise ProgramError(f"reach: the cotangent is of {cotangent.of}, the effect of {effect.layer}.")
    return type_of(header, "credit", effect.site)


def _norm(header: Header, args: tuple[Arg, ...]) -> Type:
    if not args or not all(isinstance(a, Type) for a in args):
        raise ProgramError("norm takes values.", got=_show(args))
    return type_of(header, "number", "")


def _row_norm(header: Header, args: tuple[Arg, ...]) -> Type:
    if _kinds(args) not in {("response",), ("row_factor",)}:
        raise ProgramError("row_norm takes a response or a row factor.", got=_show(args))
    assert isinstance(args[0], Type)
    return type_of(header, "rows", args[0].of)


def _dot(header: Header, args: tuple[Arg, ...]) -> Type:
    if _kinds(args) != ("hidden", "hidden") or args[0] != args[1]:
        raise ProgramError("dot takes two values of one layer's states.", got=_show(args))
    return type_of(header, "number", "")


def _to_layer(header: Header, args: tuple[Arg, ...]) -> Type:
    if not args or not isinstance(args[0], Symbol) or set(_kinds(args[1:])) - {"state"}:
        raise ProgramError("to_layer takes a layer and the signals of its groups.", got=_show(args))
    layer = header.layer(args[0].name)
    if tuple(a.of for a in args[1:] if isinstance(a, Type)) != layer.groups:
        raise ProgramError(
            f"to_layer takes one signal for each of {', '.join(layer.groups)}.", got=_show(args)
        )
    return type_of(header, "hidden", layer.name)


def _changed(header: Header, args: tuple[Arg, ...]) -> Type:
    if len(args) != 1 or not isinstance(args[0], Type):
        raise ProgramError("changed takes a value.", got=_show(args))
    return type_of(header, "number", "")


def _contract(header: Header, args: tuple[Arg, ...]) -> Type:
    if _kinds(args) in {("hidden", k) for k in ("influence", "response", "snap")}:
        signal, trace = args
        assert isinstance(signal, Type) and isinstance(trace, Type)
        effect = header.effect(trace.of)
        if effect.layer != signal.of:
            raise ProgramError(f"contract: the signal is of {signal.of}, the trace of {effect.layer}.")
        return type_of(header, "credit" if trace.kind == "response" else "gradient", effect.site)
    if _kinds(args) != ("state", "trace"):
        raise ProgramError("contract takes a learning signal and a trace.", got=_show(args))
    signal, trace = args
    assert isinstance(signal, Type) and isinstance(trace, Type)
    relation = header.relation(trace.of)
    if relation.group != signal.of:
        raise ProgramError(f"contract: the signal is of {signal.of}, the trace of {relation.group}.")
    return type_of(header, "gradient", relation.site)


def _back(header: Header, args: tuple[Arg, ...]) -> Type:
    if _kinds(args) != ("state", "immediate"):
        raise ProgramError("back takes a learning signal and an immediate Jacobian.", got=_show(args))
    signal, f = args
    assert isinstance(signal, Type) and isinstance(f, Type)
    relation = header.relation(f.of)
    if relation.group != signal.of:
        raise ProgramError(f"back: the signal is of {signal.of}, the Jacobian of {relation.group}.")
    return type_of(header, "credit", relation.site)


def _outside(header: Header, args: tuple[Arg, ...]) -> Type:
    if _kinds(args) != ("credit",):
        raise ProgramError("outside takes a credit.", got=_show(args))
    assert isinstance(args[0], Type)
    return args[0]


def _pullback(header: Header, args: tuple[Arg, ...]) -> Type:
    if _kinds(args) not in {(k, "credit") for k in ("presynaptic", "factor", "row_factor")}:
        raise ProgramError("pullback takes a presynaptic value and a credit.", got=_show(args))
    x, q = args
    assert isinstance(x, Type) and isinstance(q, Type)
    if (header.effect(x.of).site if x.kind == "row_factor" else x.of) != q.of:
        raise ProgramError(f"pullback: the presynaptic value is of {x.of}, the credit of {q.of}.")
    return type_of(header, "gradient", q.of)


def _map(header: Header, args: tuple[Arg, ...]) -> Type:
    types = [a for a in args[1:] if isinstance(a, Type)]
    values = [a for a in types if a.kind != "number"] or types
    if not args or not isinstance(args[0], Symbol) or not values or any(t != values[0] for t in values):
        raise ProgramError("map takes a function and values of one type, numbers apart.", got=_show(args))
    return values[0]


def _show(args: tuple[Arg, ...]) -> str:
    return ", ".join(map(str, args)) or "nothing"


#: Of ops that need the loss of the step.
_LOSS = dict(needs_loss=True)

# --- of one step, by paths within units -------------------------------------------------------------------------------

register_op(
    "transition", _of_symbol("transition"), "transition(g)", "D_t = dh_t/dh_{t-1} of a group, block by position",
    derivative="decay", prefix="D", zeros=zero.of_transition,
)  # fmt: skip
register_op(
    "immediate", _of_symbol("immediate"), "immediate(r)", "f_t = dh_t/dy_t of a relation",
    derivative="inject", prefix="f", zeros=zero.of_immediate,
)  # fmt: skip
register_op(
    "gain", _gain, "gain(r, 0, 1)", "a constant f in units of what response 0 injects, in the row of state 1 alone",
    fixed=True, prefix="u", zeros=zero.of_state,
)  # fmt: skip
register_op(
    "presynaptic", _of_symbol("presynaptic"), "presynaptic(s)", "x_t: what the operation at a site reads beside the weight",
    prefix="x",
)  # fmt: skip
register_op(
    "factor", _of_symbol("factor"), "factor(s)",
    "x_t as an array in which y is linear, so that it can be filtered: one-hot rows for an embedding", prefix="x",
)  # fmt: skip
register_op(
    "signal", _of_symbol("state", "signal"), "signal(g)", "L_t = dloss_t/dh_t, the group's new states taken as independent",
    signal="new", of_old="bypass", prefix="L", **_LOSS,
)  # fmt: skip
register_op(
    "bypass", _of_symbol("state", "bypass"), "bypass(g)", "K_t = dloss_t/dh_{t-1} along paths that avoid the group's new states",
    signal="old", windowed="start", prefix="K", zeros=zero.of_bypass, **_LOSS,
)  # fmt: skip
register_op(
    "start", _of_symbol("state", "start"), "start(g)",
    "the losses of a window differentiated by the old states at its start, by all paths", signal="start", **_LOSS,
)  # fmt: skip
register_op(
    "one_step", _of_symbol("credit", "one_step"), "one_step(s)", "dloss_t/dy_t by ordinary autodiff, h_{t-1} held constant",
    within=True, prefix="q", **_LOSS,
)  # fmt: skip

# --- arithmetic -------------------------------------------------------------------------------------------------------

register_op(
    "outer", _outer, "outer(f, x)", "f (x) x, the part of a trace that this step adds",
    linear=(0, 1), injects=True, by_row=True, prefix="o", zeros=zero.of_first,
)  # fmt: skip
register_op(
    "matmul", _matmul, "a @ b", "product over the group's states, position by position; an operator applied",
    linear=(0, 1), couples=True, by_row=True, infix="@", zeros=zero.of_matrix, reads=zero.by_columns,
)  # fmt: skip
register_op(
    "add", _add, "a + b", "sum", terms=(1.0, 1.0), by_row=True, vectors=True, infix="+", zeros=zero.of_sum,
)  # fmt: skip
register_op(
    "sub", _add, "a - b", "difference", terms=(1.0, -1.0), by_row=True, vectors=True, infix="-", zeros=zero.of_sum,
)  # fmt: skip
register_op(
    "mul", _mul, "a * b", "product with a number, or element by element",
    linear=(0, 1), power=1, by_row=True, vectors=True, infix="*", zeros=zero.of_product,
)  # fmt: skip
register_op(
    "div", _div, "a / b", "quotient by a number, or by one number per row",
    linear=(0,), power=-1, by_row=True, vectors=True, infix="/", zeros=zero.of_first,
)  # fmt: skip
register_op("number", _number, "number(0.1)", "a constant", fixed=True)
register_op(
    "copy", _copy, "copy(a)", "the same value under another name", linear=(0,), terms=(1.0,), by_row=True, zeros=zero.of_first,
)  # fmt: skip
register_op("changed", _changed, "changed(a)", "1 where any entry differs from zero, else 0")
register_op(
    "map", _map, "map(fn, a, b)", "a jax function of the caller, entry by entry",
    unknown=True, vectors=True, zeros=zero.of_arguments,
)  # fmt: skip
register_op("norm", _norm, "norm(a, b)", "Euclidean norm of all entries of all arguments")
register_op("dot", _dot, "dot(a, b)", "scalar product", linear=(0, 1))

# --- gradients --------------------------------------------------------------------------------------------------------

register_op(
    "contract", _contract, "contract(L, e)", "sum over states and positions: a weight gradient, or a credit of y",
    linear=(0, 1), contracts=True, prefix="G", zeros=zero.of_contraction, reads=zero.by_signal,
)  # fmt: skip
register_op(
    "back", _back, "back(L, f)", "sum over states of signal times immediate Jacobian: a credit of y", linear=(0, 1),
)  # fmt: skip
register_op(
    "outside", _outside, "outside(q)", "the credit of those elements of y that no trace covers", linear=(0,)
)
register_op(
    "pullback", _pullback, "pullback(x, q)", "the weight gradient of a credit: the operation transposed",
    linear=(0, 1), pulls_back=True, prefix="P",
)  # fmt: skip

# --- learning signals of other kinds ----------------------------------------------------------------------------------

register_op(
    "error", _vector, "error()", "dloss_t/dout_t, all outputs of an example in one row", signal="given", **_LOSS,
)  # fmt: skip
register_op(
    "target", _vector, "target()", "the target of this step, in one row per example",
    signal="given", keyword="target", **_LOSS,
)  # fmt: skip
register_op(
    "modulator", _of_symbol("drive", "modulator"), "modulator(g)", "what was given for a group with this call",
    signal="given", keyword="modulator", **_LOSS,
)  # fmt: skip
register_op(
    "random_feedback", _random_feedback, "random_feedback(g, 0)",
    "a fixed random matrix from an error or target to what a group shows", prefix="B",
)  # fmt: skip
register_op(
    "random_projection", _random_feedback, "random_projection(g, 0)",
    "a fixed random matrix from a target to what a group shows", prefix="B", **_LOSS,
)  # fmt: skip
register_op(
    "readout_weight", _of_symbol("feedback", "readout_weight"), "readout_weight(g)",
    "the transposed weight of the readout that reads a group", prefix="W",
)  # fmt: skip
register_op(
    "project",
    _project,
    "project(v, B)",
    "an error or target times a matrix: a drive of a group's units",
    linear=(0, 1),
)
register_op(
    "through", _through, "through(d)", "a drive of what a group shows, as a learning signal of its new states",
    linear=(0,), signal="drive", of_old="through_old", prefix="L", **_LOSS,
)  # fmt: skip
register_op(
    "through_old", _through, "through_old(d)", "the same of its old states, along paths that avoid the new ones",
    linear=(0,), signal="drive", prefix="K", **_LOSS,
)  # fmt: skip

# --- by all paths of a layer ------------------------------------------------------------------------------------------

register_op(
    "layer_transition", _of_symbol("jacobian", "layer_transition"), "layer_transition(l)",
    "H_t = dh_t/dh_{t-1} of a layer, by all paths, an operator", prefix="H",
)  # fmt: skip
register_op(
    "layer_immediate", _of_symbol("influence", "layer_immediate"), "layer_immediate(j)",
    "dh_t/dw of an effect, by all paths", prefix="F",
)  # fmt: skip
register_op(
    "layer_response", _of_symbol("response", "layer_response"), "layer_response(j)",
    "dh_t/dy_t of an effect, by all paths", prefix="R",
)  # fmt: skip
register_op(
    "layer_signal", _of_symbol("hidden", "layer_signal"), "layer_signal(l)",
    "dloss_t/dh_t of a layer, its new states taken as independent", signal="new", prefix="L", **_LOSS,
)  # fmt: skip
register_op(
    "layer_bypass", _of_symbol("hidden", "layer_bypass"), "layer_bypass(l)",
    "dloss_t/dh_{t-1} of a layer along paths that avoid its new states", signal="old", windowed="layer_start", prefix="K",
    **_LOSS,
)  # fmt: skip
register_op(
    "layer_start", _of_symbol("hidden", "layer_start"), "layer_start(l)",
    "the losses of a window differentiated by a layer's old states at its start, by all paths", signal="start", **_LOSS,
)  # fmt: skip
register_op("to_layer", _to_layer, "to_layer(l, L, L)", "signals of groups as one of their layer")
register_op(
    "reach", _reach, "reach(j, v)", "the credit of y for cotangents of a layer's new states", linear=(1,)
)
register_op(
    "snap_immediate",
    _snap,
    "snap_immediate(j, 1)",
    "dh_t/dw on the pattern of what a weight reaches within so many steps",
)
register_op(
    "row_factor",
    _of_symbol("row_factor"),
    "row_factor(j)",
    "x_t of an effect, one row for each example and place",
    prefix="x",
)
register_op(
    "row_norm", _row_norm, "row_norm(a)", "Euclidean norm of the entries that belong to each row of x"
)
register_op(
    "row_signs",
    _random("rows"),
    "row_signs(j, 0, n)",
    "random signs for the rows of an effect: seed, count of steps",
)
register_op(
    "rademacher",
    _random("hidden"),
    "rademacher(l, 0, n)",
    "random signs for a layer's states: seed, count of steps",
)
register_op("tick", _tick, "tick(n)", "a count, one higher")
