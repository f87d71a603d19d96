"""``compile()``, top to bottom: trace, analyse, run the passes, lower, wrap."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from etcompile.adapters.choose import as_model
from etcompile.analysis.analysis import Analysis, analyse
from etcompile.analysis.headers import program_header
from etcompile.compiled import Compiled
from etcompile.errors import InputError, OptionError
from etcompile.frontend.given import as_array, refuse_iterators
from etcompile.frontend.step_model import StepModel, step_model
from etcompile.integers import positive_integer
from etcompile.ir.program import TraceProgram
from etcompile.lowering.causal import CausalProgram
from etcompile.lowering.check_gradients import backpropagation_at_random, gradients_at_random
from etcompile.lowering.functions import StepFunctions
from etcompile.lowering.refused import refuse_operands
from etcompile.pass_manager import Pass, PassManager, PassRecord
from etcompile.paths import patterns_of
from etcompile.precision import promoting
from etcompile.registry import Algorithm, Mixed, pipeline
from etcompile.runtime.executor import Executor
from etcompile.runtime.model_states import ModelAccess, access
from etcompile.runtime.shapes import shapes_of
from etcompile.runtime.step import Step
from etcompile.schedule import Schedule, as_schedule

__all__ = ["Request", "analysed", "compile", "lower_analysed", "lower_model", "opened", "requested"]

#: What a pass after the rule does to the gradient, by its declaration.
_EFFECT = {"approximates": "approximates the gradient", "changes": "changes the gradient"}


def compile(
    model: Any,
    *example_inputs: Any,
    algo: Any = "d_rtrl",
    batch_size: int | None = None,
    schedule: Schedule | str | None = None,
    within: str = "rule",
    exclude: str | Sequence[str] = (),
    manager: PassManager | None = None,
    optimise: bool = True,
    **options: Any,
) -> Step:
    """Turn a model into an online-learning step.

    Parameters
    ----------
    model : brainstate.nn.Module or FunctionModel
        An ordinary model; nothing needs to be marked. Its states must be initialised, or ``batch_size`` given. Stock recurrent
        cells of Equinox and Flax NNX are taken as they are; :func:`etcompile.from_equinox`,
        :func:`etcompile.from_nnx` and :func:`etcompile.from_linen` make models of other modules, and
        :func:`etcompile.from_nir` of networks in the format NIR.
    *example_inputs : pytrees of arrays
        One example of every input of ``update``, for one time step. Only shapes and dtypes count.
    algo : str, rule, or list of passes
        The learning rule, by name or as an object; in a list, passes to run after it.
    batch_size : int, optional
        Initialise the model's states for this batch size first.
    schedule : Schedule, optional
        How the rule's equations are computed; the gradient is the same. ``"causal"``: always step by step.
    within : {"rule", "exact"}
        Credit inside of what one call of ``scan_value_and_grad(loss_fn, chunk=C)`` handles together. ``"rule"``: the rule's
        own at every step. ``"exact"``: backpropagation in windows of C steps, and the rule's trace for what came before.
    exclude : str or list of str
        Paths or patterns of states that shall keep no trace.
    manager : PassManager, optional
        Prints, checks or times passes.
    optimise : bool
        Whether to run the optimisation passes after the rule.
    **options
        Options of the learning rule.

    Returns
    -------
    Step

    Notes
    -----
    The model is traced here, once. Each call reads its trained parameters and states as they are then, and
    ``brainstate.environ`` as it is around the call. Arrays there, ``t`` and ``i`` are inputs of the step; in a sequence ``t``
    counts up by ``dt`` and ``i`` by 1, see :meth:`Step.scan_value_and_grad`. If another entry that the step read has changed
    (``fit``, ``dt``, a number), the step is compiled for the new value, and both are kept. An entry that the model needs and
    that is no longer set stays what it was. A plain attribute (``net.decay = 0.1``) and a global variable stay what they were:
    compile again, or keep the value in a ``brainstate`` state. After a change of an attribute the next call warns
    (``etcompile.errors.PlainAttributeWarning``); a change of a global variable, or of an array in place, goes unnoticed.

    Raises
    ------
    ModelError, InputError, AlgorithmError, OptionError
        The model's states are as they were.

    Examples
    --------
    >>> import brainstate, jax.numpy as jnp, etcompile
    >>> class Net(brainstate.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.cell, self.readout = brainstate.nn.GRUCell(3, 5), brainstate.nn.Linear(5, 2)
    ...
    ...     def update(self, x):
    ...         return self.readout(self.cell(x))
    >>> step = etcompile.compile(Net(), jnp.ones((4, 3)), batch_size=4)
    >>> step(jnp.ones((4, 3))).shape
    (4, 2)
    """
    how = as_schedule(schedule)
    request = requested(algo, options, how, within, exclude, manager, optimise)
    live, inputs, batch_size = opened(model, example_inputs, batch_size)
    with live.unchanged_on_error():
        if batch_size is not None:
            live.initialise(batch_size)
        compiled = lower_model(live, inputs, request)
        return Step(Executor(live, functools.partial(lower_model, request=request), inputs, compiled))


def opened(
    model: Any, example_inputs: tuple[Any, ...], batch_size: Any
) -> tuple[ModelAccess, tuple[Any, ...], int | None]:
    """A model as the compiler takes it, the shapes of its inputs at one step, and its batch size, checked."""
    refuse_iterators(example_inputs)
    inputs = shapes_of(tuple(jax.tree.map(as_array, x) for x in example_inputs))
    live = access(as_model(model, inputs))
    if batch_size is not None:
        batch_size = positive_integer("batch_size", batch_size, error=InputError)
    return live, inputs, batch_size


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What a model is compiled to, beside the model itself: the arguments of :func:`compile`, checked.

    Attributes
    ----------
    rule : Algorithm or Mixed
        The first of the passes.
    passes : tuple of Pass
    within_exact : bool
        Whether credit inside of windows is exact.
    exclude : tuple of str
    schedule : Schedule
    manager : PassManager
    """

    rule: Algorithm | Mixed
    passes: tuple[Pass, ...]
    within_exact: bool
    exclude: tuple[str, ...]
    schedule: Schedule
    manager: PassManager


def lower_model(live: ModelAccess, inputs: tuple[Any, ...], request: Request) -> Compiled:
    """One step of a live model for inputs of these shapes: trace, analyse, run the passes, lower."""
    return lower_analysed(analysed(live, inputs, request.exclude), request)


def analysed(live: ModelAccess, inputs: tuple[Any, ...], exclude: tuple[str, ...] = ()) -> Analysis:
    """One step of a live model for inputs of these shapes: traced and analysed, whatever the rule."""
    return _analysed(step_model(live.trace(inputs)), exclude)


@promoting
def _analysed(model: StepModel, exclude: tuple[str, ...]) -> Analysis:
    analysis = analyse(model, exclude)
    refuse_operands(analysis)
    return analysis


@promoting
def lower_analysed(analysis: Analysis, request: Request) -> Compiled:
    """An analysed step, compiled: run the passes, lower."""
    empty = TraceProgram("empty", program_header(analysis, windows=request.within_exact))
    program, records = _passed(empty, analysis, request)
    causal = CausalProgram(program, analysis, request.rule.functions, request.schedule)
    leaves_out = "; ".join(filter(None, _lost(request, empty)))
    changes = any(p.preserves == "changes" for p in (request.rule, *_lossy(request)))
    return Compiled(analysis, program, records, StepFunctions(causal), request.schedule, leaves_out, changes)


def requested(
    algo: Any,
    options: dict[str, Any],
    schedule: Schedule,
    within: str,
    exclude: str | Sequence[str],
    manager: PassManager | None,
    optimise: bool,
) -> Request:
    """The arguments of :func:`compile` that the model has no part in, checked."""
    if within not in ("rule", "exact"):
        raise OptionError("within must be 'rule' or 'exact'.", got=f"within={within!r}")
    rule, passes = pipeline(algo, options, optimise, windows=within == "exact")
    patterns = patterns_of(exclude)
    return Request(rule, tuple(passes), within == "exact", patterns, schedule, manager or PassManager())


def _passed(
    empty: TraceProgram, analysis: Analysis, request: Request
) -> tuple[TraceProgram, tuple[PassRecord, ...]]:
    """The program after all passes, and what each did; with an approximation after the rule it is not exact."""
    program, records = request.manager.run(
        empty,
        request.passes,
        lambda program: gradients_at_random(program, analysis, request.rule.functions),
        lambda: backpropagation_at_random(analysis),
    )
    return (dataclasses.replace(program, exact=False) if _lossy(request) else program), records


def _lossy(request: Request) -> list[Pass]:
    """Passes after the rule that do not keep its gradient."""
    return [
        p for p in request.passes[1:] if p.preserves != "gradients" and not getattr(p, "keeps_exact", False)
    ]


def _lost(request: Request, empty: TraceProgram) -> list[str]:
    """What the gradient leaves out beside the cuts, in words: of the rule, and of every such pass."""
    passes = [f"pass {p.name} {_EFFECT[p.preserves]}" for p in _lossy(request)]
    return [request.rule.losses(empty.header), *passes]
