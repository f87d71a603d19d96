"""Rewriting programs: what follows from keeping, replacing and defining equations, on a few lines of text."""

from __future__ import annotations

import dataclasses

import pytest

import etcompile
from etcompile.ir.verifier import verify
from etcompile.pass_api import Ref, Rewriter
from etcompile.passes import DeadTraces, ExactWithin

PROGRAM = etcompile.parse_program("""
program tiny  model=leaky  exact=no
  group g0 (h:f32) f32[2,4] pattern=1 bypass=1
  site s0 dot_general w f32[3,4], [2,3] -> [2,4] contracted=[3]  # dot_general model.py:5
  relation r0 s0 -> g0 window=[0:2,0:4] rows=1
  f0[t] = immediate(r0)             : immediate r0 f32[1,2,4]
  x0[t] = presynaptic(s0)           : presynaptic s0 f32[2,3]
  o0[t] = outer(f0[t], x0[t])       : trace r0 f32[1,2,4,3]
  v0[t] = 0.5 * e0[t-1]             : trace r0 f32[1,2,4,3]
  e0[t] = v0[t] + o0[t]             : trace r0 f32[1,2,4,3]
  c0[t] = copy(e0[t])               : trace r0 f32[1,2,4,3]
  L0[t] = signal(g0)                : state g0 f32[1,2,4]
  K0[t] = bypass(g0)                : state g0 f32[1,2,4]
  v1[t] = L0[t] - K0[t]             : state g0 f32[1,2,4]
  G0[t] = contract(v1[t], c0[t-1])  : gradient s0 f32[3,4]
  grad s0 += G0[t]
""")


def rewritten(change, program=PROGRAM):
    """The program after ``change(out, e)``, which says whether it took care of ``e``."""
    out = Rewriter(program)
    for e in program.equations:
        if not change(out, e):
            out.keep(e)
    found = out.finish()
    verify(found)
    return found


def lines(program):
    return {line.split(" : ")[0].strip() for line in str(program).splitlines() if "[t] =" in line}


def test_keeping_everything_changes_nothing():
    assert rewritten(lambda out, e: False) == PROGRAM


def test_readers_follow_a_replaced_value_one_step_late_too():
    found = rewritten(lambda out, e: e.op == "copy" and (out.replace(e, e.refs[0]) or True))
    assert lines(PROGRAM) - lines(found) == {"c0[t] = copy(e0[t])", "G0[t] = contract(v1[t], c0[t-1])"}
    assert "G0[t] = contract(v1[t], e0[t-1])" in lines(found)


def test_nothing_is_read_two_steps_late():
    late = rewritten(lambda out, e: e.op == "copy" and (out.replace(e, Ref("e0", -1)) or True))
    assert "c0[t] = copy(e0[t-1])" in lines(late)


def test_an_equation_that_is_there_is_found():
    def change(out, e):
        if e.op == "sub":
            again = out.op("sub", *e.args)
            assert again.name == "v2"  # the first number that is free
            out.define(e, out.op("mul", 2.0, again))
            assert out.op("sub", *e.args) == again and out.op("signal", *out.maker(e.args[0]).args) == Ref(
                "L0"
            )
            return True
        return False

    assert {"v2[t] = L0[t] - K0[t]", "v1[t] = 2.0 * v2[t]"} < lines(rewritten(change))


def test_a_defined_value_keeps_its_name_for_those_who_have_it():
    def change(out, e):
        if e.op == "sub":
            made = out.op("mul", 2.0, e.refs[0])
            out.define(e, made)
            out.op("add", made, made)
            return True
        return False

    assert {"v1[t] = 2.0 * L0[t]", "v3[t] = v1[t] + v1[t]"} < lines(rewritten(change))


def test_gradients_of_what_is_gone_are_gone():
    out = Rewriter(PROGRAM)
    for e in PROGRAM.equations[:-1]:
        out.keep(e)
    assert out.finish().gradients == ()


def test_what_the_tables_say_is_at_hand():
    out = Rewriter(PROGRAM)
    sub = PROGRAM.equation("v1")
    assert out.row(sub).terms == (1.0, -1.0) and out.kind(sub.refs[0]).owner == "group"
    assert out.maker(Ref("e0", -1)) is None and out.kind(0.5).number


@pytest.mark.parametrize("sign", ["+", "-"])
def test_windows_keep_what_is_left_of_a_sum(sign):
    program = etcompile.parse_program(str(PROGRAM).replace("L0[t] - K0[t]", f"L0[t] {sign} K0[t]"))
    found = ExactWithin()(program)
    verify(found)
    assert "K0[t] = start(g0)" in lines(found) and not any("signal" in line for line in lines(found))
    left = "contract(K0[t], c0[t-1])" if sign == "+" else "v1[t] = -1.0 * K0[t]"
    assert any(left in line for line in lines(found))


def test_gradients_that_are_zero_go_where_the_site_keeps_another():
    header = PROGRAM.header
    group = dataclasses.replace(header.groups[0], bypass=(False,))
    header = dataclasses.replace(header, groups=(group,))
    equations = tuple(
        dataclasses.replace(e, args=(Ref("K0"), e.args[1])) if e.name == "G0" else e
        for e in PROGRAM.equations
    )
    alone = dataclasses.replace(PROGRAM, header=header, equations=equations)
    assert "contract(K0[t]" in str(DeadTraces()(alone))  # its only one
    both = dataclasses.replace(
        alone,
        equations=(*equations, dataclasses.replace(PROGRAM.equations[-1], name="G1")),
        gradients=(*alone.gradients, dataclasses.replace(alone.gradients[0], value=Ref("G1"))),
    )
    found = DeadTraces()(both)
    verify(found)
    assert "contract(K0[t]" not in str(found) and "grad s0 += G1[t]" in str(found)
