"""Where parameters meet data: the split of a step into hoisted parameter expressions and a body, and the sites between.

The largest expressions of parameters and constants alone (``|W| * mask``, ``W1 + W2``, a broadcast bias) do not change
within a sequence. They form the *hoisted* graph; its results, the effective weights, enter the body at *sites*.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import cached_property

from jax import lax

from etcompile.analysis.dependence import Dependence
from etcompile.analysis.influence import spreads
from etcompile.analysis.loops import everywhere
from etcompile.errors import ModelError
from etcompile.frontend.jaxpr import Constant, Graph, Operand, Operation, needed_operations, short_dtype
from etcompile.frontend.loops import Use
from etcompile.frontend.step_model import StepModel
from etcompile.ir import header as ir
from etcompile.sites.direct import Direct
from etcompile.sites.operation import WeightOperation, WeightUse
from etcompile.sites.table import check_axes, recognised

__all__ = ["Site", "SplitStep", "refuse_parameters_in_while", "split_step", "weight_operation_at"]


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One place where an effective weight meets data.

    Attributes
    ----------
    record : etcompile.ir.header.Site
        What programs say of it.
    does : WeightOperation
        What the weight does there.
    weight : int
        Variable of the effective weight.
    operation, operand : int
        Number of the operation in the body and of the weight among its operands (-1 where the weight itself is y).
    y : int
        Variable of the result (or the weight).
    """

    record: ir.Site
    does: WeightOperation
    weight: int
    operation: int
    operand: int
    y: int

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def params(self) -> tuple[str, ...]:
        """Paths of the raw parameters in the weight."""
        return self.record.params


@dataclasses.dataclass(frozen=True, eq=False)
class SplitStep:
    """A step split into hoisted parameter expressions (``params -> weights``) and the body."""

    hoisted: Graph
    body: Graph
    weights: tuple[int, ...]
    sites: tuple[Site, ...]

    @cached_property
    def frozen(self) -> frozenset[Use]:
        """Uses of weights that are sites: local derivatives pass them by."""
        return frozenset((s.operation, s.operand) for s in self.sites if s.operation >= 0)


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
    # What is called for its effects alone belongs to the step.
    needed = needed_operations(hoisted, weights)
    hoisted_graph = Graph(graph.avals, model.param_vars, needed, weights)
    body_graph = Graph(
        graph.avals, (*weights, *model.state_vars, *model.input_vars), tuple(body), graph.outputs
    )
    return SplitStep(hoisted_graph, body_graph, weights, _find_sites(model, body_graph, weights, dep))


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
                if not weight_operation_at(graph, operation, k).traced:
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
    whole: set[int] = set()

    def add(
        kind: type[WeightOperation], weight: int, number: int, operand: int, source: str, primitive: str
    ) -> None:
        params = tuple(
            leaf.path for bit, leaf in enumerate(model.params) if dep.derivative[weight] >> bit & 1
        )
        if kind.weight_is_y:
            if weight in whole:
                return
            whole.add(weight)
            number, operand, y = -1, -1, weight
            does = kind(params, body.avals[weight], body.avals[y])
        else:
            operation = body.operations[number]
            y = operation.outputs[0]
            does = check_axes(kind.at(_use(body, operation, operand), params))
        record = ir.Site(
            f"s{len(sites)}", kind.name, params, primitive, source, does.weight.shape, does.y.shape,
            short_dtype(does.y.dtype), does.contracted if kind.traced else None, tuple(a.shape for a in does.others),
        )  # fmt: skip
        sites.append(Site(record, does, weight, number, operand, y))

    uses = [
        (v, number, k, weight_operation_at(body, operation, k))
        for number, operation in enumerate(body.operations)
        for k, v in enumerate(operation.inputs)
        if not isinstance(v, Constant) and v in trained
    ]
    often = Counter(v for v, _, _, kind in uses if kind.traced and kind.by_element)
    for v, number, k, kind in uses:
        operation = body.operations[number]
        if kind.traced and kind.by_element and often[v] > 1:
            kind = Direct  # one trace for all of them
        add(kind, v, number, k, operation.source, operation.name)
    for v in body.outputs:
        if not isinstance(v, Constant) and v in trained:
            add(Direct, v, -1, -1, "?", "output")
    return tuple(sites)


def weight_operation_at(graph: Graph, operation: Operation, operand: int) -> type[WeightOperation]:
    """What a weight does as an operand of an operation."""
    return recognised(_use(graph, operation, operand))


def _use(graph: Graph, operation: Operation, operand: int) -> WeightUse:
    return WeightUse(graph, operation, operand, _spreads)


def _spreads(graph: Graph, operation: Operation, operand: int) -> bool:
    """Whether a weight reaches several elements of a result; in a loop what does was taken out of it, or is cut there."""
    return operation.loop is None and spreads(graph, operation, operand)
