"""Which weights and states have no differentiable path to any output, and which operations end it.

The gradient of a loss of the outputs is then zero for structural reasons: a spike without a surrogate derivative, a
``stop_gradient`` before the readout, a state that nothing reads. It is zero in backpropagation through time as well, so
nothing is lost and nothing cut; the report says it all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from etcompile.analysis.dependence import NO_REVERSE, Dependence
from etcompile.analysis.hidden import StateRole
from etcompile.frontend.jaxpr import Constant
from etcompile.frontend.step_model import StepModel

__all__ = ["find_silent", "reaches_output"]

_NAMED = 3  #: at most so many operations are named


def find_silent(model: StepModel, dep: Dependence, roles: Sequence[StateRole]) -> Mapping[str, str]:
    """By path, for trained parameters and hidden states without a differentiable path to any output: that, in words."""
    first = len(model.params)
    live = _live_states(model, dep.derivative)
    outputs = _variables(model.output_vars) | _variables(model.new_state_vars[k] for k in live)
    found = {}
    for k, leaf in enumerate((*model.params, *model.states)):
        trained = leaf.aval.differentiable and (k < first or roles[k - first].hidden)
        if not trained or any(dep.derivative[v] >> k & 1 for v in outputs):
            continue
        carried = _reached_states(model, dep.derivative, 1 << k)
        hidden = any(roles[s].hidden for s in carried if s + first != k)
        found[leaf.path] = _in_words(
            model, dep, (1 << k) | sum(1 << (first + s) for s in carried), k < first and not hidden
        )
    return found


def reaches_output(model: StepModel, dep: Dependence, param: str, states: Sequence[int]) -> bool:
    """Whether a differentiable path leads within one step from a parameter, or from states, to any output."""
    (k,) = [k for k, leaf in enumerate(model.params) if leaf.path == param]
    bits = 1 << k | sum(1 << (len(model.params) + s) for s in states)
    return any(dep.derivative[v] & bits for v in _variables(model.output_vars))


def _in_words(model: StepModel, dep: Dependence, bits: int, nowhere: bool) -> str:
    where = "any output or hidden state" if nowhere else "any output"
    live = _live_states(model, dep.value)
    needed = _variables(model.output_vars) | _variables(model.new_state_vars[k] for k in live)
    ends: dict[str, None] = {}
    for operation in reversed(model.graph.operations):
        if not any(v in needed for v in operation.outputs):
            continue
        needed |= _variables(operation.inputs)
        arrives = any(dep.derivative[v] & bits for v in _variables(operation.inputs))
        if arrives and not any(dep.derivative[v] & bits for v in operation.outputs):
            ends[f"{operation.name} ({operation.source})"] = None
    named = list(ends)[::-1]
    if named and all(name.split(" ")[0] in NO_REVERSE for name in named):
        loops = ", ".join(named[:_NAMED])
        return (
            f"no rule passes credit from it to {where}: it ends at {loops}, which has no reverse derivative"
        )
    if not named:
        return f"no differentiable path from it to {where}: nothing on the way to one reads it"
    rest = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return f"no differentiable path from it to {where}: credit ends at {', '.join(named[:_NAMED])}{rest}"


def _live_states(model: StepModel, bits: Sequence[int]) -> set[int]:
    """States whose old value reaches an output, at this step or a later one."""
    first, live = len(model.params), set()
    ends = _variables(model.output_vars)
    while True:
        grown = {k for k in range(len(model.states)) if any(bits[v] >> (first + k) & 1 for v in ends)}
        if grown == live:
            return live
        live = grown
        ends |= _variables(model.new_state_vars[k] for k in live)


def _reached_states(model: StepModel, bits: Sequence[int], mask: int) -> set[int]:
    """States that are reached from what ``mask`` holds, at this step or a later one."""
    first, reached = len(model.params), set()
    while True:
        grown = {
            k for k, v in enumerate(model.new_state_vars) if not isinstance(v, Constant) and bits[v] & mask
        }
        if grown <= reached:
            return reached
        reached |= grown
        mask |= sum(1 << (first + k) for k in reached)


def _variables(operands: object) -> set[int]:
    return {v for v in operands if not isinstance(v, Constant)}  # type: ignore[attr-defined]
