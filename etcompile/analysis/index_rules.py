"""How one operation spreads each element of its operands over the elements of its results.

A rule answers, for one operand, the question: given the position that each element of the results influences, which
position does each element of this operand influence? Positions are integers; ``NONE`` means no influence and ``MANY``
more than one position. Rules never look at values, only at shapes, parameters and constant indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.errors import ProgramError
from etcompile.frontend.indexed import INDEXED, READS, indexed, known_indices
from etcompile.frontend.jaxpr import Aval, Constant, Graph, Operation, bind

__all__ = [
    "CHEAP",
    "ELEMENTWISE",
    "MANY",
    "MOVES",
    "NONE",
    "collapse",
    "join",
    "operand_influence",
    "register_index_rule",
]

NONE = -1
MANY = -2

#: Operations whose result element depends on the operand elements at the same index only.
ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp complex conj
    convert_element_type copy copy_p cos cosh declared_derivative digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt
    heaviside_surrogate_gradient igamma igammac igamma_grad_a imag integer_pow is_finite le lgamma log log1p log2 logistic lt
    max min mul name ne neg nextafter not one_minus_square or polygamma population_count pow pvary real
    reduce_precision regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta pcast sharding_constraint
    device_put layout_constraint""".split()  # noqa: SIM905
)

#: Operations that pass over their operands once: as quick to repeat as to read their result from memory.
CHEAP = ELEMENTWISE | frozenset(
    """reshape squeeze transpose rev slice broadcast_in_dim concatenate split stack unstack tile pad iota
    optimization_barrier dynamic_slice reduce_sum reduce_max reduce_min reduce_prod""".split()  # noqa: SIM905
)

Array = Any
Rule = Callable[[Operation, Sequence[Aval], int, list[Array | None]], Array | None]


def collapse(influence: Array, axes: Sequence[int]) -> Array:
    """Join the influences along ``axes``: the common position, NONE if there is none, MANY if they disagree."""
    if not axes:
        return influence
    axes = tuple(axes)
    largest = influence.max(axis=axes, initial=NONE)
    smallest = np.where(influence == NONE, np.iinfo(np.int64).max, influence).min(
        axis=axes, initial=np.iinfo(np.int64).max
    )
    many = (influence == MANY).any(axis=axes)
    return np.where(many | ((largest != NONE) & (smallest != largest)), MANY, largest)


def join(first: Array, second: Array) -> Array:
    """Join two influences of the same elements."""
    same = (first == second) | (second == NONE)
    return np.where(same, first, np.where(first == NONE, second, MANY))


def scatter_join(source: Array, influence: Array, size: int) -> Array:
    """Influence of each of ``size`` elements, where result element k came from element ``source[k]`` (-1: from none)."""
    source, influence = np.asarray(source).ravel(), np.asarray(influence).ravel()
    keep = (source >= 0) & (influence != NONE)
    source, influence = source[keep], influence[keep]
    result = np.full(size, NONE, np.int64)
    result[source] = influence
    disagree = result[source] != influence
    result[source[disagree]] = MANY
    return result


def operand_influence(
    graph: Graph, operation: Operation, operand: int, results: list[Array | None], inner: Rule
) -> Array | None:
    """Influence of operand number ``operand`` of ``operation``, or None where it has none at all.

    ``inner`` answers for primitives without a rule, by looking into their own derivative.
    """
    avals = [graph.aval(i) for i in operation.inputs]
    name = operation.name
    if name == "stop_gradient":
        return None
    if name in ELEMENTWISE:
        found = [r for r in results if r is not None]
        shape = avals[operand].shape
        joined = found[0]
        for other in found[1:]:
            joined = join(joined, other)
        if joined.shape == shape:
            return joined
        return collapse(joined, tuple(range(joined.ndim))).reshape(shape) if shape == () else None
    rule = _RULES.get(name)
    if name in INDEXED and (rule is None or not known_indices(operation)):
        return _at_places(graph, operation, operand, results)
    if rule is None:
        return inner(operation, avals, operand, results)
    return rule(operation, avals, operand, results)


def _many(avals: Sequence[Aval], operand: int) -> Array:
    return np.broadcast_to(np.int64(MANY), avals[operand].shape)


# ----------------------------------------------------------------------------------------------------------------
# rules by moving an array of indices through the operation


def _indices(aval: Aval) -> Array:
    return np.arange(aval.size, dtype=np.int64).reshape(aval.shape)


def _moved(move: Callable[[Operation, Array], Array]) -> Rule:
    def rule(
        operation: Operation, avals: Sequence[Aval], operand: int, results: list[Array | None]
    ) -> Array | None:
        (influence,) = results
        if influence is None or operand != 0:
            return None
        source = move(operation, _indices(avals[0]))
        return scatter_join(source, influence, avals[0].size).reshape(avals[0].shape)

    return rule


def _reshape(op: Operation, a: Array) -> Array:
    return a.reshape(op.params["new_sizes"])


def _squeeze(op: Operation, a: Array) -> Array:
    return np.squeeze(a, tuple(op.params["dimensions"]))


def _transpose(op: Operation, a: Array) -> Array:
    return np.transpose(a, op.params["permutation"])


def _rev(op: Operation, a: Array) -> Array:
    return np.flip(a, tuple(op.params["dimensions"]))


def _slice(op: Operation, a: Array) -> Array:
    strides = op.params["strides"] or (1,) * a.ndim
    return a[
        tuple(
            slice(b, e, s)
            for b, e, s in zip(op.params["start_indices"], op.params["limit_indices"], strides, strict=True)
        )
    ]


def _broadcast_in_dim(
    op: Operation, avals: Sequence[Aval], operand: int, results: list[Array | None]
) -> Array | None:
    (influence,) = results
    if influence is None or operand != 0:
        return None
    shape, dims = avals[0].shape, tuple(op.params["broadcast_dimensions"])
    repeated = [
        d for d in range(influence.ndim) if d not in dims or shape[dims.index(d)] == 1 != influence.shape[d]
    ]
    return collapse(influence, repeated).reshape(shape)


def _concatenate(
    op: Operation, avals: Sequence[Aval], operand: int, results: list[Array | None]
) -> Array | None:
    (influence,) = results
    if influence is None:
        return None
    axis = op.params["dimension"]
    start = sum(a.shape[axis] for a in avals[:operand])
    index = [slice(None)] * influence.ndim
    index[axis] = slice(start, start + avals[operand].shape[axis])
    return influence[tuple(index)]


def _split(op: Operation, avals: Sequence[Aval], operand: int, results: list[Array | None]) -> Array | None:
    axis = op.params["axis"]
    parts = []
    for size, influence in zip(op.params["sizes"], results, strict=True):
        shape = list(avals[0].shape)
        shape[axis] = int(size)
        parts.append(np.full(shape, NONE, np.int64) if influence is None else influence)
    return np.concatenate(parts, axis)


def _stack(op: Operation, avals: Sequence[Aval], operand: int, results: list[Array | None]) -> Array | None:
    (influence,) = results
    return None if influence is None else np.take(influence, operand, axis=op.params["axis"])


def _unstack(op: Operation, avals: Sequence[Aval], operand: int, results: list[Array | None]) -> Array | None:
    shape = np.delete(avals[0].shape, op.params["axis"]).tolist()
    parts = [np.full(shape, NONE, np.int64) if r is None else r for r in results]
    return np.stack(parts, op.params["axis"])


def _tile(op: Operation, a: Array) -> Array:
    return np.tile(a, op.params["reps"])


def _each_its_own(
    op: Operation, avals: Sequence[Aval], operand: int, results: list[Array | None]
) -> Array | None:
    return results[operand]


def _reduce(op: Operation, avals: Sequence[Aval], operand: int, results: list[Array | None]) -> Array | None:
    (influence,) = results
    if influence is None:
        return None
    return np.broadcast_to(np.expand_dims(influence, tuple(op.params["axes"])), avals[0].shape)


def _dot_general(
    op: Operation, avals: Sequence[Aval], operand: int, results: list[Array | None]
) -> Array | None:
    (influence,) = results
    if influence is None:
        return None
    contract, batch = op.params["dimension_numbers"]
    mine, other = operand, 1 - operand
    free = [
        [d for d in range(len(avals[k].shape)) if d not in contract[k] and d not in batch[k]] for k in (0, 1)
    ]
    n_batch = len(batch[0])
    first = n_batch if other == 0 else n_batch + len(free[0])
    collapsed = collapse(influence, tuple(range(first, first + len(free[other]))))
    order = [*batch[mine], *free[mine], *contract[mine]]
    full = collapsed.reshape(*collapsed.shape, *(1,) * len(contract[mine]))
    full = np.broadcast_to(full, [avals[mine].shape[d] for d in order])
    return np.transpose(full, np.argsort(order)) if order else full


def _cumulative(
    op: Operation, avals: Sequence[Aval], operand: int, results: list[Array | None]
) -> Array | None:
    (influence,) = results
    if influence is None:
        return None
    axis = op.params["axis"]
    return np.broadcast_to(np.expand_dims(collapse(influence, (axis,)), axis), avals[0].shape)


# ----------------------------------------------------------------------------------------------------------------
# rules by transposing the operation: for linear operations with coefficients 0 and 1


def _transposed(
    op: Operation, avals: Sequence[Aval], operand: int, results: list[Array | None]
) -> Array | None:
    (influence,) = results
    if influence is None:
        return None
    fixed = {k: i.value for k, i in enumerate(op.inputs) if isinstance(i, Constant)}
    moving = [k for k in range(len(avals)) if k not in fixed]
    if any(not avals[k].differentiable for k in moving):
        return _many(avals, operand)  # indices that depend on data
    pull = _transpose_of(op, avals, operand, fixed)
    if pull is None:
        return _many(avals, operand)
    known = influence >= 0
    shifted = np.where(known, influence, 0)
    with jax.ensure_compile_time_eval():  # some questions come up while a step is traced
        count, high, low, many = (
            np.asarray(pull(a)) for a in (known, shifted >> 12, shifted & 4095, influence == MANY)
        )
    position = (high.astype(np.int64) << 12) + low.astype(np.int64)
    return np.where(many + count > 1.5, MANY, np.where(many > 0, MANY, np.where(count > 0, position, NONE)))


def _transpose_of(
    op: Operation, avals: Sequence[Aval], operand: int, fixed: dict[int, Any]
) -> Callable[[Array], Array] | None:
    """The operation transposed in one operand, the others zero; None where jax cannot transpose it."""
    for dtype in (jnp.float32, avals[operand].dtype):
        # 16-bit floats cannot hold positions; scatters hold their dtype in a parameter. What moves is the same for all values.
        values = fixed | {k: np.zeros(a.shape, dtype) for k, a in enumerate(avals) if a.differentiable}

        def fn(v: Any, values: dict[int, Any] = values) -> Any:
            return bind(op, [v if k == operand else values[k] for k in range(len(avals))])[0]

        def pull(a: Array, dtype: Any = dtype, fn: Any = fn) -> Array:
            shape, a = jax.ShapeDtypeStruct(avals[operand].shape, dtype), np.asarray(a).astype(dtype)
            try:
                return jax.linear_transpose(fn, shape)(a)[0]
            except NotImplementedError:
                return jax.vjp(fn, np.zeros(shape.shape, dtype))[1](a)[0]

        try:
            pull(np.zeros(_result_shape(op, avals)))
        except Exception:  # no transpose in this dtype
            if jnp.finfo(avals[operand].dtype).bits < 32:
                return None
            continue
        return pull
    return None


def _result_shape(op: Operation, avals: Sequence[Aval]) -> tuple[int, ...]:
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    return tuple(jax.eval_shape(lambda *v: bind(op, v)[0], *shapes).shape)


def _gather(op: Operation, avals: Sequence[Aval], operand: int, results: list[Array | None]) -> Array | None:
    (influence,) = results
    if influence is None or operand != 0:
        return None
    if not isinstance(op.inputs[1], Constant):
        return _many(avals, operand)
    params = dict(op.params)
    params["fill_value"] = -1
    moved = Operation(op.primitive, params, op.inputs, op.outputs, op.source)
    with jax.ensure_compile_time_eval():
        source = bind(moved, [np.asarray(_indices(avals[0]), np.int32), op.inputs[1].value])[0]
    return scatter_join(np.asarray(source), influence, avals[0].size).reshape(avals[0].shape)


def _at_places(graph: Graph, operation: Operation, operand: int, results: list[Array | None]) -> Array | None:
    """Reading or writing at places of which some are known when the step runs: along an axis any may be meant."""
    (influence,) = results
    aval = graph.aval(operation.inputs[operand])
    if influence is None or not aval.differentiable:
        return None
    if operand == 0 and operation.name not in READS:
        return influence  # what is not written over stays where it is
    found = indexed(graph, operation)
    if found is None:
        return np.broadcast_to(np.int64(MANY), aval.shape)
    if operand == 0:
        here = scatter_join(found.places, influence, int(np.prod(found.reduced, dtype=np.int64)))
        return np.broadcast_to(here.reshape(found.reduced), aval.shape)
    anywhere = collapse(influence, found.axes).ravel()
    return np.where(found.places >= 0, anywhere[np.maximum(found.places, 0)], NONE)


def _opaque(op: Operation, avals: Sequence[Aval], operand: int, results: list[Array | None]) -> Array | None:
    return _many(avals, operand) if avals[operand].size > 0 else None


#: Operations that only move the elements of their first operand, or repeat them: what they make of an array of indices.
MOVES: dict[str, Callable[[Operation, Array], Array]] = {
    "reshape": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "rev": _rev,
    "slice": _slice,
    "tile": _tile,
}

_RULES: dict[str, Rule] = {
    **{name: _moved(move) for name, move in MOVES.items()},
    "optimization_barrier": _each_its_own,
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "split": _split,
    "stack": _stack,
    "unstack": _unstack,
    "reduce_sum": _reduce,
    "reduce_max": _reduce,
    "reduce_min": _reduce,
    "reduce_prod": _reduce,
    "dot_general": _dot_general,
    "cumsum": _cumulative,
    "cumprod": _cumulative,
    "cumlogsumexp": _cumulative,
    "cummax": _cumulative,
    "cummin": _cumulative,
    "gather": _gather,
    "dynamic_slice": _transposed,
    "dynamic_update_slice": _transposed,
    "scatter": _transposed,
    "scatter-add": _transposed,
    "pad": _transposed,
    "reduce_window_sum": _transposed,
    "conv_general_dilated": _opaque,
    "sort": _opaque,
    "while": _opaque,
}


def register_index_rule(primitive: str, move: Callable[..., Array]) -> None:
    """Say how a primitive moves the elements of its first operand, and that it depends on no other.

    Parameters
    ----------
    primitive : str
        Its name.
    move : callable
        ``move(indices, **params) -> indices``: what the primitive with these parameters makes of an array of the shape of its
        operand that holds integers, -1 where an element of the result comes from none.
    """
    if primitive in _RULES or primitive in ELEMENTWISE:
        raise ProgramError(f"how {primitive!r} moves elements is defined twice.")
    MOVES[primitive] = lambda operation, indices: move(indices, **operation.params)
    _RULES[primitive] = _moved(MOVES[primitive])
