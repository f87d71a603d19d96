"""Windows: backpropagation through a few steps, and the trace program for what came before them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.errors import AlgorithmError, EtcompileError, UnsupportedError
from etcompile.ir.ops import OPS
from etcompile.ir.program import TraceProgram
from etcompile.lowering.causal import CausalProgram, Traces
from etcompile.lowering.derivatives import Row
from etcompile.lowering.evaluate import Context, evaluate
from etcompile.lowering.losses import LossValue, replaced
from etcompile.lowering.schedules.base import Found, Loop, Run, SequenceSchedule, Steps
from etcompile.lowering.sums import added, by_name
from etcompile.schedule import Schedule

__all__ = [
    "End",
    "WindowLoss",
    "WindowResult",
    "Windowed",
    "check_end",
    "window",
    "window_gradients",
    "windows_refusal",
]

Array = Any

#: Cotangents of the states at the end of a window, or how to make them of these states.
End = list[Array | None] | Callable[[list[Array]], list[Array | None]]


class WindowLoss:
    """Derivatives of the losses of a window that the equations of its start may ask for."""

    def __init__(
        self, causal: CausalProgram, cotangents: Mapping[int, Array], call: Mapping[str, Any]
    ) -> None:
        self._causal = causal
        self._cotangents = cotangents
        self.outputs: list[Array] = []
        self.call = call

    def start(self, name: str) -> Row:
        """Of the group's states at the start of the window."""
        group = self._causal.model.analysis.group(name)
        found = [self._cotangents.get(s) for s in group.states]
        return self._causal.model.credits_of(name, found)

    def layer_start(self, name: str) -> tuple[Array, ...]:
        """Of a layer's states at the start of the window."""
        return tuple(self._cotangents[s] for s in self._causal.model.analysis.layer(name).states)

    def one_step(self, name: str) -> None:
        """Credit inside the window comes from backpropagation."""


class Windowed(SequenceSchedule):
    """A program of windows, in windows."""

    name = "windows"

    @property
    def cuts_credit(self) -> bool:
        return self.causal.program.window is not None

    def refusal(self) -> EtcompileError | None:
        program = self.causal.program
        if program.window is None:
            return UnsupportedError(
                f"{program.name} gives the credit of single steps, not of windows.",
                got=f"schedule=etcompile.Schedule(how={self.name!r})",
                expected="how=None",
                hint="compile with within='exact', or with algo='bptt'.",
            )
        return windows_refusal(self.causal)

    def size(self, schedule: Schedule, steps: int, wanted: int | str | None) -> int:
        """What the call asks for, else the rule; else all steps are one window."""
        window = self.causal.program.window
        return 0 if window is None else min(steps, (wanted if isinstance(wanted, int) else window) or steps)

    def caution(self, size: int, steps: int) -> str:
        program = self.causal.program
        if not program.exact or program.window or program.carried or not 0 < size < steps:
            return ""
        return (
            f"chunk={size} cuts these {steps} steps into windows, and {program.name} carries nothing from one to "
            "the next: this gradient approximates backpropagation through time, which without chunk= it equals."
        )

    def part(self, run: Run, loop: Loop, steps: Steps) -> tuple[Loop, Found]:
        return window(run, loop, steps)[:2]


def window(
    run: Run, loop: Loop, steps: Steps, end: End | None = None
) -> tuple[Loop, Found, list[Array | None]]:
    """One window: the loop after it, its losses, and their derivatives by the states at its start; ``end`` as below."""
    done = window_gradients(run, loop, run.inputs(steps.inputs), steps.items, end)
    sums = added(loop.sums, by_name(done.sites, done.params))
    after = Loop(done.states, done.traces, sums, done.loss.carried)
    return after, (done.loss.value, done.loss.aux), done.slopes


def windows_refusal(causal: CausalProgram) -> UnsupportedError | None:
    """Why a program cannot run in windows: its loss part reads values of the step itself, which differ within a window."""
    late = {e.name: e for e in causal.late}
    fixed = {e.name for e in causal.early if OPS[e.op].fixed}
    from_one_step = {name for name, e in late.items() if OPS[e.op].within}
    for name, e in late.items():
        if any(ref.name in from_one_step for ref in e.refs):
            from_one_step.add(name)
            continue
        for ref in e.refs:
            if ref.delay == 0 and ref.name not in late and ref.name not in fixed:
                return UnsupportedError(
                    f"{causal.program.name} cannot run in windows: {name} reads {ref}, which changes inside a window.",
                    hint="write the rule with p.contract(signal, trace), or run it step by step.",
                )
    return None


def check_end(program: TraceProgram) -> None:
    """Refuse a program whose windows end in a prediction, where nobody is there to predict."""
    if program.end is not None:
        raise AlgorithmError(
            f"{program.name} needs synthetic gradients, and a step alone has none.",
            got="a gradient asked of the step itself",
            expected="a gradient asked of etcompile.SyntheticGradient(step, loss_fn)",
            hint="helper = etcompile.SyntheticGradient(step, loss_fn), then helper.fit(...) and "
            "helper.scan_value_and_grad(loss_fn); for windows without predictions use algo='bptt'.",
        )


@dataclasses.dataclass(frozen=True, eq=False)
class WindowResult:
    """What a window leaves.

    Attributes
    ----------
    loss : LossValue
        Of all its steps, time on axis 0.
    params : dict of int to array
        Gradients by parameters that the loss itself reads.
    sites : dict of str to array
        Gradients by the sites' weights.
    states, traces : list, dict
        At its end.
    slopes : list of arrays or None
        Derivatives of its losses by the states at its start.
    """

    loss: LossValue
    params: dict[int, Array]
    sites: dict[str, Array]
    states: list[Array]
    traces: Traces
    slopes: list[Array | None]


def window_gradients(
    run: Run, loop: Loop, inputs: list[Array], items: Any, end: End | None = None
) -> WindowResult:
    """Backpropagation through a window, and the program's gradients for what came before it.

    ``inputs`` and ``items`` have the window's steps on axis 0; ``end`` holds cotangents of the states at its end,
    or makes them of these states.
    """
    done = _performed(run, loop.states, inputs)
    through = _backpropagated(run, loop, inputs, items, done, end)
    sites = _of_sites(run.causal, through.weights)
    for name, value in _of_earlier(run.causal, loop.traces, through.states):
        sites[name] = value if name not in sites else sites[name] + value
    return WindowResult(
        through.loss,
        through.params,
        sites,
        through.last,
        _advanced(run, loop, inputs, done),
        [through.states.get(k) for k in range(len(loop.states))],
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Through:
    """Losses of a window, their derivatives by what is there at its start, and the states at its end.

    ``weights``, ``states`` and ``params`` are by number: of the weight's variable, of the state, of the parameter that the
    loss reads itself.
    """

    loss: LossValue
    weights: dict[int, Array]
    states: dict[int, Array]
    params: dict[int, Array]
    last: list[Array]


def _backpropagated(
    run: Run, loop: Loop, inputs: list[Array], items: Any, done: dict[int, Array] | None, end: End | None
) -> _Through:
    """What plain backpropagation through the window says."""
    analysis = run.causal.model.analysis
    body, n_out = analysis.split.body, len(analysis.model.outputs)
    weights, states, params = _moving(run.weights), _moving(loop.states), run.loss.program.params

    def losses_of(
        some_weights: list[Array], some_states: list[Array], some_params: list[Array]
    ) -> tuple[tuple[Array, list[Array]], tuple[list[Array], Any, Any]]:
        full_weights = replaced(run.weights, weights, some_weights)
        full_params = replaced(run.params, params, some_params)

        def one(now: Any, item: tuple[list[Array], Any, Any]) -> tuple[Any, Any]:
            (old, held), (x, extra, known) = now, item
            results = body.evaluate(*full_weights, *old, *x, known=known)
            found = run.of_step(results[:n_out], results[n_out:], full_params, held, extra)
            return (results[n_out:], found.carried), (found.value, found.aux)

        start = (replaced(loop.states, states, some_states), loop.carried)
        (last, held), (losses, aux) = lax.scan(one, start, (inputs, items, done))
        return (losses, [last[k] for k in states]), (last, held, aux)

    at_start = (
        [run.weights[k] for k in weights],
        [loop.states[k] for k in states],
        [run.params[k] for k in params],
    )
    (losses, _), pull, (last, held, aux) = jax.vjp(losses_of, *at_start, has_aux=True)
    by_weight, by_state, by_param = pull((jnp.ones_like(losses), _beyond(end, last, states)))
    return _Through(
        LossValue(losses, aux, held),
        {analysis.split.weights[k]: g for k, g in zip(weights, by_weight, strict=True)},
        dict(zip(states, by_state, strict=True)),
        dict(zip(params, by_param, strict=True)),
        last,
    )


def _moving(values: list[Array]) -> list[int]:
    """Which of them have a derivative."""
    return [k for k, v in enumerate(values) if jnp.issubdtype(v.dtype, jnp.inexact)]


def _beyond(end: End | None, last: list[Array], states: list[int]) -> list[Array]:
    """What the steps beyond the window ask of some of the states at its end: nothing, where nobody says it."""
    given = end(last) if callable(end) else end
    asked = [(last[k], None if given is None else given[k]) for k in states]
    return [jnp.zeros_like(v) if c is None else c.astype(v.dtype) for v, c in asked]


def _of_sites(causal: CausalProgram, by_weight: Mapping[int, Array]) -> dict[str, Array]:
    """Gradients of the sites by those of their weights; of sites that share a weight the first takes it."""
    left = dict(by_weight)
    sites = causal.model.analysis.sites
    return {site.name: left.pop(site.weight) for site in sites if site.weight in left}


def _of_earlier(
    causal: CausalProgram, traces: Traces, starts: Mapping[int, Array]
) -> Iterator[tuple[str, Array]]:
    """The program's gradients for what came before the window, from derivatives by the states at its start."""
    context = Context(causal.program, causal.model, None, WindowLoss(causal, starts, {}), causal.functions)
    early: dict[str, Any] = dict.fromkeys((e.name for e in causal.early), None)
    early = evaluate(context, [e for e in causal.early if OPS[e.op].fixed], early, {})
    values = evaluate(context, causal.late, early, causal.carried.wide(traces))
    for gradient in causal.program.gradients:
        if (value := values[gradient.value.name]) is not None:
            yield gradient.site, value


def _advanced(run: Run, loop: Loop, inputs: list[Array], done: dict[int, Array] | None) -> Traces:
    """Traces at the end of the window."""
    if not jax.tree.leaves(loop.traces):
        return loop.traces

    def body(now: tuple[list[Array], Traces], item: Any) -> tuple[tuple[list[Array], Traces], None]:
        x, known = item
        step, new, _ = run.causal.forward(run.weights, now[0], now[1], x, known)
        return (step.new_states, new), None

    (_, traces), _ = lax.scan(body, (loop.states, loop.traces), (inputs, done))
    return traces


def _performed(run: Run, states: list[Array], inputs: list[Array]) -> dict[int, Array] | None:
    """Do what the steps do beside their results, each once, and return the results of what does it, time on axis 0."""
    effects = run.causal.model.effects
    if effects is None:
        return None

    def body(now: list[Array], x: list[Array]) -> tuple[list[Array], dict[int, Array]]:
        step = run.causal.model.step(run.weights, now, x)
        return step.new_states, {v: step.tape.values[v] for v in effects}

    return lax.scan(body, states, inputs)[1]
