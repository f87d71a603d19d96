"""Long sequences that leave no traces, in little memory: each step runs twice, and no trace is made.

What the gradients of later steps ask of a trace at some time has the size of the states: b_t of docs/theory.md, for D-RTRL. So a
sequence in blocks of k steps needs the states at the start of each block, found by a first pass that keeps nothing else, and
then the blocks from last to first: each is a chunk whose credit starts at its end with what the block behind it asks, and ends
with what it asks of the block before (:mod:`etcompile.lowering.schedules.traceless`). The credit is that of one chunk over all
steps, with the same cuts, whatever k is. Memory is that of k steps and of steps / k states. Chunks that make traces run each step
once; where their traces take fewer products than the second run, they are taken.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import Any

import jax

from etcompile.errors import EtcompileError, UnsupportedError
from etcompile.lowering.schedules.base import Found, Loop, Run, SequenceSchedule, Steps
from etcompile.lowering.schedules.chunk_sizes import ENOUGH_WITHOUT_TRACES, evenly
from etcompile.lowering.schedules.chunked import Chunked
from etcompile.lowering.schedules.traceless import Traceless
from etcompile.schedule import Schedule

__all__ = ["Replayed"]

Array = Any


class Replayed(SequenceSchedule):
    """Blocks from last to first, for sequences that stand alone and are too long to be one chunk."""

    name = "replay"

    @cached_property
    def _chunked(self) -> Chunked:
        return Chunked(self.causal)

    def refusal(self) -> EtcompileError | None:
        program = self.causal.program
        if program.window is not None:
            return super().refusal()
        asked = f"schedule=etcompile.Schedule(how={self.name!r})"
        if self.causal.keeps:
            return UnsupportedError(
                f"how={self.name!r} is for sequences that leave no traces.",
                got=asked,
                expected=f"etcompile.Schedule(keep_traces=False, how={self.name!r})",
            )
        if self.causal.model.effects is not None:
            return UnsupportedError(
                f"how={self.name!r} runs each step twice, and {self.causal.model.analysis.model.name} does something "
                "beside its results: it prints, checks a value, or calls back to Python.",
                got=asked,
                expected="how=None",
            )
        return self._chunked.refusal()

    def size(self, schedule: Schedule, steps: int, wanted: int | str | None) -> int:
        """Steps of a block, where a sequence cannot be one chunk; 0 where it can, and where chunks with traces are quicker.

        So it is where a length of chunks is asked for.
        """
        named = schedule.how == self.name
        wanted = schedule.chunk if wanted is None else wanted
        if self.causal.keeps or (isinstance(wanted, int) and not named) or self.refusal() is not None:
            return 0
        if isinstance(wanted, int):
            return min(wanted, steps)
        if not named and not self._is_quick:
            return 0
        allowed = self._chunked.sizes.memory_alone(schedule.memory)
        if not named and self._chunked.sizes.alone(steps) <= allowed:
            return 0
        if steps * self.bytes_of_a_step <= allowed:
            return steps
        size = self._of_block(steps, allowed)
        held = size * self.bytes_of_a_step + -(-steps // size) * self._bytes_of_start
        return size if named or held <= allowed or self.causal.carried.too_large else 0

    @cached_property
    def _is_quick(self) -> bool:
        """Whether blocks take less time than single steps, and than chunks that make traces."""
        sizes = self._chunked.sizes
        return sizes.stands_alone and sizes.pays_off and not sizes.traces_are_quick

    @property
    def in_order(self) -> SequenceSchedule:
        return self._chunked

    @property
    def held_back(self) -> str:
        causal = self.causal
        if causal.model.effects is None or causal.keeps or causal.schedule.how is not None:
            return ""
        if (
            causal.program.window is not None
            or self._chunked.refusal() is not None
            or isinstance(causal.schedule.chunk, int)
            or causal.carried.too_large
            or not self._is_quick
        ):
            return ""
        return (
            "a sequence that memory does not hold as one chunk carries traces from part to part: without, each step "
            f"would run twice, and {causal.model.analysis.model.name} prints, checks a value, or calls back to Python"
        )

    @property
    def bytes_of_a_step(self) -> int:
        return self._chunked.bytes_of_a_step

    def _of_block(self, steps: int, allowed: int) -> int:
        """Steps of a block: as many as a cache holds, and more where less memory is needed then, as far as that allows."""
        least_held = math.isqrt(steps * self._bytes_of_start // self.bytes_of_a_step)
        possible = min(steps, allowed // self.bytes_of_a_step)
        return evenly(steps, max(1, min(possible, max(ENOUGH_WITHOUT_TRACES, least_held))))

    @cached_property
    def _bytes_of_start(self) -> int:
        """What is kept of each block."""
        carried = self._chunked.program.filters_of(jax.eval_shape(self.causal.carried.zeros))
        states = [leaf.aval for leaf in self.causal.model.analysis.model.states]
        return sum(v.size * v.dtype.itemsize for v in (*jax.tree.leaves(carried), *states))

    def forward_size(self, schedule: Schedule, steps: int) -> int:
        """As chunks, where no other schedule may be taken."""
        return self._chunked.forward_size(schedule, steps) if schedule.how == self.name else 0

    def forward(self, weights: list[Array], loop: Loop, inputs: list[Array]) -> tuple[Loop, list[Array]]:
        return self._chunked.forward(weights, loop, inputs)

    def part(self, run: Run, loop: Loop, steps: Steps) -> tuple[Loop, Found]:
        return self.over(run, loop, steps, steps.count)

    def over(self, run: Run, loop: Loop, steps: Steps, size: int) -> tuple[Loop, Found]:
        alone = Traceless(self._chunked.program)
        end, found = alone.in_blocks(run, alone.start(loop), steps, size)
        return dataclasses.replace(end, traces=self.causal.stored(end.traces)), found
