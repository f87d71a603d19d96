"""Ops of rules with a learning signal of their own: errors and targets through feedback matrices, modulators.

A vector has one row per example. A drive is an array over a group's positions; :func:`_through` places it on what the
group shows to the rest of the network and pulls it back to the group's states.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from etcompile.errors import AlgorithmError, InputError, UnsupportedError
from etcompile.frontend.jaxpr import full_dtype
from etcompile.ir.program import Equation
from etcompile.lowering.mapped import mapped

if TYPE_CHECKING:
    from etcompile.analysis.groups import HiddenGroup
    from etcompile.ir.program import TraceProgram
    from etcompile.lowering.derivatives import LoweredModel
    from etcompile.lowering.evaluate import Context

__all__ = ["FEEDBACK", "check_feedback", "feedback_matrix"]

Array = Any
Value = Any


def feedback_matrix(seed: int, group: str, rows: int, units: int, dtype: Any = jnp.float32) -> Array:
    """The fixed random matrix of a group.

    Parameters
    ----------
    seed : int
    group : str
        Name of the hidden group; groups get different matrices from one seed.
    rows : int
        Length of the error or target of one example.
    units : int
        Units of the group (positions of one example).
    dtype : dtype

    Returns
    -------
    array [rows, units]
        Normal with variance ``1 / rows``, so that a projected vector has entries of the size of its own.

    Examples
    --------
    >>> import etcompile
    >>> etcompile.feedback_matrix(0, "g0", 2, 5).shape
    (2, 5)
    """
    # Drawn in float32 whatever the model's precision, so that a model and its float64 twin get the same matrix; and by a
    # program of its own, since the compiler of another one might round otherwise.
    with jax.ensure_compile_time_eval():
        number = np.uint32(zlib.crc32(group.encode()) & 0x7FFFFFFF)
        return _drawn(np.int64(seed), number, np.float32(rows**0.5), rows, units, jnp.dtype(dtype))


@partial(jax.jit, static_argnums=(3, 4, 5))
def _drawn(seed: Array, number: Array, divisor: Array, rows: int, units: int, dtype: Any) -> Array:
    key = jax.random.fold_in(jax.random.key(seed), number)
    drawn = lax.optimization_barrier(jax.random.normal(key, (rows, units), jnp.float32))
    return (drawn / divisor).astype(dtype)


def _units(context: Context, group: HiddenGroup) -> int:
    return group.size // (context.model.examples or 1)


def _error(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    """All outputs of an example in one row: the loss differentiated by each number, real and imaginary parts apart."""
    assert context.loss is not None and context.step is not None
    return _in_rows(context, _cotangents(context), full_dtype(equation.type.dtype))


def _cotangents(context: Context) -> list[Array]:
    assert context.loss is not None and context.step is not None
    found = []
    for value, cotangent in zip(context.step.outputs, context.loss.outputs, strict=True):
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            continue
        given = jnp.zeros_like(value) if cotangent is None else cotangent
        # JAX's cotangent of z = a + ib is dloss/da - i dloss/db
        found.extend((given.real, -given.imag) if jnp.iscomplexobj(value) else (given,))
    return found


def _in_rows(context: Context, leaves: Sequence[Array], dtype: Any) -> Array:
    rows = context.model.examples or 1
    return jnp.concatenate([v.reshape(rows, -1).astype(dtype) for v in leaves], axis=1)


def _target(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    return _target_rows(context, full_dtype(equation.type.dtype))


def _target_rows(context: Context, dtype: Any) -> Array:
    """The first target of the loss, one row per example; class labels as one-hot rows."""
    rows = context.model.examples or 1
    leaves = jax.tree.leaves(context.call.get("target"))
    if not leaves:
        raise InputError(
            f"{context.program.name} projects the target, and this call has none.",
            expected="value_and_grad(loss_fn)(x, target), or step(x, target=...)",
        )
    first = jnp.asarray(leaves[0])
    if first.size % rows:
        raise InputError(
            "the target has no row for every example.", got=f"shape {first.shape}", expected=f"{rows} rows"
        )
    if jnp.issubdtype(first.dtype, jnp.integer) and first.size == rows:
        classes = _in_rows(context, _cotangents(context), dtype).shape[1]
        found = jax.nn.one_hot(first.reshape(rows), classes, dtype=dtype)
    else:
        found = first.reshape(rows, -1).astype(dtype)
    return _where_counted(context, found)


def _modulator(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    name = str(args[0])
    group = context.model.analysis.group(name)
    given = context.call.get("modulator")
    if given is None:
        raise InputError(
            f"{context.program.name} needs a modulator with every call.",
            expected="value_and_grad(loss_fn)(x, *targets, modulator=m): a number, an array over units, or a dict by group",
            hint=None
            if context.loss is not None
            else f"{context.program.name} carries it: steps without a loss take it too, as step(x, modulator=m) or "
            "step(MultiStepData(xs), modulator=MultiStepData(ms)).",
        )
    if isinstance(given, Mapping):
        keys = [name, *(context.model.analysis.state_name(s) for s in group.states)]
        found = next((given[k] for k in keys if k in given), None)
        if found is None:
            raise InputError(
                f"the modulator has no entry for group {name}.",
                got=f"entries {', '.join(map(str, given))}",
                expected=f"one of {', '.join(keys)}",
            )
        given = found
    value = jnp.asarray(given)
    try:
        return jnp.broadcast_to(value, group.shape)
    except ValueError:
        raise InputError(
            f"the modulator does not fit group {name}.",
            got=f"shape {value.shape}",
            expected=f"a number, or a shape that broadcasts to {group.shape}",
        ) from None


def _reward(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    """One number for each example; zero where the step, or the example, is masked."""
    given, rows = context.call.get("modulator"), context.model.examples or 1
    expected = f"modulator=r: a number, or one for each example, of shape ({rows},)"
    if given is None:
        raise InputError(f"{context.program.name} needs a reward with every call.", expected=expected)
    found = None if isinstance(given, Mapping) else jnp.asarray(given)
    fits = (
        found is not None and found.size in (1, rows) and found.shape in ((), (found.size,), (found.size, 1))
    )
    if found is None or not fits:
        raise InputError(
            f"{context.program.name} takes one reward for each example.",
            got="a dict" if found is None else f"shape {found.shape}",
            expected=expected,
        )
    numbers = jnp.broadcast_to(found.reshape(-1, 1), (rows, 1))
    return _where_counted(context, numbers.astype(full_dtype(equation.type.dtype)))


def _of_example(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    group, (_, vector) = context.model.analysis.group(equation.type.of), args
    numbers = vector[:, 0] if context.model.examples else vector[0, 0]
    return jnp.broadcast_to(_of_examples(numbers, group.shape), group.shape).astype(
        full_dtype(equation.type.dtype)
    )


def _by_example(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    """One pullback for each example, of its part of the credit."""
    x, credit = args
    if credit is None:
        return None
    name, rows = equation.type.of, context.model.examples or 1
    site = context.model.sites[name]
    if rows == 1:
        return site.pullback(x, credit)[None]
    if context.model.analysis.site(name).y not in context.model.batch.along:
        raise UnsupportedError(
            f"{context.program.name} keeps a gradient for each example, and a weight acts on all examples at once.",
            got=f"{', '.join(site.params)}: y of shape {site.y.shape} has no axis of examples",
            expected="a weight that meets data of each example",
        )
    one = jnp.eye(rows, dtype=credit.dtype).reshape(rows, rows, *(1,) * (credit.ndim - 1))
    return mapped(lambda example: site.pullback(x, credit * example), one)


def _weigh(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    vector, gradients = args
    return None if gradients is None else jnp.tensordot(vector[:, 0].astype(gradients.dtype), gradients, 1)


def _mask(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    """A number for the step, or one for each example, over the group's positions."""
    shape, dtype = context.model.analysis.group(str(args[0])).shape, full_dtype(equation.type.dtype)
    return jnp.broadcast_to(_of_examples(_mask_of(context).astype(dtype), shape), shape)


def _mask_of(context: Context) -> Array:
    given = context.call.get("mask")
    return jnp.ones(()) if given is None else jnp.asarray(given)


def _of_examples(mask: Array, shape: tuple[int, ...]) -> Array:
    """A mask beside an array whose leading axis numbers the examples."""
    return mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)) if mask.ndim else mask


def _where_counted(context: Context, values: Array) -> Array:
    """Values of a step, zero where its mask is: whatever stands there does not count."""
    if context.call.get("mask") is None:
        return values
    mask = _of_examples(_mask_of(context), values.shape)
    return jnp.where(mask != 0, values, jnp.zeros((), values.dtype))


def _constant(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    shape = context.model.analysis.group(str(args[0])).shape
    return jnp.full(shape, args[1], full_dtype(equation.type.dtype))


def _shown(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    assert context.step is not None
    return context.step.shown(str(args[0])).astype(full_dtype(equation.type.dtype))


def _derivative(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    step, name = context.step, str(args[0])
    assert step is not None
    ones = jnp.ones(context.model.analysis.group(name).shape, full_dtype(equation.type.dtype))
    return step.of_new_states(name, step.pull_of_shown(name, ones))


def _random_feedback(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    """For errors: its rows are the outputs of an example."""
    name, seed = str(args[0]), int(args[1])
    assert context.step is not None
    sizes = [
        v.size * (1 + jnp.iscomplexobj(v))
        for v in context.step.outputs
        if jnp.issubdtype(v.dtype, jnp.inexact)
    ]
    rows = sum(sizes) // (context.model.examples or 1)
    return feedback_matrix(
        seed, name, rows, _units(context, context.model.analysis.group(name)), full_dtype(equation.type.dtype)
    )


def _random_projection(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    """For targets: its rows are known when there is a target."""
    name, seed = str(args[0]), int(args[1])
    units = _units(context, context.model.analysis.group(name))
    dtype = full_dtype(equation.type.dtype)
    return feedback_matrix(seed, name, _target_rows(context, dtype).shape[1], units, dtype)


def _readout_weight(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    assert context.step is not None
    return readout_weight(context.model, str(args[0]))(context.step.tape.values)


#: Ops of what a group shows.
_OF_SHOWN = ("through", "shown", "derivative", "shown_signal")


def check_feedback(model: LoweredModel, program: TraceProgram) -> None:
    """Refuse, when the model is compiled, a feedback that it has no place for."""
    for equation in program.equations:
        if equation.op == "error" and not any(v.aval.differentiable for v in model.analysis.model.outputs):
            raise UnsupportedError(
                f"{program.name} projects the error of the outputs, and none of them is a real or complex number.",
                got=", ".join(str(v.aval.dtype) for v in model.analysis.model.outputs) or "no output",
                expected="a floating-point output",
            )
        if equation.op == "readout_weight":
            readout_weight(model, equation.type.of)
        elif equation.op in _OF_SHOWN:
            _check_shown(model, equation)


def _check_shown(model: LoweredModel, equation: Equation) -> None:
    group, op = equation.type.of, equation.op
    seen = model.visible(group)
    otherwise = "use a rule with the true learning signal for these weights, such as d_rtrl."
    if not seen:
        raise UnsupportedError(
            f"group {group} shows nothing to the outputs within a step, so no signal of its own can reach it.",
            hint=otherwise,
        )
    if op == "derivative" and not any(one.of_new for one in seen):
        raise UnsupportedError(
            f"what group {group} shows depends on its old states alone, so it has no derivative by the new ones.",
            got=f"{equation.name} = derivative({group})",
            hint=otherwise,
        )
    if op == "shown_signal" and len(seen) > 1:
        raise UnsupportedError(
            f"group {group} shows several values, each with a learning signal of its own.",
            got=f"{len(seen)} values, and {equation.name} = shown_signal({group})",
            expected="one value, such as a spike, that all others read",
            hint=otherwise,
        )


def readout_weight(model: LoweredModel, name: str) -> Callable[[Mapping[int, Array]], Array]:
    """How to read, as ``[outputs, units]``, the weight by which a readout reads what a group shows."""
    group = model.analysis.group(name)
    body = model.analysis.split.body
    units = group.size // (model.examples or 1)
    outputs = {v for v in model.analysis.model.output_vars if isinstance(v, int)}
    for seen in model.visible(name):
        whole = seen.position.size == group.size and (seen.position.ravel() == np.arange(group.size)).all()
        for number in seen.readers:
            site = next((s for s in model.analysis.sites if s.operation == number), None)
            matrix = None if site is None or not whole else site.does.matrix_axes
            if site is None or matrix is None or not _reaches(body, site.y, outputs):
                continue
            weight, order = site.weight, (*matrix[0], *matrix[1])
            if math.prod(body.avals[weight].shape[a] for a in matrix[1]) == units:
                return lambda values: jnp.transpose(values[weight], order).reshape(-1, units)
    raise AlgorithmError(
        f"no readout weight reads group {name}, so no feedback matrix can follow it.",
        expected="a matrix from the group's units to the outputs",
        hint="use feedback='random' for this group, or per weight: algo={...}.",
    )


def _reaches(body: Any, start: int, outputs: set[int]) -> bool:
    """Whether outputs are made of a value one by one: by operations that keep its size."""
    reached, size = {start}, body.avals[start].size
    for operation in body.operations:
        if any(v in reached for v in operation.inputs if isinstance(v, int)):
            reached |= {v for v in operation.outputs if body.avals[v].size == size}
    return bool(reached & outputs)


def _project(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    vector, matrix = args
    group = context.model.analysis.group(equation.type.of)
    if vector.shape[1] != matrix.shape[0]:
        raise InputError(
            f"the feedback matrix of {group.name} has another number of rows than the vector has entries.",
            got=f"{vector.shape[1]} entries",
            expected=f"{matrix.shape[0]}",
        )
    return (vector @ matrix.astype(vector.dtype)).reshape(group.shape)


def _read(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    drive, matrix = args
    return (drive.reshape(-1, matrix.shape[1]) @ matrix.T.astype(drive.dtype)).astype(
        full_dtype(equation.type.dtype)
    )


def _spread(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
    (drive,) = args
    return (drive,) * len(context.model.analysis.group(equation.type.of).states)


def _through(new: bool) -> Callable[[Context, Equation, Sequence[Value]], Value]:
    def rule(context: Context, equation: Equation, args: Sequence[Value]) -> Value:
        (drive,) = args
        name = equation.type.of
        step = context.step
        assert step is not None
        total = step.pull_of_shown(name, _where_counted(context, drive))
        return step.of_new_states(name, total) if new else step.of_old_states(name, total)

    return rule


FEEDBACK: dict[str, Callable[[Any, Equation, Sequence[Value]], Value]] = {
    "error": _error,
    "target": _target,
    "modulator": _modulator,
    "reward": _reward,
    "of_example": _of_example,
    "by_example": _by_example,
    "weigh": _weigh,
    "mask": _mask,
    "constant": _constant,
    "shown": _shown,
    "derivative": _derivative,
    "read": _read,
    "spread": _spread,
    "random_feedback": _random_feedback,
    "random_projection": _random_projection,
    "readout_weight": _readout_weight,
    "project": _project,
    "through": _through(True),
    "through_old": _through(False),
}
