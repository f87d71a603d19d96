"""The compiled step: a thin stateful wrapper around pure functions."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from etcompile.compiled import Compiled
from etcompile.errors import (
    CarryError,
    EtcompileError,
    EtcompileWarning,
    InputError,
    ModelError,
    OptionError,
    UnsupportedError,
)
from etcompile.frontend.function import own_copy
from etcompile.frontend.given import as_array, refuse_iterators, refuse_lists, shape_difference, stacked
from etcompile.frontend.jaxpr import in_transformation, is_traced
from etcompile.frontend.module import not_recorded
from etcompile.frontend.step_model import leaf_names
from etcompile.integers import positive_integer
from etcompile.ir.kinds import KINDS
from etcompile.keywords import named_arguments
from etcompile.lowering.functions import Call, Carry, Item, StepFunctions
from etcompile.lowering.losses import Loss, LossProgram, LossValue
from etcompile.lowering.placement import Placement
from etcompile.lowering.schedules.base import Plan
from etcompile.lowering.schedules.windowed import check_end
from etcompile.report import Report, make_report
from etcompile.runtime.calls import DONATED, apart, one_step, sequence
from etcompile.runtime.changed_attributes import PlainAttributes
from etcompile.runtime.environment import alike, completed, give_up_traces, warn_of_many
from etcompile.runtime.foreign_writes import ForeignWrites
from etcompile.runtime.losses import (
    BoundLoss,
    JoinedLoss,
    LossOptions,
    as_asked,
    check_callable,
    check_mask,
    join_loss,
)
from etcompile.runtime.model_states import ModelAccess, shapes_alone
from etcompile.runtime.progress import gradients_in_pieces, in_pieces, piece_lengths
from etcompile.runtime.resizing import batch_leaves
from etcompile.runtime.step_data import MultiStepData, has_multi_step, over_time, repeated, split, unwrap
from etcompile.runtime.trace_state import TraceState
from etcompile.runtime.variants import Key, Variant, Variants, kinds_of, shapes_of
from etcompile.schedule import check_chunk, require_divisible_batch

if TYPE_CHECKING:
    import networkx
    from rich.progress import Progress

    from etcompile.cost.cost import Cost
    from etcompile.ir.program import TraceProgram
    from etcompile.pass_manager import PassRecord
    from etcompile.runtime.learn import Learner

__all__ = ["Step"]

#: What a model takes from the environment, and what a loss does.
Environments = tuple[tuple[Any, ...], tuple[Any, ...]]


class Step:
    """A model compiled with a learning rule.

    Calling it runs one time step, advances the model's states and the traces, and is differentiable: inside
    ``brainstate.transform.grad`` the gradient of whatever loss is made from its result is the online gradient.

    Attributes
    ----------
    program : TraceProgram
        The trace program; ``print(step.program)`` shows it.
    exact : bool
        Whether gradients summed over a sequence equal backpropagation through time.
    param_states : dict of str to ParamState
        The trained parameters by dotted path.
    graph : networkx.MultiDiGraph
        Hidden groups, states, weights, operations and cuts.
    passes : tuple of PassRecord
        What each pass did.
    """

    def __init__(
        self,
        access: ModelAccess,
        build: Callable[[ModelAccess, tuple[Any, ...]], Compiled],
        inputs: tuple[Any, ...],
    ) -> None:
        self._access = access
        self._compile = build
        self._writes = ForeignWrites(self._clear_for_others)
        self._variants = Variants()
        self._required: dict[str, Any] = {}
        self._lost = ""
        self._attributes: PlainAttributes = PlainAttributes(None, "")
        self._now: Variant
        self._watched: tuple[Any, Any] | None = None
        self._left_by: Variant | None = None
        self._use(shapes_of(inputs))
        access.remember()
        self._watch()
        self.place_states()

    def _watch(self) -> None:
        """Follow who else writes the states that traces belong to, in the objects that were last looked up."""
        now = (self._access.holders, self._now)
        if self._watched is not None and all(a is b for a, b in zip(now, self._watched, strict=True)):
            return
        self._watched = now
        model = self._functions.model
        carried = [model.states[k].path for g in self._compiled.analysis.groups for k in g.states]
        states = {
            path: state
            for path, state in self._access.hidden_states().items()
            if any(path in ("", name) or name.startswith(path + ".") for name in carried)
        }
        self._writes.watch(model.name, states)

    def _build(self, access: ModelAccess, inputs: tuple[Any, ...]) -> Compiled:
        self._attributes.say_what_changed()
        with self._writes.own():
            compiled = self._compile(access, inputs)
        self._follow_attributes(compiled)
        return compiled

    def _clear_for_others(self) -> None:
        self._clear_traces(self._counts())

    # -- compilations -------------------------------------------------------------------------------------------

    def _use(self, inputs: tuple[Any, ...]) -> None:
        """Take the compilation for these shapes of inputs, for the model's states and the environment as they are.

        It is found among those kept, or made. An error leaves everything as it was.
        """
        key = Key(kinds_of(inputs), self._access.kinds())
        variant = self._variants.find(key)
        if variant is None:
            found = self._access.found
            try:
                variant = self._made(self._build(self._access, inputs), inputs)
            finally:
                self._access.found = found
            self._variants.add(key, variant)
        self._take(variant)

    def _follow_attributes(self, compiled: Compiled) -> None:
        """Remember the plain attributes of the model, as it was traced now."""
        self._attributes = PlainAttributes(
            getattr(self._access, "module", None), compiled.analysis.model.name
        )

    def _follow_environment(self) -> None:
        """Take another compilation where the model read something in ``brainstate.environ`` that is now another.

        A switch that is no longer set and that the model cannot do without stays what it was compiled for.
        """
        self._attributes.say_what_changed()
        before = self._now
        environment = self._functions.model.environment
        if not environment.reads:
            return
        with completed(self._required):
            name = environment.differs()
            if name is None:
                return
            try:
                self._use(self._inputs)
            except EtcompileError:
                if not environment.misses(name):
                    raise
                self._required[name] = environment.switches[name]
        if self._now is before:
            self._follow_environment()
            return
        warn_of_many(name, self._variants)
        if not alike(before, self._now):
            give_up_traces(name, before, self._now)

    def _with_environment(self, inputs: Any, steps: int | None = None) -> Any:
        """Inputs with what the step takes from ``brainstate.environ``; with ``steps``, for each of so many steps."""
        if not self._functions.model.environment.reads:
            return inputs
        with completed(self._required):
            return self._functions.model.with_environment(inputs, steps)

    def _made(self, compiled: Compiled, inputs: tuple[Any, ...]) -> Variant:
        shapes = compiled.causal.init_traces_shapes()
        return Variant(
            compiled,
            inputs,
            self._access.found,
            kinds_of(self._access.states()),
            self._variants.traces(shapes),
        )

    def _take(self, variant: Variant) -> None:
        self._access.found = variant.found
        self._now = variant
        self._abstract = shapes_alone((self._access.params(), self._access.states())) is not None

    def _install(self, compiled: Compiled, inputs: tuple[Any, ...]) -> None:
        """Run something else that was compiled for the same states."""
        self._take(self._made(compiled, shapes_of(inputs)))

    @property
    def compilation(self) -> Variant:
        """What runs now: one of the compilations that are kept by shapes and environment."""
        return self._now

    @property
    def _compiled(self) -> Compiled:
        return self._now.compiled

    @property
    def _functions(self) -> StepFunctions:
        return self._now.functions

    @property
    def _inputs(self) -> tuple[Any, ...]:
        """Shapes of the inputs of one step."""
        return self._now.inputs

    # -- what the step is ---------------------------------------------------------------------------------------

    @property
    def program(self) -> TraceProgram:
        return self._compiled.program

    @property
    def exact(self) -> bool:
        return self._compiled.program.exact

    @property
    def passes(self) -> tuple[PassRecord, ...]:
        return self._compiled.records

    @property
    def graph(self) -> networkx.MultiDiGraph:
        from etcompile.graph import hidden_group_graph

        return hidden_group_graph(self._compiled.analysis, self._compiled.program)

    @property
    def param_states(self) -> dict[str, Any]:
        return self._access.param_states

    @property
    def traces(self) -> dict[str, Any]:
        """The traces as they stand; copies, safe to keep."""
        self._require_arrays()
        return jax.tree.map(jnp.array, self._now.traces.own())

    @property
    def params(self) -> Any:
        """Values of the trained parameters, with the structure of the gradients; may be set, all at once.

        Of a module a dict by dotted path, of a plain function the tree that it was given. They are the model's own arrays: what
        is donated to a jitted function (``donate_argnums``) has to be set again before the next step.
        """
        return self._access.params()

    @params.setter
    def params(self, values: Any) -> None:
        self._functions.model.flatten_params(values)
        self._access.set_params(values)

    def report(self) -> Report:
        """What is trained how, what is cut, and how much memory the traces take."""
        return make_report(
            self._compiled.analysis,
            self._compiled.program,
            self._compiled.causal.init_traces_shapes(),
            self._compiled.leaves_out,
            self._placement.lines(),
            self._compiled.changes,
        )

    @named_arguments("step.cost")
    def cost(
        self,
        batch: int | None = None,
        steps: int | None = None,
        chunk: int | str | None = None,
        loss_fn: Callable | None = None,
        targets: tuple[Any, ...] = (),
        has_aux: bool = False,
    ) -> Cost:
        """What runs of this step take: memory, operations and memory traffic, found without running or allocating.

        Parameters
        ----------
        batch : int, optional
            Another batch size than the compiled one. The model stays as it is. The numbers at this size follow from those
            at two small ones, so it may be as large as you like.
        steps : int, optional
            Steps of a sequence, for ``scan_value_and_grad``; without, one call of ``value_and_grad``.
        chunk : int or "auto", optional
            Steps handled together, by default what the schedule says; alone, the cost of one chunk.
        loss_fn : callable, optional
            The loss, ``loss_fn(out, *targets)``, which may read what it may in :meth:`value_and_grad`; by default the mean
            squared difference from a target like the outputs.
        targets : tuple of arrays or shapes
            Targets of one step, for ``loss_fn``.
        has_aux : bool
            ``loss_fn`` returns ``(loss, aux)``.

        Returns
        -------
        Cost
            Operations and bytes moved are per step.

        Raises
        ------
        OptionError, InputError, UnsupportedError
            For a rule that cannot run in the chunks asked for, as ``scan_value_and_grad``.

        Notes
        -----
        The jaxpr of the function that would run is walked, with a simple model of how XLA fuses, orders and places its
        operations on processors. It agrees with XLA's own ``memory_analysis()`` (arguments, temporary memory, and results
        that do not take the place of arguments) and ``cost_analysis()`` within 25 % for the models of the tests, mostly
        within 5 %. XLA counts the body of a loop once, however often it runs; this counts every trip, and is compared with
        the bodies counted once. See docs/cost.md.

        Examples
        --------
        >>> import etcompile, jax, jax.numpy as jnp
        >>> def leaky(params, state, x):
        ...     h = jnp.tanh(0.9 * state["h"] + x @ params["w"])
        ...     return {"h": h}, h
        >>> w, h = (
        ...     jax.ShapeDtypeStruct((1000, 4000), jnp.float32),
        ...     jax.ShapeDtypeStruct((2, 4000), jnp.float32),
        ... )
        >>> model = etcompile.from_function(leaky, {"w": w}, {"h": h})
        >>> step = etcompile.compile(model, jax.ShapeDtypeStruct((2, 1000), jnp.float32))
        >>> step.cost(batch=1024).trace_bytes == 4 * 1024 * 1000 * 4000
        True
        """
        from etcompile.runtime.cost import step_cost

        return step_cost(self, batch, steps, chunk, loss_fn, targets, has_aux=has_aux)

    def __repr__(self) -> str:
        header, mesh = self.program.header, self._placement.mesh
        devices = "" if mesh is None else f", mesh={dict(mesh.shape)}"
        return (
            f"Step({header.model}, algo={self.program.name}, groups={len(header.groups)}, "
            f"cuts={len(header.cuts)}, exact={self.exact}{devices})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        """A step of a deep copy of the model, with states and traces as they stand; nothing is analysed again."""
        new = object.__new__(Step)
        memo[id(self)] = new
        new._access = self._access.copied(memo)
        new._compile = self._compile
        new._writes = ForeignWrites(new._clear_for_others)
        new._variants = Variants()
        new._required, new._lost = dict(self._required), ""
        new._watched = new._left_by = None
        now, compiled = self._now, self._now.compiled
        traces = new._variants.traces(compiled.causal.init_traces_shapes())
        new._take(Variant(compiled, now.inputs, new._access.found, now.kinds, traces))
        new._variants.add(Key(kinds_of(now.inputs), new._access.kinds()), new._now)
        if now.traces.allocated:
            traces.set_own(jax.tree.map(jnp.copy, now.traces.own()))
        new._follow_attributes(compiled)
        new._watch()
        new._writes.copied(self._writes)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse: a step holds compiled functions of the running process."""
        raise UnsupportedError(
            "a compiled step cannot be pickled, nor copied by copy.copy.",
            got=repr(self),
            expected="etcompile.Checkpoints to save a run; copy.deepcopy(step) for a second one",
            hint="in another process compile the model there, and restore a checkpoint or set step.params.",
        )

    # -- pure functions -----------------------------------------------------------------------------------------

    @named_arguments("step.init_carry")
    def init_carry(self, batch_size: int | None = None) -> Carry:
        """A fresh carry: the model's initial states and zero traces.

        Its arrays are copies, so they may be donated. ``batch_size`` only says what is expected: it must be the one that the
        step is compiled for now, see :meth:`reset`.
        """
        self._follow_environment()
        if batch_size is not None:
            batch_size = _check_batch(batch_size)
            size = self._functions.causal.model.examples
            if size != batch_size:
                raise CarryError(
                    "this step was compiled for another batch size.",
                    got=f"batch_size={batch_size}",
                    expected="no batch_size: the step has no batch axis"
                    if size is None
                    else f"batch_size={size}",
                    hint="call step.reset(batch_size=...) first.",
                )
        self._require_arrays()
        states = self._access.states()
        initial = getattr(self._access, "initial", None)
        states = {**states, **initial} if isinstance(states, dict) and isinstance(initial, dict) else initial
        states = jax.tree.map(own_copy, self._alive(states, "initial state "))
        place = self._placement
        held = place.put_states(states, self._functions.model.complex_states)
        return Carry(held, dict(place.put_traces(self._compiled.causal.init_traces())))

    @named_arguments("step.apply")
    def apply(
        self, params: Any, carry: Carry, *inputs: Any, target: Any = None, modulator: Any = None
    ) -> tuple[Carry, Any]:
        """The pure step ``(params, carry, *inputs) -> (carry, out)``; jit, vmap, scan and differentiate it as you like.

        Derivatives are reverse mode, ``jax.grad`` and ``jax.vjp``: the online gradient is made from the cotangent of the result.
        Forward mode (``jax.jvp``, ``jax.linearize``, ``jax.jacfwd``) has no meaning here, and JAX refuses it with a word of
        ``custom_vjp``; for forward mode through time differentiate the model itself.

        ``target`` and ``modulator`` are for rules that read them, where the step is differentiated. What the model reads in
        ``brainstate.environ`` is taken from the environment around this call, tracers included: in a loop of your own,
        ``with brainstate.environ.context(i=i, t=i * dt): carry, out = step.apply(params, carry, x)``.
        """
        self._follow_environment()
        self._functions.model.flatten_given(inputs)
        given = self._with_environment(inputs)
        return self._functions.apply(params, carry, given, _call(self.program, target, modulator))

    # -- running ------------------------------------------------------------------------------------------------

    @named_arguments("step")
    def __call__(self, *inputs: Any, target: Any = None, modulator: Any = None) -> Any:
        """Run one time step; advances the model's states and the traces.

        Arguments wrapped in :class:`etcompile.MultiStepData` have time on axis 0 and make the call one of many steps, at
        which the others are the same; outputs then have time on axis 0. ``target`` and ``modulator`` are for rules that read
        them, where the step is differentiated.
        """
        if has_multi_step((inputs, target, modulator)):
            return self._run_steps((inputs, target, modulator))
        inputs, target, modulator = unwrap((inputs, target, modulator))
        self._follow_environment()
        carry = self._carry()
        self._functions.model.flatten_given(inputs)
        given = self._with_environment(inputs)
        params, carry, data = self._placed(carry, (given, _call(self.program, target, modulator)))
        carry, out = self.ran(self._jit("apply", self._functions.apply), params, carry, *data)
        self._set_carry(carry)
        return out

    def _run_steps(self, args: tuple[Any, Any, Any]) -> Any:
        """Outputs of all steps of multi-step arguments, time on axis 0."""
        self._follow_environment()
        per_step, join = split(args)
        one = jax.tree.map(lambda v: jax.ShapeDtypeStruct(jnp.shape(v)[1:], jnp.result_type(v)), per_step)
        self._check_one(join(one)[0])

        count = len(jax.tree.leaves(per_step)[0])
        around = self._with_environment((), count)

        def run(params: Any, carry: Carry, args: tuple[Any, Any, Any], around: Any) -> tuple[Carry, Any]:
            # Split again: what is the same at every step must come in as an argument, not be baked in.
            xs, join = split(args)

            def body(carry: Carry, item: tuple[Any, Any]) -> tuple[Carry, Any]:
                x, now = item
                inputs, target, modulator = join(x)
                given = inputs if now == () else dataclasses.replace(now, given=inputs)
                return functions.apply(params, carry, given, _call(self.program, target, modulator))

            return jax.lax.scan(body, carry, (xs, around))

        functions = self._functions
        params, carry, _ = self._placed(self._carry(), ())
        args = jax.tree.map(
            lambda v: self.place_data(v, 1 if isinstance(v, MultiStepData) else 0),
            args,
            is_leaf=lambda v: isinstance(v, MultiStepData),
        )
        carry, out = self.ran(self._jit("steps", run), params, carry, args, around)
        self._set_carry(carry)
        return out

    @named_arguments("step.value_and_grad")
    def value_and_grad(self, loss_fn: Callable, has_aux: bool = False) -> Callable:
        """A function ``(x, *targets, modulator=None, mask=None) -> (loss, grads)`` that runs one online step.

        Parameters
        ----------
        loss_fn : callable
            ``loss_fn(out, *targets) -> scalar``. It may read states and parameters of the model, which has just taken the step:
            a penalty on rates, potentials or weights is part of the gradient as it is for ``jax.grad``. Other brainstate states
            that it reads or writes (a count of steps, a random key) go on from step to step, without a derivative through them.
            Numbers and arrays that it closes over are read at every call; where one has changed the function is compiled again.
            What it reads in ``brainstate.environ`` is taken from the environment around each call, as for the model.
        has_aux : bool
            ``loss_fn`` returns ``(loss, aux)``, and the result is ``((loss, aux), grads)``.

        Returns
        -------
        callable
            ``modulator`` is for rules that read one: a number, an array over a group's units, or a dict by group. ``mask`` is a
            weight of the step, or one for each example if ``loss_fn`` returns one number per example, which are then summed;
            where it is zero there is no loss and no gradient. Its gradients have the keys of :attr:`param_states` and, leaf by
            leaf, the structure of the parameters; by a complex parameter it is JAX's, whose conjugate points uphill.

            With arguments in :class:`etcompile.MultiStepData` it is a function of many steps: all else is the same at each, and
            the result that of :meth:`scan_value_and_grad`.
        """
        check_callable(loss_fn)
        check_end(self.program)
        self._functions.require_kept("value_and_grad of one step")
        options = LossOptions(has_aux)

        def run(x: Any, *targets: Any, modulator: Any = None, mask: Any = None) -> tuple[Any, Any]:
            given = (x, targets, modulator, mask)
            if has_multi_step(given):
                x, targets, modulator, mask = repeated(given)
                found, grads = self.sequence_gradients(loss_fn, options)(
                    x, *targets, modulator=modulator, mask=mask
                )
                return as_asked(found, options), grads
            x, targets, modulator, mask = unwrap(given)
            found, grads = self.step_gradients(loss_fn, options, x, targets, modulator, mask)
            return as_asked(found, options), grads

        return run

    def step_gradients(
        self, loss_fn: Callable, options: LossOptions, x: Any, targets: tuple, modulator: Any, mask: Any
    ) -> tuple[LossValue, Any]:
        """One step with its gradients and all that the loss gave; for :meth:`value_and_grad` and learners."""
        self._follow_environment()
        inputs, mask = self._as_inputs(x), check_mask(mask, None)
        self._functions.model.flatten_given(inputs)
        inputs = self._with_environment(inputs)
        carry = self._carry(give_away=True)
        bound = self.bound_loss(loss_fn, options, targets, mask, None)
        item = bound.item(targets, mask, 0)
        donated = () if self.asks_host(bound.loss.program) else (DONATED,)
        fn = self._jit(
            ("value_and_grad", bound.loss.program), apart(one_step(self._functions)), donate=donated
        )
        found, grads, carry = self._guarded(
            fn, carry, bound.loss, inputs, item, _call(self.program, None, modulator), time=0
        )
        self._set_carry(carry)
        bound.write(found.carried)
        return found, grads

    @named_arguments("step.scan_value_and_grad")
    def scan_value_and_grad(
        self, loss_fn: Callable, chunk: int | str | None = None, has_aux: bool = False, reduction: str = "sum"
    ) -> Callable:
        """A function ``(xs, *targets, modulator=None, mask=None, progress=False) -> (losses, grads)`` over a sequence.

        Time is axis 0. ``losses`` has one number per step; ``grads`` are summed over the steps. The weights stay fixed. A
        ``modulator`` has time on axis 0 as well; a number holds for every step. What is the same at every step may be given
        as :class:`etcompile.SingleStepData`. What ``loss_fn`` may read, and ``has_aux``, are as in :meth:`value_and_grad`; aux
        values have time on axis 0.

        ``mask`` has shape ``(T,)``, or ``(T, examples)`` for a loss with one number per example, which are then summed. Where it
        is zero there is no loss and no gradient, whatever stands in the targets of a masked step; the model and the traces run
        on. Other numbers weigh the loss.

        ``reduction="mean"`` divides the gradients by the number of steps, or the sum of the mask; the losses stay one per step.

        ``chunk`` steps are handled at once, with the same result; the last chunk may be shorter. ``"auto"``, the default of
        the schedule: as many as pay off within its memory, and one by one where a rule's traces cannot be chunked. 1: one by
        one. A number given for a rule that cannot be chunked raises UnsupportedError.

        For a program of windows (``compile(..., within="exact")``, ``algo="bptt"``) ``chunk`` is the number of steps in a window;
        by default that of the rule, or else the whole call.

        What the model reads in ``brainstate.environ`` is taken from the environment around the call. ``t`` and ``i`` there are
        those of the first step; ``t`` advances by ``dt`` from step to step and ``i`` by 1. An array with one entry per step,
        time on axis 0, gives them, or any other array that the model reads, for every step:
        ``with brainstate.environ.context(i=0, t=0 * saiunit.ms): step.scan_value_and_grad(loss_fn)(xs, ys)``.

        ``progress=True`` shows a bar with steps per second and the mean loss of the last steps. The sequence then runs in about
        200 pieces of whole chunks, with the numbers of one call: each goes on from the states, traces and summed gradients of
        the one before. A ``rich.progress.Progress`` gets a task of its own instead.
        """
        check_callable(loss_fn)
        check_end(self.program)
        if chunk is not None:
            chunk = check_chunk(chunk)
        if reduction not in ("sum", "mean"):
            raise OptionError("reduction must be 'sum' or 'mean'.", got=f"reduction={reduction!r}")
        options = LossOptions(has_aux)
        gradients = self.sequence_gradients(loss_fn, options, chunk, reduction)

        def run(xs: Any, *targets: Any, **how: Any) -> tuple[Any, Any]:
            found, grads = gradients(xs, *targets, **how)
            return as_asked(found, options), grads

        return run

    def sequence_gradients(
        self, loss_fn: Callable, options: LossOptions, chunk: int | str | None = None, reduction: str = "sum"
    ) -> Callable:
        """As :meth:`scan_value_and_grad`, with all that the loss gave; for that and for learners."""

        def run(
            xs: Any,
            *targets: Any,
            modulator: Any = None,
            mask: Any = None,
            progress: bool | Progress = False,
        ) -> tuple[LossValue, Any]:
            if modulator is not None and self.program.window is not None:
                raise OptionError(
                    f"{self.program.name} runs in windows, which read no modulator.",
                    got="modulator=...",
                    expected="no modulator",
                )
            xs, targets, mask = over_time((xs, targets, mask))
            xs, targets = self.stacked(xs, targets)
            inputs = self._sequence(xs, targets)
            mask = check_mask(mask, _steps(inputs))
            carry = self._carry(give_away=True)
            bound = self.bound_loss(loss_fn, options, targets, mask, _steps(inputs))
            plan = self._plan(_steps(inputs), chunk)
            whole = sequence(self._functions, plan)
            key, call = ("sequence", bound.loss.program, plan), _call(self.program, None, modulator)
            items = bound.item(targets, mask, 1)
            if progress is not False:
                found, grads = gradients_in_pieces(
                    self,
                    key,
                    whole,
                    plan.together(_steps(inputs)),
                    bound.loss,
                    (inputs, items, call),
                    progress,
                    bound.write,
                )
            else:
                donated = () if self.asks_host(bound.loss.program) else (DONATED,)
                fn = self._jit(key, apart(whole), donate=donated)
                found, grads, carry = self._guarded(fn, carry, bound.loss, inputs, items, call)
                self._set_carry(carry)
                bound.write(found.carried)
            if reduction == "mean":
                count = _steps(inputs) if mask is None else jnp.maximum(jnp.sum(mask), 1)
                grads = jax.tree.map(lambda g: (g / count).astype(g.dtype), grads)
            return found, grads

        return run

    def _plan(self, steps: int, chunk: int | str | None) -> Plan:
        """How a sequence is run; what there is to say of it is said."""
        plan = self._functions.plan(self._compiled.schedule, steps, chunk)
        if caution := plan.how.caution(plan.together(steps), steps):
            warnings.warn(caution, EtcompileWarning, stacklevel=3)
        return plan

    def joined_loss(
        self, loss_fn: Callable, options: LossOptions, targets: Any, mask: Any, steps: int | None
    ) -> JoinedLoss:
        """A loss function as it is traced for this step and for the environment as it is; ``steps`` as in :meth:`bound_loss`."""
        self._access.look_up()
        return self._joined(loss_fn, options, targets, mask, steps)

    def _joined(
        self, loss_fn: Callable, options: LossOptions, targets: Any, mask: Any, steps: int | None
    ) -> JoinedLoss:
        with completed(self._required):
            return join_loss(self._access, self._now, loss_fn, options, targets, mask, steps)

    def bound_loss(
        self, loss_fn: Callable, options: LossOptions, targets: Any, mask: Any, steps: int | None
    ) -> BoundLoss:
        """A loss function for a call over ``steps`` steps, or of one, with what it reads as it is now."""
        joined = self._joined(loss_fn, options, targets, mask, steps)
        with completed(self._required):
            return joined.now(steps)

    @named_arguments("step.scan")
    def scan(self, xs: Any, progress: bool | Progress = False) -> Any:
        """Run a sequence forward (time is axis 0) and return all outputs; states and traces advance.

        ``progress`` as in :meth:`scan_value_and_grad`, and so are ``t`` and ``i`` of ``brainstate.environ``.
        """
        inputs = self._sequence(self.stacked(over_time(xs), ())[0], ())
        if progress is not False:
            lengths = piece_lengths(_steps(inputs))
            return in_pieces(self, self._forward, (inputs,), lengths, progress, "steps", shown=None)
        return self._forward(inputs)

    def _forward(self, inputs: Any) -> Any:
        """Outputs of a sequence of inputs, joined with their environment."""
        params, carry, (inputs,) = self._placed(self._carry(), (inputs,), time=1)
        outputs, carry = self.ran(self._jit("forward", self._functions.scan), params, carry, inputs)
        self._set_carry(carry)
        return outputs

    def stacked(self, xs: Any, targets: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """Inputs and targets of a sequence; lists with one entry for each step become arrays with time on axis 0."""
        tree = self._functions.model.input_tree
        children = tree.children()
        given = stacked(xs, children[0] if len(children) == 1 else tree, "xs")
        if len(children) > 1 and isinstance(given, tuple) and len(given) == len(children):
            given = tuple(
                stacked(x, c, f"xs[{k}]") for k, (x, c) in enumerate(zip(given, children, strict=True))
            )
        if not any(isinstance(t, list) for t in targets):
            return given, targets
        steps = next((v.shape[0] for v in jax.tree.leaves(given) if getattr(v, "shape", ())), None)

        def of_steps(target: Any) -> bool:
            """A list of as many entries; where each entry could have the time on axis 0 as well, as the inputs are given."""
            if not isinstance(target, list) or len(target) != steps:
                return False
            return given is not xs or any(jnp.shape(v)[:1] != (steps,) for v in jax.tree.leaves(target))

        return given, tuple(
            stacked(t, jax.tree.structure(t[0]), f"target {k}") if of_steps(t) else t
            for k, t in enumerate(targets)
        )

    def _sequence(self, xs: Any, targets: tuple[Any, ...]) -> Any:
        """The inputs of a sequence, checked, and joined with the environment of each step."""
        self._follow_environment()
        inputs = self._as_inputs(xs)
        self._check_sequence(inputs, targets)
        return self._with_environment(inputs, _steps(inputs))

    def environment(self, joined: JoinedLoss, steps: int) -> Environments:
        """What the model and a loss take from ``brainstate.environ`` at each of ``steps`` steps, time on axis 0."""
        with completed(self._required):
            return self._functions.model.environment.values(steps), joined.environment.values(steps)

    @contextmanager
    def environment_of(self, joined: JoinedLoss, arrays: Environments) -> Iterator[None]:
        """The environment of some steps of a sequence, from their share of :meth:`environment`."""
        of_model, of_loss = arrays
        with self._functions.model.environment.around(of_model), joined.environment.around(of_loss):
            yield

    @named_arguments("step.learn")
    def learn(
        self,
        loss_fn: Callable,
        optimizer: Any = None,
        update_every: int = 1,
        has_aux: bool = False,
        outputs: bool = False,
    ) -> Learner:
        """A driver that updates the weights while the sequence runs; see :class:`etcompile.runtime.learn.Learner`."""
        from etcompile.runtime.learn import Learner

        check_callable(loss_fn)
        check_end(self.program)
        self._functions.require_kept("learn")
        self._require_arrays()
        return Learner(self, loss_fn, optimizer, update_every, LossOptions(has_aux, outputs))

    def check_sequence(self, xs: Any, targets: tuple[Any, ...]) -> None:
        """Raise :class:`InputError` unless inputs and targets fit this step and each other; time is axis 0."""
        self._refuse_unrecorded((xs, targets))
        self._follow_environment()
        self._check_sequence(self._as_inputs(xs), targets)

    def by_param_state(self, grads: Any) -> dict[str, Any]:
        """Gradients keyed like :attr:`param_states`; for a plain function they are one tree, filed under its one state."""
        return self._access.by_param_state(grads)

    @property
    def traces_state(self) -> TraceState:
        """The brainstate state that holds the traces, for transformations that need it by name."""
        self._require_arrays()
        return self._now.traces

    @named_arguments("step.reset")
    def reset(self, batch_size: int | None = None) -> None:
        """Model states and traces back to their initial values; with ``batch_size``, for another batch size.

        Initial values are those the states had when the model was compiled (long-term and random states keep theirs, and so
        does the count of steps by which a rule draws random numbers). With ``batch_size`` they are made anew, by the model's
        ``init_state`` methods. What was compiled is kept for every batch size: a change back, or a last batch that is smaller,
        compiles nothing that was seen before.
        """
        self._refuse_unrecorded(())
        if batch_size is None:
            with self._writes.own():
                self._access.restart()
            self._clear_traces(self._counts())
            self._writes.settled()
            self.place_states()
            return
        batch_size = _check_batch(batch_size)
        require_divisible_batch(self._compiled.schedule, batch_size)
        if in_transformation():
            raise OptionError(
                "step.reset(batch_size=...) does not work inside of jit and other transformations: it makes other states.",
                got=f"batch_size={batch_size}",
                expected="step.reset() there",
                hint="call step.reset(batch_size=...) outside, before the transformed function.",
            )
        before, counts = self._now, self._counts()
        try:
            with self._writes.own(), self._access.unchanged_on_error():
                self._access.resize(batch_size, batch_leaves(self._compiled.analysis)[0])
                with self._functions.model.environment.supplied():
                    self._use(self._resized_inputs(batch_size))
                self._access.remember()
                if self._now is not before:
                    before.traces.release()
                self._clear_traces(counts)
                self._writes.settled()
                self.place_states()
        except BaseException:
            self._now = before
            raise

    def _counts(self) -> dict[str, Any]:
        """Counts of steps by which the rule draws random numbers, as they stand; nothing before the first use."""
        names = [e.name for e in self.program.equations if KINDS[e.type.kind].counts]
        if not names or self._abstract or not (self._now.traces.allocated or in_transformation()):
            return {}
        traces = self._now.traces.own()
        return {name: traces[name] for name in names if name in traces}

    def _clear_traces(self, counts: dict[str, Any]) -> None:
        """Zero traces, with these counts of steps."""
        if self._abstract:
            return
        state = self._now.traces
        if in_transformation():  # what a compiled function does at its first call it does at every one
            state.set_own({**state.zeros(), **counts})
            return
        state.release()  # zeros at the next use
        if counts:
            state.set_own({**state.own(), **counts})

    # -- plumbing -----------------------------------------------------------------------------------------------

    def _resized_inputs(self, batch_size: int) -> Any:
        """Shapes of the inputs at another batch size."""
        leaves, tree = jax.tree.flatten(self._inputs)
        along = batch_leaves(self._compiled.analysis)[1]
        resized = [
            jax.ShapeDtypeStruct((batch_size, *v.shape[1:]), v.dtype) if b else v
            for v, b in zip(leaves, along, strict=True)
        ]
        return jax.tree.unflatten(tree, resized)

    def _require_arrays(self) -> None:
        """Raise :class:`ModelError` where parameters or states are shapes alone."""
        if not self._abstract:
            return
        path = shapes_alone({"params": self._access.params(), "state": self._access.states()})
        if path is not None:
            raise ModelError(
                f"{self._functions.model.name} was given by shapes alone: it can be analysed, but not run.",
                got=f"a jax.ShapeDtypeStruct at {path}",
                expected="arrays",
                hint="report() and cost() need no arrays; to run, compile a model that has its parameters and states.",
            )

    def _carry(self, give_away: bool = False) -> Carry:
        """States and traces as they stand; to ``give_away`` are buffers of traces that nobody else holds."""
        self._require_arrays()
        states = self._access.states()
        leaves, tree = jax.tree.flatten(states)
        if self._left_by is not self._now or not self._writes.as_left(leaves, tree):
            kinds = kinds_of(states)
            if kinds != self._now.kinds:
                raise self._other_states(states, kinds)
        self._watch()
        held = self._now.traces
        self._writes.check(leaves, through=held.shared)
        traces = self._alive(held.own(), "trace ")
        return Carry(self._alive(states, "state "), held.own(give_away=True) if give_away else traces)

    def _alive(self, tree: Any, what: str) -> Any:
        """The tree; :class:`CarryError` where an array of it was given away."""
        for k, leaf in enumerate(jax.tree.leaves(tree)):
            gone = getattr(leaf, "is_deleted", None)
            if gone is not None and not is_traced(leaf) and gone():
                raise CarryError(
                    f"{what}{leaf_names(tree)[k]} of {self._functions.model.name} is an array that was deleted.",
                    got="a buffer that was donated to a jitted function"
                    + (
                        f", or was lost in a call that failed while it ran ({self._lost})"
                        if self._lost
                        else ""
                    ),
                    expected="arrays of the model's own",
                    hint="step.reset() brings states and traces back; what is donated elsewhere has to be a copy "
                    "(step.init_carry(), jnp.copy).",
                )
        return tree

    def _other_states(self, states: Any, kinds: Any) -> CarryError:
        (tree, leaves), (now, found) = self._now.kinds, kinds
        path, got, expected = "", str(now), str(tree)
        if tree == now:
            name, a, b = next(
                (n, a, b) for n, a, b in zip(leaf_names(states), leaves, found, strict=True) if a != b
            )
            path, got, expected = f" {name}", *(f"{dtype} {shape}" for shape, dtype in (b, a))
        return CarryError(
            f"state{path} of {self._functions.model.name} is not what it was when the model was compiled.",
            got=got,
            expected=expected,
            hint="call step.reset(batch_size=...) to change the batch size; compile again for another dtype.",
        )

    def _set_carry(self, carry: Carry) -> None:
        self._refuse_unrecorded(carry)
        with self._writes.own():
            self._access.set_states(carry.states)
            self._now.traces.set_own(carry.traces)
        self._writes.left(carry.states)
        self._left_by = self._now

    def _refuse_unrecorded(self, values: Any) -> None:
        """Raise :class:`UnsupportedError` in a transformation of JAX's own, in which writes of states would be lost."""
        if not_recorded(values):
            raise UnsupportedError(
                f"a step of {self._functions.model.name} is called inside of jax.jit, jax.lax.scan, jax.vmap or jax.grad.",
                got="a transformation of JAX's own, which does not see the states",
                expected="brainstate's, which do: brainstate.transform.jit, for_loop, grad",
                hint="or use the pure function: carry, out = step.apply(step.params, carry, x) from step.init_carry().",
            )

    def _guarded(
        self, fn: Callable, carry: Carry, loss: Loss, inputs: tuple, items: Item, call: Call, time: int = 1
    ) -> Any:
        params, carry, data = self._placed(carry, (inputs, items, call), time)
        return self.ran(fn, params, carry.states, carry.traces, loss, *data, loss=loss)

    def asks_host(self, loss: LossProgram | None = None) -> bool:
        """Whether the step, or a loss, calls back to Python while it runs; it may fail there, so traces are not given away."""
        return self._functions.asks_host or (loss is not None and loss.asks_host)

    @contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """An exception meanwhile leaves parameters, states and traces as they were; for calls of several compiled functions."""
        held, traces = self._now.traces, self._now.traces.own()
        params, states = self._access.params(), self._access.states()
        try:
            yield
        except BaseException:
            with self._writes.own():
                self._access.set_params(params)
                self._access.set_states(states)
                held.set_own(traces)
            self._writes.left(states)
            raise

    def ran(self, fn: Callable, *args: Any, loss: Loss | None = None) -> Any:
        """What a compiled function gives; where it asks the host, once it is there, since until then it may still fail."""
        try:
            found = fn(*args)
            if self.asks_host(None if loss is None else loss.program) and not in_transformation():
                jax.block_until_ready(found)
        except BaseException as error:
            self._lost = f"{type(error).__name__}: {error}".splitlines()[0]
            raise
        return found

    @property
    def _placement(self) -> Placement:
        return self._compiled.causal.placement

    def place_states(self) -> None:
        """Put the model's parameters and states and the traces where the schedule's mesh wants them; nothing without a mesh.

        Calls do so by themselves; it is for code that reads these states on its own and expects them on all devices.
        """
        if self._placement.mesh is None:
            return
        params, carry, _ = self._placed(self._carry(), ())
        self._access.set_params(params)
        self._set_carry(carry)

    def place_data(self, data: Any, time: int) -> Any:
        """Data of a call on the schedule's mesh; its examples are on axis ``time``."""
        return self._placement.put_batch(data, time)

    def _placed(self, carry: Carry, data: Any, time: int = 0) -> tuple[Any, Carry, Any]:
        """Parameters, carry and the data of a call on the schedule's mesh; all as they are where there is none."""
        self._refuse_unrecorded(data)
        place, model = self._placement, self._functions.model
        states = place.put_states(carry.states, model.complex_states)
        moved = Carry(states, dict(place.put_traces(carry.traces)))
        params = self._alive(self._access.params(looked_up=True), "parameter ")
        return place.put_params(params), moved, place.put_batch(data, time)

    def _jit(self, key: Any, fn: Callable, donate: tuple[int, ...] = ()) -> Callable:
        return self._now.jit(key, fn, donate)

    def _as_inputs(self, x: Any) -> tuple[Any, ...]:
        """The model's inputs from the one argument of the drivers: a tuple where the model takes several."""
        count = len(jax.tree.structure(self._inputs).children())
        if count == 1:
            return (x,)
        if not isinstance(x, tuple) or len(x) != count:
            raise InputError(
                f"{self._functions.model.name} takes {count} inputs.",
                got=type(x).__name__,
                expected=f"a tuple of {count}",
            )
        return x

    def _check_sequence(self, inputs: tuple, targets: tuple) -> None:
        refuse_iterators((inputs, targets), "xs or a target")
        for given, child in zip(inputs, self._functions.model.input_tree.children(), strict=False):
            refuse_lists(given, child, "xs", self._functions.model.name)
        lengths = {}
        for name, tree in [("xs", inputs), *((f"target {k}", t) for k, t in enumerate(targets))]:
            for leaf in jax.tree.leaves(tree):
                if not jnp.ndim(leaf if hasattr(leaf, "ndim") else as_array(leaf, name)):
                    raise InputError(
                        f"{name} has no time axis.",
                        got="a scalar",
                        expected="time as axis 0",
                        hint="broadcast it over the steps.",
                    )
                lengths.setdefault(jnp.shape(leaf)[0], name)
        if len(lengths) > 1:
            told = ", ".join(f"{name}: {n} steps" for n, name in lengths.items())
            raise InputError(
                "inputs and targets differ in length.",
                got=told,
                expected="the same number of steps on axis 0",
            )
        if 0 in lengths:
            raise InputError("the sequence is empty.", got="T = 0", expected="at least one step")
        one = jax.tree.map(lambda v: jax.ShapeDtypeStruct(jnp.shape(v)[1:], jnp.result_type(v)), inputs)
        self._check_one(one)

    def _check_one(self, one: Any) -> None:
        model = self._functions.model
        leaves, tree = jax.tree.flatten(one)
        if tree != model.input_tree:
            model.flatten_given(one)
        for leaf, value in zip(model.given, leaves, strict=True):
            if jnp.shape(value) != leaf.aval.shape:
                raise InputError(
                    f"one step of {leaf.path} has the wrong shape for {model.name}.",
                    got=f"{jnp.shape(value)} after the time axis",
                    expected=f"{leaf.aval.shape}",
                    hint="time is axis 0. " + shape_difference(jnp.shape(value), leaf.aval.shape),
                )


#: A rule that reads what a call may give.
_READERS = {"target": "osttp", "modulator": "three_factor"}


def _call(program: TraceProgram, target: Any, modulator: Any) -> Call:
    """What a call gives beside its inputs, without what it does not give."""
    given = {"target": target, "modulator": modulator}
    for name, value in given.items():
        if value is not None and not any(e.op == name for e in program.equations):
            raise OptionError(
                f"{program.name} reads no {name}.",
                got=f"{name}= of shape {jnp.shape(value)}"
                if hasattr(value, "shape")
                else f"{name}={value!r}",
                hint=f"leave {name}= out, or compile with a rule that reads it, such as algo={_READERS[name]!r}.",
            )
    return {name: value for name, value in given.items() if value is not None}


def _steps(inputs: tuple[Any, ...]) -> int:
    return jax.tree.leaves(inputs)[0].shape[0]


def _check_batch(batch_size: Any) -> int:
    return positive_integer("batch_size", batch_size, error=InputError)
