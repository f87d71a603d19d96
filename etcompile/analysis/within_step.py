"""Which way credit goes within one step: through a group's new states, or past them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_

from etcompile.analysis.analysis import Analysis
from etcompile.analysis.dependence import NO_DERIVATIVE, NO_REVERSE
from etcompile.analysis.groups import HiddenGroup
from etcompile.analysis.relations import Relation
from etcompile.frontend.jaxpr import Constant, Operand, Operation
from etcompile.frontend.loops import Use

__all__ = ["WithinStep"]


class WithinStep:
    """What old states and sites reach within one step beside the new states of a group.

    All questions are answered by one pass over the step: a bit for each of them, and for each variable the bits of those that
    reach it.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self._questions: dict[tuple[int, str], int] = {}
        for group in analysis.groups:
            for s in group.states:
                self._ask(analysis.model.state_vars[s], group)
        for relation in analysis.relations:
            self._ask(analysis.site(relation.site).y, analysis.group(relation.group))
        self._reached = self._all_reached()
        self._at_results = self._any_of(analysis.split.body.outputs)
        self._at_frozen = self._stopped(analysis.split.frozen)
        self._at_cuts = {
            group.name: self._stopped([use for s in group.states for use in analysis.uses_cut[s]])
            for group in analysis.groups
        }
        self._displaced = {c.group for c in analysis.cuts if c.primitive == "positions"}
        self._relations_of: dict[str, int] = {}
        for relation in analysis.relations:
            self._relations_of[relation.site] = self._relations_of.get(relation.site, 0) + 1

    def _ask(self, start: int, group: HiddenGroup) -> None:
        self._questions.setdefault((start, group.name), len(self._questions))

    def _all_reached(self) -> list[int]:
        """Per variable of the body, which starts it has a derivative by along paths that avoid the new states asked about."""
        body = self.analysis.split.body
        reached, own = [0] * len(body.avals), [0] * len(body.avals)
        for (start, name), bit in self._questions.items():
            reached[start] |= 1 << bit
            for v in self.analysis.new_variables(self.analysis.group(name)):
                own[v] |= 1 << bit
        for operation in body.operations:
            if operation.name in NO_DERIVATIVE | NO_REVERSE:
                continue
            bits = reduce(or_, [reached[v] for v in operation.inputs if not isinstance(v, Constant)], 0)
            if bits:
                for v in operation.outputs:
                    if body.avals[v].differentiable:
                        reached[v] |= bits & ~own[v]
        return reached

    def _any_of(self, operands: Sequence[Operand]) -> int:
        return reduce(or_, [self._reached[v] for v in operands if not isinstance(v, Constant)], 0)

    def _stopped(self, uses: Iterable[Use]) -> int:
        """Which starts reach a use, or a loop with a use inside."""
        return self._any_of([v for use in uses for v in self._stopped_at(use)])

    def _stopped_at(self, use: Use) -> tuple[Operand, ...]:
        operation: Operation = self.analysis.split.body.operations[use[0]]
        return (operation.inputs[use[1]],) if len(use) == 2 else operation.inputs

    def bypass(self, group: HiddenGroup) -> tuple[bool, ...]:
        """Which old states of the group reach a result by a path that avoids the group's new states."""
        state_vars = self.analysis.model.state_vars
        return tuple(
            bool(self._at_results >> self._questions[state_vars[s], group.name] & 1) for s in group.states
        )

    def carries_whole_credit(self, relation: Relation) -> bool:
        """Whether q = L f: all credit that a step's results give y comes through the group's new states, and all by f.

        False in doubt: whatever is cut or masked near y counts as lost on the way.
        """
        group = self.analysis.group(relation.group)
        site = self.analysis.site(relation.site)
        # Where y is a new state itself, what reads the state reads y too: its credit cannot be told apart.
        if (
            self._relations_of[site.name] > 1
            or relation.masks
            or site.y in self.analysis.new_variables(group)
        ):
            return False
        if group.name in self._displaced:
            return False
        lost = self._at_results | self._at_frozen | self._at_cuts[group.name]
        return not lost >> self._questions[site.y, group.name] & 1
