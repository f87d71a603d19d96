"""The credit of all weights over a chunk by one loop backwards, where states are larger than what weights make.

A position of such a state reads few elements of y, and an element of y reaches many. f and D then have the size of the state, and
what is asked of y the size of y. So neither f nor D is written down for all steps. The trace equations of D-RTRL are run on one
direction of the weights' results,

    d_t = D_t d_{t-1} + sum over sites of f_t u_t,    total = sum_t (L_t D_t + K_t) d_{t-1} + one_step_t u_t

with d of the shape of the states, as one push of tangents through the step. Transposed, it gives for every u_t what the chunk's
gradients ask of y_t, its one-step credit included, and for d_0 what they ask of the traces at the start. It is the sum that
:mod:`etcompile.lowering.schedules.recurrence` makes of arrays over positions. A model without cuts needs one push for all of
it: d is then the tangent of the states itself, and the loop is that of backpropagation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property, partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp

from etcompile.analysis.groups import HiddenGroup
from etcompile.frontend.jaxpr import Constant
from etcompile.frontend.loops import Use
from etcompile.ir.kinds import KINDS
from etcompile.ir.ops import OPS
from etcompile.ir.program import Equation, Ref, TraceProgram
from etcompile.lowering.causal import CausalProgram
from etcompile.lowering.derivatives import LoweredModel, StepDerivatives
from etcompile.lowering.pushed import same_cuts
from etcompile.lowering.schedules.split import Blocks, transposed

__all__ = ["Pulled", "PulledCredit", "pulled_credit"]

Array = Any
Cuts = Mapping[Use, Any]


@dataclasses.dataclass(frozen=True)
class Pulled:
    """What the loop gives.

    Attributes
    ----------
    credits : mapping of str to array
        Per site the credit of its y, time on axis 0.
    gradients : mapping of str to array
        Of other sites the gradient of the weight, summed over time.
    start : mapping of str to tuple of array
        Per group what is asked of its traces at the start, as rows over positions.
    before : dict of int to array
        The same by the variables of the states.
    """

    credits: dict[str, Array]
    gradients: dict[str, Array]
    start: dict[str, tuple[Array | None, ...]]
    before: dict[int, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class PulledCredit:
    """The loop of one program.

    Attributes
    ----------
    model : LoweredModel
    sites : mapping of str to str
        The sites with a gradient, with the name of the x that their credit meets.
    relations : tuple of str
        Those with a trace.
    wide : int
        The size of the largest y of which an element reaches many positions.
    """

    model: LoweredModel
    sites: Mapping[str, str]
    relations: tuple[str, ...]
    wide: int

    def __call__(
        self,
        weights: list[Array],
        seen: Any,
        blocks: Blocks | None = None,
        later: dict[int, Array] | None = None,
    ) -> Pulled:
        """Run it; ``seen`` holds, for all steps, old states, known variables, inputs, and the loss by outputs and new states.

        In ``blocks`` old states are made again. ``later`` is what steps after these ask, as :attr:`Pulled.before` of theirs.
        """
        analysis = self.model.analysis
        leaves = analysis.model.state_vars
        added = {name: self._shape(analysis.site(name).y) for name in self.sites if name not in self._in_loop}
        always = {name: self.model.sites[name].weight for name in self._in_loop}
        always = {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in always.items()}
        body = partial(self._step, weights)
        credits, gradients, first = transposed(
            body, self.carried, added, always, seen, self.wide, blocks, later
        )
        rows = {
            g.name: self.model.credits_of(g.name, [first[leaves[s]] for s in g.states]) for g in self._groups
        }
        return Pulled(credits, gradients, rows, first)

    @property
    def carried(self) -> dict[int, Any]:
        """Shapes of what goes from step to step: a number for each element of the states, by their variables."""
        leaves = self.model.analysis.model.state_vars
        return {leaves[s]: self._shape(leaves[s]) for g in self._groups for s in g.states}

    def _shape(self, variable: int) -> Any:
        aval = self.model.analysis.split.body.avals[variable]
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)

    @cached_property
    def _in_loop(self) -> tuple[str, ...]:
        """Sites with a y as large as the states, and no product in their gradient, which is summed in the loop."""
        sites = {name: self.model.sites[name] for name in self.sites}
        return tuple(
            name
            for name, site in sites.items()
            if site.y.size > self.wide
            and math.prod(site.contracted) == 1
            and site.closed
            and site.weight.dtype == site.y.dtype
        )

    @cached_property
    def _groups(self) -> list[HiddenGroup]:
        names = dict.fromkeys(self.model.traces[r].relation.group for r in self.relations)
        return [self.model.analysis.group(name) for name in names]

    def _step(
        self,
        weights: list[Array],
        now: dict[int, Array],
        added: dict[str, Array],
        always: dict[str, Array],
        seen: Any,
    ) -> Any:
        """One step of the loop, forwards: the tangents after it, and what the loss makes of those before and of what is added."""
        old, known, inputs, outputs, states = seen
        step = self.model.one_of_many(weights, old, inputs, known)
        asked = step.with_loss(outputs, states).seeds
        of_y = {self.model.analysis.site(name).y: u for name, u in added.items()}
        for name, v in always.items():
            of_y[self.model.analysis.site(name).y] = self.model.sites[name].respond(v, step.presynaptic(name))
        new = self.model.analysis.model.new_state_vars
        after = {self.model.analysis.model.state_vars[s]: new[s] for g in self._groups for s in g.states}
        if self._uncut:
            found = step.tape.push({**now, **of_y}, [*after.values(), *asked], cuts={}, onto=True)
            return {v: _or_zero(found, w, now[v]) for v, w in after.items()}, _product(asked, found)
        total = _product(asked, step.tape.push(of_y, list(asked), cuts={}, onto=True))
        following: dict[int, Array] = {}
        for group in self._groups:
            kept, injected = self._local(step, group, now), self._injected(step, group, of_y)
            own = {v: now[v] for s in group.states if (v := self.model.analysis.model.state_vars[s]) in now}
            independent = {new[s] for s in group.states}
            later = step.tape.push({**own, **kept}, list(asked), independent, cuts={})
            total = total + _product(asked, later)
            for v in own:
                terms = [found[after[v]] for found in (kept, injected) if after[v] in found]
                following[v] = reduce(add, terms) if terms else 0 * now[v]
        return following, total

    def _local(self, step: StepDerivatives, group: HiddenGroup, now: Mapping[int, Array]) -> dict[int, Array]:
        """D d: by new state, each with the uses cut that lead to it."""
        analysis = self.model.analysis
        found: dict[int, Array] = {}
        for k, s in enumerate(group.states):
            sources: list[tuple[int, Cuts]] = []
            for j, old in enumerate(group.states):
                if group.pattern[k][j]:
                    cuts = {} if (k, j) in group.shared else analysis.uses_cut[s]
                    sources.append((analysis.model.state_vars[old], cuts))
            self._push(step, sources, now, analysis.model.new_state_vars[s], found)
        return found

    def _injected(
        self, step: StepDerivatives, group: HiddenGroup, of_y: Mapping[int, Array]
    ) -> dict[int, Array]:
        """F u: by new state."""
        analysis = self.model.analysis
        found: dict[int, Array] = {}
        for k, s in enumerate(group.states):
            sources: dict[int, tuple[int, Cuts]] = {}
            for name in self.relations:
                relation = self.model.traces[name].relation
                if relation.group == group.name and relation.rows[k]:
                    y = analysis.site(relation.site).y  # classes of its elements are pushed together
                    fan_out = None if group.pushed else relation.fan_out
                    sources[y] = (y, fan_out.cuts if fan_out is not None else analysis.uses_cut[s])
            self._push(step, sources.values(), of_y, analysis.model.new_state_vars[s], found)
        return found

    def _push(
        self,
        step: StepDerivatives,
        sources: Any,
        tangents: Mapping[int, Array],
        target: int,
        found: dict[int, Array],
    ) -> None:
        """Add to ``found`` what reaches a new state from each source, with uses cut; those with the same cuts at once."""
        left = list(sources)
        while left:
            cuts = left[0][1]
            alike = [v for v, c in left if same_cuts(c, cuts)]
            left = [(v, c) for v, c in left if not same_cuts(c, cuts)]
            pushed = step.tape.push({v: tangents[v] for v in alike}, [target], cuts=cuts, onto=True)
            if target in pushed:
                found[target] = found[target] + pushed[target] if target in found else pushed[target]

    @cached_property
    def _uncut(self) -> bool:
        """Whether every derivative of the step is kept, so that one push finds all."""
        analysis = self.model.analysis
        relations = [self.model.traces[name].relation for name in self.relations]
        fans = [r.fan_out.cuts for r in relations if r.fan_out is not None]
        every = {r.name for r in analysis.relations} == set(self.relations)
        return not analysis.cuts and every and not any(fans)


def pulled_credit(causal: CausalProgram) -> PulledCredit | None:
    """The loop for a program whose equations are those of D-RTRL, on a model with results that reach many positions.

    None for all others: there, arrays over positions are no larger than y, and products over all steps at once are faster.
    """
    model, program = causal.model, causal.program
    sites, relations = _sites(program), _relations(program)
    if sites is None or relations is None or model.divided:
        return None
    found = [model.traces[name].relation for name in relations]
    if not any(r.fan_out is not None and r.fan_out.size > 1 for r in found) or any(
        r.site not in sites for r in found
    ):
        return None
    if any(r.masks for r in found if r.fan_out is None) or any(operation.loop for operation in _body(model)):
        return None
    kinds: dict[tuple[str, str], set[bool]] = {}
    for r in found:
        kinds.setdefault((r.site, r.group), set()).add(r.fan_out is not None)
    groups = [model.analysis.group(name) for name in {r.group for r in found}]
    if any(len(k) > 1 for k in kinds.values()) or any(g.masks for g in groups):
        return None
    variables = [model.analysis.site(name).y for name in sites]
    variables += [model.analysis.model.state_vars[s] for g in groups for s in g.states]
    avals = [model.analysis.split.body.avals[v] for v in variables]
    if any(a.dtype not in (jnp.float32, jnp.float64) for a in avals):
        return None
    wide = max(model.sites[r.site].y.size for r in found if r.fan)
    return PulledCredit(model, sites, relations, wide)


def _body(model: LoweredModel) -> Any:
    return model.analysis.split.body.operations


def _sites(program: TraceProgram) -> dict[str, str] | None:
    """The x of each site's one-step gradient; None where a gradient is made of anything else than these and contractions."""
    found: dict[str, str] = {}
    for gradient in program.gradients:
        e = program.equation(gradient.value.name)
        if gradient.value.delay or e.type.of != gradient.site:
            return None
        if OPS[e.op].contracts:
            continue
        if not OPS[e.op].pulls_back or gradient.site in found:
            return None
        x, q = (_made(program, a) for a in e.args)
        if not (_leaf(x, gradient.site) and _leaf(q, gradient.site) and q and OPS[q.op].within):
            return None
        assert x is not None
        found[gradient.site] = x.name
    return found


def _relations(program: TraceProgram) -> tuple[str, ...] | None:
    """The relations of a program that carries the traces of D-RTRL and nothing else; None for others."""
    contracted: dict[str, str] = {}
    counted = {gradient.value.name for gradient in program.gradients}
    for e in program.equations:
        if not OPS[e.op].contracts:
            continue
        signal, trace = e.args
        if not (isinstance(trace, Ref) and trace.delay and e.name in counted) or trace.name in contracted:
            return None
        kind = program.equation(trace.name).type
        if not KINDS[kind.kind].trace:
            return None
        relation = program.header.relation(kind.of)
        if relation.site != e.type.of or not _asks(program, _made(program, signal), relation.group):
            return None
        contracted[trace.name] = relation.name
    if set(contracted) != set(program.carried) or len(set(contracted.values())) != len(contracted):
        return None
    return tuple(contracted.values()) if all(_plain(program, name) for name in contracted) else None


def _plain(program: TraceProgram, name: str) -> bool:
    """Whether a trace is e[t] = D[t] e[t-1] + f[t] (x) x[t]."""
    e = program.equation(name)
    relation = program.header.relation(e.type.of)
    terms = [_made(program, a) for a in e.args]
    if OPS[e.op].terms != (1.0, 1.0) or None in terms:
        return False
    kept, injected = sorted((t for t in terms if t is not None), key=lambda t: OPS[t.op].injects)
    if not OPS[kept.op].couples or not OPS[injected.op].injects or kept.args[1] != Ref(name, -1):
        return False
    f, x = (_made(program, a) for a in injected.args)
    transition = _derivative(_made(program, kept.args[0]), relation.group, "decay")
    return transition and _derivative(f, e.type.of, "inject") and _leaf(x, relation.site)


def _asks(program: TraceProgram, credit: Equation | None, group: str) -> bool:
    """Whether a signal is L D of a group, and K if there is one."""
    if credit is None:
        return False
    terms = [_made(program, a) for a in credit.args] if OPS[credit.op].terms == (1.0, 1.0) else [credit]
    product = next((t for t in terms if t is not None and OPS[t.op].couples), None)
    bypass = [t for t in terms if t is not product]
    if product is None or bool(bypass) != any(program.header.group(group).bypass):
        return False
    signal, transition = (_made(program, a) for a in product.args)
    learning = _leaf(signal, group) and signal is not None and OPS[signal.op].signal == "new"
    past = all(_leaf(k, group) and k is not None and OPS[k.op].signal == "old" for k in bypass)
    return learning and past and _derivative(transition, group, "decay")


def _leaf(e: Equation | None, of: str) -> bool:
    """Whether a value is the model's own, of that site, relation or group: made of no others."""
    return e is not None and not e.refs and e.type.of == of


def _derivative(e: Equation | None, of: str, which: str) -> bool:
    return _leaf(e, of) and e is not None and OPS[e.op].derivative == which


def _made(program: TraceProgram, argument: Any) -> Equation | None:
    """The equation of an argument of the same step."""
    return program.equation(argument.name) if isinstance(argument, Ref) and not argument.delay else None


def _or_zero(found: Mapping[int, Array], variable: Any, like: Array) -> Array:
    value = None if isinstance(variable, Constant) else found.get(variable)
    return 0 * like if value is None else value


def _product(asked: Mapping[int, Array], found: Mapping[int, Array]) -> Array:
    """The sum of cotangents times tangents."""
    terms = [jnp.sum(c * found[v]) for v, c in asked.items() if v in found]
    dtype = jnp.result_type(jnp.float32, *asked.values())
    return reduce(add, terms, jnp.zeros((), dtype)).astype(dtype)
