"""The traces of a chunk, class by class: a recurrence over the chunk's values, and the relations that it answers for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from etcompile.ir.ops import OPS
from etcompile.lowering.causal import Traces
from etcompile.lowering.evaluate import Context, evaluate
from etcompile.lowering.schedules.chunk_program import ChunkProgram
from etcompile.lowering.schedules.first_pass import Passed
from etcompile.lowering.schedules.recurrence import (
    Again,
    Answers,
    Recurrence,
    Rows,
    TraceClass,
    referred,
    value_key,
)
from etcompile.lowering.schedules.relation_traces import RelationTraces

__all__ = ["ClassTraces", "class_traces", "rows_at_start"]

Array = Any
Value = Any


@dataclasses.dataclass(frozen=True, eq=False)
class ClassTraces:
    """One class over one chunk.

    Attributes
    ----------
    answers : Answers
    relations : tuple of RelationTraces
    """

    answers: Answers
    relations: tuple[RelationTraces, ...]


def class_traces(
    program: ChunkProgram,
    weights: list[Array],
    passed: Passed,
    inputs: list[Array],
    values: dict[str, Value],
    traces: Traces,
    weight: dict[str, Any] | None,
    later: Sequence[dict[str, Rows]] | None = None,
    *,
    ends: bool = True,
) -> list[ClassTraces]:
    """The traces over a chunk with these values; of the carried ones shapes are enough.

    ``weight`` is what each contraction counts in the gradients, None where none are asked for; ``later`` what steps after these
    ask of the traces of each class; ``ends`` tells whether the traces at the end are asked for.
    """
    again, classes = _again(program, weights, passed, inputs), program.equations.classes
    found = []
    for one, asks in zip(classes, later or [None] * len(classes), strict=True):
        recurrence = _recurrence(program, one, again(one), values, traces)
        answers = recurrence.backwards(weight, asks, ends=ends)
        found.append(ClassTraces(answers, tuple(_relations(program, one))))
    return found


def rows_at_start(program: ChunkProgram, one: TraceClass, traces: Traces) -> dict[str, Rows]:
    """Shapes of the class's carried traces over the group's positions; each has the rows that any of its relations has."""
    shape = program.causal.model.analysis.group(one.group).shape
    carried = [(k, e.name) for k, e in enumerate(one.first) if e.name in program.carried]
    return {
        name: _rows([traces[equations[k].name] for equations in one.traces.values()], shape)
        for k, name in carried
    }


def _again(
    program: ChunkProgram, weights: list[Array], passed: Passed, inputs: list[Array]
) -> Callable[[TraceClass], Again | None]:
    """Of a class its transitions, where they are not written down."""
    causal = program.causal

    def make(given: Any) -> dict[str, Value]:
        old, costly, x = given
        step = causal.model.one_of_many(weights, old, x, costly)
        context = Context(causal.program, causal.model, step, None, causal.functions)
        return evaluate(context, program.made_again, {}, {})

    again = Again((passed.before, passed.costly, inputs), make)
    return lambda one: again if one.group in causal.model.unwritten else None


def _recurrence(
    program: ChunkProgram, one: TraceClass, again: Again | None, values: dict[str, Value], traces: Traces
) -> Recurrence:
    """The class's traces over this chunk; its first relation lends the names, and has every row that any has."""
    shape = program.causal.model.analysis.group(one.group).shape
    injected: dict[str, list[Value]] = {}
    for k, e in enumerate(one.first):
        if OPS[e.op].injects:
            f = [values[value_key(referred(of[k].args[0]))] for of in one.traces.values()]
            injected.setdefault(one.joined[e.name], []).extend(f)
    additions: dict[str, Any] = {}
    for name, f in injected.items():
        steps = next((r.shape[0] for of_relation in f for r in of_relation or () if r is not None), 0)
        additions[name] = _rows(f, (steps, *shape))  # no row where f is zero for every input
    return Recurrence(program.context, one, values, additions, rows_at_start(program, one, traces), again)


def _relations(program: ChunkProgram, one: TraceClass) -> list[RelationTraces]:
    lent = [one.joined.get(first.name, first.name) for first in one.first]
    return [
        RelationTraces(program.causal.model.traces[relation], list(zip(equations, lent, strict=True)))
        for relation, equations in one.traces.items()
    ]


def _rows(of: list[Value], shape: tuple[int, ...]) -> Rows:
    """Shapes of the rows that any of some values has."""
    found = []
    for row in zip(*[v for v in of if v is not None], strict=True):
        dtypes = [r.dtype for r in row if r is not None]
        # Transitions and signals are real: a complex y makes no answer complex.
        dtype = jnp.finfo(jnp.result_type(*dtypes)).dtype if dtypes else None
        found.append(jax.ShapeDtypeStruct(shape, dtype) if dtypes else None)
    return tuple(found)
