"""Chunks in which sparse products are summed by events: work in proportion to what is sent.

A chunk needs a synapse's weight where its sender sends, its gradient and trace for the same events, and all synapses once: for
what the trace from before the chunk adds to the gradient, and for what is left of it at the end. With c_t what its gradients ask
of the sums at the receivers and r_t how much of an addition is left at the end (:mod:`etcompile.lowering.schedules.chunked`),

    grad[s] = sum_t c_t[recv(s)] x_t[send(s)] + ...,    e_C[s] = r_0[recv(s)] e_0[s] + sum_t (r_t f_t)[recv(s)] x_t[send(s)]

so that the sums run over events alone, whatever D is. All of it is :class:`Chunked` on a model whose sparse products are sites
as a whole (:mod:`etcompile.lowering.by_receivers`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any

from etcompile.errors import EtcompileError, UnsupportedError
from etcompile.ir.kinds import KINDS
from etcompile.lowering.by_receivers import ByReceivers, by_receivers
from etcompile.lowering.causal import Traces
from etcompile.lowering.schedules.base import Found, Loop, Run, SequenceSchedule, Steps
from etcompile.lowering.schedules.chunked import Chunked
from etcompile.schedule import Schedule

__all__ = ["ByEvents"]

Array = Any


class ByEvents(SequenceSchedule):
    """Chunks of sparse products by events, where ``Schedule(events=...)`` asks for them."""

    name = "events"

    @cached_property
    def _made(self) -> Chunked | EtcompileError:
        share = self.causal.schedule.events
        if share is None:
            return UnsupportedError(
                "how='events' needs to know how much is sent.",
                got="schedule=etcompile.Schedule(how='events')",
                expected="Schedule(events=0.05): at most 5 % of the synapses in one step",
            )
        if self.causal.program.window is not None:
            return _refused(self.causal.program.name, "it runs in windows")
        model = by_receivers(self.causal.model, share)
        if isinstance(model, EtcompileError):
            return model
        for name in self.causal.program.carried:
            made = self.causal.program.equation(name).type
            kind = KINDS[made.kind]
            if kind.owner == "site" and made.of in model.summed and not (kind.filtered or kind.as_array):
                return _refused(
                    self.causal.program.name, f"it carries a value of kind {kind.name} for each synapse"
                )
        chunked = Chunked(self.causal.on(model))
        return chunked.refusal() or chunked

    @property
    def _chunked(self) -> Chunked:
        assert isinstance(self._made, Chunked), "chosen only where it does not refuse"
        return self._made

    @property
    def _model(self) -> ByReceivers:
        model = self._chunked.causal.model
        assert isinstance(model, ByReceivers)
        return model

    def refusal(self) -> EtcompileError | None:
        return None if isinstance(self._made, Chunked) else self._made

    @property
    def shares(self) -> dict[str, float]:
        """Of each site that runs by events the part of its synapses that a step may take."""
        return {} if self.refusal() else dict.fromkeys(self._model.summed, self.causal.schedule.events or 0.0)

    def size(self, schedule: Schedule, steps: int, wanted: int | str | None) -> int:
        """As many as chunks would have, but that one step may be a chunk; 0 where nothing is asked of events."""
        if self.causal.schedule.events is None and self.causal.schedule.how != self.name:
            return 0
        wanted = schedule.chunk if wanted is None else wanted
        if wanted == 1 or self.refusal() is not None:
            return 0 if wanted == 1 else 1
        return self._chunked.size(dataclasses.replace(schedule, chunk=wanted), steps, None) or 1

    @property
    def bytes_of_a_step(self) -> int:
        return self._chunked.bytes_of_a_step

    def part(self, run: Run, loop: Loop, steps: Steps) -> tuple[Loop, Found]:
        inner = dataclasses.replace(run, causal=self._chunked.causal)
        end, found = self._chunked.part(inner, self._at_receivers(loop), steps)
        return self._at_synapses(end), found

    def over(self, run: Run, loop: Loop, steps: Steps, size: int) -> tuple[Loop, Found]:
        inner = dataclasses.replace(run, causal=self._chunked.causal)
        end, found = self._chunked.over(inner, self._at_receivers(loop), steps, size)
        return self._at_synapses(end), found

    def forward_size(self, schedule: Schedule, steps: int) -> int:
        return self.size(schedule, steps, None)

    def forward(self, weights: list[Array], loop: Loop, inputs: list[Array]) -> tuple[Loop, list[Array]]:
        end, outputs = self._chunked.forward(weights, self._at_receivers(loop), inputs)
        return self._at_synapses(end), outputs

    # -- what is carried of each synapse, and is the same for all of a receiver -------------------------------------

    def _at_receivers(self, loop: Loop) -> Loop:
        """Filtered f as one number for each receiver."""
        return self._moved(loop, lambda does, row: does.one_of_each(row))

    def _at_synapses(self, loop: Loop) -> Loop:
        """Filtered f as one number for each synapse."""
        return self._moved(loop, lambda does, row: does.at_synapses(row))

    def _moved(self, loop: Loop, move: Callable[[Any, Array], Array]) -> Loop:
        traces: Traces = dict(loop.traces)
        for name, value in loop.traces.items():
            made = self.causal.program.equation(name).type
            kind = KINDS[made.kind]
            if value is None or kind.owner != "relation" or kind.trace:
                continue
            does = self._model.summed.get(self._model.traces[made.of].relation.site)
            if does is not None:
                traces[name] = tuple(None if row is None else move(does, row) for row in value)
        return dataclasses.replace(loop, traces=traces)


def _refused(program: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{program} cannot run by events: {reason}.",
        got="schedule=etcompile.Schedule(events=...)",
        expected="a rule whose sequences run in chunks",
        hint="leave events out.",
    )
