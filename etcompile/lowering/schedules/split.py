"""A loop over time whose body is linear in what it carries, transposed; what need not be in the loop stands before it.

The loop runs backwards, and at each step makes what its linear part multiplies by of what it is given. Of this, all is computed
for all steps at once that takes long (products with weights, exponentials) or is no larger than what it is made of. What only
moves and repeats numbers, or multiplies them once, to large arrays is computed in the loop: a gate that is repeated along an
axis of a state would go through memory for all steps, and the gate itself is small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.frontend.jaxpr import Aval, Graph, Operation, read, run_operations, staged, variables
from etcompile.lowering.mapped import mapped

__all__ = ["Blocks", "expands", "transposed"]

Array = Any

#: Operations that are as quick to repeat as to read their result.
_QUICK = frozenset(
    """abs add add_any and broadcast_in_dim ceil clamp concatenate convert_element_type copy div eq floor ge gt integer_pow
    iota le lt max min mul ne neg not or pad real reshape rev select_n sign slice square squeeze sub transpose
    xor""".split()  # noqa: SIM905
)


def expands(operation: Operation, avals: Sequence[Aval], wide: int) -> bool:
    """Whether an operation makes more than ``wide`` numbers, and quickly: by moves and arithmetic, or as an outer product."""
    if max((avals[v].size for v in operation.outputs), default=0) <= wide:
        return False
    if operation.name == "dot_general":
        return not any(map(len, operation.params["dimension_numbers"][0]))
    return operation.name in _QUICK


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Steps in blocks: some of what a step is given is made again, block by block, when the loop comes to it.

    Attributes
    ----------
    size : int
        Steps of a block.
    remade : tuple of int
        Which leaves of what steps are given.
    given : pytree of arrays
        What they are made of, block by block.
    make : callable
        These leaves for the steps of one block.
    """

    size: int
    remade: tuple[int, ...]
    given: Any
    make: Callable[[Any], list[Array]]


def transposed(
    body: Callable[..., tuple[Any, Array]],
    start: Any,
    added: Any,
    always: Any,
    seen: Any,
    wide: int,
    blocks: Blocks | None = None,
    later: Any = None,
) -> tuple[Any, Any, Any]:
    """Derivatives of a sum over time by what each step adds, by what all steps add, and by what it starts from.

    Parameters
    ----------
    body : callable
        ``body(now, added, always, seen) -> (next, number)``, linear in all but the last.
    start, added, always : pytree of shapes
        What the loop carries, what one step adds, and what is the same at all steps.
    seen : pytree of arrays
        What each step is given, time on axis 0.
    wide : int
        Of arrays above this size it is asked whether the loop should make them.
    blocks : Blocks, optional
    later : pytree of arrays, optional
        The derivatives, by what is carried at the end, of a sum over later steps; None: there are none.
    """
    given = jax.tree.leaves(seen)
    one = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), seen)
    graph, shapes = staged(body, start, added, always, one)
    linear, each = graph.inputs[: -len(given)], graph.inputs[-len(given) :]
    graph = _without_repeats(graph)
    parts = _parts(graph, linear, wide)

    def ahead(*of_step: Array) -> list[Array]:
        env = run_operations(parts.ahead, dict(zip(each, of_step, strict=True)))
        return [env[v] for v in parts.across]

    def inside(now: Any, some: Any, all_: Any, made: Sequence[Array]) -> tuple[Any, Array]:
        env = dict(zip(linear, jax.tree.leaves((now, some, all_)), strict=True))
        env = run_operations(parts.inside, {**env, **dict(zip(parts.across, made, strict=True))})
        return jax.tree.unflatten(jax.tree.structure(shapes), [read(env, v) for v in graph.outputs])

    # Step by step: JAX would compute what a loop's linear part multiplies by in a loop of its own, and keep it for all steps.
    def back(later: Any, made: Sequence[Array]) -> tuple[Any, Any]:
        asked, total = later
        pull = jax.linear_transpose(
            lambda now, some, all_: inside(now, some, all_, made), start, added, always
        )
        asked, of_step, of_all = pull((asked, jnp.ones(shapes[1].shape, shapes[1].dtype)))
        return (asked, jax.tree.map(jnp.add, total, of_all)), of_step

    zeros = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), (start, always))
    end = zeros if later is None else (later, zeros[1])
    crossing = mapped(ahead, *given) if parts.across else []
    made_again = {each[k]: n for n, k in enumerate(blocks.remade)} if blocks is not None else {}
    if blocks is None or made_again.keys().isdisjoint(parts.across):
        (first, total), of_steps = lax.scan(back, end, crossing, length=given[0].shape[0], reverse=True)
        return of_steps, total, first

    def of_block(later: Any, given: Any) -> tuple[Any, Any]:
        of, some = given
        again, rest = blocks.make(of), iter(some)
        crossing = [again[made_again[v]] if v in made_again else next(rest) for v in parts.across]
        return lax.scan(back, later, crossing, reverse=True)

    some = [v for v, name in zip(crossing, parts.across, strict=True) if name not in made_again]
    cut = [v.reshape(-1, blocks.size, *v.shape[1:]) for v in some]
    (first, total), of_blocks = lax.scan(of_block, end, (blocks.given, cut), reverse=True)
    return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), of_blocks), total, first


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The operations of a body.

    Attributes
    ----------
    ahead, inside : tuple of Operation
        For all steps at once, and those of the loop; some stand in both.
    across : tuple of int
        What the loop reads of the first, or of what a step is given.
    """

    ahead: tuple[Operation, ...]
    inside: tuple[Operation, ...]
    across: tuple[int, ...]


def _parts(graph: Graph, linear: Sequence[int], wide: int) -> _Parts:
    moving = set(linear)
    known: list[Operation] = []  # they read nothing that is linear
    inside: list[Operation] = []
    for operation in graph.operations:
        if moving.isdisjoint(operation.inputs):
            known.append(operation)
        else:
            inside.append(operation)
            moving.update(operation.outputs)
    wanted = {*variables(graph.outputs), *(v for operation in inside for v in variables(operation.inputs))}
    for operation in reversed(known):
        if not wanted.isdisjoint(operation.outputs) and expands(operation, graph.avals, wide):
            inside.insert(0, operation)
            wanted.update(variables(operation.inputs))
    made = {*moving, *(v for operation in inside for v in operation.outputs)}
    across = tuple(v for v in sorted(wanted) if v not in made)
    ahead: list[Operation] = []
    needs = set(across)
    for operation in reversed(known):
        if not needs.isdisjoint(operation.outputs):
            ahead.insert(0, operation)
            needs.update(variables(operation.inputs))
    return _Parts(tuple(ahead), tuple(inside), across)


def _without_repeats(graph: Graph) -> Graph:
    """A graph in which the same is computed once: an exponential is made for its value, and again for its derivative."""
    first: dict[Any, tuple[int, ...]] = {}
    same: dict[int, int] = {}
    operations = []
    for operation in graph.operations:
        operation = dataclasses.replace(operation, inputs=tuple(_replaced(v, same) for v in operation.inputs))
        key = operation.primitive, operation.inputs, tuple(operation.params.items())
        try:
            before = first.setdefault(key, operation.outputs)
        except TypeError:  # parameters without a hash
            before = operation.outputs
        same.update(zip(operation.outputs, before, strict=True))
        if before is operation.outputs:
            operations.append(operation)
    outputs = tuple(_replaced(v, same) for v in graph.outputs)
    return dataclasses.replace(graph, operations=tuple(operations), outputs=outputs)


def _replaced(operand: Any, same: dict[int, int]) -> Any:
    return same.get(operand, operand) if isinstance(operand, int) else operand
