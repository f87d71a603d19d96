"""The thin executor under a step: what is kept from call to call, and the compiled functions that change it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from etcompile.compiled import Compiled
from etcompile.errors import EtcompileError, InputError, OptionError
from etcompile.frontend.function import own_copy
from etcompile.frontend.jaxpr import in_transformation, is_traced
from etcompile.frontend.loss_errors import underivable_loss
from etcompile.frontend.step_model import StepModel
from etcompile.lowering.carried import outlasts
from etcompile.lowering.functions import Carry, StepFunctions
from etcompile.lowering.losses import Loss, LossProgram
from etcompile.lowering.placement import Placement
from etcompile.runtime.carry_checks import other_states, refuse_unrecorded, require_alive, require_arrays
from etcompile.runtime.compilations import Compilation, Compilations, Lower
from etcompile.runtime.foreign_writes import ForeignWrites
from etcompile.runtime.jitted import Around, MissingConstants, NotSeen
from etcompile.runtime.learned_again import LearnedAgain
from etcompile.runtime.losses import JoinedLoss
from etcompile.runtime.model_states import ModelAccess
from etcompile.runtime.resizing import batch_axes, batch_leaves
from etcompile.runtime.shapes import kinds_of, shapes_of
from etcompile.runtime.trace_state import TraceState
from etcompile.runtime.unchanged import Unchanged
from etcompile.schedule import require_divisible_batch

__all__ = ["Executor"]


class Executor:
    """Runs a compiled model; what stands between calls stands here.

    A program is pure functions of parameters, carry and data. The executor has the rest: the compilations, by shapes and by
    what the model reads in ``brainstate.environ``; the carry, which is the model's own states and the traces; and where arrays
    lie. A call takes the carry, runs a jitted function, and commits the carry that comes out. What fails in between leaves
    parameters, states and traces as they were.

    :class:`Step` and all drivers are written with it, and a driver of yours can be.

    Parameters
    ----------
    live : ModelAccess
        The model's parameters and states.
    lower : callable
        ``lower(live, inputs) -> Compiled``, for other shapes or another environment.
    inputs : tuple of pytrees
        Shapes of the inputs of one step.
    compiled : Compiled
        The model as it is now, compiled for these.

    Attributes
    ----------
    live : ModelAccess
    compilations : Compilations
    turns : threading.RLock
        Held by whoever takes the carry until the next one is committed: of two calls at once, in two threads, both would start
        from one carry, and one of them would be lost.

    Examples
    --------
    What ``step(x)`` does, but for its checks:

    >>> import etcompile, jax.numpy as jnp
    >>> def leaky(params, state, x):
    ...     h = jnp.tanh(0.9 * state["h"] + x @ params["w"])
    ...     return {"h": h}, h
    >>> model = etcompile.from_function(leaky, {"w": jnp.ones((3, 4))}, {"h": jnp.zeros((2, 4))})
    >>> run = etcompile.compile(model, jnp.ones((2, 3))).executor
    >>> run.follow_environment()
    >>> params, carry, inputs = run.placed(run.carry(), (jnp.ones((2, 3)),))
    >>> carry, out = run.call(run.jit("apply", run.functions.apply), params, carry, inputs)
    >>> run.commit(carry)
    >>> out.shape
    (2, 4)
    """

    def __init__(self, live: ModelAccess, lower: Lower, inputs: tuple[Any, ...], compiled: Compiled) -> None:
        self.live = live
        self.turns = threading.RLock()
        self._writes = ForeignWrites(self._clear_for_others, lambda: self.traces.cleared)
        self.compilations = Compilations(live, lower, self._writes)
        self._lost = ""
        self._watched: tuple[Any, Any] = None, None
        self._left_by: Compilation | None = None
        self._unchanged: Unchanged | None = None
        self.compilations.follow_attributes(compiled)
        first = self.compilations.of(compiled, inputs)
        self.compilations.keep(first)
        self.compilations.take(first)
        live.remember()
        self._watch()
        self.place_states()

    def copied(self, memo: dict[int, Any]) -> Executor:
        """The same for a deep copy of the model, with states and traces as they stand; nothing is analysed again."""
        now, live = self.compilation, self.live.copied(memo)
        new = Executor(live, self.compilations.lower, now.inputs, now.compiled)
        new.compilation.kinds = now.kinds
        new.compilations.goes_on_from(self.compilations)
        live.initial = self.live.initial
        if not now.traces.empty:
            new.traces.copy_of(now.traces)
        new._writes.copied(self._writes)
        return new

    # -- what runs ----------------------------------------------------------------------------------------------

    @property
    def compilation(self) -> Compilation:
        """What runs now: one of the compilations that are kept by shapes and environment."""
        return self.compilations.now

    @property
    def compiled(self) -> Compiled:
        return self.compilations.now.compiled

    @property
    def functions(self) -> StepFunctions:
        """The pure functions of the program."""
        return self.compilations.now.compiled.functions

    @property
    def model(self) -> StepModel:
        """The traced model."""
        return self.compilations.now.compiled.functions.model

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Shapes of the inputs of one step."""
        return self.compilations.now.inputs

    @property
    def placement(self) -> Placement:
        """Where arrays lie."""
        return self.compilations.now.compiled.causal.placement

    @property
    def traces(self) -> TraceState:
        """The state that holds the traces."""
        return self.compilations.now.traces

    def follow_environment(self) -> None:
        """Be the compilation for ``brainstate.environ`` as it is now; at the start of every call."""
        self.compilations.follow_environment()

    def with_environment(self, inputs: Any, steps: int | None = None) -> Any:
        """Inputs with what the step takes from ``brainstate.environ``; with ``steps``, for each of so many steps."""
        return self.compilations.with_environment(inputs, steps)

    def install(self, compiled: Compiled, inputs: tuple[Any, ...]) -> None:
        """Run something else that was compiled for the same states."""
        self.compilations.take(self.compilations.of(compiled, shapes_of(inputs)))

    # -- the carry ----------------------------------------------------------------------------------------------

    def carry(self, give_away: bool = False) -> Carry:
        """States and traces as they stand; to ``give_away`` are buffers of traces that nobody else holds.

        Raises
        ------
        CarryError
            States of other shapes than the compiled ones, arrays that were deleted, states that somebody else has moved.
        ModelError
            The model is shapes alone.
        """
        states, held = self.states(), self.traces
        traces = held.own()
        self._require_alive("trace", traces, jax.tree.leaves(traces))
        return Carry(states, held.to_give(traces) if give_away else traces)

    def states(self) -> Any:
        """States as they stand, of which traces may be asked for; raises as :meth:`carry`."""
        self.require_arrays()
        states = self.live.states()
        leaves, tree = jax.tree.flatten(states)
        if self._left_by is not self.compilation or not self._writes.as_left(leaves, tree):
            kinds = kinds_of(states)
            if kinds != self.compilation.kinds:
                raise other_states(self.model.name, states, kinds, self.compilation.kinds)
        self._watch()
        self._writes.check(leaves, through=self.traces.shared)
        self._require_alive("state", states, leaves)
        return states

    @property
    def starts_anew(self) -> bool:
        """Whether no step ran since the traces were made zero."""
        return self._writes.fresh

    def commit(self, carry: Carry, make_traces: Callable[[], Any] | None = None) -> None:
        """States and traces after a call; what makes these, in their place, is called when they are asked for."""
        self.refuse_unrecorded(carry)
        with self._writes.own():
            self.live.set_states(carry.states)
            if make_traces is None:
                self.traces.set_own(carry.traces)
            else:
                self.traces.set_later(make_traces)
        self._writes.left(carry.states)
        self._left_by = self.compilation
        if self._unchanged is None or not self._unchanged.of_now():
            self._unchanged = Unchanged.of(self.live, self.compilations, self._writes)

    def moved(self) -> None:
        """States and traces are those that a compiled function left, which has run the step in it."""
        self._writes.left(self.live.states())
        self._left_by = self.compilation

    def initial_carry(self) -> Carry:
        """The model's initial states and zero traces; copies."""
        self.require_arrays()
        states, initial = self.live.states(), getattr(self.live, "initial", None)
        states = {**states, **initial} if isinstance(states, dict) and isinstance(initial, dict) else initial
        self._require_alive("initial state", states, jax.tree.leaves(states))
        states = jax.tree.map(own_copy, states)
        place = self.placement
        held = place.put_states(states, self.model.state_forms)
        return Carry(held, dict(place.put_traces(self.compiled.causal.init_traces())))

    def require_arrays(self) -> None:
        """Raise :class:`ModelError` where parameters or states are shapes alone."""
        if self.compilations.abstract:
            require_arrays(self.model.name, self.live.params(), self.live.states())

    def refuse_unrecorded(self, values: Any) -> None:
        """Raise :class:`UnsupportedError` in a transformation of JAX's own, in which writes of states would be lost."""
        refuse_unrecorded(self.model.name, values)

    def _require_alive(self, what: str, tree: Any, leaves: list[Any]) -> None:
        """Raise :class:`CarryError` where an array of a tree, whose leaves these are, was given away."""
        require_alive(self.model.name, what, tree, leaves, self._lost)

    def _watch(self) -> None:
        """Follow who else writes the states that traces belong to, in the objects that were last looked up."""
        holders, compilation = self.live.holders, self.compilation
        if self._watched[0] is holders and self._watched[1] is compilation:
            return
        self._watched = holders, compilation
        model = self.model
        carried = [model.states[k].path for g in self.compiled.analysis.groups for k in g.states]
        states = {
            path: state
            for path, state in self.live.hidden_states().items()
            if any(path in ("", name) or name.startswith(path + ".") for name in carried)
        }
        self._writes.watch(model.name, states)

    # -- running ------------------------------------------------------------------------------------------------

    def jit(self, key: Any, fn: Callable, donate: tuple[int, ...] = ()) -> Callable:
        """``fn`` jitted, its large constants set apart, or what was jitted before for this compilation under the same key."""
        return self.compilation.jit(key, fn, donate)

    def placed(self, carry: Carry, data: Any, time: int = 0) -> tuple[Any, Carry, Any]:
        """Parameters, carry and the data of a call on the schedule's mesh; all as they are where there is none.

        The data's examples are on axis ``time``.
        """
        self.refuse_unrecorded(data)
        place, params = self.placement, self.live.params(looked_up=True)
        self._require_alive("parameter", params, jax.tree.leaves(params))
        if place.mesh is None:
            return params, carry, data
        moved = Carry(
            place.put_states(carry.states, self.model.state_forms), dict(place.put_traces(carry.traces))
        )
        return place.put_params(params), moved, place.put_batch(data, time)

    def call(self, fn: Callable, *args: Any, loss: Loss | None = None, given: Any = None) -> Any:
        """What a compiled function gives; where it asks the host, once it is there, since until then it may still fail.

        Inputs of one step are looked at where ``fn`` is traced for them; what JAX does not even trace, ``given`` explains.
        """
        try:
            found = fn(*args)
            if self.asks_host(None if loss is None else loss.program) and not in_transformation():
                jax.block_until_ready(found)
        except MissingConstants:  # while it was traced: it is called again
            raise
        except BaseException as error:
            self._failed(error)
            if given is not None and isinstance(error, (TypeError, ValueError)):
                self.model.flatten_given(given)
            if loss is not None and (explained := underivable_loss(error)) is not None:
                raise explained from error
            raise
        return found

    def again(self, key: Hashable, data: tuple[Any, ...]) -> list[Any] | None:
        """What the jitted function under a key gives beside the carry, where all but these data is as the last call left it.

        None where it is not, or where the function has not seen such data: the call is then made in full, and says what is wrong
        if anything is. It is for functions ``(params, states, traces, inputs, *data) -> ((traces, states), ...)`` of lists of
        values, as ``listed`` makes them.
        """
        if self._unchanged is None:
            return None
        try:
            return self._unchanged.again(key, data)
        except NotSeen:
            return None
        except BaseException as error:
            self._failed(error)
            if isinstance(error, Exception):
                return None
            raise

    def _failed(self, error: BaseException) -> None:
        """A function failed while it ran: where what it was given is lost, the next call looks for that, and says why."""
        self._lost = _told(error)
        traces = jax.tree.leaves(self.traces.alone())
        if any(not is_traced(v) and v.is_deleted() for v in traces):
            self._unchanged = None

    def learned_again(self, loop: Around, joined: JoinedLoss, args: tuple[Any, ...]) -> LearnedAgain | None:
        """For more calls of a learner's loop like the one that has just :meth:`moved` states and traces."""
        return LearnedAgain.of(self.live, self.compilations, self._writes, loop, joined, args)

    def asks_host(self, loss: LossProgram | None = None) -> bool:
        """Whether the step, or a loss, calls back to Python while it runs; it may fail there, so traces are not given away."""
        return self.functions.asks_host or (loss is not None and loss.asks_host)

    @contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """An exception meanwhile leaves parameters, states and traces as they were; for calls of several compiled functions."""
        held, traces = self.traces, self.traces.own()
        params, states = self.live.params(), self.live.states()
        try:
            yield
        except BaseException:
            with self._writes.own():
                self.live.set_params(params)
                self.live.set_states(states)
                held.set_own(traces)
            self._writes.left(states)
            raise

    def place_states(self) -> None:
        """Put the model's parameters and states and the traces where the schedule's mesh wants them; nothing without a mesh."""
        if self.placement.mesh is None:
            return
        params, carry, _ = self.placed(self.carry(), ())
        self.live.set_params(params)
        self.commit(carry)

    # -- starting anew ------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """States back to their initial values, and traces to zero; a rule's counts of steps go on."""
        self.refuse_unrecorded(())
        with self._writes.own():
            self.live.restart()
        self._clear_traces(self.counts())
        self._writes.settled()
        self.place_states()

    def resize(self, batch_size: int) -> None:
        """States made anew for another batch size, and traces of zero; an error leaves everything as it was."""
        self.refuse_unrecorded(())
        require_divisible_batch(self.compiled.schedule, batch_size)
        if in_transformation():
            raise OptionError(
                "step.reset(batch_size=...) does not work inside of jit and other transformations: it makes other states.",
                got=f"batch_size={batch_size}",
                expected="step.reset() there",
                hint="call step.reset(batch_size=...) outside, before the transformed function.",
            )
        before, counts = self.compilation, self.counts()
        try:
            with self._writes.own(), self.live.unchanged_on_error():
                self._take_batch(batch_size)
                self.live.remember()
                if self.compilation is not before:
                    before.traces.release()
                self._clear_traces(counts)
                self._writes.settled()
                self.place_states()
        except BaseException:
            self.compilations.now = before
            raise

    @contextmanager
    def at_batch(self, batch_size: int) -> Iterator[Compilation]:
        """A compilation for another batch size, from shapes; the model has these meanwhile, and nothing is kept."""
        states, along = batch_leaves(self.compiled.analysis)
        inputs = self._inputs_at(batch_size, along)
        with self.live.resized(batch_size, [0 if batch else None for batch in states]):
            with self.model.environment.supplied():
                compiled = self.compilations.lowered(inputs)
            traces = TraceState(compiled.causal.init_traces_shapes())
            yield Compilation(compiled, inputs, None, None, traces)

    def _take_batch(self, batch_size: int) -> None:
        """Make the states for a batch size and use what is compiled for it; an error leaves everything as it was."""
        before, name, refusal = (self.inputs, self.live.kinds()), self.model.name, None
        for axes in batch_axes(self.compiled.analysis, self.live.to_resize()):
            inputs = self._inputs_at(batch_size, axes.inputs)
            try:
                with self.live.unchanged_on_error():
                    self.live.resize(batch_size, axes.states)
                    with self.model.environment.supplied():
                        self.compilations.use(inputs)
            except EtcompileError as error:
                refusal = refusal or error
                continue
            if (inputs, self.live.kinds()) != before or batch_size in _leading(inputs):
                return
            break
        raise refusal or InputError(
            f"{name} has no batch axis that could change.",
            got=f"batch_size={batch_size}",
            expected="step.reset()",
            hint="compile the model with a batch axis: compile(model, x, batch_size=...), with x for as many examples.",
        )

    def _inputs_at(self, batch_size: int, along: Sequence[bool]) -> Any:
        """Shapes of the inputs at another batch size, where these leaves have it as leading axis."""
        leaves, tree = jax.tree.flatten(self.inputs)
        resized = [
            jax.ShapeDtypeStruct((batch_size, *v.shape[1:]), v.dtype) if b else v
            for v, b in zip(leaves, along, strict=True)
        ]
        return jax.tree.unflatten(tree, resized)

    def counts(self) -> dict[str, Any]:
        """What a reset leaves alone, such as the steps by which a rule draws random numbers; nothing before the first use."""
        names = [e.name for e in self.compiled.program.equations if outlasts(e)]
        if not names or self.compilations.abstract or not (self.traces.allocated or in_transformation()):
            return {}
        traces = self.traces.own()
        return {name: traces[name] for name in names if name in traces}

    def _clear_for_others(self) -> None:
        self._clear_traces(self.counts())

    def _clear_traces(self, counts: dict[str, Any]) -> None:
        """Zero traces, with these counts of steps, and others that a reset leaves alone where they have their shapes."""
        if self.compilations.abstract:
            return
        state = self.traces
        counts = {k: v for k, v in counts.items() if kinds_of(v) == kinds_of(state.shapes.get(k))}
        if in_transformation():  # what a compiled function does at its first call it does at every one
            state.clear(counts)
            return
        state.release()  # zeros at the next use
        if counts:
            state.clear(counts)


def _leading(inputs: Any) -> set[int]:
    return {v.shape[0] for v in jax.tree.leaves(inputs) if v.shape}


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
