"""From a jaxpr to a flat graph of operations: the only module that knows jax's internals.

A :class:`Graph` is what the rest of the compiler sees of a model: numbered variables, operations in program order,
each with its primitive, its parameters and the user's source line. Calls (``jit``, ``remat``, ``closed_call``) are
inlined, a short ``scan`` is unrolled and a longer one becomes a :class:`~etcompile.frontend.loops.Loop` with a flat body,
``cond`` becomes a selection between its inlined branches, and every implicit broadcast of an element-wise operation is made
explicit. Primitives of other libraries are replaced by what they compute, with the derivative that they declare. What is left
has no inner programs except loops, ``custom_jvp_call``, ``custom_vjp_call``, ``while`` and primitives that have no
implementation in jax.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.config import debug_infs, debug_nans, enable_x64
from jax._src.core import axis_env_state, eval_trace, top_axis_env, trace_ctx, trace_state_strong_ref
from jax.core import Tracer, eval_jaxpr
from jax.interpreters import ad, batching, mlir

from etcompile.frontend.folding import LIMIT, folded
from etcompile.frontend.implementations import has_implementation, traced_implementation
from etcompile.frontend.known_indices import with_known_indices
from etcompile.frontend.loops import Loop, Use, stopped, within
from etcompile.frontend.simple_forms import simple_form
from etcompile.frontend.user_code import user_line

__all__ = [
    "Aval",
    "Constant",
    "Graph",
    "GraphBuilder",
    "Operand",
    "Operation",
    "backward_rule",
    "bind",
    "current_trace",
    "flatten_jaxpr",
    "function_name",
    "in_transformation",
    "inner_jaxpr",
    "is_staged",
    "is_traced",
    "jvp_graph",
    "needed_operations",
    "run_jaxpr",
    "run_operations",
    "staged",
    "variables",
]

#: A scan that grows to no more than this many operations is unrolled; a longer one stays a loop.
UNROLL_LIMIT = 128

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
    "custom_vmap_call",
    "composite",
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
_T = TypeVar("_T")


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
    loop : Loop or None
        What a loop does in each round.
    """

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]
    source: str
    loop: Loop | None = None

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

    @functools.cached_property
    def made_by(self) -> Mapping[int, int]:
        """The number of the operation that makes a variable; inputs are not in it."""
        return {v: number for number, operation in enumerate(self.operations) for v in operation.outputs}

    @functools.cached_property
    def read_by(self) -> Mapping[int, tuple[int, ...]]:
        """Numbers of the operations that read a variable, in order; what nobody reads is not in it."""
        found: dict[int, dict[int, None]] = {}
        for number, operation in enumerate(self.operations):
            for v in operation.inputs:
                if not isinstance(v, Constant):
                    found.setdefault(v, {})[number] = None
        return {v: tuple(numbers) for v, numbers in found.items()}

    def evaluate(
        self, *args: Any, known: Mapping[int, Any] | None = None, cuts: Mapping[Use, Any] | None = None
    ) -> list[Any]:
        """Run the graph on arrays or tracers; with ``known``, results of what has effects, without these effects.

        No derivative passes uses at the elements that ``cuts`` has for them.
        """
        env: dict[int, Any] = dict(zip(self.inputs, args, strict=True))
        env.update(known or {})
        for number, operation in enumerate(self.operations):
            if known is not None:
                if all(v in known for v in operation.outputs):
                    continue
                operation = silenced(operation)
            values = [read(env, operand) for operand in operation.inputs]
            if operation.name == "while" or without_derivative(operation):  # jax would refuse to ask
                values = [lax.stop_gradient(v) for v in values]
            if cuts:
                masks = [cuts.get((number, k)) for k in range(len(values))]
                values = [v if m is None else stopped(v, m) for v, m in zip(values, masks, strict=True)]
            env.update(zip(operation.outputs, bind(operation, values, within(cuts, number)), strict=True))
        return [read(env, operand) for operand in self.outputs]


def is_traced(value: Any) -> bool:
    """Whether a value is known only inside of a transformation, such as ``jit``."""
    return isinstance(value, Tracer)


def in_transformation() -> bool:
    """Whether code runs under a transformation of JAX, such as ``jit`` or ``vmap``, rather than plainly.

    It is what ``jax.core.trace_state_clean`` denies, which calls six functions of Python; a call of a small step feels these.
    """
    trace = trace_state_strong_ref.value
    return (trace is not eval_trace and trace is not None) or axis_env_state.value is not top_axis_env


def configuration() -> tuple[bool, bool, bool]:
    """Whether JAX makes numbers of 64 bits now, and whether it looks into results for nan and for inf."""
    return enable_x64.value, debug_nans.value, debug_infs.value


def looks_into_results() -> bool:
    """Whether JAX looks for nan or inf: it then runs a function again on what it was given, which must not be given away."""
    return debug_nans.value or debug_infs.value


def current_trace() -> weakref.ref:
    """What traces code now, plain running included: the same one for all of a function, another one for a loop's body."""
    return weakref.ref(trace_ctx.trace)


def is_staged() -> bool:
    """Whether what code does now is written down, to happen whenever the traced function runs: in ``jit`` or ``scan``."""
    return is_traced(jnp.zeros(()))


def read(env: dict[int, Any], operand: Operand) -> Any:
    return operand.value if isinstance(operand, Constant) else env[operand]


#: Primitives of functions whose derivative is a function of the user.
_CUSTOM_DERIVATIVE = ("custom_jvp_call", "custom_vjp_call")


def bind(operation: Operation, values: Sequence[Any], cuts: Mapping[Use, Any] | None = None) -> list[Any]:
    """Apply the operation's primitive to ``values``; ``cuts`` are uses in the body of a loop."""
    if operation.loop is not None:
        return operation.loop.run(values, cuts)
    if operation.name == "while":  # no credit passes it, also where others differentiate
        values = [lax.stop_gradient(v) for v in values]
    if (
        operation.name in _CUSTOM_DERIVATIVE
    ):  # user code follows, which may index a constant by a traced number
        values = [jnp.asarray(v) if isinstance(v, np.ndarray) else v for v in values]
    params = operation.primitive.get_bind_params(operation.params)
    result = operation.primitive.bind(*values, **params)
    return list(result) if operation.primitive.multiple_results else [result]


def run_operations(operations: Iterable[Operation], env: dict[int, Any]) -> dict[int, Any]:
    """Values with those that operations make of them, added to ``env``."""
    for operation in operations:
        results = bind(operation, [read(env, v) for v in operation.inputs])
        env.update(zip(operation.outputs, results, strict=True))
    return env


def needed_operations(
    operations: Sequence[Operation],
    results: Iterable[Operand],
    kept: Callable[[Operation], bool] = lambda operation: False,
) -> tuple[Operation, ...]:
    """Those that make results, or what they are made of; and those that are ``kept`` in any case, with what these read."""
    needed, found = set(variables(results)), []
    for operation in reversed(operations):
        if kept(operation) or not needed.isdisjoint(operation.outputs):
            found.append(operation)
            needed.update(variables(operation.inputs))
    return tuple(reversed(found))


def variables(operands: Iterable[Operand]) -> list[int]:
    """Those operands that are no constants."""
    return [v for v in operands if isinstance(v, int)]


def function_name(operation: Operation) -> str:
    """Name of a primitive; of ``jax.custom_jvp`` and ``jax.custom_vjp`` that of the function."""
    called = operation.params.get("call_jaxpr")
    if called is None or operation.name not in _CUSTOM_DERIVATIVE:
        return operation.name
    return called.jaxpr.debug_info.func_name


def _literal(atom: Any) -> Any:
    """The value of a literal: what is a plain number of Python in the jaxpr has a shape and a dtype here."""
    return atom.val if hasattr(atom.val, "ndim") else np.asarray(atom.val, atom.aval.dtype)


def _aval(value: Any) -> Aval:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return Aval(tuple(int(n) for n in value.shape), value.dtype)
    array = np.asarray(value)
    return Aval(array.shape, array.dtype)


# ----------------------------------------------------------------------------------------------------------------
# source lines


#: The first frame here called the model; what is further out called the compiler.
_FRONTEND = os.path.dirname(os.path.abspath(__file__)) + os.sep


#: ``(file, line)``, innermost first.
_Frames = tuple[tuple[str, int], ...]


def source_line(source_info: Any) -> str:
    """``file:line`` of the innermost frame in the user's own code; in a library's code if there is no other."""
    return user_line(_frames(source_info)) or "?"


def _frames(source_info: Any) -> _Frames:
    found = getattr(source_info, "traceback", None)
    frames = [] if found is None else [(frame.file_name, frame.line_num) for frame in found.frames]
    return tuple(itertools.takewhile(lambda frame: not frame[0].startswith(_FRONTEND), frames))


# ----------------------------------------------------------------------------------------------------------------
# flattening

#: What is looked for inside of another library's primitive: nothing, so that it stays; what it computes; or that with the
#: derivative that the primitive declares.
_Inside = Literal["nothing", "values", "derivatives"]


class GraphBuilder:
    """Writes a graph: collects variables and operations while jaxprs are inlined into it."""

    def __init__(self, inside: _Inside = "derivatives", last_rounds_apart: bool = True) -> None:
        self.inside: _Inside = inside
        self.seen: dict[int, tuple[Any, _Insight | None]] = {}
        self.last_rounds_apart = last_rounds_apart
        self.avals: list[Aval] = []
        self.operations: list[Operation] = []
        self.parameter_only: set[int] = set()
        #: Where the call being inlined stands: jax may know of an operation inside no more than what lies inside.
        self.around: _Frames = ()
        #: The name that its ``jax.named_scope`` has; it stands for the line where no line is the user's.
        self.scope = ""
        self._lines: dict[tuple[Any, _Frames], tuple[str | None, _Frames]] = {}

    def variable(self, aval: Aval) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def aval(self, operand: Operand) -> Aval:
        return operand.aval if isinstance(operand, Constant) else self.avals[operand]

    def emit(
        self,
        primitive: Any,
        params: dict,
        inputs: Sequence[Operand],
        avals: Sequence[Aval],
        source: str,
        loop: Loop | None = None,
    ) -> list[int]:
        outputs = tuple(self.variable(aval) for aval in avals)
        self.operations.append(Operation(primitive, params, tuple(inputs), outputs, source, loop))
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
            return Constant(_literal(atom)) if isinstance(atom, jex_core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [get(a) for a in eqn.invars]
            if source is not None:
                results = self.equation(eqn, operands, source, source)
            else:
                outside = self.around, self.scope
                where = self.place(eqn.source_info)
                results = self.equation(eqn, operands, where, None)
                self.around, self.scope = outside
            env.update(zip(eqn.outvars, results, strict=True))
        return [get(a) for a in jaxpr.outvars]

    def place(self, source_info: Any) -> str:
        """The line of an operation; ``around`` and ``scope`` become what they are for operations inside of it."""
        key = getattr(source_info, "traceback", None), self.around
        if key not in self._lines:
            frames = (*_frames(source_info), *self.around)
            self._lines[key] = user_line(frames), frames
        line, self.around = self._lines[key]
        if line is None:
            self.scope = str(getattr(source_info, "name_stack", "")) or self.scope
        return line or self.scope or "?"

    def equation(self, eqn: Any, inputs: list[Operand], where: str, source: str | None) -> list[Operand]:
        name = eqn.primitive.name
        if name in _INLINED:
            inner = inner_jaxpr(eqn.params)
            if inner is not None:
                return self.inline(inner, inputs, source)
        if name == "scan" and (_unrolled_size(eqn) <= UNROLL_LIMIT or eqn.params["length"] <= 2):
            return self.unroll(eqn, inputs, where, source)
        if name == "scan":
            return self.loop(eqn, inputs, where, source)
        if name == "cond" and not any(_closed(b).effects for b in eqn.params["branches"]):
            return self.select_branches(eqn, inputs, where, source)
        if name in _BROADCASTING:
            inputs = self.same_shape(inputs, where)
        form = simple_form(eqn, [v.value if isinstance(v, Constant) else None for v in inputs])
        if form is not None:
            return self.call(form, inputs, where)
        if name == "custom_linear_solve":
            inputs = self.solved_as_one(eqn, inputs, where)
        elif self.inside != "nothing":
            found = self.look_inside(eqn, inputs, where)
            if found is not None:
                return found
        avals = [Aval(tuple(v.aval.shape), v.aval.dtype) for v in eqn.outvars]
        if not any(a.differentiable for a in avals) and all(isinstance(i, Constant) for i in inputs):
            # indices at once: what a sparse product is depends on them
            operation = Operation(
                eqn.primitive, dict(eqn.params), tuple(inputs), tuple(range(len(avals))), where
            )
            values = _computed(operation, avals)
            if values is not None:
                return list(values)
        return list(self.emit(eqn.primitive, dict(eqn.params), inputs, avals, where))

    def look_inside(self, eqn: Any, inputs: list[Operand], where: str) -> list[Operand] | None:
        """Inline what another library's primitive computes; None where that cannot be known."""
        if id(eqn) not in self.seen:  # the body of an unrolled scan comes by many times
            operation = Operation(eqn.primitive, dict(eqn.params), tuple(inputs), (), where)
            avals = [self.aval(i) for i in inputs]
            self.seen[id(eqn)] = eqn, _known_insight(operation, avals, self.inside)
        insight = self.seen[id(eqn)][1]
        return None if insight is None else self.inline_insight(insight, inputs, where)

    def inline_insight(self, insight: _Insight, inputs: Sequence[Operand], where: str) -> list[Operand]:
        def still(operand: Operand) -> Operand:
            if isinstance(operand, Constant) or not self.aval(operand).differentiable:
                return operand
            return self.call(lax.stop_gradient, [operand], where)[0]

        entered = [still(v) if k in insight.own else v for k, v in enumerate(inputs)]
        values = self.inline(insight.implementation, entered, where)
        if insight.tangent is None:
            return values
        moved = self.inline_graph(
            insight.tangent, [*map(still, inputs), *[inputs[k] for k in insight.moving]], where
        )
        linear = iter(moved)
        return [
            self.emit(declared_derivative_p, {}, [value, next(linear)], [self.aval(value)], where)[0]
            if self.aval(value).differentiable
            else value
            for value in values
        ]

    def inline_graph(self, graph: Graph, inputs: Sequence[Operand], where: str) -> list[Operand]:
        env: dict[int, Operand] = dict(zip(graph.inputs, inputs, strict=True))

        def get(operand: Operand) -> Operand:
            return operand if isinstance(operand, Constant) else env[operand]

        for operation in graph.operations:
            avals = [graph.avals[v] for v in operation.outputs]
            outputs = self.emit(
                operation.primitive, operation.params, list(map(get, operation.inputs)), avals, where
            )
            env.update(zip(operation.outputs, outputs, strict=True))
        return [get(o) for o in graph.outputs]

    def solved_as_one(self, eqn: Any, inputs: list[Operand], where: str) -> list[Operand]:
        """Operands of a linear solve. Its derivative is that of the product which it solves for: its factors have none."""
        lengths = eqn.params["const_lengths"]
        product, factors = lengths.matvec, sum(lengths)
        return [
            v
            if not product <= k < factors or isinstance(v, Constant) or not self.aval(v).differentiable
            else self.call(lax.stop_gradient, [v], where)[0]
            for k, v in enumerate(inputs)
        ]

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

    def loop(self, eqn: Any, inputs: list[Operand], where: str, source: str | None) -> list[Operand]:
        """Keep a scan as a loop with a flat body.

        A new state is a variable of its own, and credit stops at it or goes through it. Where a round reads the values that
        it carries on, the last round therefore stands behind the loop, so that they are variables there.
        """
        num_consts, num_carry = scan_signature(eqn.params)
        m, length, reverse = num_consts + num_carry, eqn.params["length"], eqn.params["reverse"]
        closed = _closed(eqn.params["jaxpr"])
        body, order, numbers, constants, reads_new = self.body_of(
            closed, inputs, num_consts, num_carry, source
        )
        apart = self.last_rounds_apart and reads_new
        rounds = length - 1 if apart else length
        entered = list(inputs)
        if apart:
            start = 1 if reverse else 0
            for k in range(m, len(inputs)):
                entered[k] = self.call(lambda v: v[start : start + rounds], [inputs[k]], where)[0]
        avals = [Aval(tuple(v.aval.shape), v.aval.dtype) for v in eqn.outvars]
        avals[num_carry:] = [Aval((rounds, *a.shape[1:]), a.dtype) for a in avals[num_carry:]]
        carried = sum(k < num_carry for k in numbers)
        found = self.emit(
            eqn.primitive,
            {"length": rounds, "reverse": reverse},
            [entered[k] for k in order],
            [avals[k] for k in numbers],
            where,
            Loop(body, rounds, reverse, constants, carried),
        )
        full: dict[int, Operand] = dict(enumerate(inputs[num_consts:m]))
        full.update(zip(numbers, found, strict=True))
        results = [full[k] for k in range(len(avals))]
        if not apart:
            return results
        at = 0 if reverse else length - 1
        slices = [self.call(lambda v: v[at], [x], where)[0] for x in inputs[m:]]
        last = self.inline(closed, [*inputs[:num_consts], *results[:num_carry], *slices], source)

        def together(all_before: Any, now: Any) -> Any:
            return jnp.concatenate([now[None], all_before] if reverse else [all_before, now[None]])

        stacked = [
            self.call(together, [before, now], where)[0]
            for before, now in zip(results[num_carry:], last[num_carry:], strict=True)
        ]
        return [*last[:num_carry], *stacked]

    def body_of(
        self, closed: Any, inputs: list[Operand], num_consts: int, num_carry: int, source: str | None
    ) -> tuple[Graph, list[int], list[int], int, bool]:
        """The body of a loop over ``closed`` as a graph.

        A carried value that no round changes is a constant of the loop, and constants of the model are constants of the body.
        So there come with it: which of the inputs the loop reads, and which of its results it makes, how many of the inputs
        are the same in all rounds, and whether a round reads what it carries on.
        """
        m = num_consts + num_carry
        fixed = list(range(num_consts))
        while True:
            inner = GraphBuilder(self.inside, last_rounds_apart=False)
            inner.around, inner.scope = self.around, self.scope
            entered = [
                inputs[k]
                if k in fixed and isinstance(inputs[k], Constant)
                else inner.variable(Aval(tuple(v.aval.shape), v.aval.dtype))
                for k, v in enumerate(closed.jaxpr.invars)
            ]
            inner.parameter_only.update(
                v for k in fixed if isinstance(v := entered[k], int) and inputs[k] in self.parameter_only
            )
            results = inner.inline(closed, entered, source)
            same = [
                k for k in range(num_consts, m) if results[k - num_consts] == entered[k] and k not in fixed
            ]
            if not same:
                break
            fixed += same
        constants = [k for k in fixed if not isinstance(entered[k], Constant)]
        changed = [k for k in range(num_consts, m) if k not in fixed]
        order = [*constants, *changed, *range(m, len(inputs))]
        numbers = [*(k - num_consts for k in changed), *range(num_carry, len(results))]
        graph = simplified(
            Graph(
                tuple(inner.avals),
                tuple(v for k in order if isinstance(v := entered[k], int)),
                tuple(inner.operations),
                tuple(results[k] for k in numbers),
            )
        )
        new = {
            v
            for v in graph.outputs[: len(changed)]
            if isinstance(v, int) and graph.avals[v].differentiable and v not in graph.inputs
        }
        reads_new = any(graph.outputs.count(v) > 1 for v in new) or any(
            v in new for operation in graph.operations for v in operation.inputs
        )
        return with_copies(graph, range(len(numbers))), order, numbers, len(constants), reads_new

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
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
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


def run_jaxpr(closed: Any, *args: Any, consts: Sequence[Any] | None = None) -> list[Any]:
    """Evaluate a closed jaxpr, with other values of its constants if they are given.

    Its operations keep their source lines when this is traced again. A result that is a number written in the jaxpr is an array
    like the others.
    """
    found = (
        jex_core.jaxpr_as_fun(closed)(*args) if consts is None else eval_jaxpr(closed.jaxpr, consts, *args)
    )
    outs = closed.jaxpr.outvars
    return [
        v if hasattr(v, "shape") else jnp.asarray(v, out.aval.dtype)
        for v, out in zip(found, outs, strict=True)
    ]


def staged(fn: Callable, *args: Any) -> tuple[Graph, Any]:
    """What JAX traces of a function of these shapes, operation by operation, and the tree of its result with shapes.

    Nothing is inlined or left out. Arrays that the function closes over are constants, traced ones as well.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    number: dict[Any, Operand] = {}
    avals: list[Aval] = []

    def variable(v: Any) -> int:
        number[v] = len(avals)
        avals.append(Aval(tuple(v.aval.shape), v.aval.dtype))
        return len(avals) - 1

    def operand(v: Any) -> Operand:
        return Constant(v.val) if isinstance(v, jex_core.Literal) else number[v]

    number.update(
        (v, Constant(value)) for v, value in zip(closed.jaxpr.constvars, closed.consts, strict=True)
    )
    inputs = tuple(map(variable, closed.jaxpr.invars))
    operations = tuple(
        Operation(e.primitive, e.params, tuple(map(operand, e.invars)), tuple(map(variable, e.outvars)), "?")
        for e in closed.jaxpr.eqns
    )
    return Graph(tuple(avals), inputs, operations, tuple(map(operand, closed.jaxpr.outvars))), shapes


def inputs_used(closed: Any) -> set[int]:
    """Which inputs of a closed jaxpr anything in it reads, by number."""
    read = {v for eqn in closed.jaxpr.eqns for v in eqn.invars if not isinstance(v, jex_core.Literal)}
    read.update(v for v in closed.jaxpr.outvars if not isinstance(v, jex_core.Literal))
    return {k for k, v in enumerate(closed.jaxpr.invars) if v in read}


def flatten_jaxpr(closed: Any, n_params: int = 0, inside: _Inside = "derivatives") -> Graph:
    """Flatten a closed jaxpr, whose first ``n_params`` inputs are parameters; operations that nothing needs are dropped."""
    builder = GraphBuilder(inside)
    inputs = tuple(builder.variable(Aval(tuple(v.aval.shape), v.aval.dtype)) for v in closed.jaxpr.invars)
    builder.parameter_only.update(inputs[:n_params])
    outputs = builder.inline(closed, inputs)
    return simplified(Graph(tuple(builder.avals), inputs, tuple(builder.operations), tuple(outputs)))


def simplified(graph: Graph) -> Graph:
    """A graph without the operations that nothing needs, those on constants done."""
    return _without_dead(_folded(graph))


def _folded(graph: Graph) -> Graph:
    """Compute the operations that have constant operands only; index rules then see constant indices."""
    known: dict[int, Constant] = {}
    kept = []

    def get(operand: Operand) -> Operand:
        return operand if isinstance(operand, Constant) else known.get(operand, operand)

    for operation in graph.operations:
        operation = dataclasses.replace(operation, inputs=tuple(get(i) for i in operation.inputs))
        values = _computed(operation, [graph.avals[v] for v in operation.outputs])
        if values is None:
            kept.append(_with_known_indices(operation, graph))
        else:
            known.update(zip(operation.outputs, values, strict=True))
    return dataclasses.replace(graph, operations=tuple(kept), outputs=tuple(get(o) for o in graph.outputs))


#: Operations whose second operand holds indices into the first.
_INDEXED = frozenset(
    {"gather", "scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max", "scatter-sub"}
)


def _with_known_indices(operation: Operation, graph: Graph) -> Operation:
    if operation.name not in _INDEXED:
        return operation
    indices = operation.inputs[1]
    if not isinstance(indices, Constant) or is_traced(indices.value):
        return operation
    shapes = [graph.aval(v).shape for v in operation.inputs]
    params = with_known_indices(operation.name, operation.params, shapes, indices.value)
    return dataclasses.replace(operation, params=params)


def _computed(operation: Operation, avals: Sequence[Aval]) -> list[Constant] | None:
    """The results of an operation on constants; None where it is not one, or must stay."""
    values = [i.value for i in operation.inputs if isinstance(i, Constant)]
    if len(values) < len(operation.inputs) or not operation.outputs or has_effects(operation):
        return None
    if operation.name in _KEPT and not _small_broadcast(operation, avals):
        return None
    return list(map(Constant, computed(operation, values, avals)))


def computed(
    operation: Operation, values: Sequence[Any], avals: Sequence[Aval], limit: int | None = LIMIT
) -> list[Any]:
    """The results of an operation on known values, at once; by numpy where it gives the same.

    ``avals`` are those of the results; arrays of more elements than ``limit`` are left to JAX.
    """
    if not any(map(is_traced, values)):
        known = folded(operation.name, operation.params, values, avals, limit)
        if known is not None:
            return known
    with jax.ensure_compile_time_eval():
        return bind(operation, values)


def _small_broadcast(operation: Operation, avals: Sequence[Aval]) -> bool:
    """Broadcast indices are wanted as constants; large arrays of numbers are not."""
    (aval, *_) = avals
    return operation.name == "broadcast_in_dim" and (not aval.differentiable or aval.size <= 256)


def has_effects(operation: Operation) -> bool:
    """Whether an operation does something beside its results (prints, checks a value)."""
    if operation.params.get("effect") or operation.params.get("callback") or not operation.outputs:
        return True
    if operation.loop is not None:
        return any(map(has_effects, operation.loop.body.operations))
    return bool(_effects(operation.params))


def calls_out(operation: Operation) -> bool:
    """Whether an operation gets its results from outside, so that it must not be done again to have them."""
    asks = has_effects(operation) and without_derivative(operation)
    return bool(operation.outputs) and (asks or asks_inside(operation))


def asks_inside(operation: Operation) -> bool:
    """Whether an inner program, of a condition or of a loop, gets values from outside: to do it again is to ask again."""
    if operation.loop is not None:
        return any(map(calls_out, operation.loop.body.operations))
    return any(map(_asks, inner_programs(operation.params)))


def _asks(program: Any) -> bool:
    if not getattr(program, "effects", None):
        return False
    equations = getattr(program, "jaxpr", program).eqns
    return any(
        eqn.outvars
        and eqn.effects
        and (eqn.params.get("callback") or any(map(_asks, inner_programs(eqn.params))))
        for eqn in equations
    )


def silenced(operation: Operation) -> Operation:
    """The operation without the prints and calls to the host, those without results, that its inner programs make."""
    if not has_effects(operation):
        return operation
    if operation.loop is not None:
        return dataclasses.replace(operation, loop=dataclasses.replace(operation.loop, quiet=True))
    return dataclasses.replace(operation, params={k: _silent(v) for k, v in operation.params.items()})


def _silent(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_silent, value)) if any(getattr(v, "effects", None) for v in value) else value
    if not getattr(value, "effects", None):
        return value
    if hasattr(value, "jaxpr"):
        if value.jaxpr is not value:  # one class since jax 0.11
            return value.replace(jaxpr=_silent(value.jaxpr))
    equations = []
    for eqn in value.eqns:
        if eqn.effects and not eqn.outvars:
            continue
        if eqn.effects:
            params = {k: _silent(v) for k, v in eqn.params.items()}
            left = _effects(params) if _effects(eqn.params) else eqn.effects
            eqn = eqn.replace(params=params, effects=left)
        equations.append(eqn)
    return value.replace(eqns=equations, effects=frozenset().union(*[e.effects for e in equations]))


def _effects(params: dict[str, Any]) -> frozenset[Any]:
    """Effects of the inner programs of an operation."""
    return frozenset().union(*[getattr(v, "effects", None) or () for v in inner_programs(params)])


def inner_programs(params: dict[str, Any]) -> list[Any]:
    """Values of parameters that may be programs."""
    found = itertools.chain.from_iterable(
        v if isinstance(v, (tuple, list)) else (v,) for v in params.values()
    )
    return [v for v in found if hasattr(v, "eqns") or hasattr(v, "jaxpr")]


def without_derivative(operation: Operation) -> bool:
    """Whether JAX has no derivative for an operation: a call to the host, or a primitive that declares none."""
    if operation.params.get("callback"):
        return True
    declared = operation.primitive in ad.primitive_jvps or operation.name.startswith("custom_")
    return not declared and inner_jaxpr(operation.params) is None


def _without_dead(graph: Graph) -> Graph:
    return dataclasses.replace(
        graph, operations=needed_operations(graph.operations, graph.outputs, has_effects)
    )


def with_copies(graph: Graph, positions: Sequence[int]) -> Graph:
    """Give each of the outputs at ``positions`` a variable of its own, computed by an operation.

    A new hidden state is then never the same variable as another output, an input or a constant.
    """
    builder = GraphBuilder()
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


def jvp_graph(operation: Operation, avals: Sequence[Aval], wrt: Sequence[int]) -> Graph | None:
    """The tangent map of one operation as a graph, or None where it has no JVP rule.

    Inputs are all primal operands, then the tangents of the operands in ``wrt``; outputs are the tangents of the
    differentiable outputs.
    """

    def traced() -> Graph | None:
        closed = _tangent_jaxpr(lambda *values: bind(operation, values), avals, wrt)
        return None if closed is None else flatten_jaxpr(closed)

    return _traced_once("jvp", operation, avals, wrt, traced)


#: What was traced before, oldest first; models are made of few kinds of operations.
_TRACED: dict[Any, Any] = {}
_MOST_TRACED = 2048


def _traced_once(
    kind: str,
    operation: Operation,
    avals: Sequence[Aval],
    also: Sequence[Any],
    traced: Callable[[], _T | None],
) -> _T | None:
    """What ``traced()`` makes of an operation; of one equal to an earlier one the same.

    Operations are equal by primitive, parameters, types and ``also``. Those with a program inside are not compared: every
    trace of a model makes such programs anew.
    """
    if operation.loop is not None or inner_programs(operation.params) or operation.params.get("callback"):
        return traced()
    key = (
        *(kind, operation.primitive, tuple(sorted(operation.params.items(), key=lambda item: item[0]))),
        *(tuple(avals), tuple(also), jnp.result_type(float)),
    )
    try:
        known = _TRACED.get(key)
    except TypeError:  # a parameter that cannot be compared
        return traced()
    if known is None:
        known = traced()
        if known is not None:
            if len(_TRACED) >= _MOST_TRACED:
                del _TRACED[next(iter(_TRACED))]
            _TRACED[key] = known
    return known


def _tangent_jaxpr(fn: Callable[..., Sequence[Any]], avals: Sequence[Aval], wrt: Sequence[int]) -> Any | None:
    """The tangent map of a function of arrays like ``avals``; None where it has none on these types."""

    def tangent(*args: Any) -> list[Any]:
        primals, tangents = args[: len(avals)], args[len(avals) :]

        def moved(*moving: Any) -> list[Any]:
            values = list(primals)
            for k, v in zip(wrt, moving, strict=True):
                values[k] = v
            return [o for o in fn(*values) if jnp.issubdtype(o.dtype, jnp.inexact)]

        return jax.jvp(moved, tuple(primals[k] for k in wrt), tuple(tangents))[1]

    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in itertools.chain(avals, (avals[k] for k in wrt))]
    try:
        return jax.make_jaxpr(tangent)(*shapes)
    except Exception:  # no JVP rule, or one that fails: the caller treats the operation as opaque
        return None


def backward_rule(operation: Operation) -> Any:
    """What tells the backward rule of a ``custom_vjp_call`` from others: the code of the user's function."""
    function = operation.params["bwd"]
    while hasattr(function, "f"):  # JAX keeps it in wrappers, which it makes anew at every trace
        function = function.f
    return getattr(function, "__code__", function)


def vjp_graph(
    operation: Operation, avals: Sequence[Aval], wrt: Sequence[int], inside: _Inside = "derivatives"
) -> Graph | None:
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

    def traced() -> Graph | None:
        try:
            outs = jax.eval_shape(lambda *p: fn(p, *[p[k] for k in wrt]), *shapes)

            def cotangents(*args: Any) -> list[Any]:
                primals, cts = args[: len(avals)], args[len(avals) :]
                return list(jax.vjp(lambda *m: fn(primals, *m), *[primals[k] for k in wrt])[1](list(cts)))

            return flatten_jaxpr(jax.make_jaxpr(cotangents)(*shapes, *outs), inside=inside)
        except Exception:  # not differentiable backwards: the caller treats the operation as opaque
            return None

    return _traced_once(f"vjp {inside}", operation, avals, wrt, traced)


# ----------------------------------------------------------------------------------------------------------------
# inside of other libraries' primitives

#: ``(value, linear) -> value`` whose derivative is that of ``value + linear``: a value with a derivative of its own.
declared_derivative_p = jex_core.Primitive("declared_derivative")
declared_derivative_p.def_impl(lambda value, linear: value)
declared_derivative_p.def_abstract_eval(lambda value, linear: value)
ad.defjvp(declared_derivative_p, lambda t, value, linear: t, lambda t, value, linear: t)


def _batched_derivative(args: Sequence[Any], dims: Sequence[int | None]) -> tuple[Any, int]:
    (size,) = {a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None}
    moved = [
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(args, dims, strict=True)
    ]
    return declared_derivative_p.bind(*moved), 0


batching.primitive_batchers[declared_derivative_p] = _batched_derivative
mlir.register_lowering(
    declared_derivative_p, mlir.lower_fun(lambda value, linear: value, multiple_results=False)
)


@dataclasses.dataclass(frozen=True, eq=False)
class _Insight:
    """What a primitive of another library computes, and where its derivative is its own.

    Attributes
    ----------
    implementation : closed jaxpr
    own : tuple of int
        Operands by which the primitive's derivative is not seen to be that of the implementation.
    moving : tuple of int
        Those of them by which the primitive has a derivative at all.
    tangent : Graph or None
        The primitive's tangents: of all operands and the tangents of those in ``moving``.
    """

    implementation: Any
    own: tuple[int, ...] = ()
    moving: tuple[int, ...] = ()
    tangent: Graph | None = None


def _known_insight(operation: Operation, avals: Sequence[Aval], inside: _Inside) -> _Insight | None:
    """`_insight`, found once for operations that are alike and read the same constants: it takes long."""
    if not has_implementation(operation.primitive, operation.params):
        return None
    find = functools.partial(_insight, operation, avals, inside)
    try:
        constants = tuple(map(_fingerprint, operation.inputs))
    except TypeError:  # no array of numbers
        return find()
    return _traced_once(f"insight {inside}", operation, avals, constants, find)


def _fingerprint(operand: Operand) -> tuple[Any, ...] | None:
    """What a constant is told by; None of a variable."""
    if not isinstance(operand, Constant):
        return None
    value = np.asarray(operand.value)
    return value.shape, value.dtype, hashlib.blake2b(value.tobytes()).digest()


def _insight(operation: Operation, avals: Sequence[Aval], inside: _Inside) -> _Insight | None:
    """Look into another library's primitive; None where that shows nothing, or not what jax would differentiate.

    A surrogate derivative must never be lost. So an operand keeps the derivative of the implementation only if both tangent
    maps are the same program, or if the primitive declares that it is linear in the operand. Any other operand has the
    derivative that the primitive's own rule gives, of which the implementation then only makes the value. Last, the whole is
    compared with the primitive's own reverse derivative: where a primitive declares another transpose, as feedback alignment
    does, that is its derivative.
    """
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    implementation = traced_implementation(operation.primitive, operation.params, shapes)
    if implementation is None:
        return None
    results = jax.eval_shape(lambda *v: bind(operation, v), *shapes)
    found = [(tuple(v.aval.shape), v.aval.dtype) for v in implementation.jaxpr.outvars]
    if found != [(tuple(r.shape), r.dtype) for r in results]:
        return None
    plain = _Insight(implementation)
    wrt = [
        k for k, a in enumerate(avals) if a.differentiable and not isinstance(operation.inputs[k], Constant)
    ]
    if inside == "values" or not wrt or not any(jnp.issubdtype(r.dtype, jnp.inexact) for r in results):
        return plain
    declared = _tangent_jaxpr(lambda *values: bind(operation, values), avals, wrt)
    if declared is None:
        return None
    if _same_program(declared, _tangent_jaxpr(functools.partial(run_jaxpr, implementation), avals, wrt)):
        return plain
    own, moving = [], []
    for k in wrt:
        alone = _tangent_jaxpr(lambda *values: bind(operation, values), avals, [k])
        graph = flatten_jaxpr(alone, inside="nothing")
        if not _is_linear(graph, operation, k):
            own.append(k)
            if not all(isinstance(v, Constant) for v in graph.outputs):
                moving.append(k)
    tangent = None
    if moving:
        closed = _tangent_jaxpr(lambda *values: bind(operation, values), avals, moving)
        tangent = flatten_jaxpr(closed, inside="values")
    insight = _Insight(implementation, tuple(own), tuple(moving), tangent)
    if operation.name in _WRONG_TRANSPOSE or _is_its_derivative(insight, operation, avals, wrt):
        return insight
    tangent = _transposed_reverse(operation, avals, wrt)
    return None if tangent is None else _Insight(implementation, tuple(wrt), tuple(wrt), tangent)


#: Primitives of ``jax.experimental.sparse`` whose transpose is wrong where the matrix stands on the right: jax forgets the
#: flag. Their tangents are right, and the only thing that they can mean.
_WRONG_TRANSPOSE = ("csr_matvec", "csr_matmat", "coo_matvec", "coo_matmat")


def _transposed_reverse(operation: Operation, avals: Sequence[Aval], wrt: Sequence[int]) -> Graph | None:
    """The tangent map whose transpose is the primitive's reverse derivative."""
    own = vjp_graph(operation, avals, wrt, inside="values")
    if own is None:
        return None
    cotangents = [own.avals[v] for v in own.inputs[len(avals) :]]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (*avals, *(avals[k] for k in wrt))]

    def tangent(*args: Any) -> list[Any]:
        primals, moved = args[: len(avals)], args[len(avals) :]
        into = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in cotangents]
        return list(jax.linear_transpose(lambda *c: own.evaluate(*primals, *c), *into)(list(moved)))

    try:
        return flatten_jaxpr(jax.make_jaxpr(tangent)(*shapes), inside="values")
    except Exception:  # made of operations that cannot be transposed back: it stays opaque
        return None


def _same_program(first: Any, second: Any) -> bool:
    return (
        second is not None
        and str(first) == str(second)
        and len(first.consts) == len(second.consts)
        and all(a is b or np.array_equal(a, b) for a, b in zip(first.consts, second.consts, strict=True))
    )


def _is_linear(graph: Graph, operation: Operation, operand: int) -> bool:
    """Whether a tangent map is the operation itself, applied to the tangent in place of the operand."""
    tangent = graph.inputs[-1]
    wanted = [tangent if k == operand else v for k, v in enumerate(graph.inputs[:-1])]
    made = [o for o in graph.operations if not set(graph.outputs).isdisjoint(o.outputs)]
    if len(made) != 1 or made[0].primitive is not operation.primitive:
        return False
    (one,) = made
    live = [v for v in one.outputs if graph.avals[v].differentiable]
    return (
        list(graph.outputs) == live
        and list(one.inputs) == wanted
        and one.params.keys() == operation.params.keys()
        and all(v is operation.params[k] or v == operation.params[k] for k, v in one.params.items())
    )


def _is_its_derivative(
    insight: _Insight, operation: Operation, avals: Sequence[Aval], wrt: Sequence[int]
) -> bool:
    """Compare with the primitive's own reverse derivative at random numbers or, for products of events, at zeros and ones."""
    own = vjp_graph(operation, avals, wrt, inside="values")
    if own is None:
        return True  # no reverse derivative: the forward one is all that the primitive declares
    builder = GraphBuilder()
    inputs = [builder.variable(a) for a in avals]
    outputs = builder.inline_insight(insight, inputs, "?")
    graph = Graph(tuple(builder.avals), tuple(inputs), tuple(builder.operations), tuple(outputs))
    draw = np.random.default_rng(0)

    def random(aval: Aval) -> Any:
        numbers = draw.standard_normal(aval.shape) if aval.differentiable else np.zeros(aval.shape)
        return np.asarray(numbers, aval.dtype)

    def close(values: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
        def moved(*moving: Any) -> list[Any]:
            given = list(values)
            for k, v in zip(wrt, moving, strict=True):
                given[k] = v
            return [o for o in graph.evaluate(*given) if jnp.issubdtype(o.dtype, jnp.inexact)]

        found = jax.vjp(moved, *[values[k] for k in wrt])[1](cotangents)
        wanted = own.evaluate(*values, *cotangents)
        return [_close(a, b) for a, b in zip(found, wanted, strict=True)]

    def numbers(events: bool) -> tuple[list[Any], list[Any]]:
        # Constants are arguments too: of indices of millions XLA would compute at length, where they lie in the program.
        drawn = [(i, random(a)) for i, a in zip(operation.inputs, avals, strict=True)]
        values = [
            i.value if isinstance(i, Constant) else np.asarray(v > 0, v.dtype) if events else v
            for i, v in drawn
        ]
        return values, [random(own.avals[v]) for v in own.inputs[len(avals) :]]

    at_random = numbers(events=False)
    # One program: each operation by itself takes longer to compile than all together.
    compare = jax.jit(close).lower(*at_random).compile()
    return all(map(bool, compare(*at_random))) or all(map(bool, compare(*numbers(events=True))))


def _close(found: Any, wanted: Any) -> Any:
    size = jnp.maximum(jnp.abs(wanted).max(initial=0), 1)
    return jnp.abs(found - wanted).max(initial=0) <= 10 * np.sqrt(jnp.finfo(wanted.dtype).eps) * size
