"""Chunks: many steps at once with the weights fixed, for programs whose traces are linear in what each step adds.

A trace is never needed as such, only through gradients, and those are linear in it. Contracting first, with a_t what the
gradients of this and later steps ask of an addition made at step t (:mod:`etcompile.lowering.schedules.recurrence`),

    sum_t contract(signal_t, e_t) = sum_t pullback(x_t, f_t a_t) + contract(a_0, e_0),

so every weight has one credit of its y for all steps, and its gradient is one product over time and batch. It is the same
sum as step by step in another order: no logarithm, no division, right for every transition. With r_t what is left at the
end of an addition made at step t, the trace at the end is r_0 e_0 + sum_t (r_t f_t) (x) x_t, one batched product.

The states of all steps come from a first pass that does nothing else; what it computed at a price (products, convolutions,
random numbers) is kept. Derivatives are then taken for all steps at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.analysis.index_rules import CHEAP
from etcompile.errors import EtcompileError, UnsupportedError
from etcompile.frontend.jaxpr import bind, read
from etcompile.ir.kinds import KINDS
from etcompile.ir.ops import OPS
from etcompile.ir.program import Argument, Equation, Ref
from etcompile.ir.types import Type
from etcompile.lowering.causal import CausalProgram, Traces
from etcompile.lowering.evaluate import Context, evaluate
from etcompile.lowering.losses import LossProgram, LossValue, StepLoss, loss_and_cotangents, replaced
from etcompile.lowering.mapped import mapped
from etcompile.lowering.schedules.base import Found, Loop, Run, SequenceSchedule, Steps
from etcompile.lowering.schedules.recurrence import Recurrence, TraceClass, trace_classes, value_key, weighted
from etcompile.lowering.sums import added, by_name
from etcompile.schedule import Schedule

__all__ = ["Chunked", "refuse_too_large"]

Array = Any
Value = Any
#: A credit of y for all steps, by the presynaptic value that meets it and its site.
Credits = dict[tuple[str, str], Array]

#: Steps after which a longer chunk gains little: with traces to be made at its end, and without, where a cache should hold it.
_ENOUGH, _ENOUGH_WITHOUT_TRACES = 128, 64


class Chunked(SequenceSchedule):
    """Many steps at once."""

    name = "chunks"

    def refusal(self) -> EtcompileError | None:
        return self._program if isinstance(self._program, UnsupportedError) else None

    @cached_property
    def _program(self) -> ChunkProgram | UnsupportedError:
        try:
            return ChunkProgram(self.causal)
        except UnsupportedError as error:
            return error

    def size(self, schedule: Schedule, steps: int, wanted: int | str | None) -> int:
        """What is asked for; of ``"auto"`` as many as pay off, and all where a trace is too large to be stored between chunks."""
        wanted = schedule.chunk if wanted is None else wanted
        if self.causal.too_large:
            if isinstance(wanted, int) and wanted < steps:
                site = next(iter(self.causal.too_large.values()))
                raise site.cannot_store("chunk='auto': the whole sequence is one chunk.")
            return steps
        if isinstance(wanted, int):
            size = min(wanted, steps)
        else:
            size = (
                1
                if isinstance(self._program, UnsupportedError)
                else self._program.size(steps, schedule.memory)
            )
        return size if size > 1 else 0

    def part(self, run: Run, loop: Loop, steps: Steps) -> tuple[Loop, Found]:
        program, causal = self._program, self.causal
        assert isinstance(program, ChunkProgram)

        def of_item(outputs: list, states: list, params: list, carried: Any, item: tuple) -> LossValue:
            return run.of_step(outputs, states, params, carried, item[0])

        found, own, sites, states, traces = program.run(
            of_item,
            run.loss.program,
            run.weights,
            run.params,
            loop.states,
            causal.wide(loop.traces),
            run.inputs(steps.inputs),
            (steps.items, steps.moving),
            loop.carried,
            lambda item: run.call(*item),
        )
        traces = causal.stored(traces)
        sums = added(loop.sums, by_name(sites, own))
        return Loop(states, traces, sums, found.carried), (found.value, found.aux)


def refuse_too_large(causal: CausalProgram) -> None:
    """Raise :class:`UnsupportedError` where a trace that cannot be stored would have to be."""
    for name, site in causal.too_large.items():
        if causal.program.equation(name).type.kind != "trace" or causal.program.window is not None:
            raise site.cannot_store("train this parameter by d_rtrl in whole sequences, or exclude it.")
        if causal.keeps:
            raise site.cannot_store(
                "schedule=etcompile.Schedule(keep_traces=False) learns from whole sequences without storing it; "
                "or write the operation as a matmul or convolution."
            )
        ChunkProgram(causal)  # raises where the rule's traces cannot be chunked


class ChunkProgram:
    """A trace program run in chunks; refuses those whose traces are not linear in what each step adds."""

    def __init__(self, causal: CausalProgram) -> None:
        self.causal = causal
        self.program = causal.program
        self.model = causal.model
        self._by_name = {e.name: e for e in self.program.equations}
        self._recurrent = self._of_earlier_steps()
        self._refuse()
        late = {e.name for e in causal.late}
        plain = [e for e in self.program.equations if not _of_traces(e.type)]
        #: Values of a step that need nothing of other steps: computed for all steps at once.
        self.alone = [e for e in plain if e.name not in self._recurrent]
        self.filters = [e for e in plain if e.name in self._recurrent and e.name not in late]
        self.late_plain = [e for e in plain if e.name in self._recurrent and e.name in late]
        self.gradients = [e for e in self.program.equations if e.type.kind == "gradient"]
        self.carried = set(self.program.carried)
        self.classes = trace_classes(self.program)

    def size(self, steps: int, memory: int) -> int:
        """Steps to handle together: enough to make up for the work at a chunk's end, as far as memory allows.

        A size that leaves no rest is preferred: a shorter last chunk is a second program to compile.
        """
        graph = self.model.analysis.split.body
        made = [graph.avals[v] for operation in graph.operations for v in operation.outputs]
        per_step = 2 * sum(a.size * a.dtype.itemsize for a in made)
        traces = any(self._by_name[name].type.kind == "trace" for name in self.carried)
        enough = _ENOUGH if traces else _ENOUGH_WITHOUT_TRACES
        most = max(1, min(enough, steps, memory // max(1, per_step)))
        whole = next((c for c in range(most, most // 2, -1) if steps % c == 0), None)
        return whole or -(-steps // -(-steps // most))

    # -- what can be chunked ------------------------------------------------------------------------------------

    def _refuse(self) -> None:
        for e in self.program.equations:
            kind = KINDS[e.type.kind]
            if kind.every_path:
                self._no(e, f"it keeps a value of kind {kind.name}, which follows every path")
            if kind.counts:
                self._no(e, "it counts steps")
            if _of_traces(e.type):
                self._refuse_unless_linear(e)
            if OPS[e.op].signal == "drive" and any(ref.name in self._recurrent for ref in e.refs):
                self._no(e, "its feedback matrix changes with the weights, which are fixed in a chunk")
        for name in self.program.carried:
            if self._by_name[name].type.kind == "gradient":
                self._no(self._by_name[name], "it carries a gradient")

    def _refuse_unless_linear(self, e: Equation) -> None:
        op = OPS[e.op]
        traced = [
            k for k, a in enumerate(e.args) if isinstance(a, Ref) and _of_traces(self._by_name[a.name].type)
        ]
        if not op.together and not (op.linear and set(traced) <= set(op.linear)):
            self._no(e, f"{e.op} of a trace is not linear")
        if not op.together and len(traced) > 1:
            self._no(e, "a product of two traces is not linear")

    def _no(self, equation: Equation, reason: str) -> None:
        raise UnsupportedError(
            f"{self.program.name} cannot run in chunks: {reason}.",
            got=f"{equation.name} = {equation.op}(...) : {equation.type}",
            expected="traces made of recur, outer, contract and sums, with the weights fixed",
            hint="run it step by step: chunk=1.",
        )

    def _of_earlier_steps(self) -> set[str]:
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
        reads: LossProgram,
        weights: list[Array],
        params: list[Array],
        states: list[Array],
        traces: Traces,
        inputs: list[Array],
        items: Any,
        carried: Any,
        call: Callable[[Any], Mapping[str, Any]],
    ) -> tuple[LossValue, dict[int, Array], dict[str, Array], list[Array], Traces]:
        """Losses ``(C,)``, gradients of parameters that the loss reads and of the sites, and states and traces at the end.

        ``inputs`` and ``items`` have time on axis 0; ``call(item)`` is what a step's call brings beside its inputs.
        """
        last, olds, dear = self._states(weights, states, inputs)
        writes = bool(jax.tree.leaves(carried))
        made = None
        if writes or reads.params:

            def results(old: list[Array], dear: dict[int, Array], x: list[Array]) -> Any:
                step = self.model.step(weights, old, x, dear, quiet=True)
                return step.outputs, step.new_states

            made = mapped(results, olds, dear, inputs)
        before = carried
        if writes:  # what the loss writes goes from step to step: found first, one by one

            def write(now: Any, given: Any) -> tuple[Any, Any]:
                (outputs, new), item = given
                return loss(outputs, new, params, now, item).carried, now

            carried, before = lax.scan(write, carried, (made, items))
        without_params = dataclasses.replace(reads, params=())

        def at_step(
            old: list[Array], dear: dict[int, Array], x: list[Array], item: Any, now: Any
        ) -> tuple[Any, dict[str, Value]]:
            step = self.model.step(weights, old, x, dear, quiet=True)
            found, cotangents = loss_and_cotangents(
                loss, without_params, step.outputs, step.new_states, params, now, item
            )
            after = step.with_loss(cotangents.outputs, cotangents.states, call(item))
            context = Context(self.program, self.model, step, after, self.causal.functions)
            return (found.value, found.aux), evaluate(context, self.alone, {}, {})

        (losses, aux), values = mapped(at_step, olds, dear, inputs, items, before)
        own = self._by_params(loss, reads, params, made, items, before) if reads.params else {}
        quiet = Context(self.program, self.model, None, None, self.causal.functions)
        values, filters_end = self._filtered(quiet, values, traces)
        weight = self._weights(values)
        credits = self._own_credits(values, weight)
        found: dict[str, Array] = {}
        ends: Traces = {}
        for one in self.classes:
            recurrence = self._recurrence(quiet, one, values, traces)
            added, start = recurrence.asked(weight)
            left = recurrence.left()
            for relation in one.traces:
                self._ask(one, relation, values, credits, added)
                _add(
                    found,
                    self.model.traces[relation].relation.site,
                    self._from_start(one, relation, traces, start),
                )
                ends.update(self._ends(one, relation, values, traces, left))
        for (x, site), credit in credits.items():
            _add(found, site, self.model.sites[site].pullback_of_steps(values[x], credit))
        return LossValue(losses, aux, carried), own, found, last, {**filters_end, **ends}

    @staticmethod
    def _by_params(
        loss: StepLoss, reads: LossProgram, params: list[Array], made: Any, items: Any, before: Any
    ) -> dict[int, Array]:
        """The chunk's losses by parameters that the loss itself reads: summed over time before anything is as large as these."""

        def total(some: list[Array]) -> Array:
            full = replaced(params, reads.params, some)

            def at_step(of_step: Any, item: Any, now: Any) -> Array:
                outputs, new = of_step
                return loss(outputs, new, full, now, item).value

            return jnp.sum(mapped(at_step, made, items, before))

        return dict(zip(reads.params, jax.grad(total)([params[k] for k in reads.params]), strict=True))

    @cached_property
    def _dear(self) -> tuple[int, ...]:
        """Variables on the way to the new states whose operations are worth keeping."""
        graph = self.model.analysis.split.body
        needed = {v for v in self.model.analysis.model.new_state_vars if isinstance(v, int)}
        dear: list[int] = []
        for operation in reversed(graph.operations):
            if needed.isdisjoint(operation.outputs):
                continue
            needed.update(v for v in operation.inputs if isinstance(v, int))
            plain = all(
                not jnp.issubdtype(graph.avals[v].dtype, jax.dtypes.extended) for v in operation.outputs
            )
            if operation.name not in CHEAP and plain:
                dear += operation.outputs
        return tuple(dict.fromkeys([*dear, *(self.model.effects or ())]))

    def _states(
        self, weights: list[Array], states: list[Array], inputs: list[Array]
    ) -> tuple[list[Array], list[Array], dict[int, Array]]:
        """States after the chunk, those before each step, and what was computed at a price."""
        graph = self.model.analysis.split.body
        after = self.model.analysis.model.new_state_vars

        def forward(now: list[Array], x: list[Array]) -> tuple[list[Array], Any]:
            env: dict[int, Array] = dict(zip(graph.inputs, [*weights, *now, *x], strict=True))
            for operation in graph.operations:
                env.update(
                    zip(
                        operation.outputs,
                        bind(operation, [read(env, v) for v in operation.inputs]),
                        strict=True,
                    )
                )
            return [read(env, v) for v in after], (now, {v: env[v] for v in self._dear})

        last, (olds, dear) = lax.scan(forward, states, inputs)
        return last, olds, dear

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
        values = {**values, **found, **{value_key(Ref(name, -1)): v for name, v in before.items()}}
        if self.late_plain:

            def after(now: dict[str, Value]) -> dict[str, Value]:
                previous = {name: now[value_key(Ref(name, -1))] for name in carried}
                done = evaluate(context, self.late_plain, now, previous)
                return {e.name: done[e.name] for e in self.late_plain}

            values = {**values, **mapped(after, values)}
        return values, end

    # -- gradients ----------------------------------------------------------------------------------------------

    def _weights(self, values: dict[str, Value]) -> dict[str, Any]:
        """What each gradient value counts in the gradients: a number, or one for each step."""
        weight: dict[str, Any] = {}
        for gradient in self.program.gradients:
            _add(weight, gradient.value.name, 1)
        for e in reversed(self.gradients):
            if e.name not in weight or e.op in ("contract", "pullback"):
                continue
            now = weight[e.name]
            first, second = (*e.args, None)[:2]
            if e.op in ("mul", "div"):
                value, number = (first, second) if self._is_gradient(first) else (second, first)
                factor = values[value_key(number)] if isinstance(number, Ref) else number
                _add(weight, _ref(value).name, now * factor if e.op == "mul" else now / factor)
                continue
            _add(weight, _ref(first).name, now)
            if e.op in ("add", "sub"):
                _add(weight, _ref(second).name, now if e.op == "add" else -now)
        return weight

    def _is_gradient(self, argument: Argument | None) -> bool:
        return isinstance(argument, Ref) and self._by_name[argument.name].type.kind == "gradient"

    def _own_credits(self, values: dict[str, Value], weight: Mapping[str, Any]) -> Credits:
        """Credits of y that need no trace."""
        credits: Credits = {}
        for e in self.gradients:
            if e.op != "pullback" or e.name not in weight:
                continue
            x, credit = _ref(e.args[0]), values[value_key(_ref(e.args[1]))]
            if credit is not None:
                _add(credits, (value_key(x), self._by_name[x.name].type.of), weighted(credit, weight[e.name]))
        return credits

    def _recurrence(
        self, context: Context, one: TraceClass, values: dict[str, Value], traces: Traces
    ) -> Recurrence:
        """The class's traces over this chunk; its first relation lends the names, and has every row that any has."""
        shape = self.model.analysis.group(one.group).shape

        def rows(of: list[Value], lead: tuple[int, ...]) -> tuple[Array | None, ...]:
            found = []
            for row in zip(*[v for v in of if v is not None], strict=True):
                dtypes = [r.dtype for r in row if r is not None]
                # Transitions and signals are real: a complex y makes no answer complex.
                dtype = jnp.finfo(jnp.result_type(*dtypes)).dtype if dtypes else None
                found.append(jax.ShapeDtypeStruct((*lead, *shape), dtype) if dtypes else None)
            return tuple(found)

        added: dict[str, Any] = {}
        start: dict[str, Any] = {}
        for k, e in enumerate(one.first):
            alike = [equations[k] for equations in one.traces.values()]
            if e.op == "outer":
                of = [values[value_key(_ref(a.args[0]))] for a in alike]
                steps = next(r.shape[0] for rows_of in of for r in rows_of if r is not None)
                added[e.name] = rows(of, (steps,))
            if e.name in self.carried:
                start[e.name] = rows([traces[a.name] for a in alike], ())
        return Recurrence(context, one, values, added, start)

    def _ask(
        self,
        one: TraceClass,
        relation: str,
        values: dict[str, Value],
        credits: Credits,
        asked: dict[str, Value],
    ) -> None:
        """Add what later steps ask of this relation's additions to the credits of its y."""
        geometry = self.model.traces[relation]
        for e, lent in zip(one.traces[relation], one.first, strict=True):
            if e.op != "outer":
                continue
            f, x = (_ref(a) for a in e.args)
            for jacobian, credit in zip(values[value_key(f)], asked[lent.name], strict=True):
                if jacobian is not None and credit is not None:
                    of_y = jax.vmap(geometry.place)(jax.vmap(geometry.from_positions)(credit) * jacobian)
                    _add(credits, (value_key(x), geometry.relation.site), of_y)

    def _from_start(
        self, one: TraceClass, relation: str, traces: Traces, asked: dict[str, Value]
    ) -> Array | None:
        """What the chunk's gradients make of this relation's traces from before it."""
        geometry = self.model.traces[relation]
        pairs = []
        for e, lent in zip(one.traces[relation], one.first, strict=True):
            if e.name not in self.carried:
                continue
            for credit, row in zip(asked[lent.name], traces[e.name], strict=True):
                if credit is not None and row is not None:
                    pairs.append((geometry.from_positions(credit), row))
        return geometry.contract(pairs) if pairs else None

    # -- traces at the end --------------------------------------------------------------------------------------

    def _ends(
        self, one: TraceClass, relation: str, values: dict[str, Value], traces: Traces, left: dict[str, Any]
    ) -> Traces:
        """A relation's traces after the chunk: what is left of those before it, and of every step's addition."""
        geometry = self.model.traces[relation]
        equations = list(zip(one.traces[relation], one.first, strict=True))
        result: Traces = {}
        for e, lent in equations:
            if e.name not in self.carried:
                continue
            rows = []
            for row, of_row in zip(traces[e.name], left[lent.name], strict=True):
                if row is None:
                    rows.append(None)
                    continue
                of_additions, of_start = of_row
                total = jnp.zeros(row.shape, row.dtype)
                for other, other_lent in equations:
                    if other.name in self.carried:
                        for factor, old in zip(of_start[other_lent.name], traces[other.name], strict=True):
                            if factor is not None and old is not None:
                                kept = geometry.spread(geometry.from_positions(factor))
                                total = total + (kept * old).astype(row.dtype)
                    if other.op == "outer":
                        f, x = (values[value_key(_ref(a))] for a in other.args)
                        for factor, jacobian in zip(of_additions[other_lent.name], f, strict=True):
                            if factor is not None and jacobian is not None:
                                part = jax.vmap(geometry.from_positions)(factor) * jacobian
                                total = total + geometry.accumulate(part, x).astype(row.dtype)
                rows.append(total)
            result[e.name] = tuple(rows)
        return result


def _of_traces(kind: Type) -> bool:
    """Whether a value is summed over steps: a trace, or what gradients are made of."""
    return kind.kind in ("trace", "gradient")


def _ref(argument: Argument | None) -> Ref:
    assert isinstance(argument, Ref)
    return argument


def _add(total: dict[Any, Any], key: Any, value: Any) -> None:
    if value is not None:
        total[key] = total[key] + value if key in total else value
