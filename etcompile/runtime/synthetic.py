"""Synthetic gradients: predictors of the credit from beyond a window, and windows that end in what they say."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

from etcompile.analysis.headers import group_dtype
from etcompile.errors import AlgorithmError, InputError, OptionError
from etcompile.integers import positive_integer
from etcompile.lowering.causal import CausalProgram
from etcompile.lowering.functions import Carry, Item
from etcompile.lowering.losses import Loss, LossValue
from etcompile.lowering.schedules.base import Found, Loop, Plan, Run, Steps, in_parts
from etcompile.lowering.schedules.windowed import Windowed, window, windows_refusal
from etcompile.runtime.checks import steps_of
from etcompile.runtime.gradients import bound_loss, sequence_inputs
from etcompile.runtime.jitted import Jitted
from etcompile.runtime.losses import BoundLoss, LossFunction, as_asked, check_callable, check_mask
from etcompile.runtime.step_data import over_time

if TYPE_CHECKING:
    from etcompile.lowering.derivatives import LoweredModel
    from etcompile.runtime.step import Step

__all__ = ["SyntheticGradient"]

Array = Any
Params = dict[str, Any]

#: Group states at the starts of windows, and the derivatives by them; one more axis, the windows, in front.
Pairs = tuple[dict[int, Array], dict[int, Array]]


class SyntheticGradient:
    """Predictors of the credit from beyond a window, one per hidden group, for a step compiled with ``algo="dni"``.

    A predictor reads all states of its group of one example and says what the losses after the window will send back to them.
    At first it says zero, which is truncated backpropagation. The length of a window is that of the step; predictors belong to
    one loss function and one batch size (with a mean over the batch, the credit of an example depends on its size).

    Parameters
    ----------
    step : Step
        Compiled with ``algo="dni"``.
    loss_fn : callable
        ``loss_fn(out, *targets) -> scalar``, the loss of one step. It may read what it may in :meth:`Step.value_and_grad`.
    hidden : int, optional
        Units of the predictor's hidden layer (tanh). None: a linear map.
    seed : int
        Of the hidden layer's weights; the last layer starts at zero.
    stream : bool
        False: every call is a whole sequence. After its last step there is no credit: zero is taken there, not a prediction.
        True: calls are parts of one stream. A prediction stands at the end of a call too, and the next call teaches it, from
        the states that it starts from; call ``step.reset()`` only where the stream begins.
    has_aux : bool
        ``loss_fn`` returns ``(loss, aux)``; results then have ``(losses, aux)`` in the place of losses.

    Raises
    ------
    AlgorithmError
        The step's windows do not end in synthetic gradients.

    Notes
    -----
    A predictor's output is multiplied by the size (root mean square) of the first credit that it was taught, so that an
    optimiser's step means the same for any loss. This number does not change afterwards.

    Examples
    --------
    >>> import brainstate, jax.numpy as jnp, optax, etcompile
    >>> class Net(brainstate.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.cell, self.readout = brainstate.nn.GRUCell(3, 5), brainstate.nn.Linear(5, 2)
    ...
    ...     def update(self, x):
    ...         return self.readout(self.cell(x))
    >>> square = lambda out, y: jnp.mean((out - y) ** 2)
    >>> step = etcompile.compile(Net(), jnp.ones((4, 3)), batch_size=4, algo="dni", window=5)
    >>> helper = etcompile.SyntheticGradient(step, square, hidden=16)
    >>> xs, ys = jnp.ones((20, 4, 3)), jnp.ones((20, 4, 2))
    >>> helper.fit(xs, ys, optimizer=optax.adam(1e-2), epochs=3).shape
    (3,)
    >>> losses, grads = helper.scan_value_and_grad(square)(xs, ys)
    >>> losses.shape
    (20,)
    """

    def __init__(
        self,
        step: Step,
        loss_fn: Callable,
        hidden: int | None = None,
        seed: int = 0,
        stream: bool = False,
        has_aux: bool = False,
    ) -> None:
        check_callable(loss_fn)
        if hidden is not None:
            hidden = positive_integer("hidden", hidden, otherwise=", or None")
        if step.program.end != "synthetic":
            raise AlgorithmError(
                "the windows of this step do not end in synthetic gradients.",
                got=f"algo={step.program.name!r}",
                expected="algo='dni'",
            )
        refusal = windows_refusal(step.executor.compiled.causal)
        if refusal is not None:
            raise refusal
        self.step = step
        self.loss_fn = loss_fn
        self.stream = stream
        self._of_step = LossFunction(loss_fn, has_aux)
        self._hidden = hidden
        self._fitted = False
        self._optimizer: Any = None
        self._optimizer_state: Any = None
        self._bind()
        # brainstate states, so that brainstate's transformations carry them
        self._params = brainstate.ShortTermState(self._predictors.init(seed))
        self._loss = brainstate.ShortTermState(jnp.full((), jnp.nan))

    @property
    def params(self) -> Params:
        """``layers`` and ``scale`` of the predictors by group; copies, safe to keep."""
        return jax.tree.map(jnp.array, self._params.value)

    @property
    def prediction_loss(self) -> Array:
        """What the last :meth:`fit` or :meth:`update` found, before it changed the predictors; NaN before the first."""
        return self._loss.value

    def scan_value_and_grad(self, loss_fn: Callable) -> Callable:
        """A function ``(xs, *targets, mask=None) -> (losses, grads)`` over a sequence, as of :meth:`Step.scan_value_and_grad`.

        Parameters
        ----------
        loss_fn : callable
            The loss function that the predictors were made for.

        Returns
        -------
        callable
            ``losses`` has one number per step, ``grads`` are summed over the steps. Advances the model's states.

        Raises
        ------
        AlgorithmError
            Another loss function; predictors that were never taught; a step compiled for another batch size since.
        """
        if loss_fn != self.loss_fn:
            raise AlgorithmError(
                "these synthetic gradients belong to another loss function.",
                got=_name(loss_fn),
                expected=_name(self.loss_fn),
                hint="make etcompile.SyntheticGradient(step, loss_fn) for this loss and fit it.",
            )
        self._check_taught()

        def run(xs: Any, *targets: Any, mask: Any = None) -> tuple[Any, Any]:
            with self.step.executor.turns:
                self._check_taught()
                carry, inputs, bound, items = self._start(xs, targets, mask)
                found, grads, carry = self._ran(
                    "gradients",
                    self._gradients,
                    bound,
                    self._params.value,
                    self.step.executor.live.params(),
                    carry,
                    bound.loss,
                    inputs,
                    items,
                )
                self.step.executor.commit(carry)
                bound.write(found.carried)
            return as_asked(found, self._of_step), grads

        return run

    def fit(
        self,
        xs: Any,
        *targets: Any,
        optimizer: Any = None,
        epochs: int = 1,
        progress: bool = False,
        mask: Any = None,
    ) -> Array:
        """Teach the predictors on a sequence, time on axis 0; the model's parameters, states and traces stay.

        An epoch runs the sequence once from the states as they are, with the predictors fixed, and takes one optimiser step
        on all of its windows together.

        Parameters
        ----------
        xs, *targets : pytrees of arrays
            As for :meth:`scan_value_and_grad`.
        optimizer : optax.GradientTransformation
            Kept for later calls; None: the one given before. Its state goes on as long as it is the same object.
        epochs : int
        progress : bool
            Print the prediction loss about ten times.
        mask : array ``(T,)`` or ``(T, examples)``, optional
            As for :meth:`Step.scan_value_and_grad`.

        Returns
        -------
        array ``(epochs,)``
            Squared error of the predictions, in units of the predictors' scale: mean over entries, sum over groups.

        Raises
        ------
        InputError
            The sequence is one window, so there is nothing to predict.
        OptionError
            No optimiser, or ``epochs`` is not a positive integer.

        Notes
        -----
        Where an epoch fails, predictors and optimiser are as the epoch before it left them.
        """
        epochs = positive_integer("epochs", epochs)
        self._check_same_step()
        carry, inputs, bound, items = self._start(xs, targets, mask)
        self._check_several(inputs)
        values = self.step.executor.live.params()
        losses = []
        for epoch in range(epochs):
            with self._with_optimizer(optimizer):
                self._params.value, self._optimizer_state.value, loss = self._ran(
                    "fit",
                    self._fit,
                    bound,
                    self._params.value,
                    self._optimizer_state.value,
                    values,
                    carry,
                    bound.loss,
                    inputs,
                    items,
                )
            losses.append(loss)
            if progress and (epoch + 1) % max(1, epochs // 10) == 0:
                print(f"epoch {epoch + 1} of {epochs}: prediction loss {float(loss):.3g}")
        self._loss.value = losses[-1]
        self._fitted = True
        return jnp.stack(losses)

    def update(self, xs: Any, *targets: Any, optimizer: Any = None, mask: Any = None) -> tuple[Any, Any]:
        """Losses and gradients of a sequence, and in the same run one step of the predictors.

        The gradients are those of :meth:`scan_value_and_grad` with the predictors as they were; the model's states advance.
        Model and predictors are trained together like this.

        Parameters
        ----------
        xs, *targets : pytrees of arrays
        optimizer : optax.GradientTransformation
            As in :meth:`fit`; only the first call needs it.
        mask : array ``(T,)`` or ``(T, examples)``, optional
            As for :meth:`Step.scan_value_and_grad`.

        Returns
        -------
        losses : array ``(T,)``
        grads : pytree
        """
        with self.step.executor.turns:
            self._check_same_step()
            carry, inputs, bound, items = self._start(xs, targets, mask)
            self._check_several(inputs)
            with self._with_optimizer(optimizer):
                found, grads, carry, params, state, loss = self._ran(
                    "update",
                    self._update,
                    bound,
                    self._params.value,
                    self._optimizer_state.value,
                    self.step.executor.live.params(),
                    carry,
                    bound.loss,
                    inputs,
                    items,
                )
            self._params.value, self._optimizer_state.value, self._loss.value = params, state, loss
            self.step.executor.commit(carry)
            bound.write(found.carried)
        self._fitted = True
        return as_asked(found, self._of_step), grads

    # -- pure functions -----------------------------------------------------------------------------------------

    def _run(
        self, params: Params, values: Any, carry: Carry, loss: Loss, xs: tuple, items: Item
    ) -> tuple[LossValue, Any, Carry, Pairs]:
        def predict(states: list[Array]) -> list[Array | None]:
            return self._predictors(params, states)

        functions = self._functions
        how = PredictedEnds(functions.causal, self._predictors.states, predict, self.stream)
        plan = Plan(how, functions.causal.program.window or 0)
        found, gradients, carry = functions.sequence(plan, loss, values, carry, xs, items, {})
        aux, pairs = found.aux
        if not self.stream:  # nothing ends where a sequence starts
            pairs = jax.tree.map(lambda v: v[1:], pairs)
        return found._replace(aux=aux), gradients, carry, pairs

    def _gradients(self, params: Params, *args: Any) -> tuple[LossValue, Any, Carry]:
        return self._run(params, *args)[:3]

    def _fit(self, params: Params, state: Any, *args: Any) -> tuple[Params, Any, Array]:
        return self._taught(params, state, self._run(params, *args)[3])

    def _update(self, params: Params, state: Any, *args: Any) -> tuple[Any, ...]:
        found, grads, carry, pairs = self._run(params, *args)
        return found, grads, carry, *self._taught(params, state, pairs)

    def _taught(self, params: Params, state: Any, pairs: Pairs) -> tuple[Params, Any, Array]:
        """Predictors and optimiser after one step on what windows found at their starts."""
        states, wanted = pairs
        scale = self._predictors.scaled(params["scale"], wanted)
        loss, slope = jax.value_and_grad(self._predictors.error)(params["layers"], scale, states, wanted)
        changes, state = self._optimizer.update(slope, state, params["layers"])
        layers = jax.tree.map(lambda p, c: p + c.astype(p.dtype), params["layers"], changes)
        return {"layers": layers, "scale": scale}, state, loss

    # -- plumbing -----------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        """Take the step as it is compiled now."""
        self._compiled = self.step.executor.compiled
        self._functions = self._compiled.functions
        self._predictors = Predictors.of(self._compiled.causal.model, self._hidden)
        self._made_for = self._signature()
        self._jitted: dict[str, Callable] = {}

    def _signature(self) -> tuple[Any, ...]:
        """What the predictors depend on: the window, the inputs of a step, the groups."""
        causal = self.step.executor.compiled.causal
        shapes = tuple((leaf.path, leaf.aval.shape) for leaf in causal.model.analysis.model.inputs)
        return self.step.program.window, shapes, Predictors.of(causal.model, self._hidden)

    def _check_same_step(self) -> None:
        self.step.executor.follow_environment()
        if self.step.executor.compiled is self._compiled:
            return
        now, then = self._signature(), self._made_for
        if now != then:
            raise AlgorithmError(
                "the step was compiled anew since these synthetic gradients were made.",
                got=_told(now),
                expected=_told(then),
                hint="make etcompile.SyntheticGradient(step, loss_fn) again: credit per example depends on the batch.",
            )
        self._bind()

    def _check_taught(self) -> None:
        self._check_same_step()
        if not self._fitted:
            raise AlgorithmError(
                "these synthetic gradients were never fitted: they would all be zero.",
                got="no call of fit or update",
                expected="helper.fit(xs, *targets, optimizer=optax.adam(1e-3), epochs=100) first",
                hint="for windows without synthetic gradients compile with algo='bptt'.",
            )

    def _check_several(self, inputs: tuple) -> None:
        steps, window = steps_of(inputs), self.step.program.window
        if not self.stream and steps <= (window or steps):
            raise InputError(
                "the sequence is one window, so there is no credit from beyond it to predict.",
                got=f"{steps} steps in windows of {window or steps}",
                expected="more steps than a window has",
                hint="SyntheticGradient(..., stream=True) takes the calls as parts of one stream.",
            )

    @contextmanager
    def _with_optimizer(self, optimizer: Any) -> Iterator[None]:
        """The optimiser given, or the one given before; where the run fails it is again the one before."""
        before = self._optimizer, self._optimizer_state, self._jitted
        if optimizer is None:
            optimizer = self._optimizer
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise OptionError(
                "the predictors need an optimiser.",
                got=f"optimizer={optimizer!r}",
                expected="an optax GradientTransformation (optax.adam(1e-3))",
            )
        if optimizer is not self._optimizer:
            self._optimizer = optimizer
            self._optimizer_state = brainstate.ShortTermState(optimizer.init(self._params.value["layers"]))
            self._jitted = {}
        try:
            yield
        except BaseException:
            self._optimizer, self._optimizer_state, self._jitted = before
            raise

    def _start(self, xs: Any, targets: tuple, mask: Any) -> tuple[Carry, Any, BoundLoss, Item]:
        """What a run over a sequence takes: states and traces, inputs, and the loss with its arguments at each step."""
        run = self.step.executor
        xs, targets, mask = over_time((xs, targets, mask))
        inputs, targets = sequence_inputs(run, xs, targets)
        mask = check_mask(mask, steps_of(inputs))
        bound = bound_loss(run, self._of_step, targets, mask, steps_of(inputs))
        return run.carry(), inputs, bound, bound.item(targets, mask, 1)

    def _ran(self, name: str, fn: Callable, bound: BoundLoss, *args: Any) -> Any:
        if name not in self._jitted:
            self._jitted[name] = Jitted(fn, self.step.executor.compilation.constants)
        return self.step.executor.call(self._jitted[name], *args, loss=bound.loss)


@dataclasses.dataclass(frozen=True)
class _Group:
    """What a predictor reads and writes: numbers and shapes of its states, split into examples."""

    name: str
    states: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    examples: int
    dtype: Any

    @property
    def width(self) -> int:
        """Numbers of one example."""
        return sum(int(np.prod(shape)) for shape in self.shapes) // self.examples

    def rows(self, values: Any) -> Array:
        """Values by number of state as ``[..., examples, width]``."""
        found = []
        for state, shape in zip(self.states, self.shapes, strict=True):
            v = jnp.asarray(values[state])
            lead = v.shape[: v.ndim - len(shape)]
            found.append(v.reshape(*lead, self.examples, -1).astype(self.dtype))
        return jnp.concatenate(found, -1)

    def values(self, rows: Array) -> dict[int, Array]:
        """From ``[examples, width]`` back to the states' shapes."""
        found, start = {}, 0
        for state, shape in zip(self.states, self.shapes, strict=True):
            size = int(np.prod(shape)) // self.examples
            found[state] = rows[:, start : start + size].reshape(shape)
            start += size
        return found


@dataclasses.dataclass(frozen=True)
class Predictors:
    """One predictor per hidden group, as pure functions of ``{"layers": {group: ...}, "scale": {group: number}}``."""

    groups: tuple[_Group, ...]
    hidden: int | None

    @classmethod
    def of(cls, model: LoweredModel, hidden: int | None) -> Predictors:
        """For the groups of a model."""
        analysis = model.analysis
        return cls(
            tuple(
                _Group(
                    g.name,
                    g.states,
                    tuple(analysis.model.states[s].aval.shape for s in g.states),
                    model.examples or 1,
                    jnp.promote_types(group_dtype(analysis, g), jnp.float32),
                )
                for g in analysis.groups
                if g.size  # of states without elements there is nothing to say
            ),
            hidden,
        )

    @property
    def states(self) -> tuple[int, ...]:
        """Numbers of all states that are read."""
        return tuple(s for g in self.groups for s in g.states)

    def init(self, seed: int) -> Params:
        """Random weights of the hidden layers, and last layers that are zero; scales that wait for a first credit."""
        layers = {}
        for g in self.groups:
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(g.name.encode()) & 0x7FFFFFFF)
            # drawn in float32 whatever the model's precision, so that a model and its float64 twin get the same
            first = jax.random.normal(key, (g.width, self.hidden or 0), jnp.float32) / np.float32(
                g.width**0.5
            )
            own = [] if self.hidden is None else [_layer(first.astype(g.dtype))]
            layers[g.name] = [*own, _layer(jnp.zeros((self.hidden or g.width, g.width), g.dtype))]
        return {"layers": layers, "scale": {g.name: jnp.zeros((), g.dtype) for g in self.groups}}

    def __call__(self, params: Params, states: list[Array]) -> list[Array | None]:
        """Cotangents of the states, None for those of no group."""
        found: list[Array | None] = [None] * len(states)
        for g in self.groups:
            said = params["scale"][g.name] * _network(params["layers"][g.name], g.rows(states))
            for k, v in g.values(said).items():
                found[k] = v
        return found

    def scaled(self, scale: dict[str, Array], wanted: dict[int, Array]) -> dict[str, Array]:
        """Scales, where they still wait set to the size of the credit; a credit of zero leaves them waiting."""
        return {
            g.name: jnp.where(
                scale[g.name] > 0, scale[g.name], jnp.sqrt(jnp.mean(jnp.square(g.rows(wanted))))
            )
            for g in self.groups
        }

    def error(
        self, layers: Any, scale: dict[str, Array], states: dict[int, Array], wanted: dict[int, Array]
    ) -> Array:
        """Squared error of the predictions in units of the scale: mean over entries, sum over groups."""
        total = jnp.zeros(())
        for g in self.groups:
            unit = jnp.where(scale[g.name] > 0, scale[g.name], 1)
            off = _network(layers[g.name], g.rows(states)) - g.rows(wanted) / unit
            total = total + jnp.mean(jnp.square(off))
        return total


class PredictedEnds(Windowed):
    """Windows that end in what ``predict`` says of the states there; the last one in zero, unless ``stream``.

    Beside what the loss gave stand the pairs that teach a predictor: the states ``kept`` at the start of every window, and the
    derivatives by them.
    """

    def __init__(
        self,
        causal: CausalProgram,
        kept: tuple[int, ...],
        predict: Callable[[list[Array]], list[Array | None]],
        stream: bool,
    ) -> None:
        super().__init__(causal)
        self._kept, self._predict, self._stream = kept, predict, stream

    def over(self, run: Run, loop: Loop, steps: Steps, size: int) -> tuple[Loop, Found]:
        def one(end: Callable | None, loop: Loop, some: Steps) -> tuple[Loop, Any]:
            after, found, slopes = window(run, loop, some, end)
            pair = {k: loop.states[k] for k in self._kept}, {k: slopes[k] for k in self._kept}
            return after, (found, jax.tree.map(lambda v: v[None], pair))

        last = functools.partial(one, self._predict if self._stream else None)
        loop, ((losses, aux), pairs) = in_parts(
            functools.partial(one, self._predict), loop, steps, size, last
        )
        return loop, (losses, (aux, pairs))


def _layer(weight: Array) -> Params:
    return {"w": weight, "b": jnp.zeros(weight.shape[1], weight.dtype)}


def _network(layers: list[Params], x: Array) -> Array:
    *inner, last = layers
    for layer in inner:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def _name(fn: Any) -> str:
    return getattr(fn, "__qualname__", repr(fn))


def _told(signature: tuple[Any, ...]) -> str:
    window, shapes, _ = signature
    return f"windows of {window or 'a call'}, " + ", ".join(f"{path} {shape}" for path, shape in shapes)
