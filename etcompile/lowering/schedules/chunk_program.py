"""A program as chunks see it: its equations sorted, the loop of all credits where it has one, and its first pass.

All that handles many steps at once is given this and nothing else of the program; nothing in it changes, and nothing is of a
call.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

from etcompile.errors import UnsupportedError
from etcompile.ir.kinds import KINDS
from etcompile.ir.program import Argument, Equation, Ref, made_from
from etcompile.lowering.causal import CausalProgram, Traces
from etcompile.lowering.evaluate import Context
from etcompile.lowering.schedules.first_pass import FirstPass
from etcompile.lowering.schedules.linear import ChunkEquations, chunk_equations
from etcompile.lowering.schedules.pulled import PulledCredit, pulled_credit
from etcompile.lowering.unwritten import pushed_in_chunks

__all__ = ["ChunkProgram"]


@dataclasses.dataclass(frozen=True, eq=False)
class ChunkProgram:
    """One program, for many steps at once with the weights fixed.

    Attributes
    ----------
    causal : CausalProgram
        On a lowering of its own, where other transitions are written down in chunks than in steps alone.
    """

    causal: CausalProgram

    @classmethod
    def of(cls, causal: CausalProgram) -> ChunkProgram:
        """A program for chunks."""
        model = causal.model
        pushed = frozenset() if model.divided else pushed_in_chunks(causal.program, model.analysis)
        return cls(causal if pushed == model.unwritten else causal.on(model.pushing(pushed)))

    # -- what it may be ------------------------------------------------------------------------------------------

    @property
    def refusal(self) -> UnsupportedError | None:
        """Why it cannot run in chunks; None: it can."""
        return self._sorted if isinstance(self._sorted, UnsupportedError) else None

    @property
    def equations(self) -> ChunkEquations:
        """Its equations by what they need of other steps; only where it is not refused."""
        assert not isinstance(self._sorted, UnsupportedError), "chosen only where it does not refuse"
        return self._sorted

    @cached_property
    def _sorted(self) -> ChunkEquations | UnsupportedError:
        if self.pushes and self.pulled is None:
            program = self.causal.program
            return UnsupportedError(
                f"{program.name} cannot run in chunks: units of this model have many elements, "
                "and what becomes of a trace is known from step to step alone.",
                got=f"{program.name}, of a model whose delays feed back over many slots",
                expected="d_rtrl, whose gradients in a chunk need no trace",
                hint="run it step by step: chunk=1.",
            )
        try:
            return chunk_equations(self.causal.program)
        except UnsupportedError as error:
            return error

    # -- how it runs ---------------------------------------------------------------------------------------------

    @cached_property
    def pulled(self) -> PulledCredit | None:
        """The one loop that finds the credits of all weights; None: they are found by class of traces."""
        return pulled_credit(self.causal)

    @cached_property
    def pushes(self) -> bool:
        """Whether traces advance by pushes through the step: then those at the end of a chunk are found step by step."""
        header, analysis = self.causal.program.header, self.causal.model.analysis
        return any(analysis.group(relation.group).pushed for relation in header.relations)

    @cached_property
    def made_again(self) -> tuple[Equation, ...]:
        """The equations of transitions that are not written down, and so are made where traces need them."""
        kinds = {e.name: KINDS[e.type.kind] for e in self.equations.alone}
        groups = self.causal.model.unwritten
        made = [e.name for e in self.equations.alone if kinds[e.name].rows > 1 and e.type.of in groups]
        names = made_from(self.equations.alone, made)
        return tuple(e for e in self.equations.alone if e.name in names)

    @cached_property
    def first_pass(self) -> FirstPass:
        """The model alone, step by step."""
        return FirstPass(self.causal.model, self.pulled.wide if self.pulled else None)

    @cached_property
    def context(self) -> Context:
        """What equations are evaluated in that need no step."""
        return Context(self.causal.program, self.causal.model, None, None, self.causal.functions)

    # -- its values ----------------------------------------------------------------------------------------------

    @cached_property
    def carried(self) -> frozenset[str]:
        """Values that go from step to step."""
        return frozenset(self.causal.program.carried)

    @property
    def has_traces(self) -> bool:
        """Whether any of them is a trace."""
        return any(map(self._is_trace, self.carried))

    @cached_property
    def shapes(self) -> Traces:
        """Shapes of the carried values."""
        return self.causal.carried.shapes()

    def filters_of(self, traces: Traces) -> Traces:
        """Carried values that are no traces."""
        return {name: v for name, v in traces.items() if not self._is_trace(name)}

    def without_rows(self, traces: Traces) -> Traces:
        """Carried values, the rows of those of the classes all left out."""
        left_out = {e.name for c in self.equations.classes for of in c.traces.values() for e in of}
        return {name: (None,) * len(v) if name in left_out else v for name, v in traces.items()}

    def equation(self, name: str) -> Equation:
        """The equation that makes a value."""
        return self.causal.program.equation(name)

    def is_gradient(self, argument: Argument) -> bool:
        """Whether an argument is a value that gradients are made of."""
        return isinstance(argument, Ref) and KINDS[self.equation(argument.name).type.kind].gradient

    def _is_trace(self, name: str) -> bool:
        return KINDS[self.equation(name).type.kind].trace
