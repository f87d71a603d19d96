"""A user's loss function, joined to the step: what it reads of the model, and what it finds outside of it at each call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import brainstate
import jax
import jax.numpy as jnp

from etcompile.errors import EtcompileError, InputError
from etcompile.frontend.captured import Captured, Same, is_captured
from etcompile.frontend.environment import Environment, at_one_step
from etcompile.frontend.given import as_array
from etcompile.frontend.jaxpr import is_traced
from etcompile.frontend.loss import TracedLoss, trace_loss
from etcompile.frontend.loss_errors import check_takes, explained_loss
from etcompile.frontend.step_model import StepModel
from etcompile.lowering.functions import Item
from etcompile.lowering.losses import Loss, LossProgram, LossValue, checked_loss
from etcompile.runtime.compilations import Compilation
from etcompile.runtime.loss_warnings import say_what_ends_within_the_step, say_what_is_carried_without_credit
from etcompile.runtime.model_states import ModelAccess
from etcompile.runtime.shapes import kinds_of
from etcompile.runtime.trace_state import TraceState

__all__ = ["BoundLoss", "JoinedLoss", "LossFunction", "check_mask", "join_loss", "one_step_shapes"]

#: Folded into the model's own random key, where the loss draws from it: the model's numbers stay those of a step alone.
_LOSS_STREAM = 0x1055

#: Environments for which a loss function is kept, as it was traced.
_ENVIRONMENTS = 8


#: Lengths of sequences for which a loss function remembers how they were run.
_LENGTHS = 64


class LossFunction:
    """A loss function as the user gave it, and what is kept of it from call to call.

    Parameters
    ----------
    fn : callable
        ``fn(out, *targets)``.
    has_aux : bool
        It returns ``(loss, aux)``.
    outputs : bool
        The outputs are wanted as well.
    """

    def __init__(self, fn: Callable, has_aux: bool = False, outputs: bool = False) -> None:
        self.fn = fn
        self.has_aux = has_aux
        self.outputs = outputs
        self._captured = Captured(fn)
        self._last: tuple[Any, JoinedLoss] | None = None
        self._sequences: dict[int, tuple[JoinedLoss, Hashable]] = {}

    def key(self) -> tuple[Any, ...]:
        """Differs where the function, or what it closes over, does.

        Functions made of the same code are the same where they close over the same: a ``lambda`` in a loop is compiled once.
        """
        options = self.has_aux, self.outputs, *self._captured.key()
        if is_captured(self.fn):
            return options
        try:
            hash(self.fn)
        except TypeError:
            return Same(self.fn), *options
        return self.fn, *options

    def keep(self, circumstances: tuple[Any, ...], joined: JoinedLoss) -> None:
        """Remember what it was traced to the last time."""
        self._last = circumstances, joined

    def kept(self, circumstances: tuple[Any, ...]) -> JoinedLoss | None:
        """What it was traced to the last time, if it would be traced to that again."""
        if self._last is None:
            return None
        then, _ = self._last
        same = all(a is b or a == b for a, b in zip(circumstances, then, strict=True))
        return self.unchanged() if same else None

    def unchanged(self) -> JoinedLoss | None:
        """What it was traced to the last time, if all that it finds outside of its arguments and the model is as it was."""
        if self._last is None or not self._captured.unchanged():
            return None
        joined = self._last[1]
        return joined if not joined.reads_environment or joined.environment.differs() is None else None

    def keep_sequence(self, steps: int, joined: JoinedLoss, key: Hashable) -> None:
        """Remember by which jitted function a sequence of so many steps was run the last time."""
        if len(self._sequences) >= _LENGTHS:
            self._sequences.clear()
        self._sequences[steps] = joined, key

    def sequence(self, steps: int, joined: JoinedLoss) -> Hashable | None:
        """The key of the function that ran such a sequence the last time, if it was traced to this then."""
        then, key = self._sequences.get(steps, (None, None))
        return key if then is joined else None


@dataclasses.dataclass(frozen=True, eq=False)
class BoundLoss:
    """A loss of a call, the states outside of the model that it writes, and what it takes from the environment.

    ``around`` are arrays of one step, or of the steps of a sequence with time on axis 0.
    """

    loss: Loss
    written: tuple[Any, ...]
    around: tuple[Any, ...]

    @functools.cached_property
    def read(self) -> tuple[Any, Any]:
        """What the loss reads outside of its arguments, and what of that it also writes."""
        return self.loss.fixed, self.loss.carried

    def item(self, targets: tuple[Any, ...], mask: Any, axes: int) -> Item:
        """What belongs to the loss at each step; a mask that has ``axes`` axes is one of steps, not of examples."""
        of_steps = mask is not None and mask.ndim == axes
        return (targets, None if of_steps else mask, self.around), mask if of_steps else None

    def write(self, carried: Any) -> None:
        """Put what the loss left into the states that it writes."""
        if not self.written:
            return
        for state, value in zip(self.written, carried, strict=True):
            state.value = value


def as_asked(found: LossValue, loss: LossFunction) -> Any:
    """What the caller asked for: losses, or these with aux values."""
    return (found.value, found.aux["aux"]) if loss.has_aux else found.value


def check_callable(loss_fn: Any) -> None:
    """Raise :class:`InputError` for a loss that is no function."""
    if not callable(loss_fn):
        raise InputError(
            "the loss must be a function.", got=repr(loss_fn), expected="loss_fn(out, *targets) -> scalar"
        )


def one_step_shapes(tree: Any, time: bool) -> Any:
    """Shapes of what belongs to one step; ``time``: axis 0 of the arrays is time."""

    def shape(value: Any) -> Any:
        if isinstance(value, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(value.shape[1:] if time else value.shape, value.dtype)
        try:
            aval = jax.typeof(value)
        except TypeError:
            aval = jax.typeof(as_array(value, "a target"))
        return jax.ShapeDtypeStruct(
            aval.shape[1:] if time else aval.shape, aval.dtype, weak_type=aval.weak_type
        )

    return jax.tree.map(shape, tree)


def join_loss(
    access: ModelAccess,
    compilation: Compilation,
    loss: LossFunction,
    targets: Any,
    mask: Any,
    steps: int | None,
) -> JoinedLoss:
    """The loss of a call, for the environment as it is now.

    With ``steps`` it is one over so many steps: axis 0 of ``targets`` and ``mask`` is time.
    """
    given, time = (targets, mask), steps is not None
    try:
        kinds = kinds_of(one_step_shapes(given, time) if time else given)
    except TypeError:  # something that is no array
        kinds = kinds_of(one_step_shapes(given, time))
    circumstances = compilation, access.holders, kinds
    joined = loss.kept(circumstances)
    if joined is not None:
        return joined
    key = (*loss.key(), kinds, Same(access.holders))
    kept: tuple[JoinedLoss, ...] = compilation.losses.get(key, ())
    joined = next((one for one in kept if one.environment.differs() is None), None)
    if joined is None:
        with at_one_step(steps):
            joined = _joined(access, compilation, loss, *one_step_shapes(given, time))
        if any(is_traced(v) for v in joined.traced.constants):
            return joined
        compilation.keep_loss(key, (*kept[1 - _ENVIRONMENTS :], joined))
    loss.keep(circumstances, joined)
    return joined


@dataclasses.dataclass(frozen=True, eq=False)
class JoinedLoss:
    """A traced loss, where each of the states that it reads comes from, and whether its step takes one input."""

    traced: TracedLoss
    program: LossProgram
    fixed: tuple[int, ...]
    carried: tuple[int, ...]
    one_input: bool

    @property
    def environment(self) -> Environment:
        """What it reads in ``brainstate.environ``."""
        return self.traced.environment

    @functools.cached_property
    def reads_environment(self) -> bool:
        """Whether that is anything."""
        return self.environment.reads

    @functools.cached_property
    def step_key(self) -> Hashable:
        """Under which the gradient of one step is jitted."""
        return "value_and_grad", self.program

    def loss(self) -> Loss:
        """With the states that it reads as they are now."""
        states = self.traced.states
        fixed = (self.traced.constants, [states[k].value for k in self.fixed])
        return Loss(self.program, fixed, [states[k].value for k in self.carried])

    def now(self, steps: int | None) -> BoundLoss:
        """With states and environment as they are now; with ``steps``, for each of so many steps."""
        return self.always or self._bound(steps)

    @functools.cached_property
    def always(self) -> BoundLoss | None:
        """What :meth:`now` gives where nothing outside of the model and the arguments is read."""
        return None if self.traced.states or self.environment.inputs else self._bound(None)

    def _bound(self, steps: int | None) -> BoundLoss:
        written = tuple(self.traced.states[k] for k in self.carried)
        return BoundLoss(self.loss(), written, self.environment.values(steps))


def _joined(
    access: ModelAccess,
    compilation: Compilation,
    loss: LossFunction,
    targets: Any,
    mask: Any,
) -> JoinedLoss:
    model = compilation.functions.model
    traced = _traced(model, loss, targets, mask)
    sources = _sources(access, model.name, traced)
    read = {kind: [s.path for s in sources if s.kind == kind] for kind in ("state", "param")}
    program = compilation.compiled.program
    say_what_ends_within_the_step(program, read["state"])
    say_what_is_carried_without_credit(program, traced, [bool(s.path) for s in sources])
    params = _numbered(model.param_tree, access.by_param_state, read["param"])
    joined = LossProgram(
        _on_trees(access, traced, sources),
        _split_leaves(_numbered(model.state_tree, access.by_state, read["state"]), model),
        tuple(k for k in params if model.params[k].aval.differentiable),
        traced.asks_host,
        traced.asks_host or bool(traced.closed.effects),
    )
    fixed, carried = (
        tuple(k for k, s in enumerate(sources) if s.kind == kind) for kind in ("fixed", "carried")
    )
    return JoinedLoss(traced, joined, fixed, carried, model.input_count == 1)


def _traced(model: StepModel, loss: LossFunction, targets: Any, mask: Any) -> TracedLoss:
    """The loss as a pure function of outputs, targets and mask, with its mistakes said."""
    outputs = jax.tree.unflatten(
        model.output_tree, [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in model.outputs]
    )
    per_example = mask is not None and mask.shape != ()

    def run(outputs: Any, targets: tuple[Any, ...], mask: Any) -> tuple[Any, Any]:
        found = loss.fn(outputs, *targets)
        value, aux = _with_aux(found) if loss.has_aux else (found, None)
        aux = {"aux": aux, "outputs": outputs if loss.outputs else None}
        if not per_example:
            return checked_loss(value), aux
        return _of_examples(value, mask), aux

    check_takes(loss.fn, outputs, targets)
    try:
        return trace_loss(run, (outputs, targets, mask if per_example else None))
    except EtcompileError:
        raise
    except Exception as error:
        explained = explained_loss(error, loss.fn, outputs, targets)
        if explained is None:
            raise
        raise explained from error


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a state that a loss reads comes from.

    ``kind`` is "param" or "state" for one of the model at ``path``, "drawn" for a random key of the model from which the loss
    draws; of states outside of the model "carried" for one that the loss writes, else "fixed".
    """

    kind: str
    path: str = ""


def _sources(access: ModelAccess, name: str, traced: TracedLoss) -> list[_Source]:
    """Where each state comes from; what a loss may not read or write is refused."""
    params = {id(s): p for p, s in access.param_states.items()}
    states = {id(s): p for p, s in access.state_objects.items()}
    return [
        _source(state, written, name, params.get(id(state)), states.get(id(state)))
        for state, written in zip(traced.states, traced.written, strict=True)
    ]


def _source(state: Any, written: bool, name: str, param: str | None, path: str | None) -> _Source:
    drawn = isinstance(state, brainstate.random.RandomState)
    if isinstance(state, TraceState):
        raise InputError(
            "the loss reads the traces.",
            got="step.traces_state.value in the loss",
            expected="a loss of outputs, targets, states and parameters",
            hint="traces are derivatives of earlier steps: read step.traces after the call.",
        )
    if (own := param or path) is not None and written and not drawn:
        raise InputError(
            f"the loss writes {own} of {name}.",
            got=f"an assignment to {own}.value in the loss",
            expected="a loss that only reads what the model carries",
            hint="write it in the model's update(), or keep what the loss counts in a state of its own.",
        )
    if param is not None:
        return _Source("param", param)
    if path is not None:
        return _Source("drawn" if drawn and written else "state", path)
    return _Source("carried" if written else "fixed")


def _on_trees(access: ModelAccess, traced: TracedLoss, sources: Sequence[_Source]) -> Callable:
    """The traced loss as :attr:`LossProgram.run`."""

    def run(outputs: Any, states: Any, params: Any, fixed: Any, carried: Any, args: Any) -> Any:
        constants, values = fixed
        by_state, by_param = access.by_state(states), access.by_param_state(params)
        rest, kept = iter(values), iter(carried)
        of_kind: dict[str, Callable[[str], Any]] = {
            "param": lambda path: by_param[path],
            "state": lambda path: by_state[path],
            "drawn": lambda path: jax.random.fold_in(by_state[path], _LOSS_STREAM),
            "carried": lambda path: next(kept),
            "fixed": lambda path: next(rest),
        }
        *args, around = args
        found, new = traced.call(
            constants, [of_kind[s.kind](s.path) for s in sources], around, (outputs, *args)
        )
        return found, [v for v, s in zip(new, sources, strict=True) if s.kind == "carried"]

    return run


def _numbered(tree: Any, by_path: Callable[[Any], dict[str, Any]], paths: Sequence[str]) -> list[int]:
    """Numbers of the leaves that belong to some of the paths."""
    found = by_path(jax.tree.unflatten(tree, range(tree.num_leaves)))
    return sorted({leaf for path in paths for leaf in jax.tree.leaves(found[path])})


def _split_leaves(leaves: Sequence[int], model: Any) -> tuple[int, ...]:
    """The same where a state stands as its parts: those with a derivative."""
    places: list[range] = []
    for form in model.state_forms:
        start = places[-1].stop if places else 0
        places.append(range(start, start + form.parts))
    return tuple(k for leaf in leaves for k in places[leaf] if model.states[k].aval.differentiable)


def _with_aux(found: Any) -> tuple[Any, Any]:
    if not (isinstance(found, tuple) and len(found) == 2):
        raise InputError(
            "with has_aux=True the loss function must return two values.",
            got=_described(found),
            expected="(loss, aux)",
        )
    return found


def _described(found: Any) -> str:
    if isinstance(found, tuple):
        return f"a tuple of {len(found)}"
    return f"an array of shape {jnp.shape(found)}" if hasattr(found, "shape") else type(found).__name__


def _of_examples(value: Any, mask: Any) -> Any:
    """The masked sum of a loss with one number per example."""
    if jnp.shape(value) != mask.shape:
        raise InputError(
            "with a mask per example the loss function must return one number per example.",
            got=f"a loss of shape {jnp.shape(value)}, a mask of shape {mask.shape} at each step",
            expected=f"a loss of shape {mask.shape}",
            hint="leave out the mean over examples; a mask of shape (T,) masks whole steps.",
        )
    return checked_loss(jnp.sum(jnp.where(mask != 0, value * mask.astype(value.dtype), 0)))


def check_mask(mask: Any, steps: int | None) -> Any:
    """A mask as an array; time on axis 0 where there are ``steps``."""
    if mask is None:
        return None
    mask = as_array(mask, "the mask")
    real = (
        mask.dtype == bool
        or jnp.issubdtype(mask.dtype, jnp.floating)
        or jnp.issubdtype(mask.dtype, jnp.integer)
    )
    if not real or (steps is not None and mask.shape[:1] != (steps,)):
        raise InputError(
            "the mask does not fit the sequence.",
            got=f"{mask.dtype} of shape {mask.shape}",
            expected="True or a weight" if steps is None else f"shape ({steps},), or ({steps}, examples)",
            hint="1 or True where a step counts; numbers between weigh it.",
        )
    return mask
