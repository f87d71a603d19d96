"""The hidden-group graph of a compiled step."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

import networkx as nx

from etcompile.analysis.analysis import Analysis
from etcompile.analysis.sites import Site
from etcompile.analysis.surrogates import surrogates
from etcompile.frontend.jaxpr import Constant, Graph, Operation
from etcompile.frontend.step_model import Leaf
from etcompile.ir.program import TraceProgram
from etcompile.paths import user_line
from etcompile.report import ParameterLine
from etcompile.shown import html_of, svg_of

__all__ = ["HiddenGroupGraph", "hidden_group_graph"]

_MOVES = {
    "broadcast_in_dim",
    "reshape",
    "convert_element_type",
    "squeeze",
    "transpose",
    "copy",
    "copy_p",
}
_SUMS = {"add", "sub", "add_any"}


class HiddenGroupGraph(nx.MultiDiGraph):
    """A networkx graph that shows itself as a picture in notebooks."""

    def _repr_svg_(self) -> str | None:
        return svg_of(self)

    def _repr_html_(self) -> str:
        return html_of(self)


def hidden_group_graph(
    analysis: Analysis, program: TraceProgram, parameters: Iterable[ParameterLine]
) -> HiddenGroupGraph:
    """The step as a graph to query and to draw; ``parameters`` are those of its report.

    ``graph.graph`` holds ``model``, ``algo``, ``exact`` and ``groups`` (name to ``states`` and ``shape``). Every node has
    a ``kind``, a ``label``, a ``shape`` and (but for operations) a ``dtype``:

    ==========  ==================================  ==================================================================
    kind        node                                further attributes
    ==========  ==================================  ==================================================================
    state       path                                ``hidden``, ``group`` (or None), ``reason``
    parameter   path                                ``how`` its gradient is made, ``groups``, ``sites``, ``trace_bytes``
    operation   ``s0``, the site where it starts    ``primitive``, ``source``, ``site``, ``sites``, ``relation``
    surrogate   ``spike0``, ``spike1``, ...         ``primitive``, ``source``; a spike, whose derivative is its own
    input       ``in0``, ``in1``, ...
    output      ``out``, or ``out0``, ``out1``, ...
    ==========  ==================================  ==================================================================

    A bias is drawn at the operation to whose result it is added, the last one of a sum, so an operation can hold several
    sites. Edges have a ``kind`` as well: ``weight`` (parameter to operation), ``presynaptic`` (what the operation reads beside
    the weight), ``immediate`` (operation to the hidden states whose traces it feeds), ``transition`` (old state to new state,
    position by position), ``cut`` (to the states of the group that loses the credit; with ``cut``, ``group``, ``primitive``,
    ``source``, ``meaning``, ``part``, ``origins``; drawn from the nodes nearest to it) and ``data`` (everything else).
    """
    return _Builder(analysis, program, parameters).build()


class _Builder:
    """Nodes first, then edges; ``seen`` holds, per variable of the body, the nodes that its users read."""

    def __init__(
        self, analysis: Analysis, program: TraceProgram, parameters: Iterable[ParameterLine]
    ) -> None:
        self.analysis, self.program = analysis, program
        self.lines = {line.path: line for line in parameters}
        self.model, self.body = analysis.model, analysis.split.body
        self.graph = HiddenGroupGraph(
            model=self.model.name,
            algo=program.name,
            exact=program.exact,
            groups={
                g.name: {"states": [analysis.state_name(s) for s in g.states], "shape": g.shape}
                for g in analysis.groups
            },
        )
        self.parameters: dict[str, str] = {}
        self.states: list[str] = []
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.operations: dict[str, str] = {}  # site -> node
        self.surrogates: dict[tuple[str, tuple[str, ...]], str] = {}  # function, sources -> node

    def build(self) -> HiddenGroupGraph:
        self._leaves("input", self.model.inputs, self.inputs)
        self._states()
        self._parameters()
        self._leaves("output", self.model.outputs, self.outputs)
        reads = self._operations()
        self._weights()
        seen, through = self._walk()
        for node, variables in reads.items():
            sources = self._sources(seen, variables)
            for source in sources:
                if source != node:
                    self.graph.add_edge(source, node, kind="presynaptic")
        self._immediate()
        self._transitions()
        self._cuts(seen)
        for node, variable in zip(self.states, self.model.new_state_vars, strict=True):
            self._data(through.get(variable, {}) if not isinstance(variable, Constant) else {}, node)
        for node, variable in zip(self.outputs, self.model.output_vars, strict=True):
            self._data(seen.get(variable, {}) if not isinstance(variable, Constant) else {}, node)
        return self._in_order()

    def _in_order(self) -> HiddenGroupGraph:
        """The same graph with nodes in reading order: inputs, states, each operation after its weights, outputs."""
        weights = {node: [] for node in dict.fromkeys(self.operations[s.name] for s in self.analysis.sites)}
        for tail, head, kind in self.graph.edges(data="kind"):
            if kind == "weight":
                weights[head].append(tail)
        used = [node for operation, tails in weights.items() for node in (*tails, operation)]
        ordered = HiddenGroupGraph(**self.graph.graph)
        for node in dict.fromkeys([*self.inputs, *self.states, *used, *self.graph]):
            ordered.add_node(node, **self.graph.nodes[node])
        ordered.add_edges_from(self.graph.edges(data=True))
        return ordered

    # -- nodes --------------------------------------------------------------------------------------------------

    def _node(self, name: str, **about: object) -> str:
        """Add a node under its name, or where that is taken under the name with its kind."""
        if name in self.graph:
            name = f"{name} ({about['kind']})"
        self.graph.add_node(name, **about)
        return name

    def _states(self) -> None:
        group_of = {s: g.name for g in self.analysis.groups for s in g.states}
        for k, (leaf, role) in enumerate(zip(self.model.states, self.analysis.roles, strict=True)):
            self.states.append(
                self._node(
                    leaf.path, kind="state", label=leaf.path, shape=leaf.aval.shape, dtype=str(leaf.aval.dtype),
                    hidden=role.hidden, group=group_of.get(k), reason=role.reason,
                )
            )  # fmt: skip

    def _parameters(self) -> None:
        sites: dict[str, list[str]] = {}
        for site in self.analysis.sites:
            for path in site.params:
                sites.setdefault(path, []).append(site.name)
        for leaf in self.model.params:
            line = self.lines[leaf.path]
            how = line.how
            if line.part and how.startswith("trace"):
                how = how.replace(", and one step", ", in part, and one step")
            self.parameters[leaf.path] = self._node(
                leaf.path, kind="parameter", label=leaf.path, shape=leaf.aval.shape, dtype=str(leaf.aval.dtype), how=how,
                groups=line.groups, sites=tuple(sites.get(leaf.path, ())), trace_bytes=line.trace_bytes,
            )  # fmt: skip

    def _leaves(self, kind: str, leaves: Sequence[Leaf], nodes: list[str]) -> None:
        for k, leaf in enumerate(leaves):
            name = f"in{k}" if kind == "input" else "out" if len(leaves) == 1 else f"out{k}"
            about = dict(label=leaf.path, shape=leaf.aval.shape, dtype=str(leaf.aval.dtype))
            nodes.append(self._node(name, kind=kind, **about))

    def _operations(self) -> dict[str, list[int]]:
        """Add the operations; returns per node the variables that it reads beside its weights."""
        reads: dict[str, list[int]] = {}
        made_by = {site.y: site.name for site in self.analysis.sites if site.operation >= 0}
        for site in sorted(self.analysis.sites, key=lambda s: s.operation < 0):
            if site.operation >= 0:
                operation = self.body.operations[site.operation]
                others = _variables(v for k, v in enumerate(operation.inputs) if k != site.operand)
                reads[self._operation(site, site.record.primitive, site.record.source, site.y)] = others
                continue
            uses = _uses(self.body, site.weight)
            affine = self._affine(site, uses, made_by)
            if affine is not None:
                self._join(site, self.operations[affine])
                continue
            first = uses[0] if uses else None
            node = self._operation(
                site, first[0].name if first else site.record.primitive, first[0].source if first else site.record.source,
                first[0].outputs[0] if first else site.y,
            )  # fmt: skip
            reads[node] = [v for operation, others in uses if operation.name not in _SUMS for v in others]
        return reads

    def _operation(self, site: Site, label: str, source: str, y: int) -> str:
        node = self._node(
            site.name, kind="operation", label=label, primitive=label, source=user_line(source), shape=self.body.avals[y].shape,
            site=site.name, sites=(site.name,), relation=self._relations(site.name),
        )  # fmt: skip
        self.operations[site.name] = node
        return node

    def _surrogate(self, operation: Operation, function: str, sources: Iterable[str]) -> str:
        """The node of a spike. Spikes of the same values are one, as a state's node stands for its old and new value."""
        sources = tuple(sources)
        if (function, sources) not in self.surrogates:
            node = self._node(
                f"spike{len(self.surrogates)}", kind="surrogate", label=function, primitive=operation.name,
                source=user_line(operation.source), shape=self.body.avals[operation.outputs[0]].shape,
            )  # fmt: skip
            self.surrogates[function, sources] = node
            self._data(sources, node)
        return self.surrogates[function, sources]

    def _relations(self, site: str) -> str | None:
        return ", ".join(r.name for r in self.analysis.relations if r.site == site) or None

    def _join(self, site: Site, node: str) -> None:
        """Draw a bias at the operation whose result it is added to."""
        about = self.graph.nodes[node]
        if not about["label"].endswith(" + bias"):
            about["label"] += " + bias"
        about["sites"] = (*about["sites"], site.name)
        about["relation"] = ", ".join(filter(None, (about["relation"], self._relations(site.name)))) or None
        self.operations[site.name] = node

    def _affine(
        self, site: Site, uses: list[tuple[Operation, list[int]]], made_by: Mapping[int, str]
    ) -> str | None:
        """The site to whose result this weight is added, if that is all that is done with it.

        Of several in one sum the last that reaches the same states.
        """
        if len(uses) != 1 or uses[0][0].name not in _SUMS or site.weight in self.body.outputs:
            return None
        ends = {*made_by, *_variables(self.model.new_state_vars)}
        terms = [v for start in uses[0][1] for v in _summands(self.body, start, ends)]
        found = [made_by[v] for v in terms if v in made_by]
        alike = [name for name in found if self._reached(name) == self._reached(site.name)]
        return alike[-1] if alike else None

    def _reached(self, site: str) -> set[tuple[str, tuple[bool, ...]]]:
        return {(r.group, tuple(r.rows)) for r in self.analysis.relations if r.site == site}

    # -- edges --------------------------------------------------------------------------------------------------

    def _walk(self) -> tuple[dict[int, dict[str, None]], dict[int, dict[str, None]]]:
        """Per variable, the nearest nodes that it comes from: as its users see it, and looking through itself."""
        seen: dict[int, dict[str, None]] = {}
        for nodes, variables in ((self.states, self.model.state_vars), (self.inputs, self.model.input_vars)):
            seen.update({v: {node: None} for node, v in zip(nodes, variables, strict=True)})
        stops: dict[int, str] = {}
        spikes = surrogates(self.body)
        for site in self.analysis.sites:
            node = self.operations[site.name]
            if site.does.traced and site.does.weight_is_y:
                seen[site.weight] = {node: None}
            else:
                stops[site.y] = node
        new = {
            v: n
            for n, v in zip(self.states, self.model.new_state_vars, strict=True)
            if not isinstance(v, Constant)
        }
        through: dict[int, dict[str, None]] = dict(seen)
        for operation in self.body.operations:
            found = {node: None for v in _variables(operation.inputs) for node in seen.get(v, {})}
            for function in [spikes[v] for v in operation.outputs if v in spikes]:
                found = {self._surrogate(operation, function, found): None}
            for v in operation.outputs:
                through[v] = {stops[v]: None} if v in stops else found
                seen[v] = {new[v]: None} if v in new else through[v]
        return seen, through

    def _sources(self, seen: Mapping[int, Mapping[str, None]], variables: Iterable[int]) -> list[str]:
        return list({node: None for v in variables for node in seen.get(v, {})})

    def _weights(self) -> None:
        for site in self.analysis.sites:
            for path in site.params:
                self._once(self.parameters[path], self.operations[site.name], "weight")

    def _immediate(self) -> None:
        for relation in self.analysis.relations:
            group = self.analysis.group(relation.group)
            for state, row in zip(group.states, relation.rows, strict=True):
                if row:
                    self._once(self.operations[relation.site], self.states[state], "immediate")

    def _transitions(self) -> None:
        for group in self.analysis.groups:
            for k, new in enumerate(group.states):
                for j, old in enumerate(group.states):
                    if group.pattern[k][j]:
                        self.graph.add_edge(self.states[old], self.states[new], kind="transition")

    def _cuts(self, seen: Mapping[int, Mapping[str, None]]) -> None:
        paths = {leaf.path: node for leaf, node in zip(self.model.states, self.states, strict=True)}
        operands = self._cut_operands()
        applies = {cut.name for cut in self.program.header.cuts}
        for number, cut in enumerate(self.analysis.cuts):
            if cut.name not in applies:
                continue
            heads = self.graph.graph["groups"].get(cut.group, {"states": cut.origins})["states"]
            near = self._sources(seen, _variables(operands[number] if number < len(operands) else ()))
            tails = [node for node in near if self._has_credit(node)]
            for tail in tails or [paths.get(origin) or self.parameters[origin] for origin in cut.origins]:
                for head in heads:
                    self.graph.add_edge(
                        tail, paths[head], kind="cut", cut=cut.name, group=cut.group or None, origins=cut.origins,
                        primitive=cut.primitive, source=user_line(cut.source), meaning=cut.meaning, part=cut.part,
                    )  # fmt: skip

    def _cut_operands(self) -> list[list]:
        """The operand at which each cut stops, in the order of the cuts, which begin with those at operations.

        None for one inside of a loop, whose variables are not drawn.
        """
        return [
            [self.body.operations[use[0]].inputs[use[1]]] if len(use) == 2 else []
            for use in self.analysis.cut_at
        ]

    def _has_credit(self, node: str) -> bool:
        about = self.graph.nodes[node]
        return about["kind"] in ("operation", "surrogate") or about.get("hidden", False)

    def _data(self, sources: Iterable[str], node: str) -> None:
        """What reaches a state or an output and is not told by another edge."""
        for source in sources:
            if not self.graph.has_edge(source, node):
                self.graph.add_edge(source, node, kind="data")

    def _once(self, tail: str, head: str, kind: str) -> None:
        there = self.graph.get_edge_data(tail, head, default={}).values()
        if not any(edge["kind"] == kind for edge in there):
            self.graph.add_edge(tail, head, kind=kind)


def _variables(operands: Iterable) -> list[int]:
    return [v for v in operands if not isinstance(v, Constant)]


def _uses(body: Graph, weight: int) -> list[tuple[Operation, list[int]]]:
    """Operations that use a weight after it was moved about, with the other variables that they read."""
    moved, found = {weight}, []
    for operation in body.operations:
        variables = _variables(operation.inputs)
        if not moved & set(variables):
            continue
        if operation.name in _MOVES:
            moved |= set(operation.outputs)
        else:
            found.append((operation, [v for v in variables if v not in moved]))
    return found


def _summands(body: Graph, variable: int, ends: Container[int]) -> list[int]:
    """What a sum is made of, down to ``ends``, whether or not its elements were moved about."""
    made = {v: operation for operation in body.operations for v in operation.outputs}
    found: list[int] = []
    waiting = [variable]
    while waiting:
        v = waiting.pop()
        operation = made.get(v)
        if operation is None or v in ends or operation.name not in _SUMS | _MOVES:
            found.append(v)
        else:
            waiting += _variables(operation.inputs)[::-1]
    return found
