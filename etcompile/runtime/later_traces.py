"""Traces at the end of a sequence that starts anew: they are made when somebody asks for them.

Where the step is reset before each sequence, traces at its end are of no use. Such a sequence is one chunk without traces, as
backpropagation, and takes less time. So a sequence that starts anew leaves its traces to be made at the first use: by the steps
of its own inputs from its own start, forwards, with the parameters that it had. The gradient is that of a sequence with traces,
and so are the traces, to rounding. It is so for each such sequence, whatever was before: the same call gives the same bits.

What is needed for the traces is copied, since the caller may give his arrays away. Long sequences, of which one chunk takes more
memory than chunks with traces, and more than a few caches hold, make their traces as they go.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.frontend.jaxpr import configuration, in_transformation
from etcompile.frontend.module import recording
from etcompile.lowering.functions import Carry, StepFunctions
from etcompile.lowering.schedules.base import Plan
from etcompile.lowering.schedules.chunked import Chunked
from etcompile.runtime.executor import Executor

__all__ = ["Alone", "alone"]

_copied = jax.jit(partial(jax.tree.map, jnp.copy))


@dataclasses.dataclass(frozen=True)
class Alone:
    """How a sequence is run that starts anew, and leaves its traces to be made later.

    Attributes
    ----------
    run : Executor
    functions : StepFunctions
        Those that make no traces.
    plan : Plan
        Of all steps at once.
    steps : int
    carry : Carry
        Where it starts.
    """

    run: Executor
    functions: StepFunctions
    plan: Plan
    steps: int
    carry: Carry

    def traces_of(self, inputs: Any) -> Callable[[], Any]:
        """Makes the traces that the sequence leaves, with parameters as they are now."""
        compilation, functions = self.run.compilation, self.run.functions
        plan = functions.forward_plan(self.steps)
        key = "traces", None if plan is None else (plan.how.name, plan.size)
        inputs = jax.tree.map(_own, inputs)
        given = _copied((self.run.live.params(looked_up=True), self.carry.states, inputs))

        def forward(params: Any, states: Any, inputs: Any) -> Any:
            carry = Carry(states, functions.causal.init_traces())
            return functions.scan(plan, params, carry, inputs)[1].traces

        wide = configuration()[0]

        def make() -> Any:
            with jax.enable_x64(wide):  # as they were then, whoever asks now
                return compilation.jit(key, forward)(*given)

        return make


def _own(value: Any) -> Any:
    """A copy of what may change in place, made now: what is dispatched may run later."""
    return np.array(value) if isinstance(value, np.ndarray) else value


def alone(run: Executor, inputs: Any, steps: int, chunk: int | str | None) -> Alone | None:
    """How to run a sequence with these inputs without its traces; None where they are made at once."""
    if chunk not in (None, "auto") or not run.starts_anew:
        return None
    if in_transformation() or recording():  # who follows the states has to find traces
        return None
    functions = run.compilation.alone
    if functions is None:
        return None
    plan = functions.plan(functions.causal.schedule, steps)
    if not isinstance(plan.how, Chunked) or plan.together(steps) < steps:
        return None
    schedule = run.compiled.schedule
    ever = run.functions.plan(schedule, steps).how
    if not isinstance(ever, Chunked):
        return None
    # Memory must not grow with the sequence: neither that of the run, nor that of what is copied.
    allowed = max(ever.sizes.with_traces(steps, schedule.memory), ever.sizes.of_few_caches)
    if max(plan.how.sizes.alone(steps), sum(map(_bytes, jax.tree.leaves(inputs)))) > allowed:
        return None
    return Alone(run, functions, plan, steps, Carry(run.states(), {}))


def _bytes(value: Any) -> int:
    return math.prod(jnp.shape(value)) * jnp.result_type(value).itemsize
