"""The cost of a step's runs, from the jaxpr of the very function that would run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from etcompile.compiled import Compiled
from etcompile.cost.cost import Cost, Measured, measured, priced
from etcompile.cost.scaling import scaled
from etcompile.errors import InputError, OptionError
from etcompile.frontend.given import as_array
from etcompile.integers import positive_integer
from etcompile.lowering.functions import StepFunctions
from etcompile.lowering.in_place import alike_at_every_size
from etcompile.lowering.losses import Loss
from etcompile.runtime.calls import DONATED, apart, one_step, sequence
from etcompile.runtime.checks import keywords_of
from etcompile.runtime.compilations import Compilation
from etcompile.runtime.executor import Executor
from etcompile.runtime.losses import LossFunction, check_callable, join_loss
from etcompile.runtime.model_states import ModelAccess
from etcompile.runtime.shapes import shapes_of
from etcompile.runtime.trace_state import TraceState
from etcompile.schedule import Schedule, check_chunk

__all__ = ["as_targets", "check_run", "program_cost", "step_cost"]

Shapes = Any


def step_cost(
    executor: Executor,
    batch: int | None,
    steps: int | None,
    chunk: int | str | None,
    loss_fn: Callable | None,
    targets: tuple[Any, ...],
    every_trip: bool = True,
    has_aux: bool = False,
) -> Cost:
    """See :meth:`etcompile.Step.cost`; ``every_trip`` as in :func:`etcompile.cost.cost.priced`."""
    batch = None if batch is None else positive_integer("batch", batch)
    steps, chunk = check_run(steps, chunk)
    loss = _Wanted(loss_fn, as_targets(targets), has_aux)
    targets = loss.targets
    now, schedule = executor.compiled.causal.model.examples, executor.compiled.schedule
    here = _compiled(executor.live, executor.compilation, loss)
    if batch is None or batch == now:
        found, together = here.measured(schedule, steps, chunk)
        return priced(found, steps, together, now, every_trip)
    if now is None:
        raise InputError(
            f"{executor.model.name} has no batch axis that could change.",
            got=f"batch={batch}",
            expected="states, inputs and outputs whose leading axis numbers independent examples",
            hint="compile the model for that batch size and ask for its cost there.",
        )
    if any(jnp.ndim(v) and jnp.shape(v)[0] == now for v in jax.tree.leaves(targets)):
        raise InputError(
            "targets are for the batch size of the compiled step.",
            got=f"batch={batch}, targets for {now}",
            expected="no targets, for the squared error of the outputs; or the compiled batch size",
        )
    pair = (now, now + 1) if now > 1 else (2, 3)
    graphs = []
    for size in pair:
        there = here if size == now else _at_batch(executor, size, loss)
        share = dataclasses.replace(schedule, memory=max(1, schedule.memory * size // batch))
        graphs.append(there.measured(share, steps, chunk))
    (first, together), (second, other) = graphs
    found = scaled(first, second, pair, batch) if together == other else None
    if found is None:  # not the same program at every batch size: look at this one itself
        there = _at_batch(executor, batch, loss)
        found, together = there.measured(schedule, steps, chunk)
    return priced(found, steps, together, batch, every_trip)


def program_cost(
    live: ModelAccess,
    compiled: Compiled,
    inputs: tuple[Any, ...],
    steps: int | None,
    chunk: int | str | None,
    loss_fn: Callable | None,
    targets: tuple[Any, ...],
    has_aux: bool,
) -> Cost:
    """The cost of what was compiled for a live model and inputs of these shapes, at its own batch size; no step is made.

    ``steps``, ``chunk`` and ``targets`` as :func:`check_run` and :func:`as_targets` give them.
    """
    compilation = Compilation(compiled, inputs, None, None, TraceState(compiled.causal.init_traces_shapes()))
    here = _compiled(live, compilation, _Wanted(loss_fn, targets, has_aux))
    found, together = here.measured(compiled.schedule, steps, chunk)
    return priced(found, steps, together, compiled.causal.model.examples)


def check_run(steps: int | None, chunk: int | str | None) -> tuple[int | None, int | str | None]:
    """Steps and chunk of the run that is asked about; a chunk alone is a sequence of that length."""
    steps = None if steps is None else positive_integer("steps", steps)
    if chunk is None:
        return steps, None
    chunk = check_chunk(chunk)
    steps = steps or (chunk if isinstance(chunk, int) else None)
    if steps is None:
        raise OptionError(
            "the cost of a chunk depends on the number of steps.",
            got=f"chunk={chunk!r}, steps=None",
            expected="steps=1000, or another length of the sequence",
        )
    return steps, chunk


def as_targets(targets: tuple[Any, ...]) -> tuple[Any, ...]:
    """Targets of one step, with shapes as they are and numbers as arrays."""
    return tuple(jax.tree.map(lambda v: v if hasattr(v, "shape") else as_array(v, "a target"), targets))


@dataclasses.dataclass(frozen=True, eq=False)
class _Wanted:
    """A loss as the caller gives it; None: the mean squared difference from a target like the outputs."""

    loss_fn: Callable | None
    targets: tuple[Any, ...]
    has_aux: bool


@dataclasses.dataclass(frozen=True, eq=False)
class _Compiled:
    """Pure functions, and the shapes of what they take."""

    functions: StepFunctions
    params: Shapes
    states: Shapes
    inputs: Shapes
    loss: Loss
    args: tuple[Any, ...]

    def measured(
        self, schedule: Schedule, steps: int | None, chunk: int | str | None
    ) -> tuple[Measured, int]:
        """What would run, and how many steps it handles together."""
        functions, together = self.functions, 1
        call = {}
        if "modulator" in keywords_of(functions.causal.program):
            call["modulator"] = jax.ShapeDtypeStruct((), jnp.result_type(float))
        traces = functions.causal.init_traces_shapes()
        inputs, given = functions.model.with_environment_shapes(self.inputs), self.args
        if steps is None:
            fn = apart(one_step(functions), self.loss.program)
        else:
            inputs, given = jax.tree.map(
                lambda v: jax.ShapeDtypeStruct((steps, *v.shape), v.dtype), (inputs, given)
            )
            plan = functions.plan(schedule, steps, chunk, bool(self.loss.program.effects))
            fn, together = apart(sequence(functions, plan), self.loss.program), plan.together(steps)
        args = (
            self.params,
            self.states,
            traces,
            inputs,
            (self.loss.fixed, self.loss.carried),
            (given, None),
            call,
        )
        counts = [len(jax.tree.leaves(a)) for a in args]
        start = sum(counts[:DONATED])
        with alike_at_every_size():
            closed = jax.make_jaxpr(fn)(*args)
        return measured(closed, range(start, start + counts[DONATED])), together


def _compiled(live: ModelAccess, compilation: Compilation, wanted: _Wanted) -> _Compiled:
    """What runs in a compilation, with the loss as it is traced for it and for the states as they are."""
    model = compilation.functions.model
    loss_fn, targets = wanted.loss_fn, wanted.targets
    if loss_fn is None:
        loss_fn = _squared_error
        outputs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in model.outputs]
        targets = (jax.tree.unflatten(model.output_tree, outputs),)
    check_callable(loss_fn)
    targets = shapes_of(targets)
    live.look_up()
    with model.environment.supplied():
        joined = join_loss(
            live, compilation, LossFunction(loss_fn, wanted.has_aux), targets, None, steps=None
        )
    params, states = shapes_of((live.params(), live.states()))
    args = (targets, None, joined.environment.shapes())
    return _Compiled(
        compilation.functions, params, states, compilation.inputs, shapes_of(joined.loss()), args
    )


def _at_batch(executor: Executor, batch: int, wanted: _Wanted) -> _Compiled:
    """The step for another batch size, from shapes; the model stays as it is."""
    with executor.at_batch(batch) as there:
        return _compiled(executor.live, there, wanted)


def _squared_error(outputs: Any, target: Any) -> Any:
    """The loss that is looked at where none is given."""
    pairs = zip(jax.tree.leaves(outputs), jax.tree.leaves(target), strict=True)
    return sum((jnp.mean(jnp.abs(o - t) ** 2) for o, t in pairs if jnp.issubdtype(o.dtype, jnp.inexact)), 0.0)
