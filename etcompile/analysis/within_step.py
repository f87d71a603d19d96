"""Which way credit goes within one step: through a group's new states, or past them."""

from __future__ import annotations

from etcompile.analysis.analysis import Analysis
from etcompile.analysis.dependence import NO_DERIVATIVE, NO_REVERSE
from etcompile.analysis.relations import Relation
from etcompile.frontend.jaxpr import Constant, Operation

__all__ = ["carries_whole_credit", "reached_beside"]


def reached_beside(analysis: Analysis, start: int, new: set[int]) -> set[int]:
    """Variables of the body with a derivative by ``start`` along paths that avoid ``new``; ``start`` is one of them."""
    body = analysis.split.body
    reached = {start}
    for operation in body.operations:
        if operation.name in NO_DERIVATIVE | NO_REVERSE:
            continue
        if any(v in reached for v in operation.inputs if not isinstance(v, Constant)):
            reached |= {v for v in operation.outputs if body.avals[v].differentiable and v not in new}
    return reached


def carries_whole_credit(analysis: Analysis, relation: Relation) -> bool:
    """Whether q = L f: all credit that a step's results give y comes through the group's new states, and all of that by f.

    False in doubt: whatever is cut or masked near y counts as lost on the way.
    """
    body, group = analysis.split.body, analysis.group(relation.group)
    site = analysis.site(relation.site)
    new = analysis.new_variables(group)
    alone = [r.site for r in analysis.relations].count(site.name) == 1
    # Where y is a new state itself, what reads the state reads y too: its credit cannot be told apart.
    if not alone or relation.masks or site.y in new:
        return False
    if any(c.group == group.name and c.primitive == "positions" for c in analysis.cuts):
        return False
    reached = reached_beside(analysis, site.y, new)
    if reached & {v for v in body.outputs if not isinstance(v, Constant)}:
        return False
    stops = {use for s in group.states for use in analysis.uses_cut[s]}
    stops |= analysis.split.frozen
    if any(len(use) > 2 and reached.intersection(_variables(body.operations[use[0]])) for use in stops):
        return False  # cut inside of a loop that y enters
    return not any(body.operations[use[0]].inputs[use[1]] in reached for use in stops if len(use) == 2)


def _variables(operation: Operation) -> set[int]:
    return {v for v in operation.inputs if not isinstance(v, Constant)}
