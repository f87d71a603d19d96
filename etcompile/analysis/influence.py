"""Influence: which single position of a new hidden state each element of each variable reaches, and where that ends.

The walk goes backwards from one new state. Where an operation spreads an element over several positions, that use of
the element is *cut*: nothing behind it is followed, and the trace program will not differentiate through it. Where two
uses of one value reach different positions, the use that reaches the value's own position is kept (a unit's own memory
goes before its neighbours') and the others are cut.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from etcompile.analysis.index_rules import MANY, NONE, join, operand_influence
from etcompile.analysis.linearity import linear
from etcompile.analysis.loops import moving_inside, through_rounds
from etcompile.frontend.jaxpr import Aval, Constant, Graph, Operation, backward_rule, jvp_graph, vjp_graph
from etcompile.frontend.loops import Loop, Use, within
from etcompile.frontend.walks import BackwardWalk

__all__ = ["Influence", "Use", "influence_on", "spreads", "through_operation"]

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Influence:
    """Influence on one new state.

    Attributes
    ----------
    positions : mapping of int to array
        For each kept variable the flat position of the state that each element reaches, or NONE.
    cuts : mapping of Use to array
        Elements of an operand at which a use is cut. A use in the body of a loop is cut in all rounds.
    """

    positions: Mapping[int, Array]
    cuts: Mapping[Use, Array]


def influence_on(
    graph: Graph,
    seeds: Mapping[int, Array],
    active: Sequence[bool],
    keep: set[int],
    frozen: AbstractSet[Use],
    cut: Mapping[Use, Array] | None = None,
    size: int | None = None,
    within_rules: AbstractSet[Any] = frozenset(),
) -> Influence:
    """Walk ``graph`` backwards from ``seeds``.

    Parameters
    ----------
    graph : Graph
    seeds : mapping of variable to array of positions
    active : sequence of bool
        Variables worth following: those that a derivative with respect to a hidden state or parameter can reach.
    keep : set of int
        Variables whose influence the caller wants.
    frozen : set of Use
        Uses that are not followed and not cut (weights at an operation that makes a relation of its own).
    cut : mapping of Use to array
        Elements at which a use is cut in any case.
    size : int
        Number of positions, where they are not those of a seed.
    within_rules : set
        Derivatives of the user's own (``custom_vjp``) that ``graph`` is inside of. The reverse of an ODE solver is the solver
        again, with a reverse of its own: what comes back to a rule that is being looked into is opaque there.
    """
    if size is None:
        size = max((int(np.prod(p.shape)) for p in seeds.values()), default=0)
    walk = _Walk(graph, seeds, active, keep, frozen, cut or {}, size, within_rules)
    for number in walk.order:
        walk.behind(number)
    for variable in list(walk.uses):
        walk.settle(variable)
    return Influence(walk.positions, walk.cuts)


class _Walk:
    """The walk from an operation to those before it, with what has been found so far.

    ``uses`` holds of each variable that is not settled yet which positions it reaches by each of its uses; None for a seed.
    """

    def __init__(
        self,
        graph: Graph,
        seeds: Mapping[int, Array],
        active: Sequence[bool],
        keep: AbstractSet[int],
        frozen: AbstractSet[Use],
        cut: Mapping[Use, Array],
        size: int,
        within_rules: AbstractSet[Any],
    ) -> None:
        self._graph, self._active, self._keep, self._frozen = graph, active, keep, frozen
        self._cut, self._size, self._within_rules = cut, size, within_rules
        self.order = BackwardWalk(graph, seeds)
        self.uses: dict[int, list[tuple[Use | None, Array]]] = {v: [(None, p)] for v, p in seeds.items()}
        self.positions: dict[int, Array] = {}
        self.cuts: dict[Use, Array] = {}

    def behind(self, number: int) -> None:
        """Go on from the results of an operation to its operands."""
        operation = self._graph.operations[number]
        results = [self.settle(v) for v in operation.outputs]
        if all(r is None for r in results):
            return
        followed = [
            k
            for k, v in enumerate(operation.inputs)
            if not isinstance(v, Constant) and self._active[v] and (number, k) not in self._frozen
        ]
        for k, found in self._operands(number, operation, followed, results).items():
            if found is not None:
                self._use(number, k, found)

    def _operands(
        self, number: int, operation: Operation, followed: Sequence[int], results: list[Array | None]
    ) -> dict[int, Array | None]:
        """What each operand that is followed reaches by this operation."""
        if operation.loop is None:
            rules = self._within_rules
            return {k: through_operation(self._graph, operation, k, results, rules) for k in followed}
        of_operands, inner = _through_loop(
            operation.loop, results, followed, self._size, within(self._cut, number), self._within_rules
        )
        self.cuts.update({(number, *use): mask for use, mask in inner.items()})
        return {k: of_operands.get(k) for k in followed}

    def _use(self, number: int, k: int, found: Array) -> None:
        """Cut a use where it spreads, and wait with the rest of it until all uses of the value are known."""
        many = (found == MANY) | (self._cut.get((number, k), False) & (found != NONE))
        if many.any():
            self.cuts[number, k] = many
            found = np.where(many, NONE, found)
        if (found != NONE).any():
            operand = self._graph.operations[number].inputs[k]
            assert isinstance(operand, int)
            self.uses.setdefault(operand, []).append(((number, k), found))
            self.order.add(operand)

    def settle(self, variable: int) -> Array | None:
        """What a variable reaches by all of its uses together; the uses that lose against another are cut."""
        found = self.uses.pop(variable, None)
        if not found:
            return None
        resolved = functools.reduce(join, [p for _, p in found])
        if (resolved == MANY).any():
            resolved = _own_position(resolved, [p for _, p in found], self._size)
            for use, p in found:
                lost = (p != NONE) & (p != resolved)
                if use is not None and lost.any():
                    self.cuts[use] = lost | self.cuts.get(use, False)
        if variable in self._keep:
            self.positions[variable] = resolved
        return resolved if (resolved != NONE).any() else None


def _own_position(resolved: Array, found: Sequence[Array], size: int) -> Array:
    """Settle conflicting elements: their own position if a use reaches it, else NONE."""
    if resolved.size != size:
        return np.where(resolved == MANY, NONE, resolved)
    own = np.arange(size).reshape(resolved.shape)
    reached = np.zeros(resolved.shape, bool)
    for p in found:
        reached |= p == own
    return np.where(resolved == MANY, np.where(reached, own, NONE), resolved)


def _through_loop(
    loop: Loop,
    results: list[Array | None],
    followed: Sequence[int],
    size: int,
    cut: Mapping[Use, Array],
    within_rules: AbstractSet[Any],
) -> tuple[Mapping[int, Array | None], dict[Use, Array]]:
    """Influence of a loop's operands, and the cuts in its body.

    A use that is cut in one round is cut in all of them, since all run the same program: so the rounds are walked through
    again until no other cut comes up.
    """
    moving = [k in followed for k in range(loop.operands)]
    active = moving_inside(loop, moving)
    keep = set(loop.body.inputs)
    known = dict(cut)
    while True:
        new: dict[Use, Array] = {}

        def walk(seeds: dict[int, Array], new: dict[Use, Array] = new) -> Mapping[int, Array]:
            found = influence_on(loop.body, seeds, active, keep, set(), known, size, within_rules)
            for use, mask in found.cuts.items():
                new[use] = mask | new.get(use, False)
            return found.positions

        operands = through_rounds(loop, results, walk)
        if operands is None:
            return {k: np.broadcast_to(np.int64(MANY), _shape_of(loop, k)) for k in followed}, {}
        if all(use in known and not (mask & ~known[use]).any() for use, mask in new.items()):
            return dict(enumerate(operands)), new
        for use, mask in new.items():
            known[use] = mask | known.get(use, False)


def _shape_of(loop: Loop, operand: int) -> tuple[int, ...]:
    aval = loop.body.avals[loop.body.inputs[operand]]
    sliced = operand >= loop.constants + loop.carried
    return (loop.length, *aval.shape) if sliced else aval.shape


def through_operation(
    graph: Graph,
    operation: Operation,
    operand: int,
    results: list[Array | None],
    within_rules: AbstractSet[Any] = frozenset(),
) -> Array | None:
    """Influence of one operand of an operation, given that of its results; None where it has none."""
    inner = functools.partial(_inner, within_rules=within_rules)
    return operand_influence(graph, operation, operand, results, inner)


def spreads(graph: Graph, operation: Operation, operand: int) -> bool:
    """Whether an operation takes elements of an operand to several elements of its results."""
    avals = [graph.avals[v] for v in operation.outputs]
    found = through_operation(graph, operation, operand, [np.arange(a.size).reshape(a.shape) for a in avals])
    return found is not None and bool((found == MANY).any())


def _inner(
    operation: Operation,
    avals: Sequence[Aval],
    operand: int,
    results: list[Array | None],
    within_rules: AbstractSet[Any],
) -> Array | None:
    """Influence through a primitive without a rule of its own: through its JVP, its VJP, or MANY."""
    many = np.broadcast_to(np.int64(MANY), avals[operand].shape)
    if operation.loop is not None:
        return _inside(operation.loop, operand, results, within_rules)
    if operation.name == "custom_vjp_call":
        found = _through_vjp(operation, avals, operand, results, within_rules)
    else:
        found = _through_jvp(operation, avals, operand, results, within_rules)
    return many if found is None else found


def _inside(
    loop: Loop, operand: int, results: list[Array | None], within_rules: AbstractSet[Any]
) -> Array | None:
    """Influence of one operand of a loop: MANY, and not cut, where its elements spread in the body."""
    if operand >= loop.operands:
        return None
    size = max((r.size for r in results if r is not None), default=0)
    operands, cuts = _through_loop(loop, results, [operand], size, {}, within_rules)
    return np.broadcast_to(np.int64(MANY), _shape_of(loop, operand)) if cuts else operands.get(operand)


def _through_jvp(
    operation: Operation,
    avals: Sequence[Aval],
    operand: int,
    results: list[Array | None],
    within_rules: AbstractSet[Any],
) -> Array | None:
    graph = jvp_graph(operation, avals, [operand])
    if graph is None:
        return None
    tangent = graph.inputs[-1]
    reached = _reached(graph, {tangent})
    if any(o.name == operation.name and any(reached[v] for v in o.outputs) for o in graph.operations):
        return None  # its tangent is made by the same primitive: nothing to look into
    live = [r for r, v in zip(results, _differentiable_outputs(operation, avals, results), strict=True) if v]
    seeds = {
        v: r
        for v, r in zip(graph.outputs, live, strict=True)
        if r is not None and not isinstance(v, Constant)
    }
    if not seeds:
        return np.full(avals[operand].shape, NONE, np.int64)
    found = influence_on(graph, seeds, reached, {tangent}, set(), within_rules=within_rules)
    if found.cuts:
        return None
    return found.positions.get(tangent, np.full(avals[operand].shape, NONE, np.int64))


def _through_vjp(
    operation: Operation,
    avals: Sequence[Aval],
    operand: int,
    results: list[Array | None],
    within_rules: AbstractSet[Any],
) -> Array | None:
    """Read the influence off the cotangent map: cotangent element p reaches operand element q, so q influences p."""
    rule = backward_rule(operation)
    if rule in within_rules:
        return None
    graph = vjp_graph(operation, avals, [operand])
    if graph is None:
        return None
    (out,) = graph.outputs
    total = np.full(avals[operand].shape, NONE, np.int64)
    if isinstance(out, Constant):
        return total
    cotangents = graph.inputs[len(avals) :]
    if not linear(graph, set(cotangents)):
        return None
    live = [r for r, v in zip(results, _differentiable_outputs(operation, avals, results), strict=True) if v]
    seed = np.arange(avals[operand].size).reshape(avals[operand].shape)
    found = influence_on(
        graph,
        {out: seed},
        _reached(graph, set(cotangents)),
        set(cotangents),
        set(),
        within_rules={*within_rules, rule},
    )
    if found.cuts:
        return None
    for cotangent, influence in zip(cotangents, live, strict=True):
        target = found.positions.get(cotangent)
        if target is None or influence is None:
            continue
        part = np.full(avals[operand].size, NONE, np.int64)
        for q, p in zip(target.ravel(), influence.ravel(), strict=True):
            if q != NONE and p != NONE:
                part[q] = p if part[q] in (NONE, p) else MANY
        total = join(total, part.reshape(total.shape))
    return total


def _differentiable_outputs(
    operation: Operation, avals: Sequence[Aval], results: list[Array | None]
) -> list[bool]:
    import jax

    from etcompile.frontend.jaxpr import bind

    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    outs = jax.eval_shape(lambda *v: bind(operation, v), *shapes)
    return [Aval(o.shape, o.dtype).differentiable for o in outs]


def _reached(graph: Graph, sources: set[int]) -> list[bool]:
    reached = [v in sources for v in range(len(graph.avals))]
    for operation in graph.operations:
        if any(not isinstance(v, Constant) and reached[v] for v in operation.inputs):
            for v in operation.outputs:
                reached[v] = graph.avals[v].differentiable
    return reached
