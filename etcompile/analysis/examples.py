"""The example axis: whether a step treats the leading axis of everything as a batch of independent examples.

Rules that project an error per example, or keep a factor per example, need to know. It is found, not declared: the leading
index of every result is followed backwards, and it is an example axis where no element reaches two of them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from etcompile.analysis.analysis import Analysis
from etcompile.analysis.index_rules import MANY, NONE, collapse, join
from etcompile.analysis.influence import through_operation
from etcompile.frontend.jaxpr import Constant, Operation

__all__ = ["Examples", "find_examples", "leading_is_examples"]

#: Operations along one axis that leave the others alone: the names of the parameter that holds the axis.
_ALONG = {
    "cumsum": "axis",
    "cumprod": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumlogsumexp": "axis",
    "sort": "dimension",
}


@dataclasses.dataclass(frozen=True)
class Examples:
    """The example axis of a step.

    Attributes
    ----------
    size : int or None
        None where the step is one example.
    along : frozenset of int
        Variables whose leading axis it is.
    """

    size: int | None
    along: frozenset[int] = frozenset()


def find_examples(analysis: Analysis) -> Examples:
    """The leading axis shared by hidden states, inputs and outputs, if it is a batch."""
    model, body = analysis.model, analysis.model.graph
    hidden = [s for g in analysis.groups for s in g.states]
    outputs = [v for v in model.output_vars if not isinstance(v, Constant) and body.avals[v].differentiable]
    inputs = [v for v, leaf in zip(model.input_vars, model.given, strict=False) if leaf.aval.differentiable]
    carried = [model.state_vars[s] for s in hidden]
    shapes = [body.avals[v].shape for v in (*carried, *outputs, *inputs)]
    if not shapes or any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        return Examples(None)
    size = shapes[0][0]
    labels: dict[int, np.ndarray] = {}
    for v in (*outputs, *[model.new_state_vars[s] for s in hidden]):
        labels[v] = _leading(body.avals[v].shape)
    _follow(analysis, labels)
    for v in (*carried, *inputs):
        found = labels.get(v)
        if found is not None and ((found != NONE) & (found != _leading(found.shape))).any():
            return Examples(None)
    if size > 1 and any(_one_each(labels.get(w)) for w in model.param_vars):
        return Examples(None)
    along = {
        v
        for v, found in labels.items()
        if found.ndim
        and found.shape[0] == size
        and not ((found != NONE) & (found != _leading(found.shape))).any()
    }
    return Examples(size, frozenset(along))


def leading_is_examples(analysis: Analysis, size: int) -> frozenset[int]:
    """Variables whose leading axis numbers examples, ``size`` of them, where not everything has that axis.

    Asked of floating-point states and inputs: each index reaches the same index of results alone.
    """
    model, body = analysis.model, analysis.model.graph
    outputs = [v for v in model.output_vars if not isinstance(v, Constant)]
    states = dict(zip(model.state_vars, model.new_state_vars, strict=True))
    seeds = {v for v in (*outputs, *states.values()) if body.avals[v].differentiable}
    while True:
        labels = {v: _leading(body.avals[v].shape) for v in seeds if body.avals[v].shape[:1] == (size,)}
        _follow(analysis, labels)
        found = {
            v
            for v in (*model.state_vars, *model.input_vars)
            if v in labels
            and body.avals[v].shape[:1] == (size,)
            and (labels[v] == _leading(labels[v].shape)).all()
        }
        others = {new for old, new in states.items() if old not in found} & seeds
        if not others:
            return frozenset(found)
        seeds -= others  # what is no batch of examples says nothing of what it is made of


def _follow(analysis: Analysis, labels: dict[int, np.ndarray]) -> None:
    """Take labels of results back to everything they are made of."""
    body = analysis.model.graph
    for operation in reversed(body.operations):
        results = [labels.get(v) for v in operation.outputs]
        if all(r is None for r in results):
            continue
        for k, v in enumerate(operation.inputs):
            if isinstance(v, Constant) or not body.avals[v].differentiable:
                continue
            found = _label(analysis, operation, k, results)
            if found is not None:
                labels[v] = found if v not in labels else join(labels[v], found)


def _leading(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.arange(shape[0]).reshape(-1, *(1,) * (len(shape) - 1)), shape)


def _one_each(labels: np.ndarray | None) -> bool:
    """Whether a weight has elements for one leading index each: then the axis numbers units, not examples."""
    if labels is None:
        return False
    distinct = labels[tuple(slice(0, 1) if step == 0 else slice(None) for step in labels.strides)]
    return bool((distinct >= 0).any())  # of a label repeated over a large weight one is enough


def _label(
    analysis: Analysis, operation: Operation, operand: int, results: list[np.ndarray | None]
) -> np.ndarray | None:
    body = analysis.model.graph
    aval = body.aval(operation.inputs[operand])
    if operation.name == "conv_general_dilated" and results[0] is not None:
        lhs, _, out = operation.params["dimension_numbers"]
        if operand == 1 or operation.params["batch_group_count"] != 1:
            return np.full(aval.shape, NONE if operand == 1 else MANY, np.int64)
        per_example = collapse(results[0], [a for a in range(results[0].ndim) if a != out[0]])
        return np.broadcast_to(
            per_example.reshape([-1 if a == lhs[0] else 1 for a in range(len(aval.shape))]), aval.shape
        )
    if operation.name in _ALONG and operation.params[_ALONG[operation.name]] != 0:
        known = [r for r in results if r is not None]
        return known[0] if len(known) == 1 else None
    return through_operation(body, operation, operand, results)
