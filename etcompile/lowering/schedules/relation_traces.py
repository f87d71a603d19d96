"""The traces of one relation over a chunk: what is asked of its y, and what is left at the end.

In the words of :mod:`etcompile.lowering.schedules.chunked`: f_t a_t, a_0 e_0 and e_C. Answers a and r are over the group's
positions (:mod:`etcompile.lowering.schedules.recurrence`); here they meet f, x and the relation's own traces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from etcompile.ir.ops import OPS
from etcompile.ir.program import Equation, Ref
from etcompile.lowering.begun import times
from etcompile.lowering.causal import Traces
from etcompile.lowering.geometry import TraceGeometry
from etcompile.lowering.in_place import Moment, all_known_after, known_after, large_ones
from etcompile.lowering.schedules.filter_credits import FilterCredits, Met
from etcompile.lowering.schedules.recurrence import Left, Rows, referred, value_key

__all__ = ["RelationTraces"]

Array = Any
Value = Any


@dataclasses.dataclass(frozen=True)
class RelationTraces:
    """The trace equations of one relation, with the names that the first relation of its class lends them.

    Attributes
    ----------
    geometry : TraceGeometry
    equations : sequence of (Equation, str)
        The relation's own equations, and under which name the answers for them stand.
    """

    geometry: TraceGeometry
    equations: Sequence[tuple[Equation, str]]

    @property
    def relation(self) -> str:
        return self.geometry.relation.name

    @property
    def site(self) -> str:
        """The site whose weight they are for."""
        return self.geometry.relation.site

    @property
    def _added(self) -> Iterator[tuple[Ref, Ref, str]]:
        """F and x of what each step adds, and its lent name."""
        for e, lent in self.equations:
            if OPS[e.op].injects:
                f, x = (referred(a) for a in e.args)
                yield f, x, lent

    def credits(self, values: Mapping[str, Value], asked: Mapping[str, Rows]) -> Iterator[tuple[str, Array]]:
        """f_t a_t: what later steps ask of y_t through this step's additions, for each x_t that meets it."""
        for f, x, lent in self._added:
            for f_t, a_t in zip(values[value_key(f)], asked[lent], strict=True):
                if f_t is not None and a_t is not None:
                    of_span = self._product(f_t, jax.vmap(self.geometry.from_positions)(a_t))
                    yield value_key(x), jax.vmap(self.geometry.place)(of_span)

    def _product(self, f_t: Array, value: Array) -> Array:
        return times(f_t, value) if self.geometry.steep else value * f_t

    def gradient_of_start(self, traces: Traces, asked: Mapping[str, Rows]) -> Array | None:
        """a_0 e_0: what the chunk's gradients make of the traces from before it."""
        pairs = [
            (self.geometry.factor(a_0, e_0), e_0)
            for e, lent in self.equations
            if lent in asked
            for a_0, e_0 in zip(asked[lent], traces[e.name], strict=True)
            if a_0 is not None and e_0 is not None
        ]
        return self.geometry.contract(pairs) if pairs else None

    def at_end(
        self,
        values: Mapping[str, Value],
        traces: Traces,
        left: Mapping[str, Sequence[Left]],
        filters: FilterCredits,
        done: Sequence[Array] = (),
    ) -> Traces:
        """e_C = r_0 e_0 + sum_t (r_t f_t) (x) x_t, for each trace that is carried; ``done`` is what is known before.

        Who reads e_0 besides belongs there: then e_C takes its place, and no copy is made.
        """
        wanted = [
            (e.name, e_0, of_row)
            for e, lent in self.equations
            if lent in left
            for e_0, of_row in zip(traces[e.name], left[lent], strict=True)
        ]
        after = Moment(done if large_ones([e_0 for _, e_0, _ in wanted]) else ())
        met = iter(filters([self._credits(values, of_row) for _, e_0, of_row in wanted if e_0 is not None]))
        rows: dict[str, list[Array | None]] = {name: [] for name, _, _ in wanted}
        for name, e_0, of_row in wanted:
            rows[name].append(
                None if e_0 is None else self._row(e_0, values, traces, of_row, next(met), after)
            )
        return {name: tuple(found) for name, found in rows.items()}

    def _credits(self, values: Mapping[str, Value], left: Left) -> dict[str, Array]:
        """r_t f_t by x_t: summed before anything is as large as a trace."""
        assert left is not None
        found: dict[str, Array] = {}
        for f, x, lent in self._added:
            for r, f_t in zip(left[0][lent], values[value_key(f)], strict=True):
                if r is not None and f_t is not None:
                    part = self._product(f_t, jax.vmap(self.geometry.from_positions)(r))
                    found[value_key(x)] = found[value_key(x)] + part if value_key(x) in found else part
        return found

    def _row(
        self,
        like: Array,
        values: Mapping[str, Value],
        traces: Traces,
        left: Left,
        met: Met,
        after: Moment,
    ) -> Array:
        """One row of a trace at the end: of all rows of all traces, and of all that was added, what is left in it."""
        assert left is not None
        total = jnp.zeros(like.shape, like.dtype)
        for e, lent in self.equations:
            for r, e_0 in zip(left[1][lent], traces[e.name], strict=True) if lent in left[1] else ():
                if r is not None and e_0 is not None:
                    kept = self.geometry.spread(self.geometry.factor(known_after(r, after), e_0))
                    total = total + (kept * e_0).astype(like.dtype)
        for z, credit in met.start.items():
            before = self.geometry.presynaptic(traces[z])
            total = total + (self.geometry.spread(credit) * before).astype(like.dtype)
        for x, credit in met.steps.items():
            credit, given = all_known_after((credit, values[x]), after)
            total = total + self.geometry.accumulate(credit, given).astype(like.dtype)
        return total
