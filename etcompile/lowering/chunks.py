"""Chunks: many steps at once with the weights fixed, for programs whose traces are linear in what each step adds.

A trace is never needed as such, only through gradients, and those are linear in it. So every trace is *probed* with a
variation V of its weight: ``outer(f, x)`` becomes ``f * y(V)``, with y(V) what the operation makes of V at x, and the
whole program becomes a recurrence of the size of the states whose result is one number, linear in V,

    Q(V) = sum_t <credit_t, y_t(V)> + contract(signal_t, e_t V).

The gradient is Q's derivative. Transposing the recurrence gives the backward pass in time over states, and
transposing ``y_t(V)``, which is formed for all steps at once, one matrix product over time and batch. It is the same
sum as step by step, contracted in another order: no logarithm, no division, right for every transition.

The traces at the chunk's end follow from the same recurrence, transposed once for each of their rows: that tells how
much of every step's addition is left (R_t), and a sum over time of R_t f_t (x) x_t is one batched matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.errors import UnsupportedError
from etcompile.ir.program import Equation, Ref
from etcompile.lowering.causal import CausalProgram, Traces
from etcompile.lowering.evaluate import EVALUATE, Context, evaluate
from etcompile.lowering.geometry import TraceGeometry
from etcompile.lowering.losses import StepLoss, loss_and_cotangents

__all__ = ["ChunkProgram"]

Array = Any
Value = Any

_KINDS = {
    "transition",
    "state",
    "immediate",
    "trace",
    "presynaptic",
    "factor",
    "credit",
    "gradient",
    "drive",
    "feedback",
    "vector",
    "number",
}
#: Steps after which a longer chunk gains little.
_ENOUGH = 128

_PROBED = {"add", "sub", "mul", "div", "copy", "matmul", "outer", "contract", "pullback"}


class ChunkProgram:
    """A trace program run in chunks; refuses those whose traces are not linear in what each step adds."""

    def __init__(self, causal: CausalProgram) -> None:
        self.causal = causal
        self.program = causal.program
        self.model = causal.model
        self._by_name = {e.name: e for e in self.program.equations}
        self._refuse()
        late = {e.name for e in causal.late}
        probed = {e.name for e in self.program.equations if e.type.kind in ("trace", "gradient")}
        recurrent = self._recurrent()
        plain = [e for e in self.program.equations if e.name not in probed]
        #: Values of a step that need nothing of other steps: computed for all steps at once.
        self.alone = [e for e in plain if e.name not in recurrent]
        self.filters = [e for e in plain if e.name in recurrent and e.name not in late]
        self.late_plain = [e for e in plain if e.name in recurrent and e.name in late]
        self.traces = [e for e in self.program.equations if e.type.kind == "trace"]
        self.gradients = [e for e in self.program.equations if e.type.kind == "gradient"]
        self.carried = set(self.program.carried)

    def size(self, steps: int, memory: int) -> int:
        """Steps to handle together: enough to make up for the work at a chunk's end, as far as memory allows."""
        per_step = 2 * sum(a.size * a.dtype.itemsize for a in self.model.analysis.split.body.avals)
        most = max(1, min(_ENOUGH, memory // max(1, per_step)))
        parts = -(-steps // most)
        return -(-steps // parts)

    # -- what can be chunked ------------------------------------------------------------------------------------

    def _refuse(self) -> None:
        for e in self.program.equations:
            traced = e.type.kind in ("trace", "gradient")
            if e.type.kind not in _KINDS:
                self._no(e, f"it keeps a value of kind {e.type.kind}, which follows every path")
            if traced and e.op not in _PROBED:
                self._no(e, f"{e.op} of a trace is not linear")
            if traced and e.op == "mul":
                kinds = [self._by_name[a.name].type.kind for a in e.args if isinstance(a, Ref)]
                if kinds.count("trace") + kinds.count("gradient") > 1:
                    self._no(e, "a product of two traces is not linear")
            if e.op in ("readout_weight", "through_old", "through") and self._reads_recurrent(e):
                self._no(e, "its feedback matrix changes with the weights, which are fixed in a chunk")
        for name in self.program.carried:
            if self._by_name[name].type.kind == "gradient":
                self._no(self._by_name[name], "it carries a gradient")

    def _reads_recurrent(self, equation: Equation) -> bool:
        recurrent = self._recurrent()
        return any(ref.name in recurrent for ref in equation.refs)

    def _no(self, equation: Equation, reason: str) -> None:
        raise UnsupportedError(
            f"{self.program.name} cannot run in chunks: {reason}.",
            got=f"{equation.name} = {equation.op}(...) : {equation.type}",
            expected="traces made of recur, outer, contract and sums, with the weights fixed",
            hint="run it step by step: chunk=1.",
        )

    def _recurrent(self) -> set[str]:
        """Values that depend on an earlier step."""
        found: set[str] = set()
        while True:
            grown = {
                e.name
                for e in self.program.equations
                if any(r.delay == -1 or r.name in found for r in e.refs)
            }
            if grown == found:
                return found
            found = grown

    # -- one chunk ----------------------------------------------------------------------------------------------

    def run(
        self,
        loss: StepLoss,
        weights: list[Array],
        states: list[Array],
        traces: Traces,
        inputs: list[Array],
        items: Any,
        call: Callable[[Any], Mapping[str, Any]],
    ) -> tuple[Array, dict[str, Array], list[Array], Traces]:
        """Losses ``(C,)``, gradients of the sites, and states and traces at the end.

        ``inputs`` and ``items`` have time on axis 0; ``call(item)`` is what a step's call brings beside its inputs.
        """
        body = self.model.analysis.split.body
        n_out = len(self.model.analysis.model.outputs)

        def forward(now: list[Array], x: list[Array]) -> tuple[list[Array], list[Array]]:
            return body.evaluate(*weights, *now, *x)[n_out:], now

        last, olds = lax.scan(forward, states, inputs)

        def at_step(old: list[Array], x: list[Array], item: Any) -> tuple[Array, dict[str, Value]]:
            step = self.model.step(weights, old, x)
            value, cotangents = loss_and_cotangents(loss, step.outputs, item)
            after = step.with_loss(cotangents, [None] * len(old), call(item))
            context = Context(self.program, self.model, step, after, self.causal.functions)
            return value, evaluate(context, self.alone, {}, {})

        losses, values = jax.vmap(at_step)(olds, inputs, items)
        quiet = Context(self.program, self.model, None, None, self.causal.functions)
        values, filters_end = self._filtered(quiet, values, traces)
        zeros = {name: jnp.zeros(g.weight_shape, g.weight_dtype) for name, g in self.model.sites.items()}
        probe = jax.linear_transpose(lambda v: self._total(values, traces, v), zeros)
        (found,) = probe(jnp.ones((), self._dtype()))
        ends = self._ends(values, traces)
        return losses, found, last, {**filters_end, **ends}

    def _dtype(self) -> Any:
        return jnp.result_type(*[g.y_dtype for g in self.model.sites.values()], jnp.float32)

    def _filtered(
        self, context: Context, values: dict[str, Value], traces: Traces
    ) -> tuple[dict[str, Value], Traces]:
        """Values that are recurrences of the size of states or presynaptic values, for all steps."""
        carried = {e.name: traces[e.name] for e in self.filters if e.name in self.carried}
        steady = {e.name: e for e in self.alone if e.name in self.carried}
        carried.update({name: traces[name] for name in steady})

        def one(before: Traces, now: dict[str, Value]) -> tuple[Traces, tuple[dict[str, Value], Traces]]:
            found = evaluate(context, self.filters, now, before)
            kept = {
                name: self.causal.kept(self._by_name[name], found[name] if name in found else now[name])
                for name in before
            }
            new = {e.name: found[e.name] for e in self.filters}
            return kept, (new, before)

        if not carried and not self.filters:
            return values, {}
        end, (found, before) = lax.scan(one, carried, values)
        values = {**values, **found, **{_late(name): v for name, v in before.items()}}
        if self.late_plain:

            def after(now: dict[str, Value]) -> dict[str, Value]:
                previous = {name: now[_late(name)] for name in carried}
                done = evaluate(context, self.late_plain, now, previous)
                return {e.name: done[e.name] for e in self.late_plain}

            values = {**values, **jax.vmap(after)(values)}
        return values, end

    # -- the probed program -------------------------------------------------------------------------------------

    def _responses(self, values: dict[str, Value], v: dict[str, Array]) -> dict[tuple[str, str], Array]:
        """y_t(V) for every presynaptic value that an equation meets, for all steps at once."""
        found: dict[tuple[str, str], Array] = {}
        for e in (*self.traces, *self.gradients):
            if e.op not in ("outer", "pullback"):
                continue
            ref = e.args[1] if e.op == "outer" else e.args[0]
            assert isinstance(ref, Ref)
            site = self._by_name[ref.name].type.of
            key = (_key(ref), site)
            if key not in found:
                steps = jax.tree.leaves(values[_key(ref)])
                geometry = self.model.sites[site]
                if steps:
                    found[key] = jax.vmap(lambda x, g=geometry, s=site: g.respond(v[s], x))(values[_key(ref)])
                else:  # the weight is y itself
                    found[key] = v[site][None]
        return found

    def _total(self, values: dict[str, Value], traces: Traces, v: dict[str, Array]) -> Array:
        """Q(V)."""
        responses = self._responses(values, v)
        start = {
            e.name: tuple(
                None if row is None else geometry.probe(row, v[geometry.site.site.name])
                for row in traces[e.name]
            )
            for e in self.traces
            if e.name in self.carried and (geometry := self.model.traces[e.type.of])
        }
        additions = {e.name: self._addition(e, values, responses) for e in self.traces if e.op == "outer"}
        probed = self._recurrence(values, additions, start)
        total = jnp.zeros((), self._dtype())
        scalars: dict[str, Array] = {}
        for e in self.gradients:
            scalars[e.name] = self._scalar(e, values, probed, responses, scalars)
        for gradient in self.program.gradients:
            value = scalars[gradient.value.name]
            if value is not None:
                total = total + jnp.sum(value).astype(total.dtype)
        return total

    def _addition(
        self, e: Equation, values: dict[str, Value], responses: dict[tuple[str, str], Array]
    ) -> tuple[Array | None, ...]:
        """``outer(f, x)`` probed: f times the window of y(V), for all steps."""
        f, x = e.args
        assert isinstance(f, Ref) and isinstance(x, Ref)
        geometry = self.model.traces[e.type.of]
        y = jax.vmap(geometry.window)(responses[_key(x), geometry.site.site.name])
        rows = values[_key(f)]
        return tuple(None if row is None else row * y.astype(row.dtype) for row in rows)

    def _recurrence(
        self, values: dict[str, Value], additions: dict[str, Value], start: Traces, ends: bool = False
    ) -> Any:
        """The traces' equations on probed values: all of them at every step, and before it where carried."""
        if not self.traces:
            return {}
        needed = self._needed(values)

        def one(before: Traces, now: tuple[dict[str, Value], dict[str, Value]]) -> tuple[Traces, Any]:
            plain, added = now
            found: dict[str, Value] = {}
            for e in self.traces:
                found[e.name] = added[e.name] if e.op == "outer" else self._probed(e, plain, found, before)
            kept = {
                name: tuple(
                    None if b is None else jnp.zeros_like(b) if v is None else v.astype(b.dtype)
                    for b, v in zip(before[name], found[name] or (None,) * len(before[name]), strict=True)
                )
                for name in before
            }
            return kept, None if ends else (found, before)

        end, stacked = lax.scan(one, start, (needed, additions))
        if ends:
            return end
        found, before = stacked
        return {**found, **{_late(name): v for name, v in before.items()}}

    def _needed(self, values: dict[str, Value]) -> dict[str, Value]:
        """Plain values that the traces' equations read."""
        names = {_key(ref) for e in self.traces if e.op != "outer" for ref in e.refs}
        return {name: v for name, v in values.items() if name in names}

    def _probed(
        self, e: Equation, plain: dict[str, Value], found: dict[str, Value], before: Traces
    ) -> tuple[Array | None, ...] | None:
        """One equation of traces, on rows over the window."""

        def get(a: Any) -> Value:
            if not isinstance(a, Ref):
                return a
            if self._by_name[a.name].type.kind == "trace":
                return before[a.name] if a.delay else found[a.name]
            return plain[_key(a)]

        args = [get(a) for a in e.args]
        if e.op == "matmul":
            transition, rows = args
            if rows is None:
                return None
            geometry = self.model.traces[e.type.of]
            return tuple(_dot(geometry, line, rows) for line in transition)
        context = Context(self.program, self.model, None, None, self.causal.functions)
        return EVALUATE[e.op](context, e, args)

    def _scalar(
        self,
        e: Equation,
        values: dict[str, Value],
        probed: dict[str, Value],
        responses: dict[tuple[str, str], Array],
        scalars: dict[str, Array],
    ) -> Array | None:
        """A weight gradient times V, step by step ``(C,)``."""
        if e.op == "pullback":
            x, credit = e.args
            assert isinstance(x, Ref) and isinstance(credit, Ref)
            q = values[_key(credit)]
            if q is None:
                return None
            y = responses[_key(x), self._by_name[x.name].type.of]
            return _sum_but_time(q * y.astype(q.dtype))
        if e.op == "contract":
            signal, trace = e.args
            assert isinstance(signal, Ref) and isinstance(trace, Ref)
            rows = probed[_key(trace)]
            geometry = self.model.traces[self._by_name[trace.name].type.of]
            terms = [
                _sum_but_time(jax.vmap(geometry.from_positions)(s) * row)
                for s, row in zip(values[_key(signal)] or (), rows or (), strict=False)
                if s is not None and row is not None
            ]
            return sum(terms[1:], terms[0]) if terms else None

        def get(a: Any) -> Any:
            if isinstance(a, Ref):
                return scalars[a.name] if a.name in scalars else values[_key(a)]
            return a

        args = [get(a) for a in e.args]
        if e.op in ("add", "sub"):
            a, b = args
            if a is None:
                return b if e.op == "add" or b is None else -b
            return a if b is None else a + b if e.op == "add" else a - b
        if any(a is None for a in args):
            return None
        return args[0] if e.op == "copy" else args[0] * args[1] if e.op == "mul" else args[0] / args[1]

    # -- traces at the end --------------------------------------------------------------------------------------

    def _ends(self, values: dict[str, Value], traces: Traces) -> Traces:
        """Traces after the last step: what is left of those before the chunk, and of every step's addition."""
        names = [e.name for e in self.traces if e.name in self.carried]
        if not names:
            return {}
        outers = [e for e in self.traces if e.op == "outer"]
        additions = {e.name: _like(values[_key(_ref(e.args[0]))]) for e in outers}
        start = {
            name: tuple(
                None if row is None else jnp.zeros(geometry.relation.shape, row.dtype) for row in traces[name]
            )
            for name in names
            if (geometry := self.model.traces[self._by_name[name].type.of])
        }
        pull = jax.linear_transpose(
            lambda added, begin: self._recurrence(values, added, begin, ends=True), additions, start
        )
        result: Traces = {}
        for name in names:
            rows = []
            for k, row in enumerate(traces[name]):
                if row is None:
                    rows.append(None)
                    continue
                seeds = {
                    n: tuple(
                        None if v is None else jnp.ones_like(v) if (n, j) == (name, k) else jnp.zeros_like(v)
                        for j, v in enumerate(start[n])
                    )
                    for n in names
                }
                of_additions, of_start = pull(seeds)
                rows.append(self._end_row(name, row, outers, values, traces, of_additions, of_start))
            result[name] = tuple(rows)
        return result

    def _end_row(
        self,
        name: str,
        row: Array,
        outers: Sequence[Equation],
        values: dict[str, Value],
        traces: Traces,
        of_additions: dict[str, Value],
        of_start: Traces,
    ) -> Array:
        relation = self._by_name[name].type.of
        geometry = self.model.traces[relation]
        total = jnp.zeros(row.shape, row.dtype)
        for other, left in of_start.items():
            if self._by_name[other].type.of != relation:
                continue
            for factor, old in zip(left, traces[other], strict=True):
                if factor is not None and old is not None:
                    total = total + (geometry.spread(factor) * old).astype(row.dtype)
        for e in outers:
            if e.type.of != relation:
                continue
            f, x = values[_key(_ref(e.args[0]))], values[_key(_ref(e.args[1]))]
            for factor, jacobian in zip(of_additions[e.name], f, strict=True):
                if factor is not None and jacobian is not None:
                    total = total + geometry.accumulate(factor * jacobian, x).astype(row.dtype)
        return total


def _ref(argument: Any) -> Ref:
    assert isinstance(argument, Ref)
    return argument


def _late(name: str) -> str:
    """The key of a value as it was one step before."""
    return f"{name}'"


def _key(ref: Ref) -> str:
    return _late(ref.name) if ref.delay else ref.name


def _like(rows: Value) -> Value:
    return tuple(None if r is None else jnp.zeros_like(r) for r in rows)


def _dot(geometry: TraceGeometry, line: Sequence[Array | None], rows: Sequence[Array | None]) -> Array | None:
    terms = [
        geometry.from_positions(d) * row
        for d, row in zip(line, rows, strict=True)
        if d is not None and row is not None
    ]
    return sum(terms[1:], terms[0]) if terms else None


def _sum_but_time(value: Array) -> Array:
    return jnp.sum(value, axis=tuple(range(1, value.ndim)))
