"""How many steps a chunk handles together: enough to make up for the work at its end, as far as memory allows."""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property

import jax
import jax.numpy as jnp

from etcompile.lowering.caches import shared_cache
from etcompile.lowering.schedules.chunk_program import ChunkProgram
from etcompile.lowering.schedules.traffic import chunks_pay_off
from etcompile.precision import accumulator

__all__ = ["ENOUGH_WITHOUT_TRACES", "ChunkSizes", "evenly"]

#: Steps after which a longer chunk gains little: with traces to be made at its end, and without, where a cache should hold it.
_ENOUGH, ENOUGH_WITHOUT_TRACES = 128, 64
#: How many shared caches a chunk may count and stay whole: not all of it is there at one time.
_FEW_CACHES = 2
#: Bytes of a run up to which the C library keeps what the last run gave back. More comes from the system, zeroed page by page.
_RECYCLED = 32 << 20
#: What a chunk takes at a time of what its steps hold: while traces are made at its end, beside these, and before.
_AT_ITS_END, _BEFORE = 0.2, 0.5
#: Steps below which a chunk is not cut short for that.
_FEW = 40
#: Of a block: its least steps, and its bytes for each of the gradients that it adds to.
_LEAST, _PER_GRADIENT = 16, 12


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
        if self.stands_alone and self.alone(steps) <= self.memory_alone(memory):
            return steps
        enough = min(_ENOUGH, self._recycled) if self.program.has_traces else ENOUGH_WITHOUT_TRACES
        return evenly(steps, max(1, min(possible, enough)))

    def block(self, steps: int) -> int:
        """Steps of a part of a chunk without traces that all but the first pass handles together; all where a cache holds them.

        Each block adds gradients of all weights to those of the others, which should take little beside the block's values. The
        loop of all credits (``ChunkProgram.pulled``) goes step by step, so it gains nothing.
        """
        if self.program.pulled is not None or steps * self.bytes_of_a_step <= self.of_few_caches:
            return steps
        enough = max(shared_cache() // 2, _PER_GRADIENT * self._bytes_of_gradients) // self.bytes_of_a_step
        return evenly(steps, min(steps, max(_LEAST, enough)))

    def alone(self, steps: int) -> int:
        """Bytes of a sequence as one chunk without traces, about: what the first pass leaves of all steps, and a block."""
        block = self.block(steps)
        left = (steps - block) * self.program.first_pass.bytes_left
        return left + block * self.bytes_of_a_step  # a block counts its own first pass

    @property
    def of_few_caches(self) -> int:
        """Bytes up to which a chunk without traces gains nothing by blocks."""
        return _FEW_CACHES * shared_cache()

    def with_traces(self, steps: int, memory: int) -> int:
        """Bytes of a sequence in chunks that carry traces, these included, about."""
        return self.together(steps, memory) * self.bytes_of_a_step + self._bytes_of_traces

    @cached_property
    def traces_are_quick(self) -> bool:
        """Whether traces at the end of chunks take less than a second first pass, counted in products with the weights."""
        program, causal = self.program, self.program.causal
        if program.pushes or causal.carried.too_large:
            return False
        filters = program.filters_of(program.shapes)
        kept = [v for name, v in program.shapes.items() if name not in filters]
        learning = {relation.site for relation in causal.model.analysis.relations}
        forwards = [causal.model.sites[site] for site in learning]
        again = sum(math.prod((*does.y.shape, *does.contracted)) for does in forwards)
        return sum(v.size for v in jax.tree.leaves(kept)) < again

    @cached_property
    def _recycled(self) -> int:
        """Steps of a chunk with traces whose memory is that of the last run, about; many where no chunk's is."""
        if jax.default_backend() != "cpu":
            return _ENOUGH
        left = max(0, _RECYCLED - self._bytes_of_traces // 2)
        steps = int(min(left / _AT_ITS_END, _RECYCLED / _BEFORE) / self.bytes_of_a_step)
        return steps if steps >= _FEW else _ENOUGH

    @cached_property
    def _bytes_of_gradients(self) -> int:
        weights = [site.weight for site in self.program.causal.model.sites.values()]
        return sum(w.size * jnp.dtype(accumulator(w.dtype)).itemsize for w in weights)

    @cached_property
    def _bytes_of_traces(self) -> int:
        """What is carried from chunk to chunk, and once more while it is made at the end of one."""
        carried = jax.tree.leaves(jax.eval_shape(self.program.causal.carried.zeros))
        return 2 * sum(v.size * v.dtype.itemsize for v in carried)


def evenly(steps: int, most: int) -> int:
    """A part of ``steps`` of about ``most`` of them, without a rest if there is one: a shorter last part is compiled again."""
    whole = next((c for c in range(most, most // 2, -1) if steps % c == 0), None)
    return whole or -(-steps // -(-steps // most))
