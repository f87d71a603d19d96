"""How many steps a chunk handles together: enough to make up for the work at its end, as far as memory allows."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import jax

from etcompile.lowering.schedules.chunk_program import ChunkProgram
from etcompile.lowering.schedules.traffic import chunks_pay_off

__all__ = ["ENOUGH_WITHOUT_TRACES", "ChunkSizes", "evenly"]

#: Steps after which a longer chunk gains little: with traces to be made at its end, and without, where a cache should hold it.
_ENOUGH, ENOUGH_WITHOUT_TRACES = 128, 64


@dataclasses.dataclass(frozen=True, eq=False)
class ChunkSizes:
    """What decides it, of one program.

    Attributes
    ----------
    program : ChunkProgram
    """

    program: ChunkProgram

    @property
    def bytes_of_a_step(self) -> int:
        """What each step of a chunk holds, about."""
        return self.program.first_pass.bytes_of_a_step

    @cached_property
    def pays_off(self) -> bool:
        """Whether steps take less time in chunks than alone."""
        return chunks_pay_off(self.program.causal)

    @property
    def stands_alone(self) -> bool:
        """Whether a sequence has traces, which start at zero and are given up at its end: one chunk needs none."""
        return self.program.has_traces and not self.program.causal.keeps

    def memory_alone(self, memory: int) -> int:
        """Bytes that a sequence may take that carries no traces: theirs as well."""
        return memory + self._bytes_of_traces

    def together(self, steps: int, memory: int) -> int:
        """Steps of a chunk, of a sequence of ``steps``, where chunks pay off."""
        possible = min(steps, memory // self.bytes_of_a_step)
        if self.stands_alone and steps * self.bytes_of_a_step <= self.memory_alone(memory):
            return steps
        enough = _ENOUGH if self.program.has_traces else ENOUGH_WITHOUT_TRACES
        return evenly(steps, max(1, min(possible, enough)))

    @property
    def _bytes_of_traces(self) -> int:
        """What is carried from chunk to chunk, and once more while it is made at the end of one."""
        carried = jax.tree.leaves(jax.eval_shape(self.program.causal.carried.zeros))
        return 2 * sum(v.size * v.dtype.itemsize for v in carried)


def evenly(steps: int, most: int) -> int:
    """A part of ``steps`` of about ``most`` of them, without a rest if there is one: a shorter last part is compiled again."""
    whole = next((c for c in range(most, most // 2, -1) if steps % c == 0), None)
    return whole or -(-steps // -(-steps // most))
