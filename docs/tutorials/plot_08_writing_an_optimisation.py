"""
Writing an optimisation
=======================

An optimisation is a pass from program to program that leaves the gradients as they are. This one merges two
products with numbers into one.
"""

import dataclasses

import brainstate
import jax.numpy as jnp

import etcompile
from etcompile.pass_api import Rewriter, TraceProgram

# %%
# Pattern: ``a * (b * v)`` with numbers a and b. Replacement: ``(a b) * v``. Reason: one pass over memory instead of two.


@dataclasses.dataclass(frozen=True)
class MergeNumbers:
    """Replace ``a * (b * v)`` by ``(a b) * v``."""

    name: str = "merge_numbers"
    preserves: str = "gradients"

    def __call__(self, program: TraceProgram) -> TraceProgram:
        out = Rewriter(program)
        for e in program.equations:
            inner = out.maker(e.args[1]) if e.op == "mul" and isinstance(e.args[0], float) else None
            if inner is not None and inner.op == "mul" and isinstance(inner.args[0], float):
                out.replace(e, out.op("mul", e.args[0] * inner.args[0], inner.args[1]))
            else:
                out.keep(e)
        return out.finish()


# %%
# A rule that writes such products, to try it on:


@etcompile.algorithm("twice_scaled")
def twice_scaled(p):
    for r in p.relations:
        e = p.recur(decay=p.transition(r.group), inject=0.5 * (0.5 * p.outer(r)))
        p.gradient(r, p.contract(p.signal(r.group), e))


class Net(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = brainstate.nn.GRUCell(2, 4)
        self.readout = brainstate.nn.Linear(4, 1)

    def update(self, x):
        return self.readout(self.cell(x))


# %%
# Passes follow the rule in a list. ``check=True`` runs the program before and after every pass on random
# inputs, and holds the pass to what it declares.

seen = []
manager = etcompile.PassManager(check=True, print_after="changes", emit=seen.append)
step = etcompile.compile(
    Net(), jnp.ones((3, 2)), algo=[twice_scaled(), MergeNumbers()], batch_size=3, manager=manager
)
for record in step.passes:
    print(f"{record.name:24} {record.before:3} -> {record.after:3} equations")
print(next(text for text in seen if "after merge_numbers" in text))

# %%
# A program prints as text and parses back to an equal value, so a pass is tested on a few lines without a
# model; :doc:`/write_a_pass` shows how.

assert etcompile.parse_program(str(step.program)) == step.program
assert "0.25" in str(step.program)
