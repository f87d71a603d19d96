"""Traces updated in place: each row after the last reader of its old values.

XLA updates an array of a loop in place where it can prove that all who read the old values are done, and copies it at every step
where it cannot. The old values of a trace row are read

* by contractions with the learning signal of this step: these go first;
* by the updates of rows that D couples to it: row k reads row j where D[k, j] is not zero. So rows go in an order in which
  readers come before what they read. Where rows read each other in a circle one of them is copied: each of the new ones needs
  all old ones;
* by whoever reads the new values, since XLA computes them again for each reader: so they are computed once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from etcompile.ir.kinds import KINDS
from etcompile.ir.ops import OPS
from etcompile.ir.program import Equation
from etcompile.lowering.deferred import DeferredTrace
from etcompile.lowering.evaluate import Context, evaluate
from etcompile.lowering.in_place import Moment, computed_once, known_after, large_ones, spread_once
from etcompile.lowering.pushed import PushedTransition

__all__ = ["updated_in_order"]

Value = Any
Matrix = Sequence[Sequence[Value]]


def updated_in_order(
    context: Context, values: Mapping[str, Value], old: Mapping[str, Value]
) -> dict[str, Value]:
    """New traces, and the contractions that they wait for.

    ``values`` are those of this step known so far: all that is not made of this step's traces. ``old`` are those carried to
    it. Traces of rules that read them otherwise than by contractions are left out, and those that are written later.
    """
    found: dict[str, Value] = {}
    equations = context.program.equations
    traces_of: defaultdict[str, list[Equation]] = defaultdict(list)
    readers_of: defaultdict[str, set[int]] = defaultdict(set)
    for k, e in enumerate(equations):
        if KINDS[e.type.kind].trace:
            traces_of[e.type.of].append(e)
        for r in e.refs:
            readers_of[r.name].add(k)
    read_now = {r.name for e in equations for r in e.refs if not r.delay}
    for relation in context.program.header.relations:
        traces = traces_of[relation.name]
        names = {e.name for e in traces}
        numbers = sorted(set().union(*(readers_of[name] for name in names)))
        readers = [equations[k] for k in numbers if equations[k].name not in names]
        if (
            not large_ones([old.get(name) for name in names])
            or any(isinstance(old.get(name), DeferredTrace) for name in names)
            or not _row_by_row(traces, names, values)
            or not all(OPS[e.op].contracts for e in readers)
        ):
            continue
        done = {e.name: values[e.name] for e in readers if values.get(e.name) is not None}
        found.update(done)
        spans = map(context.model.traces[relation.name].of_span, done.values())
        found.update(_rows_in_order(context, traces, values, old, list(spans), read_now))
    return found


def _row_by_row(traces: Sequence[Equation], names: Collection[str], values: Mapping[str, Value]) -> bool:
    """Whether every row follows from its own values of this step and the old ones of any row."""
    return all(
        OPS[e.op].by_row
        and not any(isinstance(values.get(r.name), PushedTransition) for r in e.refs)
        and all(r.delay or r.name in names or r.name in values for r in e.refs)
        and not (OPS[e.op].couples and not e.refs[1].delay)
        for e in traces
    )


def _rows_in_order(
    context: Context,
    traces: Sequence[Equation],
    values: Mapping[str, Value],
    old: Mapping[str, Value],
    done: list[Value],
    read_now: Collection[str],
) -> dict[str, Value]:
    """The traces of one relation, where ``done`` is what must be known before; ``read_now`` are read in the step they are of."""
    added = {e.refs[0].name for e in traces if OPS[e.op].injects}
    decays = {e.refs[0].name for e in traces if OPS[e.op].couples}
    count = traces[0].type.shape[0]
    order = _readers_first(count, [values[name] for name in decays])
    rows: dict[str, list[Value]] = {e.name: [None] * count for e in traces}
    after = Moment(done)
    for place, k in enumerate(order):
        grows = any(values[name][k] is not None for name in added)
        now = {name: _only(values[name], k, after) for name in added}
        now.update({name: _only_line(values[name], k, Moment(()) if grows else after) for name in decays})
        reads = [values[d][k][j] for d in decays for j in order[place + 1 :]]
        waited_for = any(d is not None for d in reads) and not context.model.divided
        for e in traces:
            now.update(evaluate(context, [e], {**values, **now}, old))
            row, before = (v and v[k] for v in (now[e.name], old.get(e.name)))
            if row is not None and before is not None and (waited_for or e.name in read_now):
                row = computed_once(row, before)
                now[e.name] = tuple(row if j == k else v for j, v in enumerate(now[e.name]))
                done = [*done, row] if waited_for and row.ndim > 1 else done
            rows[e.name][k] = row
        after = Moment(done)
    return {name: tuple(found) for name, found in rows.items()}


def _readers_first(count: int, decays: Sequence[Matrix]) -> list[int]:
    """Rows in an order in which each comes before the others that it reads, unless they read each other in a circle."""

    def readers(j: int, of: Sequence[int]) -> int:
        return sum(k != j and any(decay[k][j] is not None for decay in decays) for k in of)

    order: list[int] = []
    left = list(range(count))
    while left:
        order.append(min(left, key=lambda j: readers(j, left)))
        left.remove(order[-1])
    return order


def _only(f: Sequence[Value], k: int, after: Moment) -> tuple[Value, ...]:
    """Row ``k`` of f alone, known after a moment."""
    return tuple(
        spread_once(known_after(v, after)) if j == k and v is not None else None for j, v in enumerate(f)
    )


def _only_line(decay: Matrix, k: int, after: Moment) -> tuple[tuple[Value, ...], ...]:
    """Row ``k`` of D alone, known after a moment."""
    line = tuple(None if v is None else spread_once(known_after(v, after)) for v in decay[k])
    return tuple(line if i == k else (None,) * len(line) for i in range(len(decay)))
