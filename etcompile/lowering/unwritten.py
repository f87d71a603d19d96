"""Which transitions are pushed through the step rather than written down, though their groups have few elements for each unit.

A transition is written down as a block for each pair of states of which one reaches the other: of a ring buffer that feeds back
nearly all do. A push makes a whole column by the step's own operations instead, as many as the model has. Let m be the states of
a group, p its blocks, w the numbers that a push computes at each position, and w_k those of a pull from new state k. In a chunk,
writing transitions down takes sum_k w_k for each step, and what is left of each state at the end takes p m. By pushes that takes
m w, the credits take w, and running the step again for both 2 w. In a step alone a trace is multiplied by p blocks, which lie in
a cache, or goes through memory w times. Each block is compiled as well, several times over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from etcompile.analysis.analysis import Analysis
from etcompile.analysis.groups import HiddenGroup
from etcompile.frontend.jaxpr import Constant
from etcompile.frontend.walks import BackwardWalk, ForwardWalk
from etcompile.ir.kinds import KINDS
from etcompile.ir.ops import OPS
from etcompile.ir.program import Ref, TraceProgram, made_from
from etcompile.ir.verifier import computed_with_loss

__all__ = ["pushed_in_chunks", "pushed_in_steps"]

#: From which ratio of the two on transitions are pushed, measured: in chunks, where blocks also go through memory, and in steps.
_IN_CHUNKS, _IN_STEPS = 0.8, 4.0


def pushed_in_chunks(program: TraceProgram, analysis: Analysis) -> frozenset[str]:
    """Groups whose transitions a program had better push in a chunk, of those that it can."""

    def worth(group: HiddenGroup, work: Work) -> bool:
        count, blocks = len(group.states), int(np.sum(group.pattern))
        return sum(work.of_each) + blocks * count > _IN_CHUNKS * (count + 3) * work.of_all

    return _pushed(program, analysis, worth)


def pushed_in_steps(program: TraceProgram, analysis: Analysis) -> frozenset[str]:
    """The same for steps alone."""

    def worth(group: HiddenGroup, work: Work) -> bool:
        return int(np.sum(group.pattern)) > _IN_STEPS * work.of_all and _apart(analysis, group)

    return _pushed(program, analysis, worth)


@dataclasses.dataclass(frozen=True)
class Work:
    """Numbers computed between a group's old and new states, for each position.

    Attributes
    ----------
    of_all : float
        By a push.
    of_each : list of float
        By a pull from each new state.
    """

    of_all: float
    of_each: list[float]


def _pushed(
    program: TraceProgram, analysis: Analysis, worth: Callable[[HiddenGroup, Work], bool]
) -> frozenset[str]:
    if program.window is not None:
        return frozenset()
    found = set()
    for group in analysis.groups:
        few = int(np.sum(group.pattern)) <= 2 * len(group.states)  # less than any push: not worth a look
        if (
            not (group.pushed or few)
            and _each_once(analysis, group)
            and _can_be_pushed(program, analysis, group)
        ):
            work = _work(analysis, group)
            if work is not None and worth(group, work):
                found.add(group.name)
    return frozenset(found)


def _work(analysis: Analysis, group: HiddenGroup) -> Work | None:
    """None where there is a loop between the states: no push can be made through it."""
    graph, model = analysis.split.body, analysis.model
    between = _between(analysis, group)
    if any(graph.operations[number].loop for number in between):
        return None
    sizes = {}
    for number, moving in between.items():
        made = sum(graph.avals[v].size for v in graph.operations[number].outputs)
        # Backwards, a slice fills the array that it is of.
        sizes[number] = max(made, sum(graph.avals[v].size for v in moving)) / group.size
    of_each = []
    for s in group.states:
        new = model.new_state_vars[s]
        walk = BackwardWalk(graph, () if isinstance(new, Constant) else (new,))
        reached = 0.0
        for number in walk:
            for v in between.get(number, ()):
                walk.add(v)
            reached += sizes.get(number, 0.0)
        of_each.append(reached)
    return Work(sum(sizes.values()), of_each)


def _between(analysis: Analysis, group: HiddenGroup) -> dict[int, list[int]]:
    """The operations by which the group's old states reach its new ones, each with those of its operands that do."""
    graph, model = analysis.split.body, analysis.model
    moving = {model.state_vars[s] for s in group.states}
    led: dict[int, list[int]] = {}
    forwards = ForwardWalk(graph, moving)
    for number in forwards:
        operation = graph.operations[number]
        read = [
            v
            for k, v in enumerate(operation.inputs)
            if isinstance(v, int) and v in moving and (number, k) not in analysis.split.frozen
        ]
        if read:
            led[number] = read
            for v in operation.outputs:
                if graph.avals[v].differentiable:
                    moving.add(v)
                    forwards.add(v)
    new = [v for s in group.states if not isinstance(v := model.new_state_vars[s], Constant)]
    backwards = BackwardWalk(graph, new)
    found = {}
    for number in backwards:
        if number in led:
            found[number] = led[number]
            for v in led[number]:
                backwards.add(v)
    return found


def _each_once(analysis: Analysis, group: HiddenGroup) -> bool:
    """Whether each element of each state, a real number, has one position, at which all entries of the transition count."""
    avals = [analysis.model.states[s].aval for s in group.states]
    ys = [
        analysis.split.body.avals[analysis.site(r.site).y]
        for r in analysis.relations
        if r.group == group.name
    ]
    return (
        not (group.masks or group.shared)
        and all(jnp.issubdtype(a.dtype, jnp.floating) for a in (*avals, *ys))
        and all(
            elements is None or np.array_equal(np.sort(elements[elements >= 0]), np.arange(aval.size))
            for aval, elements in zip(avals, group.maps, strict=True)
        )
    )


def _apart(analysis: Analysis, group: HiddenGroup) -> bool:
    """Whether elements of one y act at positions of their own: a push of a trace would add up those that share one."""
    found = [r.position[r.position >= 0] for r in analysis.relations if r.group == group.name]
    return all(np.unique(position).size == position.size for position in found)


def _can_be_pushed(program: TraceProgram, analysis: Analysis, group: HiddenGroup) -> bool:
    """Whether a program makes a group's transitions of one step, and takes them times traces, signals and numbers alone."""
    apart = _apart(analysis, group)
    for e in program.equations:
        refs = [ref for ref in e.refs if _is_transition(program, ref.name)]
        own = any(program.equation(ref.name).type.of == group.name for ref in refs)
        if _is_transition(program, e.name) and e.type.of == group.name:
            if e.name in computed_with_loss(program) or not _of_one_step(program, e.name):
                return False
        elif not own:
            continue
        elif not KINDS[e.type.kind].trace:
            of_y = KINDS[e.type.kind].owner != "group"
            if not _of_one_step(program, e.name) or (of_y and not apart):
                return False
        numbers = [a for a in e.args if not isinstance(a, Ref) or _is_number(program, a.name)]
        times_number = bool(OPS[e.op].power) and len(numbers) == 1
        if own and (len(refs) > 1 or not (OPS[e.op].couples or times_number)):
            return False
    return True


def _of_one_step(program: TraceProgram, name: str) -> bool:
    made = made_from(program.equations, [name])
    return not any(ref.delay for e in program.equations if e.name in made for ref in e.refs)


def _is_transition(program: TraceProgram, name: str) -> bool:
    return KINDS[program.equation(name).type.kind].rows > 1


def _is_number(program: TraceProgram, name: str) -> bool:
    return KINDS[program.equation(name).type.kind].number
