"""What a user adds to the compiler: read anew by each test of ``test_from_outside.py``, and taken away after it."""

from __future__ import annotations

import dataclasses

import jax

from etcompile import extend
from etcompile.ir import zeros
from etcompile.pass_api import Rewriter, Symbol

extend.register_op(
    "halve",
    "T -> T",
    "halve(a)",
    "half of a value",
    evaluate=lambda context, equation, args: jax.tree.map(lambda v: v / 2, args[0]),
    linear=(0,),
    terms=(0.5,),
    by_row=True,
    zeros=zeros.of_first,
)


@extend.register_kind("leak", "group", "states x positions, of no loss", rows=1, carried="k")
def leak(header, group):
    return group.dtype, (len(group.states), *group.shape)


extend.register_op(
    "leak",
    "group g -> leak g",
    "leak(g)",
    "what of a state stays",
    evaluate=lambda context, equation, args: tuple(
        row[k] for k, row in enumerate(context.step.transition(args[0].name))
    ),
)
extend.register_op(
    "gated",
    lambda header, args: args[0],
    "gated(L, a)",
    "a signal times a leak, entry by entry",
    evaluate=lambda context, equation, args: jax.tree.map(lambda s, a: s * a, *args),
    linear=(0, 1),
    by_row=True,
)


def halves(p):
    """A trace that is halved twice at every step."""
    for r in p.relations:
        e = p.recur(decay=0.5, inject=p.op("halve", p.op("halve", p.outer(r))))
        p.gradient(r, p.contract(p.signal(r.group), e))


def gated(p):
    """The signal counts as much as the filtered leak of its units."""
    for r in p.relations:
        leak = p.recur(decay=0.5, inject=p.op("leak", Symbol(r.group)))
        e = p.recur(decay=0.8, inject=p.outer(r))
        p.gradient(r, p.contract(p.op("gated", p.signal(r.group), leak), e))


@dataclasses.dataclass(frozen=True)
class Quarters:
    name: str = "quarters"
    preserves: str = "gradients"

    def __call__(self, program):
        out = Rewriter(program)
        for e in program.equations:
            inner = out.maker(e.args[0]) if e.op == "halve" else None
            if inner is not None and inner.op == "halve":
                out.define(e, out.op("mul", 0.25, inner.args[0]))
            else:
                out.keep(e)
        return out.finish()
