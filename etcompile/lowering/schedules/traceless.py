"""Parts of a sequence whose traces start at zero and are given up at its end, so that it carries none.

Forwards, a part leaves states, filtered values and what the loss writes. Backwards, it is a chunk whose credit starts with what
the part behind it asks of its traces, and ends with what it asks of the part before. Where the first pass over all steps is kept,
parts are there for the cache alone: arrays of a few steps stay in it from kernel to kernel, and no step runs twice.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.lowering.causal import Traces
from etcompile.lowering.schedules.base import Found, Loop, Run, Steps
from etcompile.lowering.schedules.chunk_gradients import Credit, chunk_gradients
from etcompile.lowering.schedules.chunk_losses import results_of_steps, written_by_loss
from etcompile.lowering.schedules.chunk_program import ChunkProgram
from etcompile.lowering.schedules.chunk_values import chunk_values, filtered, without_loss
from etcompile.lowering.schedules.class_traces import class_traces, rows_at_start
from etcompile.lowering.schedules.counts import counts
from etcompile.lowering.schedules.first_pass import Passed
from etcompile.lowering.sums import Sums, added, by_name

__all__ = ["Traceless"]

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Traceless:
    """Such parts of one program.

    Attributes
    ----------
    program : ChunkProgram
    """

    program: ChunkProgram

    def start(self, loop: Loop) -> Loop:
        """A loop without traces; what is filtered stays."""
        traces = self.program.without_rows(self.program.causal.carried.wide(loop.traces))
        return dataclasses.replace(loop, traces=traces)

    def no_credit(self) -> Credit:
        """What nothing asks, of what steps ask of the traces before them."""
        program = self.program
        if program.pulled is not None:
            shapes: Credit = program.pulled.carried
        else:
            shapes = [rows_at_start(program, one, program.shapes) for one in program.equations.classes]
        return jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)

    def onward(self, run: Run, loop: Loop, steps: Steps, passed: Passed | None = None) -> Loop:
        """What is there after some steps, of :meth:`start`: no derivatives, and nothing is kept of the steps."""
        program, first_pass = self.program, self.program.first_pass
        inputs, writes = run.inputs(steps.inputs), bool(jax.tree.leaves(loop.carried))
        if not self._goes_on(loop):
            return dataclasses.replace(loop, states=first_pass.last(run.weights, loop.states, inputs))
        passed, carried = passed or first_pass(run.weights, loop.states, inputs), loop.carried
        if writes:
            made, given = results_of_steps(run, passed, inputs), (steps.items, steps.moving)
            carried, _ = written_by_loss(run, carried, made, given)
        _, values = without_loss(program, run.weights, passed, inputs)
        _, filters = filtered(program, values, loop.traces)
        return Loop(passed.states, {**loop.traces, **filters}, loop.sums, carried)

    def credited(
        self, run: Run, loop: Loop, steps: Steps, later: Credit = None, passed: Passed | None = None
    ) -> tuple[Loop, Found, Credit]:
        """Some steps from :meth:`start`, with what later ones ask: the loop with their gradients as sums, and what these ask."""
        program = self.program
        seen = chunk_values(program, run, loop, steps, loop.traces, passed)
        of_steps = (run.weights, seen.passed, seen.inputs)
        classes = []
        if program.pulled is None:
            weight, values = counts(program, seen.values), (seen.values, program.shapes)
            classes = class_traces(program, *of_steps, *values, weight, later, ends=False)
        gradients = chunk_gradients(program, run.weights, seen, classes, loop.traces, later)
        sums = by_name(gradients.sites, seen.own)
        traces: Traces = {**loop.traces, **seen.filters}
        end = Loop(seen.passed.states, traces, sums, seen.loss.carried)
        return end, (seen.loss.value, seen.loss.aux), gradients.before

    def in_blocks(
        self, run: Run, loop: Loop, steps: Steps, size: int, passed: Passed | None = None
    ) -> tuple[Loop, Found]:
        """All steps from :meth:`start` in blocks, from last to first: the loop with their gradients added to its sums.

        ``passed`` is the first pass over all of them; without it, each block makes its own from the states at its start.
        """
        whole, rest = divmod(steps.count, size)
        start = dataclasses.replace(loop, sums={})

        def block(first: Any, count: int) -> tuple[Steps, Passed | None]:
            return steps.part(first, count), None if passed is None else passed.part(first, count)

        def onward(now: Loop, k: Array) -> tuple[Loop, Loop]:
            return self.onward(run, now, *block(k * size, size)), now

        def back(later: tuple[Credit, Sums], given: tuple[Array, Loop | None]) -> Any:
            (credit, sums), (k, now) = later, given
            some, known = block(k * size, size)
            end, found, credit = self.credited(run, now or start, some, credit, known)
            return (credit, added(sums, end.sums)), found

        if passed is None or self._goes_on(loop):
            end, starts = lax.scan(onward, start, jnp.arange(whole))
        else:
            end, starts = dataclasses.replace(start, states=passed.states), None
        later, parts = (self.no_credit(), loop.sums), []
        if rest:
            some, known = block(whole * size, rest)
            end, found, credit = self.credited(run, end, some, later[0], known)
            later, parts = (credit, added(loop.sums, end.sums)), [found]
        (_, sums), found = lax.scan(back, later, (jnp.arange(whole), starts), reverse=True)
        parts.insert(0, jax.tree.map(lambda v: v.reshape(v.shape[0] * v.shape[1], *v.shape[2:]), found))
        found = parts[0] if len(parts) == 1 else jax.tree.map(lambda *v: jnp.concatenate(v), *parts)
        return dataclasses.replace(end, sums=sums), found

    def _goes_on(self, loop: Loop) -> bool:
        """Whether more than states goes from step to step: filtered values, and what the loss writes."""
        return bool(jax.tree.leaves(loop.carried) or self.program.filters_of(loop.traces))
