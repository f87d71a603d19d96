"""What a compiled function takes, as numbers: the result of :meth:`etcompile.Step.cost`."""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

from etcompile.amounts import bytes_text, count_text
from etcompile.cost.graph import Graph, flatten
from etcompile.cost.invariant import made_before_loops
from etcompile.cost.totals import totals
from etcompile.shown import html_of

__all__ = ["Cost", "Measured", "measured", "priced"]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a compiled step takes, from shapes alone.

    Attributes
    ----------
    trace_bytes : int
        Bytes of the traces, which go from step to step.
    peak_bytes : int
        Most bytes in use at one time: parameters, states, traces, inputs, targets, losses, gradients, and what is
        temporary between them.
    flops : float
        Additions, multiplications and their like, per step; a multiplication with an addition is two.
    transcendentals : float
        ``exp``, ``tanh`` and their like, per step, in numbers computed.
    bytes_moved : float
        Bytes read from and written to memory, per step.
    steps : int or None
        Steps of the sequence that was looked at; None for one call of ``value_and_grad``.
    chunk : int
        Steps handled together; of windows their length.
    batch : int or None
        Examples; None where the model has no batch axis.

    Examples
    --------
    >>> import etcompile
    >>> print(etcompile.Cost(2048, 10_000_000, 4e6, 512.0, 3e7, steps=100, chunk=1, batch=8))
    cost of 100 steps in chunks of 1, batch 8
      traces          2.0 KiB
      peak            9.5 MiB
      per step        4.00 Mflop, 512 transcendentals
      moved per step  28.6 MiB
    """

    trace_bytes: int
    peak_bytes: int
    flops: float
    transcendentals: float
    bytes_moved: float
    steps: int | None
    chunk: int
    batch: int | None

    def __str__(self) -> str:
        what = "one step" if self.steps is None else f"{self.steps} steps in chunks of {self.chunk}"
        batch = "" if self.batch is None else f", batch {self.batch}"
        return "\n".join((
            f"cost of {what}{batch}",
            f"  traces          {bytes_text(self.trace_bytes)}",
            f"  peak            {bytes_text(self.peak_bytes)}",
            f"  per step        {count_text(self.flops)}flop, {count_text(self.transcendentals).strip()} transcendentals",
            f"  moved per step  {bytes_text(self.bytes_moved)}",
        ))  # fmt: skip

    def _repr_html_(self) -> str:
        return html_of(self)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A function as a graph, and which inputs it may overwrite with which results."""

    graph: Graph
    given: dict[int, int]
    trace_bytes: int


def measured(closed: Any, donated: Sequence[int]) -> Measured:
    """Take the numbers from a closed jaxpr whose inputs ``donated`` are its caller's to give away: the traces."""
    leaves = [v.aval for v in closed.jaxpr.invars]
    waiting: dict[Any, deque[int]] = defaultdict(deque)
    for k in donated:
        waiting[leaves[k].shape, leaves[k].dtype].append(k)
    given = {}
    for target, v in enumerate(closed.jaxpr.outvars):  # as jax pairs them: by shape and dtype, in order
        found = waiting.get((v.aval.shape, v.aval.dtype))
        if found:
            given[found.popleft()] = target
    graph = made_before_loops(flatten(closed))
    return Measured(graph, given, sum(graph.sizes[graph.inputs[k]] for k in donated))


def priced(
    found: Measured, steps: int | None, chunk: int, batch: int | None, every_trip: bool = True
) -> Cost:
    """The cost of a function that handles ``steps`` steps.

    With ``every_trip=False`` the bodies of loops count once, as in XLA's own analysis (``compiled.cost_analysis()``): for
    comparisons with it.
    """
    graph = found.graph
    sums = totals(graph, found.given, every_trip)
    kept = set(found.given.values())
    around = sum(graph.sizes[v] for v in (*graph.inputs, *graph.constants))
    results = sum(graph.sizes[v] for k, v in enumerate(graph.outputs) if v is not None and k not in kept)
    each = steps or 1
    return Cost(
        trace_bytes=found.trace_bytes,
        peak_bytes=around + results + sums.temporary,
        flops=sums.flops / each,
        transcendentals=sums.transcendentals / each,
        bytes_moved=sums.bytes_moved / each,
        steps=steps,
        chunk=chunk,
        batch=batch,
    )
