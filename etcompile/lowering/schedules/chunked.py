"""Chunks: many steps at once with the weights fixed, for programs whose traces are linear in what each step adds.

A trace is never needed as such, only through gradients, and those are linear in it. With a_t what the gradients of this and
later steps ask of the addition f_t (x) x_t made at step t, and r_t how much of it is left at the end of C steps,

    sum_t contract(L_t, e_t) = sum_t pullback(x_t, f_t a_t) + a_0 e_0        (gradients)
    e_C = r_0 e_0 + sum_t (r_t f_t) (x) x_t                                  (traces)

so every weight has one credit of its y for all steps, and its gradient is one product over time and batch. It is the same
sum as step by step in another order: no logarithm, no division, right for every transition. Of D-RTRL, a_t is b_t and r_t is
R_t of docs/theory.md; of any rule both are its own trace equations transposed (:mod:`etcompile.lowering.schedules.recurrence`).

One way leads through a chunk: the program (``chunk_program``), its values at all steps (``chunk_values``), its traces by class
(``class_traces``), gradients (``chunk_gradients``), and the traces at its end (``chunk_ends``).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from etcompile.errors import EtcompileError
from etcompile.lowering.causal import CausalProgram
from etcompile.lowering.schedules.base import Found, Loop, Run, SequenceSchedule, Steps
from etcompile.lowering.schedules.chunk_ends import ends_of_classes, ends_step_by_step
from etcompile.lowering.schedules.chunk_gradients import ChunkGradients, chunk_gradients
from etcompile.lowering.schedules.chunk_program import ChunkProgram
from etcompile.lowering.schedules.chunk_sizes import ChunkSizes
from etcompile.lowering.schedules.chunk_values import chunk_values, filtered, without_loss
from etcompile.lowering.schedules.class_traces import class_traces
from etcompile.lowering.schedules.counts import counts
from etcompile.lowering.schedules.traceless import Traceless
from etcompile.lowering.sums import added, by_name
from etcompile.schedule import Schedule

__all__ = ["Chunked"]

Array = Any


class Chunked(SequenceSchedule):
    """Many steps at once.

    Attributes
    ----------
    program : ChunkProgram
    sizes : ChunkSizes
    """

    name = "chunks"

    def __init__(self, causal: CausalProgram) -> None:
        super().__init__(causal)
        self.program = ChunkProgram.of(causal)
        self.sizes = ChunkSizes(self.program)

    # -- how many -----------------------------------------------------------------------------------------------

    def refusal(self) -> EtcompileError | None:
        return self.program.refusal

    def size(self, schedule: Schedule, steps: int, wanted: int | str | None) -> int:
        """What is asked for; of ``"auto"`` as many as pay off, if any do, and all where a trace is too large to be stored."""
        wanted = schedule.chunk if wanted is None else wanted
        if self.causal.carried.too_large:
            if isinstance(wanted, int) and wanted < steps:
                site = next(iter(self.causal.carried.too_large.values()))
                raise site.cannot_store("chunk='auto': the whole sequence is one chunk.")
            return steps
        if not isinstance(wanted, int):
            pays = self.refusal() is None and self.sizes.pays_off
            wanted = self.sizes.together(steps, schedule.memory) if pays else 1
        size = min(wanted, steps)
        return size if size > 1 else 0

    @property
    def bytes_of_a_step(self) -> int:
        return self.sizes.bytes_of_a_step

    def forward_size(self, schedule: Schedule, steps: int) -> int:
        if self.causal.program.window is not None or self.refusal() is not None:
            return 0
        if (
            self.causal.carried.too_large
        ):  # never made where there is no loss, so that steps need not be one chunk
            return self.sizes.together(steps, schedule.memory)
        return self.size(schedule, steps, None)

    # -- one chunk ----------------------------------------------------------------------------------------------

    def over(self, run: Run, loop: Loop, steps: Steps, size: int) -> tuple[Loop, Found]:
        if self.causal.keeps or steps.count > size:
            return super().over(run, loop, steps, size)
        alone = Traceless(self.program)  # one chunk: traces are zero before it, and of no use after it
        start, block = alone.start(loop), self.sizes.block(steps.count)
        if block < steps.count and not run.loss.program.effects:  # these come in the order of the steps
            inputs = run.inputs(steps.inputs)
            passed = self.program.first_pass(run.weights, loop.states, inputs)
            end, found = alone.in_blocks(run, start, steps, block, passed)
        else:
            end, found, _ = alone.credited(run, start, steps)
            end = dataclasses.replace(end, sums=added(loop.sums, end.sums))
        return dataclasses.replace(end, traces=self.causal.stored(end.traces)), found

    def part(self, run: Run, loop: Loop, steps: Steps) -> tuple[Loop, Found]:
        program = self.program
        traces = self.causal.carried.wide(loop.traces)
        seen = chunk_values(program, run, loop, steps, traces)
        steps_seen = (run.weights, seen.passed, seen.inputs)
        classes = []
        if not program.pushes:
            weight = counts(program, seen.values) if program.pulled is None else None
            classes = class_traces(program, *steps_seen, seen.values, traces, weight)
        gradients = chunk_gradients(program, run.weights, seen, classes, traces)
        if program.pushes:
            traces = ends_step_by_step(self.causal, *steps_seen, loop.traces)
        else:
            ends = ends_of_classes(program, seen.values, classes, traces, gradients)
            traces = self.causal.stored({**seen.filters, **ends})
        sums = added(loop.sums, by_name(gradients.sites, seen.own))
        return Loop(seen.passed.states, traces, sums, seen.loss.carried), (seen.loss.value, seen.loss.aux)

    def forward(self, weights: list[Array], loop: Loop, inputs: list[Array]) -> tuple[Loop, list[Array]]:
        program = self.program
        passed = program.first_pass(weights, loop.states, inputs)
        outputs, values = without_loss(program, weights, passed, inputs)
        if not self.causal.keeps:
            return dataclasses.replace(loop, states=passed.states), outputs
        if program.pushes:
            traces = ends_step_by_step(self.causal, weights, passed, inputs, loop.traces)
        else:
            traces = self.causal.carried.wide(loop.traces)
            values, filters = filtered(program, values, traces)
            classes = class_traces(program, weights, passed, inputs, values, traces, None)
            ends = ends_of_classes(program, values, classes, traces, ChunkGradients({}))
            traces = self.causal.stored({**filters, **ends})
        return Loop(passed.states, traces, loop.sums, loop.carried), outputs
