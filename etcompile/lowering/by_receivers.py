"""A model whose sparse products are sites as a whole: credits and derivatives are those of the sums at the receivers.

Of y[s] = w[s] x[send(s)] and out[r], the sum of those that end at r, all that reaches a state goes through ``out``. So f is the
same for all synapses of a receiver, and with f, L and one-step credits taken of ``out`` nothing has the size of the synapses but
weights, traces and gradients. Traces lie in memory as they do elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property, reduce
from operator import add
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.analysis.analysis import Analysis
from etcompile.analysis.examples import Examples
from etcompile.analysis.index_rules import MANY, NONE, operand_influence
from etcompile.analysis.relations import Relation
from etcompile.analysis.sites import Site
from etcompile.analysis.visible import Visible
from etcompile.errors import EtcompileError, UnsupportedError
from etcompile.frontend.jaxpr import Constant, Graph, GraphBuilder, Operation, bind
from etcompile.frontend.loops import Use
from etcompile.lowering.derivatives import LoweredModel
from etcompile.lowering.geometry import TraceGeometry
from etcompile.precision import accumulator
from etcompile.sites.events import Synapses
from etcompile.sites.gathered import Gathered, known_zero
from etcompile.sites.summed import Summed

__all__ = ["ByReceivers", "by_receivers"]

Array = Any
K = TypeVar("K")
V = TypeVar("V")

#: Operations that move elements, of which a sum may be made.
_MOVES = frozenset({"transpose", "reshape", "squeeze", "broadcast_in_dim", "rev"})


class ByReceivers(LoweredModel):
    """A lowering of which some sites are :class:`Summed`; :attr:`summed` are these by name."""

    def __init__(self, base: LoweredModel, analysis: Analysis, summed: Mapping[str, Summed]) -> None:
        super().__init__(analysis, base.divided)
        self._base, self.summed = base, summed
        for relation in analysis.relations:
            if relation.site in summed:
                like = self.traces[relation.name]
                self.traces[relation.name] = _AtReceivers(**_fields(like))

    @cached_property
    def batch(self) -> Examples:
        return self._base.batch

    def visible(self, group: str) -> tuple[Visible, ...]:
        return self._base.visible(group)


@dataclasses.dataclass(frozen=True, eq=False)
class _AtReceivers(TraceGeometry):
    """The span is that of the sums; a trace has a number for each synapse, as the weight has."""

    @property
    def _does(self) -> Summed:
        assert isinstance(self.site, Summed)
        return self.site

    @property
    def logical_shape(self) -> tuple[int, ...]:
        return self.site.weight.shape

    @property
    def shape(self) -> tuple[int, ...]:
        return self.site.weight.shape

    def spread(self, value: Array) -> Array:
        return self._does.at_synapses(value)

    def presynaptic(self, x: tuple[Array, ...] | Array) -> Array:
        return self._does.sent_to(self.site.factor(x) if isinstance(x, tuple) else x)

    def accumulate(self, credits: Array, x: tuple[Array, ...] | Array) -> Array:
        return self._does.met(jnp.zeros(self.shape, accumulator(credits.dtype)), x, credits)

    def contract(self, rows: Any) -> Array:
        products = [self.spread(credit) * row for credit, row in rows]
        return reduce(add, products).astype(self.site.weight.dtype)


def by_receivers(base: LoweredModel, share: float) -> ByReceivers | EtcompileError:
    """The model with its sparse products as sites; or why there is none.

    Parameters
    ----------
    base : LoweredModel
    share : float
        Of the synapses of each product those that a step may have to sum, at most, by events.
    """
    analysis = base.analysis
    if (
        base.divided
        or any(r.fan_out is not None for r in analysis.relations)
        or any(g.pushed for g in analysis.groups)
    ):
        return _refused(
            "arrays are split over devices" if base.divided else "elements of a result reach many units here"
        )
    found = {site.name: product for site in analysis.sites if (product := _Product.of(analysis, site, share))}
    if not found:
        return _refused(
            "there is no weight that meets what is gathered at constant places and is summed at constant places"
        )
    changed = analysis
    for product in found.values():
        changed = product.put_into(changed)
    return ByReceivers(base, changed, {s.name: s.does for s in changed.sites if isinstance(s.does, Summed)})


def _refused(reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"nothing of this model can run by events: {reason}.",
        got="schedule=etcompile.Schedule(events=...)",
        expected="a sparse product: jax.ops.segment_sum(w * x[senders], receivers, units), or x @ brainevent.CSR(...)",
        hint="leave events out.",
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Product:
    """A sparse product in a step.

    Attributes
    ----------
    site : Site
        The weight meeting what is gathered.
    does : Summed
    number : int
        Of the operation that makes the sum.
    relations, constants : mapping of str to value
        Those of the products, as those of the sums.
    cuts : mapping of int to array
        Per hidden state the elements of what is sent whose credit ends on the way to the sum.
    """

    site: Site
    does: Summed
    number: int
    relations: Mapping[str, Relation]
    constants: Mapping[str, Any]
    cuts: Mapping[int, Array]

    @classmethod
    def of(cls, analysis: Analysis, site: Site, share: float) -> _Product | None:
        """The product at a site, if it is one."""
        if not isinstance(site.does, Gathered) or site.does.origin is None or site.operation < 0:
            return None
        graph = analysis.split.body
        chain = _chain(graph, site.y)
        if chain is None:
            return None
        last = graph.operations[chain[-1][0]]
        (out,) = last.outputs
        found = _places(graph, chain)
        if found is None:
            return None
        receiver, behind = found
        sender, path = _sent(graph, site)
        path += [(use, np.where(at >= 0, sender.ravel()[np.maximum(at, 0)], NONE)) for use, at in behind]
        synapses = Synapses(
            sender.ravel().astype(np.int32),
            receiver.ravel().astype(np.int32),
            graph.avals[site.does.origin.variable].size,
            graph.avals[out].size,
            share,
        )
        does = Summed(
            **{**_fields(site.does), "y": graph.avals[out]},
            synapses=synapses,
            summing=(*_zeros_of(graph, last), *(graph.operations[k] for k, _ in chain)),
            each=site.y,
        )
        shape = does.y.shape
        own = [r for r in analysis.relations if r.site == site.name]
        relations = _complete({r.name: _relation(r, receiver, shape) for r in own})
        known = {r.name: analysis.constants[r.name] for r in own if r.name in analysis.constants}
        constants = _complete({name: _constants(value, receiver, shape) for name, value in known.items()})
        cuts = _complete({k: _cut(path, uses, synapses.senders) for k, uses in analysis.uses_cut.items()})
        if relations is None or constants is None or cuts is None:
            return None
        return cls(site, does, chain[-1][0], relations, constants, cuts)

    def put_into(self, analysis: Analysis) -> Analysis:
        """The analysis with this product as a site."""
        split = analysis.split
        graph, out = split.body, self.does.summing[-1].outputs[0]
        assert self.does.origin is not None
        x = self.does.origin.variable
        operation = _as_operation(
            self.does, graph, self.site.weight, x, graph.operations[self.number].source, out
        )
        operand = operation.inputs.index(self.site.weight)
        operations = list(graph.operations)
        operations[self.number] = operation
        site = dataclasses.replace(self.site, does=self.does, operation=self.number, operand=operand, y=out)
        sites = tuple(site if s.name == site.name else s for s in split.sites)
        body = dataclasses.replace(graph, operations=tuple(operations))
        sent = (self.number, operation.inputs.index(x))
        uses_cut = {
            state: {**uses, sent: self.cuts[state].reshape(graph.avals[x].shape)}
            if self.cuts[state].any()
            else uses
            for state, uses in analysis.uses_cut.items()
        }
        return dataclasses.replace(
            analysis,
            split=dataclasses.replace(split, body=body, sites=sites),
            relations=tuple(self.relations.get(r.name, r) for r in analysis.relations),
            constants={**analysis.constants, **self.constants},
            uses_cut=uses_cut,
        )


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, for one that adds to it."""
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _complete(values: Mapping[K, V | None]) -> dict[K, V] | None:
    """None where a value is."""
    found = {key: value for key, value in values.items() if value is not None}
    return found if len(found) == len(values) else None


def _sent(graph: Graph, site: Site) -> tuple[Array, list[tuple[Use, Array]]]:
    """For each product the flat element of what is sent; and the uses on its way there, with that element at each place."""
    assert isinstance(site.does, Gathered) and site.does.origin is not None
    origin = site.does.origin
    aval = graph.avals[origin.variable]
    sender = np.arange(aval.size, dtype=np.int32).reshape(aval.shape)
    uses: list[tuple[Use, Array]] = []
    before = origin.variable
    numbers = {graph.made_by[o.outputs[0]]: o in origin.moves for o in (*origin.pointwise, *origin.moves)}
    for number in sorted(numbers):
        operation = graph.operations[number]
        uses.append(((number, operation.inputs.index(before)), sender))
        if numbers[number]:
            sender = np.asarray(_run(operation, sender))
        (before,) = operation.outputs
    operand = graph.operations[site.operation].inputs.index(before)
    sender = np.broadcast_to(sender, site.does.y.shape)
    return sender, [*uses, ((site.operation, operand), sender)]


def _chain(graph: Graph, each: int) -> list[tuple[int, int]] | None:
    """The operations that make a sum of the products, which nobody else reads, and which operand each has of it."""
    found: list[tuple[int, int]] = []
    value, outputs = each, {v for v in graph.outputs if not isinstance(v, Constant)}
    while value not in outputs and len(readers := graph.read_by.get(value, ())) == 1:
        operation = graph.operations[readers[0]]
        operand = operation.inputs.index(value)
        others = [v for k, v in enumerate(operation.inputs) if k != operand]
        found.append((readers[0], operand))
        (value,) = operation.outputs
        if operation.name == "scatter-add" and operand == 2 and isinstance(others[1], Constant):
            return found if known_zero(graph, others[0]) else None
        if operation.name == "reduce_sum":
            return found
        if operation.name not in _MOVES or not all(isinstance(v, Constant) for v in others):
            return None
    return None


def _places(graph: Graph, chain: list[tuple[int, int]]) -> tuple[Array, list[tuple[Use, Array]]] | None:
    """The flat element of the sum that each product is added to; and the uses on the way, with the product at each element.

    None where a product is added to no element, or to several.
    """
    aval = graph.avals[graph.operations[chain[-1][0]].outputs[0]]
    found: Array | None = np.arange(aval.size, dtype=np.int64).reshape(aval.shape)
    for number, operand in reversed(chain):
        found = operand_influence(graph, graph.operations[number], operand, [found], lambda *_: None)
        if found is None or (found == MANY).any() or (found == NONE).any():
            return None
    assert found is not None
    uses: list[tuple[Use, Array]] = []
    moved: Array = np.arange(found.size, dtype=np.int32).reshape(found.shape)
    for use in chain:
        uses.append((use, moved))
        if use != chain[-1]:
            moved = np.asarray(_run(graph.operations[use[0]], moved))
    return found, uses


def _zeros_of(graph: Graph, operation: Operation) -> list[Operation]:
    """What makes the zeros that an operation adds to."""
    made = [
        graph.made_by[v]
        for v in operation.inputs
        if isinstance(v, int) and v in graph.made_by and known_zero(graph, v)
    ]
    return [
        one
        for number in made
        for one in (*_zeros_of(graph, graph.operations[number]), graph.operations[number])
    ]


def _run(operation: Operation, value: Array) -> Array:
    """An operation that moves elements, on an array of their numbers."""
    with jax.ensure_compile_time_eval():
        values = [v.value if isinstance(v, Constant) else jnp.asarray(value) for v in operation.inputs]
        return bind(operation, values)[0]


def _of_receivers(values: Array, receiver: Array, shape: tuple[int, ...], empty: Any) -> Array | None:
    """Values of the products as values of the sums, where those of one sum are alike; None where they differ."""
    flat, places = np.broadcast_to(values, receiver.shape).ravel(), receiver.ravel()
    found = np.full(int(np.prod(shape)), empty, flat.dtype)
    found[places] = flat
    return found.reshape(shape) if (found[places] == flat).all() else None


def _relation(relation: Relation, receiver: Array, shape: tuple[int, ...]) -> Relation | None:
    """A relation of the products as one of the sums."""
    if relation.shape != receiver.shape:
        return None
    position = _of_receivers(relation.position, receiver, shape, NONE)
    masks = {k: _of_receivers(mask, receiver, shape, False) for k, mask in relation.masks.items()}
    if position is None or any(mask is None for mask in masks.values()):
        return None
    in_order = np.arange(position.size).reshape(shape)
    if ((position == NONE) | (position == in_order)).all():  # receivers of nothing: any place will do
        position = in_order
    return dataclasses.replace(relation, span=tuple((0, n) for n in shape), position=position, masks=masks)


def _constants(known: Any, receiver: Array, shape: tuple[int, ...]) -> Any:
    number = _of_receivers(known.number, receiver, shape, NONE)
    scale = _of_receivers(known.scale, receiver, shape, 0)
    return None if number is None or scale is None else dataclasses.replace(known, number=number, scale=scale)


def _cut(path: Any, uses: Mapping[Use, Array], senders: int) -> Array | None:
    """What is sent whose credit ends on the way; None where it ends at some of a sender's synapses and not at others."""
    cut = np.zeros(senders, bool)
    for use, elements in path:
        mask = uses.get(use)
        if mask is not None and mask.any():
            flat = elements.ravel()
            at, known = np.broadcast_to(mask, elements.shape).ravel(), flat >= 0
            ends = np.bincount(flat[known], weights=at[known], minlength=senders)
            whole = np.bincount(flat[known], minlength=senders)
            if ((ends > 0) & (ends < whole) & ~cut).any():
                return None
            cut |= ends > 0
    return cut


def _as_operation(does: Summed, graph: Graph, weight: int, x: int, source: str, out: int) -> Operation:
    """The product as one operation of the step: its derivatives are those of the operations that it stands for."""

    @jax.custom_batching.sequential_vmap
    def forwards(weight: Array, x: Array) -> Array:
        return does.by_events(weight, x)

    @jax.custom_batching.sequential_vmap
    def backwards(weight: Array, x: Array, credit: Array) -> Any:
        return jax.vjp(lambda w, v: does.respond(w, (v,)), weight, x)[1](credit)

    product = jax.custom_vjp(forwards)
    product.defvjp(lambda w, v: (forwards(w, v), (w, v)), lambda kept, credit: backwards(*kept, credit))
    builder = GraphBuilder(inside="nothing")
    inputs = [builder.variable(graph.avals[v]) for v in (weight, x)]
    builder.call(lambda *v: [product(*v)], inputs, source)
    (made,) = builder.operations
    given = tuple(v if isinstance(v, Constant) else (weight, x)[v] for v in made.inputs)
    return dataclasses.replace(made, inputs=given, outputs=(out,))
