"""Types of ops, and what is said of arguments that do not fit: both come from one line of the op's row."""

from __future__ import annotations

import contextlib

import pytest

from etcompile import parse_program
from etcompile.errors import ProgramError
from etcompile.ir.kinds import type_of
from etcompile.ir.ops import OPS, infer_type
from etcompile.ir.program import Ref, Symbol
from etcompile.ir.types import Type

HEADER = parse_program("""
program tiny  model=two_layers  exact=no
  group g0 (a:f32, b:f32) f32[2,4] pattern=10/11
  group g1 (c:f64) f64[2,5] pattern=1
  site s0 dot_general w f32[3,4], [2,3] -> [2,4] contracted=[3]  # dot_general model.py:5
  site s1 dot_general v f64[4,5], [2,4] -> [2,5] contracted=[4]  # dot_general model.py:6
  relation r0 s0 -> g0 window=[0:2,0:4] rows=11
  relation r1 s1 -> g1 window=[0:2,0:5] rows=1
  layer network (g0, g1) f64[26]
  effect j0 s0 -> network
  effect j1 s1 -> network
""").header
VALUES = [
    *(type_of(HEADER, kind, g) for kind in ("state", "transition", "drive") for g in ("g0", "g1")),
    *(type_of(HEADER, kind, r) for kind in ("trace", "immediate") for r in ("r0", "r1")),
    *(type_of(HEADER, kind, s) for kind in ("presynaptic", "credit", "gradient") for s in ("s0", "s1")),
    *(type_of(HEADER, kind, j) for kind in ("influence", "row_factor", "rows") for j in ("j0", "j1")),
    *(type_of(HEADER, kind, "network") for kind in ("hidden", "jacobian")),
    *(type_of(HEADER, kind, "") for kind in ("number", "vector", "count")),
]  # fmt: skip
#: By what the text of an equation calls them: "trace r0", "number".
OF = {f"{v.kind} {v.of}".strip(): v for v in VALUES}


def typed(op, *args):
    """The type of an op of values that are given as OF names them, of names, and of numbers."""
    given = [OF.get(a, Symbol(a)) if isinstance(a, str) else a for a in args]
    names = {f"v{k}": a for k, a in enumerate(given) if isinstance(a, Type)}
    return infer_type(
        HEADER, op, tuple(Ref(f"v{k}") if isinstance(a, Type) else a for k, a in enumerate(given)), names
    )


@pytest.mark.parametrize(
    ("op", "args", "result"),
    [
        ("transition", ["g0"], "transition g0 f32[2,2,2,4]"),
        ("outer", ["immediate r0", "presynaptic s0"], "trace r0 f32[2,2,4,3]"),
        ("matmul", ["transition g1", "trace r1"], "trace r1 f64[1,2,5,4]"),
        ("matmul", ["state g0", "transition g0"], "state g0 f32[2,2,4]"),
        ("matmul", ["jacobian network", "influence j0"], "influence j0 f64[26,3,4]"),
        ("contract", ["state g1", "trace r1"], "gradient s1 f64[4,5]"),
        ("mul", [0.5, "trace r0"], "trace r0 f32[2,2,4,3]"),
        ("mul", ["rows j0", "row_factor j0"], "row_factor j0 f32[2,4,3]"),
        ("to_layer", ["network", "state g0", "state g1"], "hidden network f64[26]"),
        ("norm", ["hidden network", "trace r0", "number"], "number f64[]"),
        ("map", ["jax.numpy.sin", "number"], "number f64[]"),
        ("snap_immediate", ["j1", 2], "snap j1 f64[2]"),
        ("error", [], "vector f64[]"),
    ],
)
def test_types(op, args, result):
    assert str(typed(op, *args)) == result


@pytest.mark.parametrize(
    ("op", "args", "says"),
    [
        ("outer", ["presynaptic s0", "immediate r0"], "outer takes immediate r, presynaptic or factor r.site."),
        ("outer", ["immediate r0", "presynaptic s1"], "expected: immediate r0, presynaptic or factor s0"),
        ("contract", ["state g0", "trace r1"], "expected: state g1, trace r1"),
        ("matmul", ["transition g0", "transition g1"], "expected: transition g0, transition g0"),
        ("mul", ["rows j0", "row_factor j1"], "expected: rows j0, row_factor or response j0"),
        ("to_layer", ["network", "state g1", "state g0"], "expected: layer network, state g0 g1"),
        ("add", ["state g0", "state g1"], "add takes T, T (T: values of the same type)."),
        ("transition", ["g7"], "transition: there is no group 'g7' in this program."),
        ("reach", ["g0", "hidden network"], "reach: there is no effect 'g0' in this program."),
        ("signal", [], "got: nothing"),
        ("error", [0.5], "error takes nothing."),
        ("number", ["number"], "number takes float."),
        ("rademacher", ["network", 0.5, "count"], "rademacher takes layer l, int, count."),
        ("gain", ["r0", 0, 0], "no such constant response"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(op, args, says):
    with pytest.raises(ProgramError) as caught:
        typed(op, *args)
    assert says in str(caught.value)


@pytest.mark.parametrize("op", OPS)
def test_an_op_of_nothing_but_of_what_it_takes(op):
    """Whatever an op is given, it has a type or is refused by an error of ours."""
    for a in (*VALUES, Symbol("g0"), Symbol("nobody"), 0, 0.5):
        for args in ((a,), (a, VALUES[0]), (VALUES[0], a)):
            with contextlib.suppress(ProgramError):
                assert isinstance(OPS[op].rule(HEADER, args), Type)
