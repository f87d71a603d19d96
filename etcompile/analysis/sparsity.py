"""Structural sparsity: which elements can depend on which, whatever the values.

For every variable a table of bits says on which *sources* each of its elements depends, with a derivative. Zeros that
are known when the model is compiled count: a constant mask on a weight, fixed indices of a sparse connection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from etcompile.analysis.analysis import Analysis
from etcompile.analysis.index_rules import ELEMENTWISE, MANY
from etcompile.analysis.influence import through_operation
from etcompile.frontend.jaxpr import Constant, Graph, Operand, Operation, bind

__all__ = ["dependence_table", "weight_patterns"]

Array = Any

#: Element-wise operations that take zero to zero.
_KEEP_ZERO = frozenset(
    """neg abs sign sin tan tanh asin atan sinh asinh atanh sqrt cbrt square expm1 log1p floor ceil round erf convert_element_type
    copy copy_p real imag conj reduce_precision integer_pow stop_gradient device_put name""".split()  # noqa: SIM905
)
_SUMS = {"add", "sub", "add_any", "max", "min"}


def weight_patterns(analysis: Analysis) -> dict[int, Array]:
    """Per effective weight, the elements that can differ from zero."""
    hoisted = analysis.split.hoisted
    known: dict[int, Array] = {v: np.ones(hoisted.avals[v].shape, bool) for v in hoisted.inputs}
    for operation in hoisted.operations:
        for v, pattern in zip(operation.outputs, _nonzero(hoisted, operation, known), strict=True):
            known[v] = pattern
    return {v: known[v] for v in analysis.split.weights}


def _pattern_of(operand: Operand, known: Mapping[int, Array]) -> Array:
    if isinstance(operand, Constant):
        return np.asarray(operand.value) != 0
    return known[operand]


def _nonzero(graph: Graph, operation: Operation, known: Mapping[int, Array]) -> list[Array]:
    patterns = [_pattern_of(v, known) for v in operation.inputs]
    shapes = [graph.avals[v].shape for v in operation.outputs]
    name = operation.name
    if name == "mul":
        return [np.broadcast_to(patterns[0] & patterns[1], shapes[0])]
    if name == "div":
        return [np.broadcast_to(patterns[0], shapes[0])]
    if name in _SUMS:
        return [np.broadcast_to(patterns[0] | patterns[1], shapes[0])]
    if name in _KEEP_ZERO and len(patterns) == 1:
        return [patterns[0]]
    if name == "select_n":
        found = patterns[1]
        for p in patterns[2:]:
            found = found | p
        return [np.broadcast_to(found, shapes[0])]
    if name not in ELEMENTWISE:
        linear = _applied(graph, operation, {k: p.astype(np.float32) for k, p in enumerate(patterns)})
        if linear is not None:
            return linear
    return [np.ones(shape, bool) for shape in shapes]


#: Operations with coefficients that are never negative: applied to tables of zeros and ones they show what depends on what.
_LINEAR = frozenset(
    """reshape squeeze transpose rev slice broadcast_in_dim concatenate split stack unstack tile reduce_sum pad gather
    dynamic_slice scatter-add reduce_window_sum dot_general conv_general_dilated cumsum""".split()  # noqa: SIM905
)


def _applied(
    graph: Graph, operation: Operation, values: Mapping[int, Array], batched: int | None = None
) -> list[Array] | None:
    """A linear operation applied to nonnegative values of its floating operands; None where that cannot show a pattern.

    Operand number ``batched`` has one more axis in front, and so have the results.
    """
    if operation.name not in _LINEAR:
        return None
    args = []
    for k, v in enumerate(operation.inputs):
        aval = graph.aval(v)
        if isinstance(v, Constant) and not aval.differentiable:
            args.append(v.value)
        elif aval.differentiable and k in values:
            args.append(values[k].astype(aval.dtype))  # a scatter holds its dtype in a parameter
        else:
            return None  # indices that depend on data

    def run(moved: Array | None) -> list[Array]:
        return bind(operation, [moved if k == batched else a for k, a in enumerate(args)])

    with jax.ensure_compile_time_eval():
        results = run(None) if batched is None else jax.vmap(run)(args[batched])
        return [np.abs(np.asarray(r)) > 0 for r in results]


def dependence_table(
    analysis: Analysis,
    sources: Mapping[int, Array],
    targets: Sequence[int],
    blocked: frozenset[int],
    examples: int | None,
) -> dict[int, Array]:
    """On which sources each element of the target variables depends.

    Parameters
    ----------
    analysis : Analysis
    sources : mapping of variable to bool array [*shape, number of sources]
    targets : sequence of variables
    blocked : set of variables that depend on nothing, whatever they are made of
    examples : int or None
        Size of the example axis, which no operation mixes.

    Returns
    -------
    dict of variable to bool array [*shape, number of sources]
    """
    body = analysis.split.body
    weights = weight_patterns(analysis)
    frozen = analysis.split.frozen
    count = next(iter(sources.values())).shape[-1]
    tables: dict[int, Array] = dict(sources)
    for number, operation in enumerate(body.operations):
        if operation.name == "stop_gradient":
            continue
        moving = [
            k
            for k, v in enumerate(operation.inputs)
            if not isinstance(v, Constant) and v in tables and (number, k) not in frozen
        ]
        if not moving:
            continue
        for place, v in enumerate(operation.outputs):
            if v in blocked or not body.avals[v].differentiable:
                continue
            total = np.zeros((*body.avals[v].shape, count), bool)
            for k in moving:
                operand = operation.inputs[k]
                assert isinstance(operand, int)
                total |= _through(analysis, operation, k, tables[operand], place, weights, examples)
            tables[v] = total if v not in tables else tables[v] | total
    return {v: tables.get(v, np.zeros((*body.avals[v].shape, count), bool)) for v in targets}


def _through(
    analysis: Analysis,
    operation: Operation,
    k: int,
    table: Array,
    place: int,
    weights: Mapping[int, Array],
    examples: int | None,
) -> Array:
    """The table of one result through one operand."""
    body = analysis.split.body
    aval = body.avals[operation.outputs[place]]
    count = table.shape[-1]
    shape = table.shape[:-1]
    if operation.name in _LINEAR:
        others: dict[int, Array] = {}
        product = operation.name in ("dot_general", "conv_general_dilated")
        for j, v in enumerate(operation.inputs):
            if j == k or not body.aval(v).differentiable:
                continue
            if not product:
                others[j] = np.zeros(body.aval(v).shape, np.float32)
            elif isinstance(v, Constant):
                others[j] = (np.asarray(v.value) != 0).astype(np.float32)
            else:
                others[j] = weights.get(v, np.ones(body.aval(v).shape, bool)).astype(np.float32)
        moved = np.moveaxis(table, -1, 0).astype(np.float32)
        applied = _applied(body, operation, {**others, k: moved}, batched=k)
        if applied is not None:
            return np.moveaxis(applied[place], 0, -1)
    results: list[Array | None] = [None] * len(operation.outputs)
    results[place] = np.arange(aval.size).reshape(aval.shape)
    found = through_operation(body, operation, k, results)
    if found is None:
        return np.zeros((*aval.shape, count), bool)
    flat, table = found.ravel(), table.reshape(found.size, count)
    result = np.zeros((aval.size, count), bool)
    single = flat >= 0
    if single.any():
        np.logical_or.at(result, flat[single], table[single])
    spread = flat == MANY
    if spread.any():
        result |= _of_many(table, spread, shape, aval.shape, examples).reshape(aval.size, count)
    return result.reshape(*aval.shape, count)


def _of_many(
    table: Array, spread: Array, shape: tuple[int, ...], to: tuple[int, ...], examples: int | None
) -> Array:
    """Elements that reach several others are taken to reach all of their example."""
    count = table.shape[-1]
    chosen = np.where(spread[:, None], table, False).reshape(*shape, count)
    if examples is not None and shape[:1] == to[:1] == (examples,):
        per_row = chosen.any(axis=tuple(range(1, len(shape))))
        return np.broadcast_to(per_row.reshape(shape[0], *(1,) * (len(to) - 1), count), (*to, count))
    return np.broadcast_to(chosen.any(axis=tuple(range(len(shape)))), (*to, count))
