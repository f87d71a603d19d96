"""A jaxpr as the compiler behind jax will see it: calls inlined, shared and constant expressions gone, shapes forgotten.

What remains is a list of nodes with the bytes of the values between them. A reshape is no node: its result is the same
memory. Everything is a number here, so that graphs of two batch sizes can be told apart by their numbers alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.cost.operations import ALIASES, EXPENSIVE, MOVES, ONE_BY_ONE, REDUCTIONS, operations
from etcompile.frontend.jaxpr import inner_jaxpr, scan_signature

__all__ = ["Graph", "Loop", "Node", "flatten"]

_CALLS = frozenset(
    """jit pjit closed_call core_call core_closed_call remat remat2 checkpoint custom_jvp_call custom_vjp_call
    custom_vjp_call_jaxpr custom_lin run_state""".split()  # noqa: SIM905
)
_SUMS = ("add", "add_any", "sub")


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop: its bodies, and how values go around.

    Attributes
    ----------
    bodies : tuple of Graph
        Of a scan its body; of a while loop condition and body; of a conditional its branches.
    trips : int
        Times that the bodies run; 1 where the shapes do not tell.
    consts, carry : int
        Numbers of operands that stay, and that go around; the others are read slice by slice. Results: the carry, then what
        is stacked.
    choice : bool
        One of the bodies runs.
    """

    bodies: tuple[Graph, ...]
    trips: int
    consts: int = 0
    carry: int = 0
    choice: bool = False


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation.

    Attributes
    ----------
    name : str
    kind : {"light", "sum", "whole", "loop"}
        Light nodes can be part of what reads them, sums (reductions) take their operands in; the others read and write memory.
    inputs, outputs : tuple of int
        Numbers of values.
    read : tuple of int
        Bytes that it reads of each operand.
    flops, transcendentals : int
    expensive : bool
        Not computed twice.
    spreads : bool
        It repeats elements of its operand.
    library : bool
        Sums and products that become one library call together with a reduction.
    loop : Loop or None
    """

    name: str
    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    read: tuple[int, ...]
    flops: int = 0
    transcendentals: int = 0
    expensive: bool = False
    spreads: bool = False
    library: bool = False
    loop: Loop | None = None


@dataclasses.dataclass(frozen=True)
class Graph:
    """Nodes in program order; ``sizes`` are bytes by value, 0 for constants that the compiler folds."""

    sizes: tuple[int, ...]
    inputs: tuple[int, ...]
    constants: tuple[int, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int | None, ...]


def flatten(closed: Any) -> Graph:
    """The graph of a closed jaxpr."""
    builder = _Builder()
    inputs = tuple(builder.value(v.aval) for v in closed.jaxpr.invars)
    outputs = tuple(builder.inline(closed, inputs))
    graph = Graph(tuple(builder.sizes), inputs, tuple(builder.constants), tuple(builder.nodes), outputs)
    return _needed(graph, (True,) * len(outputs))


def bytes_of(aval: Any) -> int:
    """Bytes of an array of this shape and dtype."""
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 0)


def _content(value: Any) -> Any:
    """What a constant is known by: of those that are alike the compiler keeps one."""
    if not hasattr(value, "dtype") or jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return id(value)
    array = np.ascontiguousarray(value)
    return array.shape, str(array.dtype), hashlib.blake2b(array.tobytes(), digest_size=16).digest()


class _Builder:
    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.nodes: list[Node] = []
        self.constants: list[int] = []
        self.known: dict[Any, tuple[int, ...]] = {}
        #: Values that are one number everywhere; None: a number not computed here.
        self.uniform: dict[int, float | None] = {}
        #: Repeated values: what of, and its aval.
        self.spread: dict[int, tuple[int, Any]] = {}
        #: Transposed values: where from, and the permutation.
        self.moved: dict[int, tuple[int, tuple[int, ...]]] = {}
        #: Results of products: number of their batch axes and of the first operand's.
        self.products: dict[int, tuple[int, int]] = {}
        #: Loops by their names, operands and results: what their bodies say, and the values made.
        self.loops: dict[Any, list[tuple[_Text, Sequence[int]]]] = {}

    def value(self, aval: Any, size: int | None = None) -> int:
        self.sizes.append(bytes_of(aval) if size is None else size)
        return len(self.sizes) - 1

    def node(
        self, name: str, kind: str, inputs: Sequence[int], avals: Sequence[Any], **fields: Any
    ) -> tuple[int, ...]:
        outputs = tuple(self.value(a) for a in avals)
        read = fields.pop("read", None) or tuple(self.sizes[v] for v in inputs)
        self.nodes.append(Node(name, kind, tuple(inputs), outputs, tuple(read), **fields))
        return outputs

    # -- jaxprs -------------------------------------------------------------------------------------------------

    def inline(self, closed: Any, inputs: Sequence[int]) -> list[int]:
        env: dict[Any, int] = dict(zip(closed.jaxpr.invars, inputs, strict=True))
        for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            env[var] = self._constant(value)

        def read(atom: Any) -> int:
            return self._literal(atom.val, atom.aval) if hasattr(atom, "val") else env[atom]

        for eqn in closed.jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            found = self._equation(eqn, operands)
            env.update(zip(eqn.outvars, found, strict=True))
        return [read(v) for v in closed.jaxpr.outvars]

    def _constant(self, value: Any) -> int:
        key = ("constant", _content(value))
        if key not in self.known:
            if np.ndim(value) == 0 and hasattr(value, "dtype"):
                return self._literal(value, value)
            self.known[key] = (self.value(value if hasattr(value, "dtype") else np.asarray(value)),)
            self.constants.append(self.known[key][0])
        return self.known[key][0]

    def _literal(self, value: Any, aval: Any) -> int:
        number = float(value) if np.ndim(value) == 0 and np.isrealobj(value) and _is_number(value) else None
        key = ("literal", str(aval.dtype), number if number is not None else id(value))
        if key not in self.known:
            self.known[key] = (self.value(aval, size=0),)
            self.uniform[self.known[key][0]] = number
        return self.known[key][0]

    def _equation(self, eqn: Any, operands: list[int]) -> Sequence[int]:
        name, params = eqn.primitive.name, eqn.params
        avals, outs = [v.aval for v in eqn.invars], [v.aval for v in eqn.outvars]
        if name in _CALLS:
            inner = inner_jaxpr(params)
            return self.inline(inner, operands[len(operands) - len(inner.jaxpr.invars) :])
        if name in ("scan", "while", "cond"):
            return self._once(name, params, operands, outs)
        if name in ALIASES:
            return operands
        key = (name, tuple(operands), tuple(a.shape for a in avals), _frozen(outs), _frozen_params(params))
        if key not in self.known:
            self.known[key] = tuple(self._operation(name, params, operands, avals, outs))
        return self.known[key]

    # -- operations ---------------------------------------------------------------------------------------------

    def _operation(
        self, name: str, params: dict[str, Any], operands: list[int], avals: list[Any], outs: list[Any]
    ) -> Sequence[int]:
        flops, series = operations(name, params, avals, outs)
        size = bytes_of(outs[0]) if outs else 0
        if name in ("reshape", "squeeze") or (
            name in REDUCTIONS and not name.startswith("arg") and avals[0].size == outs[0].size
        ):
            return operands[:1] * len(outs)
        if name == "broadcast_in_dim":
            return [self._broadcast(operands[0], avals[0], outs[0])]
        if name == "transpose":
            return [self._transpose(operands[0], tuple(params["permutation"]), avals[0], outs[0])]
        if name == "split":
            each = [bytes_of(a) for a in outs]
            return [
                self.node("slice", "light", operands, [a], read=(s,))[0]
                for a, s in zip(outs, each, strict=True)
            ]
        if name in ("slice", "dynamic_slice", "gather"):
            if name == "gather" and operands[1] not in self.uniform:
                read = (min(size, self.sizes[operands[0]]), self.sizes[operands[1]])
                return self.node(name, "light", operands[:2], outs, read=read, expensive=True)
            if operands[0] in self.uniform:
                return [self._same(operands[0], outs[0])]
            return self.node(name, "light", operands[:1], outs, read=(min(size, self.sizes[operands[0]]),))
        if name in ONE_BY_ONE:
            return [self._elementwise(name, operands, avals, outs[0], flops, series)]
        if name in MOVES:
            return self.node(name, "light", operands, outs)
        if name in REDUCTIONS:
            return self.node(
                name, "sum", operands[:1], outs, flops=flops, expensive=True, library=name == "reduce_sum"
            )
        if name == "concatenate":
            live = [v for v in operands if v not in self.uniform]
            if not live:
                return [self._same(operands[0], outs[0])]
            return self.node(name, "whole" if len(live) > 1 else "light", live, outs)
        if name == "dot_general":
            return self._product(params, operands, avals, outs, flops)
        if name == "conv_general_dilated":
            return self._convolution(params, operands, avals, outs, flops)
        if name == "dynamic_update_slice":
            part = bytes_of(avals[1])
            return self.node(name, "whole", operands[:2], outs, read=(part, part))
        live = [v for v in operands if v not in self.uniform]
        return self.node(name, "whole", live, outs, flops=flops, transcendentals=series)

    def _same(self, value: int, aval: Any) -> int:
        """One number everywhere, in another shape."""
        number = self.uniform[value]
        key = ("uniform", number, value if number is None else None, _frozen([aval]))
        if key not in self.known:
            self.known[key] = self.node("broadcast", "light", (), [aval], read=())
            self.uniform[self.known[key][0]] = number
        return self.known[key][0]

    def _broadcast(self, value: int, aval: Any, out: Any) -> int:
        if aval.size == out.size:
            return value
        if value in self.uniform:
            return self._same(value, out)
        return self._wide(value, aval, out)

    def _transpose(self, value: int, order: tuple[int, ...], aval: Any, out: Any) -> int:
        if value in self.uniform:
            return value
        moving = [a for a in order if aval.shape[a] != 1]
        if moving == sorted(moving):
            return value
        if value in self.products and _swaps(order, *self.products[value]):
            return value  # the product with its operands exchanged
        found = self.node("transpose", "light", (value,), [out])[0]
        self.moved[found] = value, order
        return found

    def _elementwise(
        self, name: str, operands: list[int], avals: list[Any], out: Any, flops: int, series: int
    ) -> int:
        numbers = [self.uniform.get(v, math.nan) for v in operands]
        if all(v in self.uniform for v in operands):
            found = self.value(out, size=0)
            self.uniform[found] = _folded(name, numbers)
            return found if out.size == 1 else self._same(found, out)
        simpler = self._simpler(name, operands, avals, numbers, out)
        if simpler is not None:
            return simpler
        moving = [(v, a) for v, a in zip(operands, avals, strict=True) if v not in self.uniform]
        if len(moving) == 1 and (moving[0][1].size != out.size or moving[0][0] in self.spread):
            return self._before_spreading(name, *moving[0], out, flops, series)
        live = [v if a.size in (1, out.size) else self._wide(v, a, out) for v, a in moving]
        return self.node(
            name, "light", live, [out], flops=flops, transcendentals=series, expensive=name in EXPENSIVE,
            library=name in ("add", "add_any", "mul", "sub"),
        )[0]  # fmt: skip

    def _before_spreading(self, name: str, value: int, aval: Any, out: Any, flops: int, series: int) -> int:
        """An operation on one repeated operand, done before it is repeated."""
        value, aval = self.spread.get(value, (value, aval))
        share = max(1, math.prod(out.shape) // max(1, math.prod(aval.shape)))
        small = jax.ShapeDtypeStruct(aval.shape, out.dtype)
        key = ("small", name, value, share, _frozen([small, out]), flops, series)
        if key not in self.known:
            self.known[key] = self.node(
                name, "light", (value,), [small], flops=flops // share, transcendentals=series // share,
                expensive=name in EXPENSIVE, library=name in ("mul", "add", "add_any", "sub"),
            )  # fmt: skip
        return self._wide(self.known[key][0], small, out)

    def _wide(self, value: int, aval: Any, out: Any) -> int:
        """An operand repeated to the shape of the result, as the compiler makes explicit."""
        key = ("wide", value, aval.shape, _frozen([out]))
        if key not in self.known:
            shape = jax.ShapeDtypeStruct(out.shape, aval.dtype)
            self.known[key] = self.node("broadcast", "light", (value,), [shape], spreads=True, library=True)
            self.spread[self.known[key][0]] = value, aval
        return self.known[key][0]

    def _simpler(
        self, name: str, operands: list[int], avals: list[Any], numbers: list[float | None], out: Any
    ) -> int | None:
        """A sum with 0, a product with 1, and their like."""
        if name == "convert_element_type":
            return operands[0] if avals[0].dtype == out.dtype else None
        if name not in (*_SUMS, "mul", "div") or len(operands) != 2:
            return None
        for k in (0, 1):
            other = 1 - k
            if avals[other].size != out.size:
                continue
            neutral = 0 if name in _SUMS else 1
            if numbers[k] == neutral and (k == 1 or name in ("add", "add_any", "mul")):
                return operands[other]
        return None

    def _product(
        self, params: dict[str, Any], operands: list[int], avals: list[Any], outs: list[Any], flops: int
    ) -> Sequence[int]:
        contract, batch = params["dimension_numbers"]
        if all(avals[0].shape[d] == 1 for d in contract[0]):
            flops //= 2  # an outer product has nothing to add
        ranks = [len(a.shape) - len(batch[0]) for a in avals]
        plain = len(contract[0]) == 1 and max(ranks) <= 2
        live = [
            self._straight(operands[k], avals[k], list(batch[k]), list(contract[k]), None if plain else k)
            for k in (0, 1)
        ]
        found = self.node("dot_general", "whole", live, outs, flops=flops)
        free = len(avals[0].shape) - len(contract[0]) - len(batch[0])
        self.products[found[0]] = len(batch[0]), free
        return found

    def _straight(
        self, value: int, aval: Any, batch: list[int], contracted: list[int], side: int | None
    ) -> int:
        """An operand in an order of axes that a product can read, copied if it has another.

        Matrices may come as they are (``side`` None); of other products the first operand has the contracted axes last,
        the second one first.
        """
        if value in self.uniform:
            return self._same(value, aval)
        free = [d for d in range(len(aval.shape)) if d not in batch and d not in contracted]
        orders = [[*batch, *free, *contracted], [*batch, *contracted, *free]]
        sources = self._sources(value, len(aval.shape))
        for source, at in sources:
            for order in orders if side is None else orders[side : side + 1]:
                places = [at.index(d) for d in order if aval.shape[d] != 1]
                if places == sorted(places):
                    return source
        source, at = sources[-1]
        return self._copied(source, tuple(at.index(d) for d in orders[side or 0]), aval)

    def _sources(self, value: int, rank: int) -> list[tuple[int, list[int]]]:
        """A value, and what it was transposed from, each with its axes as numbered in the value."""
        at = list(range(rank))
        found = [(value, at)]
        while value in self.moved and len(self.moved[value][1]) == rank:
            value, order = self.moved[value]
            at = [at[order.index(k)] for k in range(rank)]
            found.append((value, at))
        return found

    def _copied(self, value: int, order: tuple[int, ...], aval: Any) -> int:
        """A value with its axes in another order, made once."""
        key = ("copied", value, order, aval.shape)
        if key not in self.known:
            self.known[key] = self.node("transpose", "light", (value,), [aval])
        return self.known[key][0]

    def _convolution(
        self, params: dict[str, Any], operands: list[int], avals: list[Any], outs: list[Any], flops: int
    ) -> Sequence[int]:
        left, right, result = params["dimension_numbers"]
        rank = len(avals[0].shape)
        space = list(range(1, rank - 1))
        wanted = [[0, rank - 1, *space], [rank - 1, rank - 2, *range(rank - 2)]]
        live = []
        for v, a, spec, best in zip(operands, avals, (left, right), wanted, strict=True):
            if v in self.uniform:
                live.append(self._same(v, a))
            elif [d for d in spec if a.shape[d] != 1] == [d for d in best if a.shape[d] != 1]:
                live.append(v)
            else:
                live.append(self._copied(v, tuple(spec), a))
        found = self.node("conv_general_dilated", "whole", live, outs, flops=flops)
        if [d for d in result if outs[0].shape[d] != 1] == [d for d in wanted[0] if outs[0].shape[d] != 1]:
            return found
        return self.node("transpose", "light", found, outs)

    # -- loops --------------------------------------------------------------------------------------------------

    def _loop(self, name: str, params: dict[str, Any], operands: list[int], outs: list[Any]) -> Sequence[int]:
        if name == "scan":
            consts, carry = scan_signature(params)
            loop = Loop((_body(params["jaxpr"]),), int(params["length"]), consts, carry)
        elif name == "while":
            first, second = params["cond_nconsts"], params["body_nconsts"]
            carried = operands[first + second :]
            loop = Loop((_body(params["body_jaxpr"]),), 1, second, len(carried))
            operands = [*operands[first : first + second], *carried]
        else:
            loop = Loop(tuple(_body(b) for b in params["branches"]), 1, len(operands) - 1, 0, choice=True)
            operands = operands[1:]
        return self.node(name, "loop", operands, outs, loop=loop)

    def _once(self, name: str, params: dict[str, Any], operands: list[int], outs: list[Any]) -> Sequence[int]:
        """A loop; of two that are alike and start from the same values the compiler keeps one."""
        alike = self.loops.setdefault((name, tuple(operands), _frozen(outs)), [])
        text = _Text(params)
        for other, found in alike:
            if other == text:
                return found
        found = self._loop(name, params, operands, outs)
        alike.append((text, found))
        return found


@dataclasses.dataclass(eq=False)
class _Text:
    """What a loop says, written down when it is compared."""

    params: dict[str, Any]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Text) and self.text == other.text

    @cached_property
    def text(self) -> tuple[str, tuple[Any, ...]]:
        closed = [v for v in jax.tree.leaves(self.params, is_leaf=_is_closed) if _is_closed(v)]
        return repr(sorted(self.params.items())), tuple(_content(c) for v in closed for c in v.consts)


def _is_closed(value: Any) -> bool:
    return hasattr(value, "jaxpr") and hasattr(value, "consts")


def _body(closed: Any) -> Graph:
    builder = _Builder()
    inputs = tuple(builder.value(v.aval) for v in closed.jaxpr.invars)
    outputs = tuple(builder.inline(closed, inputs))
    return Graph(tuple(builder.sizes), inputs, tuple(builder.constants), tuple(builder.nodes), outputs)


# ----------------------------------------------------------------------------------------------------------------
# what nothing needs


def _needed(graph: Graph, wanted: Sequence[bool]) -> Graph:
    """The graph without what no wanted result needs."""
    outputs = tuple(v if w else None for v, w in zip(graph.outputs, wanted, strict=True))
    live = {v for v in outputs if v is not None}
    nodes = []
    for node in reversed(graph.nodes):
        if not any(v in live for v in node.outputs):
            continue
        if node.loop is not None:
            node = _needed_loop(node, [v in live for v in node.outputs])
        live.update(v for v in node.inputs if v >= 0)
        nodes.append(node)
    return dataclasses.replace(graph, nodes=tuple(reversed(nodes)), outputs=outputs)


def _needed_loop(node: Node, wanted: list[bool]) -> Node:
    """A loop without carries and results that nothing needs; their operands become -1."""
    loop = node.loop
    assert loop is not None
    while True:
        bodies = tuple(_needed(body, wanted) for body in loop.bodies)
        used = [False] * len(node.inputs)
        for body in bodies:
            read = {v for n in body.nodes for v in n.inputs} | {v for v in body.outputs if v is not None}
            used = [u or v in read for u, v in zip(used, body.inputs, strict=True)]
        grown = list(wanted)
        for k in range(loop.carry):
            grown[k] = wanted[k] or used[loop.consts + k]
        if grown == wanted:
            break
        wanted = grown
    kept = [
        u or (loop.consts <= k < loop.consts + loop.carry and wanted[k - loop.consts])
        for k, u in enumerate(used)
    ]
    inputs = tuple(v if k else -1 for v, k in zip(node.inputs, kept, strict=True))
    outputs = tuple(v if w else -1 for v, w in zip(node.outputs, wanted, strict=True))
    return dataclasses.replace(
        node, inputs=inputs, outputs=outputs, loop=dataclasses.replace(loop, bodies=bodies)
    )


# ----------------------------------------------------------------------------------------------------------------
# small things


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _folded(name: str, numbers: Sequence[float | None]) -> float | None:
    if any(n is None for n in numbers):
        return None
    values = [n for n in numbers if n is not None]
    if name in ("add", "add_any"):
        return values[0] + values[1]
    if name == "mul":
        return values[0] * values[1]
    if name == "sub":
        return values[0] - values[1]
    if name == "neg":
        return -values[0]
    return values[0] if name == "convert_element_type" else None


def _swaps(order: tuple[int, ...], batch: int, first: int) -> bool:
    """Whether a permutation exchanges the two operands' axes of a product."""
    rest = range(batch, len(order))
    return order == (*range(batch), *rest[first:], *rest[:first])


def _frozen(avals: Sequence[Any]) -> tuple[Any, ...]:
    return tuple((tuple(a.shape), str(a.dtype)) for a in avals)


def _frozen_params(params: dict[str, Any]) -> tuple[Any, ...]:
    return tuple((k, repr(v)) for k, v in sorted(params.items()))
