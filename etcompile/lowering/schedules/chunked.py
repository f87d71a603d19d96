"""Chunks: many steps at once with the weights fixed, for programs whose traces are linear in what each step adds.

A trace is never needed as such, only through gradients, and those are linear in it. With a_t what the gradients of this and
later steps ask of the addition f_t (x) x_t made at step t, and r_t how much of it is left at the end of C steps,

    sum_t contract(L_t, e_t) = sum_t pullback(x_t, f_t a_t) + a_0 e_0        (gradients)
    e_C = r_0 e_0 + sum_t (r_t f_t) (x) x_t                                  (traces)

so every weight has one credit of its y for all steps, and its gradient is one product over time and batch. It is the same
sum as step by step in another order: no logarithm, no division, right for every transition. Of D-RTRL, a_t is b_t and r_t is
R_t of docs/theory.md; of any rule both are its own trace equations transposed (:mod:`etcompile.lowering.schedules.recurrence`).

The states of all steps come from a first pass that does nothing else. Derivatives are then taken for all steps at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.errors import EtcompileError, UnsupportedError
from etcompile.ir.kinds import KINDS
from etcompile.ir.ops import OPS
from etcompile.ir.program import Argument, Ref
from etcompile.lowering.causal import CausalProgram, Traces
from etcompile.lowering.evaluate import Context, covered, evaluate
from etcompile.lowering.in_place import Moment, all_known_after, large_ones
from etcompile.lowering.losses import LossValue, loss_and_cotangents, replaced
from etcompile.lowering.mapped import mapped
from etcompile.lowering.pushed import PushedTransition
from etcompile.lowering.schedules.base import Found, Loop, Run, SequenceSchedule, Steps
from etcompile.lowering.schedules.filter_credits import FilterCredits
from etcompile.lowering.schedules.first_pass import FirstPass, Passed, in_blocks
from etcompile.lowering.schedules.linear import ChunkEquations, chunk_equations
from etcompile.lowering.schedules.pulled import Pulled, PulledCredit, pulled_credit
from etcompile.lowering.schedules.recurrence import (
    Recurrence,
    Rows,
    TraceClass,
    referred,
    value_key,
    weighted,
)
from etcompile.lowering.schedules.relation_traces import RelationTraces
from etcompile.lowering.schedules.split import Blocks
from etcompile.lowering.schedules.traffic import chunks_pay_off
from etcompile.lowering.sums import added, by_name
from etcompile.schedule import Schedule
from etcompile.sites.operation import Span

__all__ = ["ENOUGH_WITHOUT_TRACES", "Chunked", "Credit", "evenly", "refuse_too_large"]

Array = Any
Value = Any

#: What steps ask of the traces before them, of the size of states: of D-RTRL b_0; by what makes it, the loop or the classes.
Credit = Any

#: Steps after which a longer chunk gains little: with traces to be made at its end, and without, where a cache should hold it.
_ENOUGH, ENOUGH_WITHOUT_TRACES = 128, 64


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """Gradients of a chunk.

    Attributes
    ----------
    sites : dict of str to array
        Of the sites' weights.
    starts : dict of str to array
        What of them is made of the traces before the chunk, by relation.
    last : list of arrays
        The last large product: all others were made before it.
    before : Credit
        What is asked of traces at the chunk's start.
    """

    sites: dict[str, Array]
    starts: dict[str, Array] = dataclasses.field(default_factory=dict)
    last: list[Array] = dataclasses.field(default_factory=list)
    before: Credit = None


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A chunk before its credit: states, losses, and what the program's equations make of each step.

    Attributes
    ----------
    passed : Passed
    inputs : list of arrays
    loss : LossValue
    values : dict of str to value
        By :func:`value_key`, time on axis 0.
    filters : dict of str to value
        Those that are carried and no traces, after the chunk.
    own : dict of int to array
        Gradients by parameters that the loss reads itself.
    asked : tuple
        Derivatives of the losses by outputs and new states, for a loop that pulls all credits.
    """

    passed: Passed
    inputs: list[Array]
    loss: LossValue
    values: dict[str, Value]
    filters: dict[str, Value]
    own: dict[int, Array]
    asked: Any


class Chunked(SequenceSchedule):
    """Many steps at once."""

    name = "chunks"

    def __init__(self, causal: CausalProgram) -> None:
        super().__init__(causal)
        self._pulled = pulled_credit(causal)
        #: Whether traces advance by pushes through the step: then those at the end of a chunk are found step by step.
        self._pushes = any(
            causal.model.analysis.group(r.group).pushed for r in causal.program.header.relations
        )
        self._first_pass = FirstPass(causal.model, self._pulled.wide if self._pulled else None)
        self._carried = set(causal.program.carried)
        self._quiet = Context(causal.program, causal.model, None, None, causal.functions)

    # -- what it is for -----------------------------------------------------------------------------------------

    def refusal(self) -> EtcompileError | None:
        return self._sorted if isinstance(self._sorted, UnsupportedError) else None

    @cached_property
    def _sorted(self) -> ChunkEquations | UnsupportedError:
        if self._pushes and self._pulled is None:
            program = self.causal.program
            return UnsupportedError(
                f"{program.name} cannot run in chunks: units of this model have many elements, "
                "and what becomes of a trace is known from step to step alone.",
                got=f"{program.name}, of a model whose delays feed back over many slots",
                expected="d_rtrl, whose gradients in a chunk need no trace",
                hint="run it step by step: chunk=1.",
            )
        try:
            return chunk_equations(self.causal.program)
        except UnsupportedError as error:
            return error

    @property
    def _equations(self) -> ChunkEquations:
        assert not isinstance(self._sorted, UnsupportedError), "chosen only where it does not refuse"
        return self._sorted

    def size(self, schedule: Schedule, steps: int, wanted: int | str | None) -> int:
        """What is asked for; of ``"auto"`` as many as pay off, if any do, and all where a trace is too large to be stored."""
        wanted = schedule.chunk if wanted is None else wanted
        if self.causal.carried.too_large:
            if isinstance(wanted, int) and wanted < steps:
                site = next(iter(self.causal.carried.too_large.values()))
                raise site.cannot_store("chunk='auto': the whole sequence is one chunk.")
            return steps
        if not isinstance(wanted, int):
            pays = self.refusal() is None and self.pays_off
            wanted = self._that_pay_off(steps, schedule.memory) if pays else 1
        size = min(wanted, steps)
        return size if size > 1 else 0

    @property
    def bytes_of_a_step(self) -> int:
        return self._first_pass.bytes_of_a_step

    @cached_property
    def pays_off(self) -> bool:
        """Whether steps take less time in chunks than alone."""
        return chunks_pay_off(self.causal)

    def _that_pay_off(self, steps: int, memory: int) -> int:
        """Steps to handle together: enough to make up for the work at a chunk's end, as far as memory allows."""
        possible = min(steps, memory // self._first_pass.bytes_of_a_step)
        if self.stands_alone and steps * self.bytes_of_a_step <= self.memory_alone(memory):
            return steps
        return evenly(steps, max(1, min(possible, _ENOUGH if self._traces else ENOUGH_WITHOUT_TRACES)))

    @property
    def stands_alone(self) -> bool:
        """Whether a sequence has traces, which start at zero and are given up at its end: one chunk needs none."""
        return self._traces and not self.causal.keeps

    def memory_alone(self, memory: int) -> int:
        """Bytes that a sequence may take that carries no traces: theirs as well."""
        return memory + self._bytes_of_traces

    @property
    def _traces(self) -> bool:
        return any(KINDS[self._kind(name)].trace for name in self._carried)

    @property
    def _bytes_of_traces(self) -> int:
        """What is carried from chunk to chunk, and once more while it is made at the end of one."""
        carried = jax.tree.leaves(jax.eval_shape(self.causal.carried.zeros))
        return 2 * sum(v.size * v.dtype.itemsize for v in carried)

    # -- one chunk ----------------------------------------------------------------------------------------------

    def part(self, run: Run, loop: Loop, steps: Steps) -> tuple[Loop, Found]:
        traces = self.causal.carried.wide(loop.traces)
        seen = self._seen(run, loop, steps, traces)
        recurrences = [] if self._pushes else self._recurrences(seen.values, traces)
        gradients = self._credited(run, seen, recurrences, traces)
        if self._pushes:
            traces = self._advanced(run.weights, seen.passed, seen.inputs, loop.traces)
        else:
            ends = self._ends(recurrences, seen.values, traces, gradients)
            traces = self.causal.stored({**seen.filters, **ends})
        sums = added(loop.sums, by_name(gradients.sites, seen.own))
        return Loop(seen.passed.states, traces, sums, seen.loss.carried), (seen.loss.value, seen.loss.aux)

    def _seen(self, run: Run, loop: Loop, steps: Steps, traces: Traces) -> _Seen:
        inputs = run.inputs(steps.inputs)
        passed = self._first_pass(run.weights, loop.states, inputs)  # h_0 ... h_C
        loss, values, own, asked = self._at_all_steps(
            run, loop.carried, steps, passed, inputs
        )  # D_t, f_t, x_t, L_t, K_t
        values, filters = self._filtered(values, traces)
        return _Seen(passed, inputs, loss, self._after_filters(values), filters, own, asked)

    def _credited(
        self,
        run: Run,
        seen: _Seen,
        recurrences: list[Recurrence],
        traces: Traces,
        later: Credit = None,
    ) -> _Gradients:
        """Gradients of the sites, with what steps after the chunk ask of its traces; None: nothing."""
        if self._pulled is None:
            return self._gradients(recurrences, seen.values, traces, later)
        of_steps = (seen.passed.before, seen.passed.costly, seen.inputs, *seen.asked)
        blocks = self._blocks(run.weights, seen.passed, seen.inputs)
        pulled = self._pulled(run.weights, of_steps, blocks, later)
        return self._gradients_of_pulled(self._pulled, pulled, seen.values, traces)

    # -- a part of a sequence whose traces start at zero and are given up -------------------------------------------

    def alone(self, loop: Loop) -> Loop:
        """A loop without traces, and without sums; what is filtered stays."""
        traces = self._without_rows(self.causal.carried.wide(loop.traces))
        return dataclasses.replace(loop, traces=traces, sums={})

    def no_credit(self) -> Credit:
        """What nothing asks, of what steps ask of the traces before them."""
        if self._pulled is not None:
            shapes: Credit = self._pulled.carried
        else:
            shapes = [self._rows_before(one, self._shapes) for one in self._equations.classes]
        return jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)

    def onward(self, run: Run, loop: Loop, steps: Steps) -> Loop:
        """What is there after some steps, of :meth:`alone`: no derivatives, and nothing is kept of the steps."""
        inputs, writes = run.inputs(steps.inputs), bool(jax.tree.leaves(loop.carried))
        if not writes and not self.filtered(loop.traces):
            return dataclasses.replace(loop, states=self._first_pass.last(run.weights, loop.states, inputs))
        passed, carried = self._first_pass(run.weights, loop.states, inputs), loop.carried
        if writes:
            made, given = self._made(run, passed, inputs), (steps.items, steps.moving)
            carried, _ = _written_by_loss(run, carried, made, given)
        _, values = self._without_loss(run.weights, passed, inputs)
        filters = self._filtered(values, loop.traces)[1]
        return Loop(passed.states, {**loop.traces, **filters}, loop.sums, carried)

    def credited(self, run: Run, loop: Loop, steps: Steps, later: Credit) -> tuple[Loop, Found, Credit]:
        """Some steps from :meth:`alone`, with what later ones ask: the loop with their gradients as sums, and what these ask."""
        seen = self._seen(run, loop, steps, loop.traces)
        recurrences = [] if self._pulled else self._recurrences(seen.values, self._shapes)
        gradients = self._credited(run, seen, recurrences, loop.traces, later)
        sums, traces = by_name(gradients.sites, seen.own), {**loop.traces, **seen.filters}
        end = Loop(seen.passed.states, traces, sums, seen.loss.carried)
        return end, (seen.loss.value, seen.loss.aux), gradients.before

    def filtered(self, traces: Traces) -> Traces:
        """Carried values that are no traces."""
        return {name: v for name, v in traces.items() if not KINDS[self._kind(name)].trace}

    @cached_property
    def _shapes(self) -> Traces:
        return self.causal.carried.shapes()

    def over(self, run: Run, loop: Loop, steps: Steps, size: int) -> tuple[Loop, Found]:
        alone = not self.causal.keeps and steps.count <= size
        if alone and self._pulled is not None:  # one chunk: traces are zero before it, and of no use after it
            loop = dataclasses.replace(loop, traces=self._without_rows(loop.traces))
        return super().over(run, loop, steps, size)

    def _without_rows(self, traces: Traces) -> Traces:
        """Carried values, the rows of those of the classes all left out."""
        left_out = {e.name for c in self._equations.classes for of in c.traces.values() for e in of}
        return {name: (None,) * len(v) if name in left_out else v for name, v in traces.items()}

    def forward_size(self, schedule: Schedule, steps: int) -> int:
        if self.causal.program.window is not None or self.refusal() is not None:
            return 0
        if (
            self.causal.carried.too_large
        ):  # never made where there is no loss, so that steps need not be one chunk
            return self._that_pay_off(steps, schedule.memory)
        return self.size(schedule, steps, None)

    def forward(self, weights: list[Array], loop: Loop, inputs: list[Array]) -> tuple[Loop, list[Array]]:
        passed = self._first_pass(weights, loop.states, inputs)
        outputs, values = self._without_loss(weights, passed, inputs)
        if not self.causal.keeps:
            return dataclasses.replace(loop, states=passed.states), outputs
        if self._pushes:
            advanced = self._advanced(weights, passed, inputs, loop.traces)
            return Loop(passed.states, advanced, loop.sums, loop.carried), outputs
        traces = self.causal.carried.wide(loop.traces)
        values, filters = self._filtered(values, traces)
        ends = self._ends(self._recurrences(values, traces), values, traces, _Gradients({}))
        return Loop(passed.states, self.causal.stored({**filters, **ends}), loop.sums, loop.carried), outputs

    def _without_loss(
        self, weights: list[Array], passed: Passed, inputs: list[Array]
    ) -> tuple[list[Array], dict[str, Value]]:
        """Outputs of all steps, and what needs neither the loss nor other steps."""
        model = self.causal.model

        def at_step(
            old: list[Array], costly: dict[int, Array], x: list[Array]
        ) -> tuple[list[Array], dict[str, Value]]:
            step = model.step(weights, old, x, costly, quiet=True)
            context = Context(self.causal.program, model, step, None, self.causal.functions)
            return step.outputs, _written(evaluate(context, self._equations.alone, {}, {}))

        return mapped(at_step, passed.before, passed.costly, inputs)

    def _made(self, run: Run, passed: Passed, inputs: list[Array]) -> tuple[list[Array], list[Array]]:
        """Outputs and new states of all steps."""

        def results(old: list[Array], costly: dict[int, Array], x: list[Array]) -> Any:
            step = self.causal.model.step(run.weights, old, x, costly, quiet=True)
            return step.outputs, step.new_states

        return mapped(results, passed.before, passed.costly, inputs)

    def _at_all_steps(
        self, run: Run, carried: Any, steps: Steps, passed: Passed, inputs: list[Array]
    ) -> tuple[LossValue, dict[str, Value], dict[int, Array], Any]:
        """Losses, what needs nothing of other steps, gradients of parameters that the loss reads, and of what steps give it."""
        model, reads = self.causal.model, run.loss.program
        seen = (passed.before, passed.costly, inputs)
        given = (steps.items, steps.moving)
        writes = bool(jax.tree.leaves(carried))
        made = self._made(run, passed, inputs) if writes or reads.params else None
        before = carried
        if writes:
            carried, before = _written_by_loss(run, carried, made, given)
        without_params = dataclasses.replace(reads, params=())
        equations = [*self._equations.alone, *(() if self._pulled else self._equations.signals)]

        def at_step(
            old: list[Array], costly: dict[int, Array], x: list[Array], given: Any, now: Any
        ) -> tuple[Found, dict[str, Value], Any]:
            step = model.step(run.weights, old, x, costly, quiet=True)
            found, cotangents = loss_and_cotangents(
                run.of_step, without_params, step.outputs, step.new_states, run.params, now, given[0]
            )
            after = step.with_loss(cotangents.outputs, cotangents.states, run.call(*given))
            context = Context(self.causal.program, model, step, after, self.causal.functions)
            asked = (cotangents.outputs, cotangents.states) if self._pulled else None
            return (found.value, found.aux), _written(evaluate(context, equations, {}, {})), asked

        (losses, aux), values, asked = mapped(at_step, *seen, given, before)
        own = _by_params(run, made, given, before) if reads.params else {}
        return LossValue(losses, aux, carried), values, own, asked

    def _filtered(self, values: dict[str, Value], traces: Traces) -> tuple[dict[str, Value], Traces]:
        """Values with those that are recurrences of the size of states or presynaptic values; and these after the chunk."""
        filters, context = self._equations.filters, self._quiet
        carried = {e.name: traces[e.name] for e in filters if e.name in self._carried}
        carried.update({e.name: traces[e.name] for e in self._equations.alone if e.name in self._carried})

        def one(before: Traces, now: dict[str, Value]) -> tuple[Traces, tuple[dict[str, Value], Traces]]:
            found = evaluate(context, filters, now, before)
            kept = {name: self.causal.kept(name, found[name]) for name in before}
            return kept, ({e.name: found[e.name] for e in filters}, before)

        if not carried and not filters:
            return values, {}
        end, (found, before) = lax.scan(one, carried, values)
        return {**values, **found, **{value_key(Ref(name, -1)): v for name, v in before.items()}}, end

    def _after_filters(self, values: dict[str, Value]) -> dict[str, Value]:
        """Values with those that need the loss and filters."""
        late = self._equations.late
        if not late:
            return values

        def after(now: dict[str, Value]) -> dict[str, Value]:
            previous = {
                name: now[value_key(Ref(name, -1))]
                for name in self._carried
                if value_key(Ref(name, -1)) in now
            }
            done = evaluate(self._quiet, late, now, previous)
            return {e.name: done[e.name] for e in late}

        return {**values, **mapped(after, values)}

    # -- gradients, and traces at the end -----------------------------------------------------------------------

    def _recurrences(self, values: dict[str, Value], traces: Traces) -> list[Recurrence]:
        """The traces of the chunk, class by class."""
        return [self._recurrence(one, values, traces) for one in self._equations.classes]

    def _traces_of(self, recurrence: Recurrence) -> Iterator[RelationTraces]:
        """The traces of each relation of a class."""
        for relation, equations in recurrence.traces.traces.items():
            joined = recurrence.traces.joined
            lent = [
                (e, joined.get(first.name, first.name))
                for e, first in zip(equations, recurrence.traces.first, strict=True)
            ]
            yield RelationTraces(self.causal.model.traces[relation], lent)

    def _gradients(
        self,
        recurrences: list[Recurrence],
        values: dict[str, Value],
        traces: Traces,
        later: list[dict[str, Rows]] | None = None,
    ) -> _Gradients:
        """Gradients of the sites, summed over the chunk; ``later`` is what steps after it ask of the traces of each class."""
        weight = self._weights(values)
        credits: dict[str, dict[str, Array]] = {}  # of y for all steps, by the site and the x that meets it
        spans: dict[tuple[str, str], set[Span | None]] = {}  # outside of which such a credit is zero
        gradients: dict[str, Array] = {}
        starts: dict[str, Array] = {}
        for e in self._equations.gradients:  # q_t, which needs no trace
            if OPS[e.op].pulls_back and e.name in weight:
                x, q = map(referred, e.args)
                if values[value_key(q)] is not None:
                    q_t = weighted(values[value_key(q)], weight[e.name])
                    site = self._equation(x.name).type.of
                    _add(credits.setdefault(site, {}), value_key(x), q_t)
                    spans.setdefault((site, value_key(x)), set()).add(covered(self._quiet, q))
        before: list[dict[str, Rows]] = []
        for recurrence, after in zip(recurrences, later or [None] * len(recurrences), strict=True):
            a_t, a_0 = recurrence.asked(weight, after)
            before.append(a_0)
            for own in self._traces_of(recurrence):
                for x, credit in own.credits(values, a_t):
                    _add(credits.setdefault(own.site, {}), x, credit)  # f_t a_t
                    spans.setdefault((own.site, x), set()).add(own.geometry.relation.span)
                _add(starts, own.relation, own.gradient_of_start(traces, a_0))  # a_0 e_0
                _add(gradients, own.site, starts.get(own.relation))
        last: list[Array] = []  # one large product after the other, as at the end of the chunk
        for site, of_site in credits.items():  # sum_t pullback(x_t, q_t + f_t a_t)
            does = self.causal.model.sites[site]
            (met,) = FilterCredits(self._quiet, site)([of_site])
            for x, credit in met.steps.items():
                span, *others = spans[site, x] if of_site.get(x) is credit else (None,)
                large = large_ones((values[x], credit))
                given, credit = all_known_after((values[x], credit), Moment(last))
                found = (
                    does.pullback_of_steps(given, credit)
                    if span is None or others
                    else does.pulled_within(given, credit, span, steps=True)
                )
                _add(gradients, site, found)
                last = [found] if large else last
            for z, credit in met.start.items():
                _add(gradients, site, does.pullback(traces[z], credit))
        return _Gradients(gradients, starts, last, before)

    def _blocks(self, weights: list[Array], passed: Passed, inputs: list[Array]) -> Blocks | None:
        """Blocks of the first pass, in which wide states are made again where the loop of credits needs them."""
        if passed.starts is None:
            return None
        size = jax.tree.leaves(inputs)[0].shape[0] // passed.starts[0].shape[0]
        again, remade = self._first_pass.again, self._first_pass.remade
        given = (passed.starts, in_blocks((inputs, {**passed.across, **passed.costly}), size))

        def make(of: Any) -> list[Array]:
            before = again(weights, *of)
            return [before[k] for k in remade]

        return Blocks(size, remade, given, make)  # old states are the first leaves of what steps are given

    def _gradients_of_pulled(
        self, loop: PulledCredit, pulled: Pulled, values: dict[str, Value], traces: Traces
    ) -> _Gradients:
        """The same where one loop finds all credits of y."""
        model = self.causal.model
        gradients: dict[str, Array] = {}
        starts: dict[str, Array] = {}
        for site, gradient in pulled.gradients.items():
            _add(gradients, site, gradient)
        for site, credit in pulled.credits.items():
            x = values[loop.sites[site]]
            _add(gradients, site, model.sites[site].pullback_of_steps(x, credit))
        for one in self._equations.classes:
            for relation, equations in one.traces.items():
                own = RelationTraces(model.traces[relation], [(e, e.name) for e in equations])
                asked = {e.name: pulled.start[one.group] for e in equations if e.name in self._carried}
                _add(starts, relation, own.gradient_of_start(traces, asked))
                _add(gradients, own.site, starts.get(relation))
        return _Gradients(gradients, starts, before=pulled.before)

    def _ends(
        self,
        recurrences: list[Recurrence],
        values: dict[str, Value],
        traces: Traces,
        gradients: _Gradients,
    ) -> Traces:
        """The traces after the chunk: r_0 e_0 + sum_t (r_t f_t) (x) x_t.

        Each is overwritten after it was read, and one after the other: what each is made of would be held for all at a time else.
        """
        ends: Traces = {}
        before = gradients.last
        for recurrence in recurrences:
            r = recurrence.left()
            for own in self._traces_of(recurrence):
                read = [gradients.starts[own.relation]] if own.relation in gradients.starts else []
                filters = FilterCredits(self._quiet, own.site)
                found = own.at_end(values, traces, r, filters, [*before, *read])
                ends.update(found)
                before = large_ones(found) or before
        return ends

    def _advanced(self, weights: list[Array], passed: Passed, inputs: list[Array], traces: Traces) -> Traces:
        """The traces after the chunk, step by step; nothing where none are asked for."""
        if not jax.tree.leaves(traces):
            return self.causal.stored(dict.fromkeys(traces))

        causal = self.causal

        def one(now: Traces, given: Any) -> tuple[Traces, None]:
            step = causal.model.step(weights, *given, quiet=True)
            context = Context(causal.program, causal.model, step, None, causal.functions)
            values = evaluate(context, causal.early, {}, now)
            return {name: causal.kept(name, values[name]) for name in now}, None

        wide = causal.carried.wide(traces)
        return causal.stored(lax.scan(one, wide, (passed.before, inputs, passed.costly))[0])

    def _weights(self, values: dict[str, Value]) -> dict[str, Any]:
        """What each value that gradients are made of counts in them: a number, or one for each step."""
        weight: dict[str, Any] = {}
        for gradient in self.causal.program.gradients:
            _add(weight, gradient.value.name, 1)
        for e in reversed(self._equations.gradients):
            if e.name not in weight:
                continue
            op, now = OPS[e.op], weight[e.name]
            for sign, argument in zip(op.terms, e.args, strict=bool(op.terms)):
                _add(weight, referred(argument).name, now if sign == 1 else sign * now)
            if op.power:
                value, number = e.args if self._is_gradient(e.args[0]) else reversed(e.args)
                factor = values[value_key(number)] if isinstance(number, Ref) else number
                _add(weight, referred(value).name, now * factor if op.power == 1 else now / factor)
        return weight

    def _recurrence(self, one: TraceClass, values: dict[str, Value], traces: Traces) -> Recurrence:
        """The class's traces over this chunk; its first relation lends the names, and has every row that any has."""
        shape = self.causal.model.analysis.group(one.group).shape
        injected: dict[str, list[Value]] = {}
        for k, e in enumerate(one.first):
            if OPS[e.op].injects:
                f = [values[value_key(referred(of[k].args[0]))] for of in one.traces.values()]
                injected.setdefault(one.joined[e.name], []).extend(f)
        additions: dict[str, Any] = {}
        for name, f in injected.items():
            steps = next((r.shape[0] for of_relation in f for r in of_relation or () if r is not None), 0)
            additions[name] = _rows(f, (steps, *shape))  # no row where f is zero for every input
        return Recurrence(self._quiet, one, values, additions, self._rows_before(one, traces))

    def _rows_before(self, one: TraceClass, traces: Traces) -> dict[str, Rows]:
        """Shapes of the class's carried traces over the group's positions; each has the rows that any of its relations has."""
        shape = self.causal.model.analysis.group(one.group).shape
        carried = [(k, e.name) for k, e in enumerate(one.first) if e.name in self._carried]
        return {
            name: _rows([traces[equations[k].name] for equations in one.traces.values()], shape)
            for k, name in carried
        }

    def _equation(self, name: str) -> Any:
        return self.causal.program.equation(name)

    def _kind(self, name: str) -> str:
        return self._equation(name).type.kind

    def _is_gradient(self, argument: Argument) -> bool:
        return isinstance(argument, Ref) and KINDS[self._kind(argument.name)].gradient


def _rows(of: list[Value], shape: tuple[int, ...]) -> Rows:
    """Shapes of the rows that any of some values has."""
    found = []
    for row in zip(*[v for v in of if v is not None], strict=True):
        dtypes = [r.dtype for r in row if r is not None]
        # Transitions and signals are real: a complex y makes no answer complex.
        dtype = jnp.finfo(jnp.result_type(*dtypes)).dtype if dtypes else None
        found.append(jax.ShapeDtypeStruct(shape, dtype) if dtypes else None)
    return tuple(found)


def _written_by_loss(run: Run, carried: Any, made: Any, given: Any) -> tuple[Any, Any]:
    """What the loss writes goes from step to step: found first, one by one. After all steps, and before each."""

    def write(now: Any, step: Any) -> tuple[Any, Any]:
        (outputs, new), (item, _) = step
        return run.of_step(outputs, new, run.params, now, item).carried, now

    return lax.scan(write, carried, (made, given))


def evenly(steps: int, most: int) -> int:
    """A part of ``steps`` of about ``most`` of them, without a rest if there is one: a shorter last part is compiled again."""
    whole = next((c for c in range(most, most // 2, -1) if steps % c == 0), None)
    return whole or -(-steps // -(-steps // most))


def _by_params(run: Run, made: Any, given: Any, before: Any) -> dict[int, Array]:
    """The chunk's losses by parameters that the loss itself reads: summed over time before anything is as large as these."""
    reads = run.loss.program

    def total(some: list[Array]) -> Array:
        full = replaced(run.params, reads.params, some)

        def at_step(of_step: Any, given: Any, now: Any) -> Array:
            outputs, new = of_step
            return run.of_step(outputs, new, full, now, given[0]).value

        return jnp.sum(mapped(at_step, made, given, before))

    return dict(zip(reads.params, jax.grad(total)([run.params[k] for k in reads.params]), strict=True))


def _written(values: dict[str, Value]) -> dict[str, Value]:
    """Values that can be kept for all steps: transitions that are not written down cannot."""
    return {name: v for name, v in values.items() if not isinstance(v, PushedTransition)}


def _add(total: dict[Any, Any], key: Any, value: Any) -> None:
    if value is not None:
        total[key] = total[key] + value if key in total else value


def refuse_too_large(causal: CausalProgram) -> None:
    """Raise :class:`UnsupportedError` where a trace that cannot be stored would have to be."""
    for name, site in causal.carried.too_large.items():
        if not KINDS[causal.program.equation(name).type.kind].trace or causal.program.window is not None:
            raise site.cannot_store("train this parameter by d_rtrl in whole sequences, or exclude it.")
        if causal.keeps:
            raise site.cannot_store(
                "schedule=etcompile.Schedule(keep_traces=False) learns from whole sequences without storing it; "
                "or write the operation as a matmul or convolution."
            )
        chunk_equations(causal.program)  # raises where the rule's traces cannot be chunked
