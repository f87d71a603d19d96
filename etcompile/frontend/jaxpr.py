"""From a jaxpr to a flat graph of operations: the only module that knows jax's internals.

A :class:`Graph` is what the rest of the compiler sees of a model: numbered variables, operations in program order,
each with its primitive, its parameters and the user's source line. Calls (``jit``, ``remat``, ``closed_call``) are
inlined, ``scan`` of fixed length is unrolled, ``cond`` becomes a selection between its inlined branches, and every
implicit broadcast of an element-wise operation is made explicit. What is left has no inner programs except
``custom_jvp_call``, ``custom_vjp_call``, ``while`` and primitives that nobody has seen before.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.core import trace_state_clean
from jax.core import Tracer

__all__ = [
    "Aval",
    "Constant",
    "Graph",
    "Operand",
    "Operation",
    "bind",
    "flatten_jaxpr",
    "in_transformation",
    "inner_jaxpr",
    "is_staged",
    "is_traced",
    "jvp_graph",
]

#: An unrolled scan may grow to this many operations; a longer one stays whole and is analysed as one operation.
UNROLL_LIMIT = 4096

_INLINED = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat",
    "remat2",
    "checkpoint",
    "core_closed_call",
    "run_state",
}
#: Never computed while compiling, though their operands are constant: broadcasts would only make large constants.
_KEPT = {"broadcast_in_dim", "while", "custom_vjp_call", "custom_jvp_call"}
_BROADCASTING = {
    "add", "sub", "mul", "div", "rem", "max", "min", "pow", "atan2", "nextafter", "and", "or", "xor", "eq", "ne", "lt",
    "le", "gt", "ge", "select_n", "clamp", "complex", "add_any", "shift_left", "shift_right_logical",
    "shift_right_arithmetic", "heaviside_surrogate_gradient",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Aval:
    """Shape and dtype of a variable."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def differentiable(self) -> bool:
        return bool(jnp.issubdtype(self.dtype, jnp.inexact))

    def __str__(self) -> str:
        return f"{short_dtype(self.dtype)}[{','.join(map(str, self.shape))}]"


def short_dtype(dtype: Any) -> str:
    """``float32`` as ``f32``, the way jaxprs print it."""
    name = str(dtype)
    for long, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c")):
        if name.startswith(long):
            return short + name[len(long) :]
    return name


def full_dtype(short: str) -> Any:
    """``f32`` as ``float32``."""
    for long, brief in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c")):
        if short.startswith(brief):
            return jnp.dtype(long + short[len(brief) :])
    raise ValueError(short)


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A value known when the model is compiled: a literal of the jaxpr or an array that the model closes over."""

    value: Any

    @property
    def aval(self) -> Aval:
        return _aval(self.value)


Operand = int | Constant


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One primitive application.

    Attributes
    ----------
    primitive : jax Primitive
    params : dict
        Parameters as the jaxpr holds them.
    inputs : tuple of int or Constant
    outputs : tuple of int
    source : str
        ``file:line`` in the user's code, or ``"?"``.
    """

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]
    source: str

    @property
    def name(self) -> str:
        return str(self.primitive.name)


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A flat program: ``inputs`` -> ``operations`` -> ``outputs``; variables are numbers with an :class:`Aval`."""

    avals: tuple[Aval, ...]
    inputs: tuple[int, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[Operand, ...]

    def aval(self, operand: Operand) -> Aval:
        return operand.aval if isinstance(operand, Constant) else self.avals[operand]

    def evaluate(self, *args: Any) -> list[Any]:
        """Run the graph on arrays or tracers."""
        env: dict[int, Any] = dict(zip(self.inputs, args, strict=True))
        for operation in self.operations:
            values = bind(operation, [read(env, operand) for operand in operation.inputs])
            env.update(zip(operation.outputs, values, strict=True))
        return [read(env, operand) for operand in self.outputs]


def is_traced(value: Any) -> bool:
    """Whether a value is known only inside of a transformation, such as ``jit``."""
    return isinstance(value, Tracer)


def in_transformation() -> bool:
    """Whether code runs under a transformation of JAX, such as ``jit`` or ``vmap``, rather than plainly."""
    return not trace_state_clean()


def is_staged() -> bool:
    """Whether what code does now is written down, to happen whenever the traced function runs: in ``jit`` or ``scan``."""
    return is_traced(jnp.zeros(()))


def read(env: dict[int, Any], operand: Operand) -> Any:
    return operand.value if isinstance(operand, Constant) else env[operand]


def bind(operation: Operation, values: Sequence[Any]) -> list[Any]:
    """Apply the operation's primitive to ``values``."""
    params = operation.primitive.get_bind_params(operation.params)
    result = operation.primitive.bind(*values, **params)
    return list(result) if operation.primitive.multiple_results else [result]


def _aval(value: Any) -> Aval:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return Aval(tuple(int(n) for n in value.shape), value.dtype)
    array = np.asarray(value)
    return Aval(array.shape, array.dtype)


# ----------------------------------------------------------------------------------------------------------------
# source lines


_PACKAGES = tuple(os.path.dirname(module.__file__ or "") + os.sep for module in (jax, np))
_LIBRARIES = tuple(
    os.sep + name + os.sep
    for name in ("brainstate", "saiunit", "brainunit", "braintools", "brainpy", "brainevent", "brainpy_state")
)
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def source_line(source_info: Any) -> str:
    """``file:line`` of the innermost frame in the user's own code; in a library's code if there is no other."""
    traceback = getattr(source_info, "traceback", None)
    if traceback is None:
        return "?"
    library = None
    for frame in traceback.frames:
        name = frame.file_name
        if name.startswith((*_PACKAGES, _HERE, "<")):
            continue
        text = f"{os.path.basename(name)}:{frame.line_num}"
        if any(part in name for part in _LIBRARIES):
            library = library or text
            continue
        if f"{os.sep}lib{os.sep}python" in name and "site-packages" not in name:
            continue
        return text if library is None else f"{text} ({library})"
    return library or "?"


# ----------------------------------------------------------------------------------------------------------------
# flattening


class _Builder:
    """Collects variables and operations while jaxprs are inlined into it."""

    def __init__(self) -> None:
        self.avals: list[Aval] = []
        self.operations: list[Operation] = []
        self.parameter_only: set[int] = set()

    def variable(self, aval: Aval) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def aval(self, operand: Operand) -> Aval:
        return operand.aval if isinstance(operand, Constant) else self.avals[operand]

    def emit(
        self, primitive: Any, params: dict, inputs: Sequence[Operand], avals: Sequence[Aval], source: str
    ) -> list[int]:
        outputs = tuple(self.variable(aval) for aval in avals)
        self.operations.append(Operation(primitive, params, tuple(inputs), outputs, source))
        if all(isinstance(i, Constant) or i in self.parameter_only for i in inputs):
            self.parameter_only.update(outputs)
        return list(outputs)

    def call(self, fn: Callable, inputs: Sequence[Operand], source: str) -> list[Operand]:
        """Inline an ordinary jax function, its operations filed under ``source``."""
        shapes = [jax.ShapeDtypeStruct(self.aval(i).shape, self.aval(i).dtype) for i in inputs]
        closed = jax.make_jaxpr(fn)(*shapes)
        return self.inline(closed, inputs, source)

    def inline(self, closed: Any, inputs: Sequence[Operand], source: str | None = None) -> list[Operand]:
        jaxpr, consts = closed.jaxpr, closed.consts
        env: dict[Any, Operand] = (
            dict(zip(jaxpr.constvars, map(Constant, consts), strict=True)) if consts else {}
        )
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def get(atom: Any) -> Operand:
            return Constant(atom.val) if isinstance(atom, jex_core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            where = source if source is not None else source_line(eqn.source_info)
            results = self.equation(eqn, [get(a) for a in eqn.invars], where, source)
            env.update(zip(eqn.outvars, results, strict=True))
        return [get(a) for a in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[Operand], where: str, source: str | None) -> list[Operand]:
        name = eqn.primitive.name
        if name in _INLINED:
            inner = inner_jaxpr(eqn.params)
            if inner is not None:
                return self.inline(inner, inputs, source)
        if name == "scan" and _unrolled_size(eqn) <= UNROLL_LIMIT:
            return self.unroll(eqn, inputs, where, source)
        if name == "cond" and not any(_closed(b).effects for b in eqn.params["branches"]):
            return self.select_branches(eqn, inputs, where, source)
        if name in _BROADCASTING:
            inputs = self.same_shape(inputs, where)
        avals = [Aval(tuple(v.aval.shape), v.aval.dtype) for v in eqn.outvars]
        return list(self.emit(eqn.primitive, dict(eqn.params), inputs, avals, where))

    def same_shape(self, inputs: list[Operand], where: str) -> list[Operand]:
        shapes = [self.aval(i).shape for i in inputs]
        shape = np.broadcast_shapes(*shapes)
        return [
            i
            if s == shape or (isinstance(i, Constant) and s == ())
            else self.call(lambda v: lax.broadcast_in_dim(v, shape, _trailing(v, shape)), [i], where)[0]
            for i, s in zip(inputs, shapes, strict=True)
        ]

    def unroll(self, eqn: Any, inputs: list[Operand], where: str, source: str | None) -> list[Operand]:
        length = eqn.params["length"]
        num_consts, num_carry = scan_signature(eqn.params)
        consts, carry, xs = (
            inputs[:num_consts],
            inputs[num_consts : num_consts + num_carry],
            inputs[num_consts + num_carry :],
        )
        steps = range(length - 1, -1, -1) if eqn.params["reverse"] else range(length)
        body = _closed(eqn.params["jaxpr"])
        collected: dict[int, list[Operand]] = {}
        for t in steps:
            slices = [self.call(lambda v, t=t: v[t], [x], where)[0] for x in xs]
            results = self.inline(body, [*consts, *carry, *slices], source)
            carry, collected[t] = results[:num_carry], results[num_carry:]
        stacked: list[Operand] = []
        for k, outvar in enumerate(eqn.outvars[num_carry:]):
            if length == 0:
                stacked.append(Constant(jnp.zeros(outvar.aval.shape, outvar.aval.dtype)))
            else:
                stacked += self.call(
                    lambda *vs: jnp.stack(vs), [collected[t][k] for t in range(length)], where
                )
        return [*carry, *stacked]

    def select_branches(
        self, eqn: Any, inputs: list[Operand], where: str, source: str | None
    ) -> list[Operand]:
        """Run every branch and select.

        Each differentiable input enters a branch through a selection that passes cotangents only where the branch is
        taken, so that an infinite derivative in a branch not taken stays there. Expressions of parameters alone enter as
        they are: they keep their own traces.
        """
        index, *operands = inputs
        branches = [_closed(b) for b in eqn.params["branches"]]
        count = len(branches)
        (index,) = self.call(lambda i: jnp.clip(jnp.asarray(i, jnp.int32), 0, count - 1), [index], where)
        results = []
        for k, branch in enumerate(branches):

            def gate(i: Any, v: Any, k: int = k) -> Any:
                return jnp.where(i == k, v, lax.stop_gradient(v))

            entered = [
                v
                if isinstance(v, Constant) or v in self.parameter_only or not self.aval(v).differentiable
                else self.call(gate, [index, v], where)[0]
                for v in operands
            ]
            results.append(self.inline(branch, entered, source))

        def choose(i: Any, *cases: Any) -> Any:
            chosen = cases[0]
            for k, case in enumerate(cases[1:], 1):
                chosen = jnp.where(i == k, case, chosen)
            return chosen

        return [self.call(choose, [index, *cases], where)[0] for cases in zip(*results, strict=True)]


def _trailing(v: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(len(shape) - v.ndim, len(shape)))


def _closed(jaxpr: Any) -> Any:
    """A closed jaxpr, whichever of the two classes (one since jax 0.11) this is."""
    return jaxpr if hasattr(jaxpr, "consts") else jex_core.ClosedJaxpr(jaxpr, ())


def inner_jaxpr(params: dict[str, Any]) -> Any:
    """The closed jaxpr of a call-like primitive, or None."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in params:
            return _closed(params[key])
    return None


def scan_signature(params: dict[str, Any]) -> tuple[int, int]:
    """Number of constants and of carried values of a ``scan``."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def _unrolled_size(eqn: Any) -> int:
    def count(closed: Any) -> int:
        total = 0
        for inner in closed.jaxpr.eqns:
            sub = (
                inner_jaxpr(inner.params)
                if inner.primitive.name in _INLINED or inner.primitive.name == "scan"
                else None
            )
            times = inner.params["length"] if inner.primitive.name == "scan" else 1
            total += 1 if sub is None else times * count(sub)
        return total

    return eqn.params["length"] * max(1, count(_closed(eqn.params["jaxpr"])))


def run_jaxpr(closed: Any, *args: Any) -> list[Any]:
    """Evaluate a closed jaxpr; its operations keep their source lines when this is traced again."""
    return list(jex_core.jaxpr_as_fun(closed)(*args))


def flatten_jaxpr(closed: Any, n_params: int = 0) -> Graph:
    """Flatten a closed jaxpr, whose first ``n_params`` inputs are parameters; operations that nothing needs are dropped."""
    builder = _Builder()
    inputs = tuple(builder.variable(Aval(tuple(v.aval.shape), v.aval.dtype)) for v in closed.jaxpr.invars)
    builder.parameter_only.update(inputs[:n_params])
    outputs = builder.inline(closed, inputs)
    return _without_dead(
        _folded(Graph(tuple(builder.avals), inputs, tuple(builder.operations), tuple(outputs)))
    )


def _folded(graph: Graph) -> Graph:
    """Compute the operations that have constant operands only; index rules then see constant indices."""
    known: dict[int, Constant] = {}
    kept = []

    def get(operand: Operand) -> Operand:
        return operand if isinstance(operand, Constant) else known.get(operand, operand)

    with jax.ensure_compile_time_eval():
        for operation in graph.operations:
            inputs = tuple(get(i) for i in operation.inputs)
            foldable = (
                all(isinstance(i, Constant) for i in inputs)
                and operation.outputs
                and not has_effects(operation)
            )
            if foldable and (operation.name not in _KEPT or _small_broadcast(graph, operation)):
                values = bind(operation, [i.value for i in inputs if isinstance(i, Constant)])
                known.update(zip(operation.outputs, map(Constant, values), strict=True))
            else:
                kept.append(dataclasses.replace(operation, inputs=inputs))
    return dataclasses.replace(graph, operations=tuple(kept), outputs=tuple(get(o) for o in graph.outputs))


def _small_broadcast(graph: Graph, operation: Operation) -> bool:
    """Broadcast indices are wanted as constants; large arrays of numbers are not."""
    aval = graph.avals[operation.outputs[0]]
    return operation.name == "broadcast_in_dim" and (not aval.differentiable or aval.size <= 256)


def has_effects(operation: Operation) -> bool:
    """Whether an operation does something beside its results (prints, checks a value)."""
    if operation.params.get("effect") or operation.params.get("callback") or not operation.outputs:
        return True
    return any(_closed(b).effects for b in operation.params.get("branches", ()))


def _without_dead(graph: Graph) -> Graph:
    needed = {v for v in graph.outputs if not isinstance(v, Constant)}
    kept = []
    for operation in reversed(graph.operations):
        if has_effects(operation) or any(v in needed for v in operation.outputs):
            kept.append(operation)
            needed.update(v for v in operation.inputs if not isinstance(v, Constant))
    return dataclasses.replace(graph, operations=tuple(reversed(kept)))


def with_copies(graph: Graph, positions: Sequence[int]) -> Graph:
    """Give each of the outputs at ``positions`` a variable of its own, computed by an operation.

    A new hidden state is then never the same variable as another output, an input or a constant.
    """
    builder = _Builder()
    builder.avals, builder.operations = list(graph.avals), list(graph.operations)
    outputs = list(graph.outputs)
    computed = {v for operation in graph.operations for v in operation.outputs}
    seen: set[int] = set()
    for k in positions:
        operand = outputs[k]
        if isinstance(operand, Constant) or operand not in computed or operand in seen:
            (operand,) = builder.emit(_copy_p(), {}, [operand], [builder.aval(operand)], "?")
        seen.add(operand)
        outputs[k] = operand
    return dataclasses.replace(
        graph, avals=tuple(builder.avals), operations=tuple(builder.operations), outputs=tuple(outputs)
    )


def _copy_p() -> Any:
    return jex_core.primitives.copy_p


def splice(
    graph: Graph,
    before: Callable[..., Sequence[Any]],
    inputs: Sequence[Aval],
    after: Callable[..., Sequence[Any]],
) -> Graph:
    """The graph of ``after(*graph(*before(*inputs)))``, where ``before`` and ``after`` are ordinary jax functions."""
    builder = _Builder()
    new_inputs = [builder.variable(a) for a in inputs]
    args = builder.call(lambda *a: list(before(*a)), new_inputs, "?")
    env: dict[int, Operand] = dict(zip(graph.inputs, args, strict=True))

    def get(operand: Operand) -> Operand:
        return operand if isinstance(operand, Constant) else env[operand]

    for operation in graph.operations:
        outputs = builder.emit(
            operation.primitive,
            operation.params,
            [get(i) for i in operation.inputs],
            [graph.avals[v] for v in operation.outputs],
            operation.source,
        )
        env.update(zip(operation.outputs, outputs, strict=True))
    results = builder.call(lambda *a: list(after(*a)), [get(o) for o in graph.outputs], "?")
    return Graph(tuple(builder.avals), tuple(new_inputs), tuple(builder.operations), tuple(results))


def jvp_graph(operation: Operation, avals: Sequence[Aval], wrt: Sequence[int]) -> Graph | None:
    """The tangent map of one operation as a graph, or None where it has no JVP rule.

    Inputs are all primal operands, then the tangents of the operands in ``wrt``; outputs are the tangents of the
    differentiable outputs.
    """

    def tangent(*args: Any) -> list[Any]:
        primals, tangents = args[: len(avals)], args[len(avals) :]

        def fn(*moving: Any) -> list[Any]:
            values = list(primals)
            for k, v in zip(wrt, moving, strict=True):
                values[k] = v
            return [o for o in bind(operation, values) if jnp.issubdtype(o.dtype, jnp.inexact)]

        return jax.jvp(fn, tuple(primals[k] for k in wrt), tuple(tangents))[1]

    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in itertools.chain(avals, (avals[k] for k in wrt))]
    try:
        return flatten_jaxpr(jax.make_jaxpr(tangent)(*shapes))
    except (
        Exception
    ):  # no JVP rule, or one that fails on these types: the caller treats the operation as opaque
        return None


def vjp_graph(operation: Operation, avals: Sequence[Aval], wrt: Sequence[int]) -> Graph | None:
    """The cotangent map of one operation as a graph, or None where it cannot be transposed.

    Inputs are all primal operands, then the cotangents of the differentiable outputs; outputs are the cotangents of the
    operands in ``wrt``.
    """

    def fn(primals: Sequence[Any], *moving: Any) -> list[Any]:
        values = list(primals)
        for k, v in zip(wrt, moving, strict=True):
            values[k] = v
        return [o for o in bind(operation, values) if jnp.issubdtype(o.dtype, jnp.inexact)]

    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    try:
        outs = jax.eval_shape(lambda *p: fn(p, *[p[k] for k in wrt]), *shapes)

        def cotangents(*args: Any) -> list[Any]:
            primals, cts = args[: len(avals)], args[len(avals) :]
            return list(jax.vjp(lambda *m: fn(primals, *m), *[primals[k] for k in wrt])[1](list(cts)))

        return flatten_jaxpr(jax.make_jaxpr(cotangents)(*shapes, *outs))
    except Exception:  # not differentiable backwards: the caller treats the operation as opaque
        return None
