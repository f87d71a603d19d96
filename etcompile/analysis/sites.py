"""Where parameters meet data: the split of a step into hoisted parameter expressions and a body, and the sites between.

The largest expressions of parameters and constants alone (``|W| * mask``, ``W1 + W2``, a broadcast bias) do not change
within a sequence. They form the *hoisted* graph; its results, the effective weights, enter the body at *sites*.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax import lax

from etcompile.analysis.dependence import Dependence
from etcompile.analysis.index_rules import MANY, operand_influence
from etcompile.analysis.influence import _inner
from etcompile.analysis.loops import everywhere
from etcompile.errors import ModelError
from etcompile.frontend.jaxpr import Aval, Constant, Graph, Operand, Operation
from etcompile.frontend.step_model import StepModel

__all__ = ["Site", "SplitStep", "refuse_parameters_in_while", "site_kind", "split_step"]


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One place where an effective weight meets data.

    Attributes
    ----------
    name : str
        ``s0``, ``s1``, ... in program order.
    kind : str
        ``dot_general``, ``conv``, ``embedding``: an operation whose result ``y`` is linear in the weight, with a trace of
        y's axes plus the contracted ones. ``direct``: every use is element-wise or only moves elements; the weight itself
        plays the part of y. ``generic``: another operation with one result. ``opaque``: one with several results; the weight,
        used there alone, plays the part of y, and has a one-step gradient only.
    weight : int
        Variable of the effective weight.
    operation, operand : int
        Number of the operation in the body and of the weight among its operands (-1 for ``direct`` and ``opaque``).
    y : int
        Variable of the result (for ``direct`` and ``opaque``, the weight).
    params : tuple of str
        Paths of the raw parameters in the weight.
    source : str
        ``file:line`` of the operation.
    primitive : str
    """

    name: str
    kind: str
    weight: int
    operation: int
    operand: int
    y: int
    params: tuple[str, ...]
    source: str
    primitive: str


@dataclasses.dataclass(frozen=True, eq=False)
class SplitStep:
    """A step split into hoisted parameter expressions (``params -> weights``) and the body."""

    hoisted: Graph
    body: Graph
    weights: tuple[int, ...]
    sites: tuple[Site, ...]


def split_step(model: StepModel, dep: Dependence) -> SplitStep:
    graph = model.graph
    params_mask = (1 << len(model.params)) - 1

    def parameter_only(operand: Operand) -> bool:
        return (
            not isinstance(operand, Constant)
            and bool(dep.value[operand])
            and not dep.value[operand] & ~params_mask
        )

    hoisted, body = [], []
    for operation in graph.operations:
        constant = not any(dep.value[v] for v in operation.outputs)
        if operation.outputs and (constant or all(parameter_only(v) for v in operation.outputs)):
            hoisted.append(operation)
        if constant or not all(parameter_only(v) for v in operation.outputs):
            body.append(operation)  # what depends on constants alone is computed wherever it is needed
    used = [v for operation in body for v in operation.inputs] + list(graph.outputs)
    weights = tuple(dict.fromkeys(v for v in used if not isinstance(v, Constant) and parameter_only(v)))
    hoisted_graph = Graph(graph.avals, model.param_vars, _needed(hoisted, weights), weights)
    body_graph = Graph(
        graph.avals, (*weights, *model.state_vars, *model.input_vars), tuple(body), graph.outputs
    )
    return SplitStep(hoisted_graph, body_graph, weights, _find_sites(model, body_graph, weights, dep))


def _needed(operations: list[Operation], results: Sequence[int]) -> tuple[Operation, ...]:
    """The operations that these results need: what is called for its effects alone belongs to the step."""
    needed, kept = set(results), []
    for operation in reversed(operations):
        if needed.intersection(operation.outputs):
            kept.append(operation)
            needed.update(v for v in operation.inputs if not isinstance(v, Constant))
    return tuple(reversed(kept))


def separate_opaque_uses(model: StepModel, dep: Dependence) -> StepModel:
    """Give each parameter expression at an operation with several results a copy of its own there.

    Its credit comes through all of the results, so it is read off the weight itself, apart from the weight's other uses.
    """
    graph = model.graph
    params_mask = (1 << len(model.params)) - 1
    avals, operations = list(graph.avals), []
    for operation in graph.operations:
        inputs = list(operation.inputs)
        live = [v for v in operation.outputs if graph.avals[v].differentiable]
        mixed = any(dep.value[v] & ~params_mask for v in operation.outputs)
        if mixed and (len(live) > 1 or (live and live[0] != operation.outputs[0])):
            for k, v in enumerate(operation.inputs):
                if isinstance(v, Constant) or not dep.derivative[v] or dep.value[v] & ~params_mask:
                    continue
                if site_kind(graph, operation, k) == "opaque":
                    number = len(avals)
                    inputs[k] = number
                    avals.append(graph.avals[v])
                    operations.append(Operation(lax.copy_p, {}, (v,), (number,), operation.source))
        operations.append(dataclasses.replace(operation, inputs=tuple(inputs)))
    if len(avals) == len(graph.avals):
        return model
    changed = Graph(tuple(avals), graph.inputs, tuple(operations), graph.outputs)
    return dataclasses.replace(model, graph=changed)


def refuse_parameters_in_while(model: StepModel, dep: Dependence) -> None:
    """A while loop has no reverse derivative, so a trained parameter in it could only get a wrong gradient."""
    params_mask = (1 << len(model.params)) - 1
    for graph, operation, there in everywhere(model.graph, dep):
        if operation.name == "while" and any(there.on(v, params_mask) for v in operation.inputs):
            names = [
                leaf.path
                for bit, leaf in enumerate(model.params)
                if any(there.on(v, 1 << bit) for v in operation.inputs)
            ]
            made = next((v for v in operation.inputs if there.on(v, params_mask)), None)
            (by,) = [o.source for o in graph.operations if made in o.outputs] or [None]
            how = "is used inside" if by is None else f"reaches, by the value computed at {by},"
            raise ModelError(
                f"a trained parameter ({', '.join(names)}) {how} a while loop.",
                where=operation.source,
                got="while_loop, which has no reverse derivative",
                expected="a loop of fixed length: lax.scan, lax.fori_loop with constant bounds, brainstate.transform.for_loop",
                hint="give the loop a fixed number of rounds, or move the parameter out of it.",
            )


def _find_sites(model: StepModel, body: Graph, weights: tuple[int, ...], dep: Dependence) -> tuple[Site, ...]:
    trained = {w for w in weights if dep.derivative[w]}
    sites: list[Site] = []
    direct: dict[int, int] = {}

    def raw(weight: int) -> tuple[str, ...]:
        return tuple(leaf.path for bit, leaf in enumerate(model.params) if dep.derivative[weight] >> bit & 1)

    def add(kind: str, weight: int, number: int, operand: int, y: int, source: str, primitive: str) -> None:
        sites.append(Site(f"s{len(sites)}", kind, weight, number, operand, y, raw(weight), source, primitive))

    for number, operation in enumerate(body.operations):
        for k, v in enumerate(operation.inputs):
            if isinstance(v, Constant) or v not in trained:
                continue
            kind = site_kind(body, operation, k)
            if kind == "opaque":
                add(kind, v, -1, -1, v, operation.source, operation.name)
            elif kind != "direct":
                add(kind, v, number, k, operation.outputs[0], operation.source, operation.name)
            elif v not in direct:
                direct[v] = len(sites)
                add("direct", v, -1, -1, v, operation.source, operation.name)
    for v in body.outputs:
        if not isinstance(v, Constant) and v in trained and v not in direct:
            direct[v] = len(sites)
            add("direct", v, -1, -1, v, "?", "output")
    return tuple(sites)


def site_kind(body: Graph, operation: Operation, operand: int) -> str:
    """What kind of site a weight makes as an operand of an operation: see :class:`Site`."""
    if operation.name == "dot_general":
        return "dot_general"
    if (
        operation.name == "conv_general_dilated"
        and operand == 1
        and operation.params["batch_group_count"] == 1
    ):
        return "conv"
    if (
        operation.name == "gather"
        and operand == 0
        and is_embedding(operation, body.aval(operation.inputs[0]))
    ):
        return "embedding"
    if operation.loop is not None:
        return "direct"  # what spreads in a loop was taken out of it, or is cut there
    results = [np.arange(body.avals[v].size).reshape(body.avals[v].shape) for v in operation.outputs]
    found = operand_influence(body, operation, operand, list(results), _inner)
    if found is None or not (found == MANY).any():
        return "direct"
    differentiable = [v for v in operation.outputs if body.avals[v].differentiable]
    return "generic" if len(differentiable) == 1 and differentiable[0] == operation.outputs[0] else "opaque"


def is_embedding(operation: Operation, table: Aval) -> bool:
    """Whether a gather takes whole rows along the first axis."""
    d = operation.params["dimension_numbers"]
    return (
        tuple(d.collapsed_slice_dims) == (0,)
        and tuple(d.start_index_map) == (0,)
        and not d.operand_batching_dims
        and tuple(operation.params["slice_sizes"]) == (1, *table.shape[1:])
    )
