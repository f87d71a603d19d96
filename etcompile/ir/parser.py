"""Text as programs: the inverse of the printer."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from etcompile.errors import ProgramError
from etcompile.ir.header import Cut, Effect, Group, Header, Layer, Relation, Response, Site
from etcompile.ir.ops import OPS, infer_type
from etcompile.ir.program import Argument, Equation, Gradient, Ref, Symbol, TraceProgram
from etcompile.ir.types import Type

__all__ = ["parse_program"]

_HEAD = re.compile(
    r"(?P<name>\S+)  model=(?P<model>.+)  exact=(?P<exact>yes|no)"
    r"(?:  window=(?P<window>all|\d+))?(?:  end=(?P<end>\w+))?$"
)
_GROUP = re.compile(
    r"(?P<name>\S+) \((?P<states>.*)\) (?P<dtype>[a-z0-9]+)\[(?P<shape>[\d,]*)\]"
    r" pattern=(?P<pattern>[01/]+)(?: bypass=(?P<bypass>[01]+))?$"
)
_SITE = re.compile(
    r"(?P<name>\S+) (?P<kind>\S+) (?P<params>\S+)"
    r" (?P<dtype>[a-z0-9]+)\[(?P<weight>[\d,]*)\],"
    r" (?P<reads>-|[\[\]\d, ]*?)"
    r" -> \[(?P<y>[\d,]*)\] contracted=(?P<contracted>none|\[[\d,]*\])(?P<hoisted> hoisted)?"
    r"  # (?P<primitive>\S+) (?P<source>.*)$"
)
_RELATION = re.compile(
    r"(?P<name>\S+) (?P<site>\S+) -> (?P<group>\S+) window=\[(?P<window>[\d:,]*)\]"
    r"(?: fan=(?P<fan>\d+))? rows=(?P<rows>[01]+)(?P<whole> whole)?"
    r"(?: constant=(?P<constant>\S+))?(?: filtered=(?P<filtered>\d+) decays=(?P<decays>\d+))?$"
)
_CUT = re.compile(
    r"(?P<name>\S+) in (?P<group>\S+): (?P<origins>.*?) through (?P<primitive>\S+), part=(?P<part>[^:]*):"
    r" (?P<meaning>.*)  # (?P<source>.*)$"
)
_LAYER = re.compile(r"(?P<name>\S+) \((?P<groups>.*)\) (?P<dtype>[a-z0-9]+)\[(?P<size>\d+)\]$")
_EFFECT = re.compile(r"(?P<name>\S+) (?P<site>\S+) -> (?P<layer>\S+)$")
_TYPE = re.compile(r"(?P<kind>\w+)(?: (?P<of>\w+))? (?P<dtype>[a-z0-9]+)\[(?P<shape>[\d,]*)\]$")


def parse_program(text: str) -> TraceProgram:
    """Read a program that was printed.

    Raises
    ------
    ProgramError
        With the number and the text of the line that does not parse or has the wrong type.
    """
    found: dict[str, list] = {name: [] for name in (*_LINES, "equation")}
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line:
            continue
        name, _, rest = line.partition(" ")
        try:
            if (name == "program") == bool(found["program"]):
                raise ProgramError("unknown form")
            if name in _LINES:
                found[name].append(_LINES[name](rest))
            else:
                found["equation"].append(_equation(line))
        except (ProgramError, ValueError, SyntaxError) as error:
            raise ProgramError(f"line {number} of the program does not parse: {error}", got=line) from error
    if not found["program"]:
        raise ProgramError("the program is empty.", expected="a line 'program NAME  model=...  exact=...'")
    (head,) = found["program"]
    header = Header(
        head["model"], *[tuple(found[n]) for n in ("group", "site", "relation", "cut", "layer", "effect")]
    )
    window = None if head["window"] is None else 0 if head["window"] == "all" else int(head["window"])
    equations, gradients = tuple(found["equation"]), tuple(found["grad"])
    _check_types(header, equations)
    return TraceProgram(
        head["name"], header, equations, gradients, head["exact"] == "yes", window, head["end"]
    )


def _check_types(header: Header, equations: tuple[Equation, ...]) -> None:
    types = {e.name: e.type for e in equations}
    for equation in equations:
        for ref in equation.refs:
            if ref.name not in types:
                raise ProgramError(f"{equation.name} uses {ref.name}, which is not defined.")
        found = infer_type(header, equation.op, equation.args, types)
        if found != equation.type:
            raise ProgramError(
                f"{equation.name} has another type than its line says.",
                got=str(equation.type),
                expected=str(found),
            )


def _match(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    found = pattern.match(text)
    if found is None:
        raise ProgramError("unknown form")
    return found


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.strip("[]").split(",") if n)


def _flags(text: str) -> tuple[bool, ...]:
    return tuple(c == "1" for c in text)


def _group(m: re.Match[str]) -> Group:
    states = tuple((unquote(s.rsplit(":", 1)[0]), s.rsplit(":", 1)[1]) for s in m["states"].split(", ") if s)
    pattern = tuple(_flags(row) for row in m["pattern"].split("/"))
    bypass = _flags(m["bypass"]) if m["bypass"] else (False,) * len(states)
    return Group(m["name"], states, _shape(m["shape"]), m["dtype"], pattern, bypass)


def _site(m: re.Match[str]) -> Site:
    reads = tuple(_shape(x) for x in m["reads"].split(" ")) if m["reads"] != "-" else ()
    contracted = None if m["contracted"] == "none" else _shape(m["contracted"])
    params = tuple(map(unquote, m["params"].split("+")))
    return Site(
        m["name"], m["kind"], params, m["primitive"], m["source"], _shape(m["weight"]), _shape(m["y"]),
        m["dtype"], contracted, reads, bool(m["hoisted"]),
    )  # fmt: skip


def _relation(m: re.Match[str]) -> Relation:
    window = tuple((int(a), int(b)) for a, b in (part.split(":") for part in m["window"].split(",") if part))
    constant = tuple(_response(text) for text in (m["constant"] or "").split(";") if text)
    filtered, decays = int(m["filtered"] or 0), int(m["decays"] or 0)
    rows, whole = _flags(m["rows"]), bool(m["whole"])
    fan = (int(m["fan"]),) if m["fan"] else ()
    return Relation(m["name"], m["site"], m["group"], window, rows, constant, filtered, decays, whole, fan)


def _response(text: str) -> Response:
    decay, inject = text.split(":")
    rows = None if decay == "?" else tuple(_numbers(row) for row in decay.split("/"))
    return Response(_numbers(inject), rows)


def _numbers(text: str) -> tuple[float | None, ...]:
    return tuple(None if number == "?" else float(number) for number in text.split(","))


def _cut(m: re.Match[str]) -> Cut:
    group = "" if m["group"] == "-" else m["group"]
    return Cut(
        m["name"],
        group,
        m["primitive"],
        m["source"],
        tuple(map(unquote, m["origins"].split(", "))),
        m["meaning"],
        m["part"],
    )


def _layer(m: re.Match[str]) -> Layer:
    return Layer(m["name"], tuple(m["groups"].split(", ")), int(m["size"]), m["dtype"])


def _effect(m: re.Match[str]) -> Effect:
    return Effect(m["name"], m["site"], m["layer"])


def _gradient(text: str) -> Gradient:
    site, value = text.split(" += ")
    return Gradient(site, _reference(ast.parse(value, mode="eval").body))


def _line(pattern: re.Pattern[str], build: Callable[[re.Match[str]], Any]) -> Callable[[str], Any]:
    return lambda text: build(_match(pattern, text.strip()))


#: How a line is read, by its first word; any other is an equation.
_LINES: dict[str, Callable[[str], Any]] = {
    "program": _line(_HEAD, lambda m: m),
    "group": _line(_GROUP, _group),
    "site": _line(_SITE, _site),
    "relation": _line(_RELATION, _relation),
    "cut": _line(_CUT, _cut),
    "layer": _line(_LAYER, _layer),
    "effect": _line(_EFFECT, _effect),
    "grad": _gradient,
}


_SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.MatMult: "@"}


def _equation(text: str) -> Equation:
    body, type_text = text.rsplit(" : ", 1)
    name, expression = body.split("[t] = ", 1)
    type_match = _match(_TYPE, type_text.removesuffix("carried").strip())
    kind = Type(type_match["kind"], type_match["of"] or "", type_match["dtype"], _shape(type_match["shape"]))
    tree = ast.parse(expression.strip(), mode="eval").body
    if isinstance(tree, ast.BinOp):
        op = next(
            (op.name for op in OPS.values() if op.infix and op.infix == _SIGNS.get(type(tree.op))), None
        )
        if op is None:
            raise ProgramError("there is no op of that sign")
        return Equation(name, op, (_argument(tree.left), _argument(tree.right)), kind)
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
        raise ProgramError("expected op(...) or a binary operator")
    if tree.keywords:
        raise ProgramError("an op takes no keywords")
    return Equation(name, tree.func.id, tuple(map(_argument, tree.args)), kind)


def _argument(node: ast.expr) -> Argument:
    if isinstance(node, ast.Subscript):
        return _reference(node)
    if isinstance(node, (ast.Name, ast.Attribute)):
        return Symbol(ast.unparse(node))
    value = ast.literal_eval(node)
    if not isinstance(value, (int, float)):
        raise ProgramError("expected a number")
    return value


def _reference(node: ast.expr) -> Ref:
    if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name):
        raise ProgramError("expected a reference such as e0[t-1]")
    delay = {"t": 0, "t - 1": -1}.get(ast.unparse(node.slice))
    if delay is None:
        raise ProgramError("a reference is to [t] or [t-1]")
    return Ref(node.value.id, delay)
