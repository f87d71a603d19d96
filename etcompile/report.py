"""What the compiler found and did, for people and for programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from etcompile.analysis.analysis import Analysis
from etcompile.analysis.relations import Relation
from etcompile.analysis.silence import reaches_output
from etcompile.frontend.jaxpr import full_dtype
from etcompile.frontend.step_model import Leaf
from etcompile.ir.header import Cut, Effect
from etcompile.ir.kinds import KINDS
from etcompile.ir.ops import OPS
from etcompile.ir.program import TraceProgram
from etcompile.ir.windows import learnt_step_by_step, signal_of_its_own
from etcompile.paths import natural_key, short_list
from etcompile.shown import html_of

__all__ = ["GroupLine", "ParameterLine", "Report", "make_report"]


@dataclasses.dataclass(frozen=True)
class GroupLine:
    """One hidden group: its states, their common shape, and the groups' name in the program."""

    name: str
    states: tuple[str, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class StateLine:
    """One state of the model: hidden or not, and why; ``silent`` says it where no differentiable path leads to an output."""

    path: str
    hidden: bool
    reason: str
    silent: str = ""


@dataclasses.dataclass(frozen=True)
class ParameterLine:
    """How the gradient of one parameter is made.

    ``how`` begins with ``"trace of g0"`` (and one step), ``"influence on network"``, ``"within the step only"``,
    ``"backpropagation inside of windows"``, ``"not used"`` or ``"not trained"``;
    ``part`` tells which part of a weight has no trace. A trace of an expression of several parameters counts for each.
    Where the trace is factorised, filtered presynaptic values are carried in its place: ``decays`` counts the different
    decays (else 0), ``saved_bytes`` what that saves. ``positions`` is the largest number of positions of a group that one
    element of the weight's result reaches: its trace has an entry for each of them.
    ``silent`` says it where no differentiable path leads from the parameter to any output, with the operation that ends it;
    ``zero`` where there is one, and all that the rule keeps of the parameter misses the outputs: with a loss of the outputs
    alone its gradient is zero at every step.
    """

    path: str
    shape: tuple[int, ...]
    how: str
    groups: tuple[str, ...]
    part: str
    trace_bytes: int = 0
    decays: int = 0
    saved_bytes: int = 0
    silent: str = ""
    zero: str = ""
    positions: int = 1


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """The analysis and the program in a form to read, or to query with :meth:`to_dict`.

    The text is short: where a cut ends the credit of many states and parameters it names their modules, and of a source line the
    user's part. The attributes and :meth:`to_dict` hold all.

    Attributes
    ----------
    model, algorithm : str
    exact : bool
        False if and only if ``cuts`` or ``leaves_out`` say what is lost.
    leaves_out : str
        What the rule loses beside the cuts.
    groups, states, parameters, cuts : tuple
        Hidden groups; states; parameters, with how each gradient is made; and where credit ends.
    traces : mapping of str to int
        Bytes of each carried value.
    devices : tuple of str
        The mesh, then each array with the mesh axes along which it is split.
    trace_owners : mapping of str to str
        The parameter or group of each trace.
    verdict : str
        What the gradient is.
    forgotten : tuple of str
        Hidden groups of which the rule keeps nothing from step to step.
    learning : tuple of str
        Traces that depend on the loss, and so go on only at steps with one.
    another : bool
        By intent the result is not the gradient of the loss.
    bytes_of_a_step : int
        About what each step holds in place of traces where many are handled together; 0 where they cannot be.
    events : mapping of str to float
        Of the parameters that are summed by events in sequences, the part of the synapses that a step may take so.
    held_back : str
        Why long sequences carry traces though the schedule keeps none, where it is for what a step does beside its results.
    written_every : mapping of str to int
        Of the traces that are not written at every step, after how many.
    windows : bool
        Credit inside of windows is exact.
    between_layers : bool
        A cut ends credit from one layer to another that ``within="exact"`` would keep.
    """

    model: str
    algorithm: str
    exact: bool
    leaves_out: str
    groups: tuple[GroupLine, ...]
    states: tuple[StateLine, ...]
    parameters: tuple[ParameterLine, ...]
    cuts: tuple[Cut, ...]
    traces: Mapping[str, int]
    devices: tuple[str, ...] = ()
    trace_owners: Mapping[str, str] = dataclasses.field(default_factory=dict)
    verdict: str = ""
    forgotten: tuple[str, ...] = ()
    learning: tuple[str, ...] = ()
    another: bool = False
    bytes_of_a_step: int = 0
    windows: bool = False
    between_layers: bool = False
    events: Mapping[str, float] = dataclasses.field(default_factory=dict)
    held_back: str = ""
    written_every: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def trace_bytes(self) -> int:
        """Bytes carried from step to step beside the model's states."""
        return sum(self.traces.values())

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists, strings and numbers."""
        return {
            "model": self.model,
            "algorithm": self.algorithm,
            "exact": self.exact,
            "verdict": self.verdict,
            "another": self.another,
            "forgotten": list(self.forgotten),
            "learning": list(self.learning),
            "leaves_out": self.leaves_out,
            "groups": [dataclasses.asdict(g) for g in self.groups],
            "states": [dataclasses.asdict(s) for s in self.states],
            "parameters": {p.path: dataclasses.asdict(p) for p in self.parameters},
            "cuts": [dataclasses.asdict(c) for c in self.cuts],
            "traces": dict(self.traces),
            "trace_bytes": self.trace_bytes,
            "bytes_of_a_step": self.bytes_of_a_step,
            "events": dict(self.events),
            "held_back": self.held_back,
            "written_every": dict(self.written_every),
            "windows": self.windows,
            "between_layers": self.between_layers,
            "trace_owners": dict(self.trace_owners),
            "devices": list(self.devices),
        }

    def __str__(self) -> str:
        from etcompile.report_text import report_text

        return report_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_of(self)


def parameter_lines(
    analysis: Analysis, program: TraceProgram, sizes: Mapping[str, int] | None = None
) -> tuple[ParameterLine, ...]:
    """How each parameter's gradient is made under ``program``; ``sizes`` are bytes of the carried values by name."""
    made = _Made.of(analysis, program, sizes or {})
    leaves = sorted(analysis.model.params, key=lambda leaf: natural_key(leaf.path))
    return tuple(_parameter_line(analysis, program, made, leaf) for leaf in leaves)


@dataclasses.dataclass(frozen=True)
class _Made:
    """What a program makes gradients of, each looked up by what it belongs to.

    Attributes
    ----------
    sites : mapping of str to list of str
        Sites of each parameter.
    relations : mapping of str to list of Relation
        Relations of each site that have a trace, or whose f is read; all of them where its gradient is made of traces.
    effects : mapping of str to list of Effect
        Effects of each site that the program uses.
    sizes : mapping of str to int
        Bytes of the carried values.
    of_owner : mapping of str to int
        The same, for all values that belong to one site, relation or effect.
    ends : bool
        Whether it can be told of a parameter that nothing kept of it reaches an output.
    """

    sites: Mapping[str, list[str]]
    relations: Mapping[str, list[Relation]]
    effects: Mapping[str, list[Effect]]
    sizes: Mapping[str, int]
    of_owner: Mapping[str, int]
    ends: bool

    @classmethod
    def of(cls, analysis: Analysis, program: TraceProgram, sizes: Mapping[str, int]) -> _Made:
        equations = program.equations
        traced = {
            e.type.of for e in equations if KINDS[e.type.kind].owner == "relation" or OPS[e.op].contracts
        }
        used = {e.type.of for e in equations} | {str(a) for e in equations for a in e.args}
        of_owner = _listed((program.equation(name).type.of, size) for name, size in sizes.items())
        given = any(OPS[e.op].signal == "given" or OPS[e.op].unknown for e in equations)
        return cls(
            sites=_listed((path, s.name) for s in analysis.sites for path in s.params),
            relations=_listed(
                (r.site, r) for r in analysis.relations if not traced.isdisjoint((r.name, r.site))
            ),
            effects=_listed((e.site, e) for e in program.header.effects if e.name in used),
            sizes=sizes,
            of_owner={owner: sum(found) for owner, found in of_owner.items()},
            ends=not given and program.window is None,
        )


def _parameter_line(analysis: Analysis, program: TraceProgram, made: _Made, leaf: Leaf) -> ParameterLine:
    sites = made.sites.get(leaf.path, [])
    effects = [e for s in sites for e in made.effects.get(s, ())]
    relations = [] if effects else [r for s in sites for r in made.relations.get(s, ())]
    groups = tuple(dict.fromkeys(r.group for r in relations))
    positions = {g: max(math.prod(r.fan) for r in relations if r.group == g) for g in groups}
    owners = {*sites, *(r.name for r in relations), *(e.name for e in effects)}
    decays, saved = _factorised(program, sites, made.sizes)
    silent = analysis.silent.get(leaf.path, "") if sites else ""
    told = silent or effects or not sites or not made.ends
    return ParameterLine(
        path=leaf.path,
        shape=leaf.aval.shape,
        how=_how(program, leaf.aval.differentiable, sites, [e.layer for e in effects], positions),
        groups=groups,
        part=_parts(analysis, relations) if leaf.aval.differentiable else "",
        trace_bytes=sum(made.of_owner.get(owner, 0) for owner in owners),
        decays=decays,
        saved_bytes=saved,
        silent=silent,
        zero="" if told else _zero(analysis, program, leaf.path, groups),
        positions=max(positions.values(), default=1),
    )


def _how(
    program: TraceProgram,
    trained: bool,
    sites: Sequence[str],
    layers: Sequence[str],
    groups: Mapping[str, int],
) -> str:
    """How the gradient is made, in words; ``groups`` with the positions that an element of y reaches."""
    if not trained:
        return "not trained: its numbers have no derivative"
    if not sites:
        return "not used in the step: its gradient is zero"
    within = "one step" if program.window is None else "backpropagation inside of windows"
    if layers:
        return f"influence on {', '.join(dict.fromkeys(layers))}, and {within}"
    if groups:
        named = [g if many == 1 else f"{g} ({many} positions each)" for g, many in groups.items()]
        return f"trace of {', '.join(named)}, and {within}"
    return "within the step only" if program.window is None else within


def _listed(pairs: Iterable[tuple[str, Any]]) -> dict[str, list[Any]]:
    """What belongs to each name, in order."""
    found: dict[str, list[Any]] = {}
    for name, value in pairs:
        found.setdefault(name, []).append(value)
    return found


def _zero(analysis: Analysis, program: TraceProgram, path: str, groups: Sequence[str]) -> str:
    """Words where nothing that the rule keeps of a parameter reaches an output; else none."""
    states = [s for g in groups for s in analysis.group(g).states]
    if reaches_output(analysis.model, analysis.dependence, path, states):
        return ""
    kept = f"and neither does {', '.join(groups)}" if groups else "and no trace of it is kept"
    return f"its gradient is zero with {program.name}: within a step it reaches no output, {kept}; the cuts say why"


def _verdict(program: TraceProgram, leaves_out: str, another: bool) -> str:
    """What the gradient is, in words."""
    if another:
        return f"not the gradient of the loss: {leaves_out or 'the rule says so'}"
    if program.window is None:
        how = "equals" if program.exact else "approximates"
        return f"{how} backpropagation through time"
    if program.exact:
        return "equals backpropagation through time over what each call of scan_value_and_grad is given"
    window = f"window of {program.window} steps" if program.window else "window"
    return f"equals backpropagation through time inside of each {window}, and approximates it beyond"


def _forgotten(program: TraceProgram, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Groups of which a rule that loses credit carries nothing."""
    if program.exact or program.window is not None or program.header.effects:
        return ()
    owners = {program.equation(name).type.of for name, size in sizes.items() if size}
    found = []
    for group in program.header.groups:
        relations = [r for r in program.header.relations if r.group == group.name]
        kept = {group.name, *(r.name for r in relations), *(r.site for r in relations)} & owners
        if not kept and any(cut.group == group.name for cut in program.header.cuts):
            found.append(f"{group.name} ({', '.join(path for path, _ in group.states)})")
    return tuple(found)


def _between_layers(program: TraceProgram) -> bool:
    """Whether a cut ends the credit of one group in another, and exact windows, which this rule could have, would keep it."""
    if program.window is not None or learnt_step_by_step(program) or signal_of_its_own(program):
        return False
    group_of = {path: g.name for g in program.header.groups for path, _ in g.states}
    return any(
        group_of.get(origin, cut.group) != cut.group
        for cut in program.header.cuts
        if not cut.for_every_rule
        for origin in cut.origins
    )


def _factorised(program: TraceProgram, sites: Sequence[str], sizes: Mapping[str, int]) -> tuple[int, int]:
    """How many decays the factorised traces of these sites have, and the bytes that they save."""
    relations = [r for name in sites for r in program.header.relations_of(name) if r.filtered]
    instead = sum(r.filtered * full_dtype(program.header.site(r.site).dtype).itemsize for r in relations)
    owners = {r.site for r in relations}
    kinds = {name: program.equation(name).type for name in sizes}
    filters = sum(
        sizes[name] for name, kind in kinds.items() if KINDS[kind.kind].filtered and kind.of in owners
    )
    return max((r.decays for r in relations), default=0), instead - filters


def _parts(analysis: Analysis, relations: Sequence[Relation]) -> str:
    """Which part of a fused weight has a trace, where not all of it has."""
    together: dict[tuple[str, str], list[Relation]] = {}
    for r in relations:
        together.setdefault((r.site, r.group), []).append(r)
    notes = []
    for (site, _), found in together.items():
        for axis, size in enumerate(analysis.split.body.avals[analysis.site(site).y].shape):
            rest = _gaps([r.span[axis] for r in found], size)
            if rest:
                notes.append(f"elements {', '.join(rest)} of axis {axis} of its result within the step only")
    return "; ".join(dict.fromkeys(notes))


def _gaps(spans: Sequence[tuple[int, int]], size: int) -> list[str]:
    """What of an axis is in none of the spans, as slices."""
    found, end = [], 0
    for start, stop in [*sorted(spans), (size, size)]:
        if end < start:
            found.append(f"{end}:{start}")
        end = max(end, stop)
    return found


def make_report(
    analysis: Analysis,
    program: TraceProgram,
    traces: Mapping[str, Any],
    leaves_out: str = "",
    devices: tuple[str, ...] = (),
    changes: bool = False,
    bytes_of_a_step: int = 0,
    events: Mapping[str, float] | None = None,
    held_back: str = "",
    written_every: Mapping[str, int] | None = None,
) -> Report:
    """The report of one compiled program; ``traces`` holds arrays or their shapes, by name; ``devices`` where arrays lie."""
    import jax

    sizes = {
        name: int(
            sum(np.prod(leaf.shape, dtype=np.int64) * leaf.dtype.itemsize for leaf in jax.tree.leaves(value))
        )
        for name, value in traces.items()
    }
    if not (program.exact or leaves_out or program.header.cuts):
        leaves_out = f"{program.name} is registered as never exact and does not say what it leaves out"
    another = changes or any(OPS[e.op].signal == "drive" for e in program.equations)
    return Report(
        model=analysis.model.name,
        algorithm=program.name,
        exact=program.exact,
        leaves_out=leaves_out,
        groups=tuple(
            GroupLine(g.name, tuple(analysis.state_name(s) for s in g.states), g.shape)
            for g in analysis.groups
        ),
        states=tuple(
            StateLine(r.path, r.hidden, r.reason, analysis.silent.get(r.path, ""))
            for r in sorted(analysis.roles, key=lambda r: natural_key(r.path))
        ),
        parameters=parameter_lines(analysis, program, sizes),
        cuts=program.header.cuts,
        traces=dict(sorted(sizes.items(), key=lambda item: natural_key(item[0]))),
        devices=devices,
        trace_owners={name: _owner(program, name) for name in sizes},
        verdict=_verdict(program, leaves_out, another),
        forgotten=_forgotten(program, sizes),
        learning=tuple(name for name in program.carried if OPS[program.equation(name).op].learns),
        another=another,
        bytes_of_a_step=bytes_of_a_step,
        events=events or {},
        held_back=held_back,
        written_every=written_every or {},
        windows=program.window is not None,
        between_layers=_between_layers(program),
    )


def _owner(program: TraceProgram, name: str) -> str:
    """Whose a carried value is: a weight and where it acts, a group's states, a layer; else what kind of value it is."""
    header, kind = program.header, program.equation(name).type
    params = {s.name: short_list(s.params) for s in header.sites}
    for r in header.relations:
        if r.name == kind.of:
            return f"{params[r.site]} in {r.group}"
    for e in header.effects:
        if e.name == kind.of:
            return f"{params[e.site]} in {e.layer}"
    for g in header.groups:
        if g.name == kind.of:
            return f"{g.name}: {short_list([path for path, _ in g.states])}"
    return params.get(kind.of) or kind.of or kind.kind
