"""The compiled step: a thin stateful wrapper around pure functions."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from etcompile.errors import CarryError, InputError, ModelError, OptionError, UnsupportedError
from etcompile.frontend.function import own_copy
from etcompile.frontend.jaxpr import in_transformation, is_traced
from etcompile.frontend.module import not_recorded
from etcompile.frontend.step_model import leaf_names
from etcompile.lowering.functions import Call, Carry, StepFunctions
from etcompile.lowering.placement import Placement
from etcompile.lowering.windows import check_end
from etcompile.report import Report, make_report
from etcompile.runtime.calls import DONATED, apart, one_step, sequence, windows
from etcompile.runtime.foreign_writes import ForeignWrites
from etcompile.runtime.model_states import ModelAccess, shapes_alone
from etcompile.runtime.progress import gradients_in_pieces, in_pieces, piece_lengths
from etcompile.runtime.step_data import MultiStepData, has_multi_step, split, unwrap
from etcompile.runtime.trace_state import TraceState
from etcompile.runtime.variants import Key, Variant, Variants, kinds_of, shapes_of
from etcompile.schedule import check_chunk, require_divisible_batch

if TYPE_CHECKING:
    import networkx
    from rich.progress import Progress

    from etcompile.compiler import Compiled
    from etcompile.cost.cost import Cost
    from etcompile.ir.program import TraceProgram
    from etcompile.pass_manager import PassRecord
    from etcompile.runtime.learn import Learner

__all__ = ["Step"]


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
        self._now: Variant
        self._use(shapes_of(inputs))
        access.remember()
        self._watch()
        self.place_states()

    def _watch(self) -> None:
        """Follow who else writes the states that traces belong to."""
        model = self._functions.model
        carried = [model.states[k].path for g in self._compiled.analysis.groups for k in g.states]
        states = {
            path: state
            for path, state in self._access.hidden_states().items()
            if any(path in ("", name) or name.startswith(path + ".") for name in carried)
        }
        self._writes.watch(model.name, states)

    def _build(self, access: ModelAccess, inputs: tuple[Any, ...]) -> Compiled:
        with self._writes.own():
            return self._compile(access, inputs)

    def _clear_for_others(self) -> None:
        self._clear_traces(self._counts())

    # -- compilations -------------------------------------------------------------------------------------------

    def _switches(self) -> Hashable:
        """Settings outside of the model that change what it computes: part of what a compilation is for."""
        return ()

    def _use(self, inputs: tuple[Any, ...]) -> None:
        """Take the compilation for these shapes of inputs, for the model's states and the switches as they are.

        It is found among those kept, or made. An error leaves everything as it was.
        """
        key = Key(kinds_of(inputs), self._access.kinds(), self._switches())
        variant = self._variants.find(key)
        if variant is None:
            found = self._access.found
            try:
                variant = self._made(self._build(self._access, inputs), inputs)
            finally:
                self._access.found = found
            self._variants.add(key, variant)
        self._take(variant)

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

    def cost(
        self,
        batch: int | None = None,
        steps: int | None = None,
        chunk: int | str | None = None,
        loss_fn: Callable | None = None,
        targets: tuple[Any, ...] = (),
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
            The loss, ``loss_fn(out, *targets)``; by default the mean squared difference from a target like the outputs.
        targets : tuple of arrays or shapes
            Targets of one step, for ``loss_fn``.

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

        return step_cost(self, batch, steps, chunk, loss_fn, targets)

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
        now, compiled = self._now, self._now.compiled
        traces = new._variants.traces(compiled.causal.init_traces_shapes())
        new._take(Variant(compiled, now.inputs, new._access.found, now.kinds, traces))
        new._variants.add(Key(kinds_of(now.inputs), new._access.kinds(), new._switches()), new._now)
        if now.traces.allocated:
            traces.set_own(jax.tree.map(jnp.copy, now.traces.own()))
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

    def init_carry(self, batch_size: int | None = None) -> Carry:
        """A fresh carry: the model's initial states and zero traces.

        Its arrays are copies, so they may be donated. ``batch_size`` only says what is expected: it must be the one that the
        step is compiled for now, see :meth:`reset`.
        """
        if batch_size is not None:
            _check_batch(batch_size)
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

    def apply(
        self, params: Any, carry: Carry, *inputs: Any, target: Any = None, modulator: Any = None
    ) -> tuple[Carry, Any]:
        """The pure step ``(params, carry, *inputs) -> (carry, out)``; jit, vmap, scan and differentiate it as you like.

        Derivatives are reverse mode, ``jax.grad`` and ``jax.vjp``: the online gradient is made from the cotangent of the result.
        Forward mode (``jax.jvp``, ``jax.linearize``, ``jax.jacfwd``) has no meaning here, and JAX refuses it with a word of
        ``custom_vjp``; for forward mode through time differentiate the model itself.

        ``target`` and ``modulator`` are for rules that read them, where the step is differentiated.
        """
        return self._functions.apply(params, carry, inputs, _call(target, modulator))

    # -- running ------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Any, target: Any = None, modulator: Any = None) -> Any:
        """Run one time step; advances the model's states and the traces.

        Arguments wrapped in :class:`etcompile.MultiStepData` have time on axis 0 and make the call one of many steps, at
        which the others are the same; outputs then have time on axis 0. ``target`` and ``modulator`` are for rules that read
        them, where the step is differentiated.
        """
        if has_multi_step((inputs, target, modulator)):
            return self._run_steps((inputs, target, modulator))
        inputs, target, modulator = unwrap((inputs, target, modulator))
        carry = self._carry()
        self._functions.model.flatten_inputs(inputs)
        params, carry, data = self._placed(carry, (inputs, _call(target, modulator)))
        carry, out = self._jit("apply", self._functions.apply)(params, carry, *data)
        self._set_carry(carry)
        return out

    def _run_steps(self, args: tuple[Any, Any, Any]) -> Any:
        """Outputs of all steps of multi-step arguments, time on axis 0."""
        per_step, join = split(args)
        one = jax.tree.map(lambda v: jax.ShapeDtypeStruct(jnp.shape(v)[1:], jnp.result_type(v)), per_step)
        self._check_one(join(one)[0])

        def run(params: Any, carry: Carry, args: tuple[Any, Any, Any]) -> tuple[Carry, Any]:
            # Split again: what is the same at every step must come in as an argument, not be baked in.
            xs, join = split(args)

            def body(carry: Carry, x: Any) -> tuple[Carry, Any]:
                inputs, target, modulator = join(x)
                return self._functions.apply(params, carry, inputs, _call(target, modulator))

            return jax.lax.scan(body, carry, xs)

        params, carry, _ = self._placed(self._carry(), ())
        args = jax.tree.map(
            lambda v: self.place_data(v, 1 if isinstance(v, MultiStepData) else 0),
            args,
            is_leaf=lambda v: isinstance(v, MultiStepData),
        )
        carry, out = self._jit("steps", run)(params, carry, args)
        self._set_carry(carry)
        return out

    def value_and_grad(self, loss_fn: Callable) -> Callable:
        """A function ``(x, *targets, modulator=None) -> (loss, grads)`` that runs one online step.

        Parameters
        ----------
        loss_fn : callable
            ``loss_fn(out, *targets) -> scalar``.

        Returns
        -------
        callable
            ``modulator`` is for rules that read one: a number, an array over a group's units, or a dict by group. Its
            gradients have the keys of :attr:`param_states` and, leaf by leaf, the structure of the parameters.
        """
        _check_callable(loss_fn)
        check_end(self.program)
        self._functions.require_kept("value_and_grad of one step")

        def run(x: Any, *targets: Any, modulator: Any = None) -> tuple[Any, Any]:
            inputs = self._as_inputs(x)
            self._functions.model.flatten_inputs(inputs)
            carry = self._carry(give_away=True)
            fn = self._jit(
                ("value_and_grad", loss_fn), apart(one_step(self._functions, loss_fn)), donate=(DONATED,)
            )
            loss, grads, carry = self._guarded(fn, carry, inputs, targets, _call(None, modulator), time=0)
            self._set_carry(carry)
            return loss, grads

        return run

    def scan_value_and_grad(self, loss_fn: Callable, chunk: int | str | None = None) -> Callable:
        """A function ``(xs, *targets, modulator=None, progress=False) -> (losses, grads)`` over a sequence; time is axis 0.

        ``losses`` has one number per step; ``grads`` are summed over the steps. The weights stay fixed. A ``modulator`` has
        time on axis 0 as well; a number holds for every step.

        ``chunk`` steps are handled at once, with the same result; the last chunk may be shorter. ``"auto"``, the default of
        the schedule: as many as pay off within its memory, and one by one where a rule's traces cannot be chunked. 1: one by
        one. A number given for a rule that cannot be chunked raises UnsupportedError.

        For a program of windows (``compile(..., within="exact")``, ``algo="bptt"``) ``chunk`` is the number of steps in a window;
        by default that of the rule, or else the whole call.

        ``progress=True`` shows a bar with steps per second and the mean loss of the last steps. The sequence then runs in about
        200 pieces of whole chunks, with the numbers of one call: each goes on from the states, traces and summed gradients of
        the one before. A ``rich.progress.Progress`` gets a task of its own instead.
        """
        _check_callable(loss_fn)
        check_end(self.program)
        if chunk is not None:
            check_chunk(chunk)
        window = self.program.window
        if window is not None:
            return self._scan_windows(loss_fn, chunk if isinstance(chunk, int) else window)
        wanted = self._compiled.schedule.chunk if chunk is None else chunk

        def run(
            xs: Any, *targets: Any, modulator: Any = None, progress: bool | Progress = False
        ) -> tuple[Any, Any]:
            inputs = self._as_inputs(xs)
            self._check_sequence(inputs, targets)
            carry = self._carry(give_away=True)
            size = self._functions.chunk_size(wanted, _steps(inputs), self._compiled.schedule.memory)
            key, call = ("scan", loss_fn, size), _call(None, modulator)
            whole = sequence(self._functions, loss_fn, size)
            if progress is not False:
                return gradients_in_pieces(self, key, whole, size, (inputs, targets, call), progress)
            fn = self._jit(key, apart(whole), donate=(DONATED,))
            losses, grads, carry = self._guarded(fn, carry, inputs, targets, call)
            self._set_carry(carry)
            return losses, grads

        return run

    def _scan_windows(self, loss_fn: Callable, window: int) -> Callable:
        whole = windows(self._functions, loss_fn, window)

        def run(xs: Any, *targets: Any, progress: bool | Progress = False) -> tuple[Any, Any]:
            inputs = self._as_inputs(xs)
            self._check_sequence(inputs, targets)
            carry = self._carry(give_away=True)
            key = ("windows", loss_fn, window)
            if progress is not False:
                size = window or _steps(inputs)
                return gradients_in_pieces(self, key, whole, size, (inputs, targets, {}), progress)
            fn = self._jit(key, apart(whole), donate=(DONATED,))
            losses, grads, carry = self._guarded(fn, carry, inputs, targets, {})
            self._set_carry(carry)
            return losses, grads

        return run

    def scan(self, xs: Any, progress: bool | Progress = False) -> Any:
        """Run a sequence forward (time is axis 0) and return all outputs; states and traces advance.

        ``progress`` as in :meth:`scan_value_and_grad`.
        """
        inputs = self._as_inputs(xs)
        self._check_sequence(inputs, ())
        if progress is not False:
            lengths = piece_lengths(_steps(inputs))
            return in_pieces(self, self.scan, (xs,), lengths, progress, "steps", losses=False)
        params, carry, (inputs,) = self._placed(self._carry(), (inputs,), time=1)
        outputs, carry = self._jit("forward", self._functions.scan)(params, carry, inputs)
        self._set_carry(carry)
        return outputs

    def learn(self, loss_fn: Callable, optimizer: Any, update_every: int = 1) -> Learner:
        """A driver that updates the weights while the sequence runs; see :class:`etcompile.runtime.learn.Learner`."""
        from etcompile.runtime.learn import Learner

        _check_callable(loss_fn)
        check_end(self.program)
        self._functions.require_kept("learn")
        self._require_arrays()
        return Learner(self, loss_fn, optimizer, update_every)

    def check_sequence(self, xs: Any, targets: tuple[Any, ...]) -> None:
        """Raise :class:`InputError` unless inputs and targets fit this step and each other; time is axis 0."""
        self._refuse_unrecorded((xs, targets))
        self._check_sequence(self._as_inputs(xs), targets)

    def by_param_state(self, grads: Any) -> dict[str, Any]:
        """Gradients keyed like :attr:`param_states`; for a plain function they are one tree, filed under its one state."""
        return self._access.by_param_state(grads)

    @property
    def traces_state(self) -> TraceState:
        """The brainstate state that holds the traces, for transformations that need it by name."""
        self._require_arrays()
        return self._now.traces

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
        _check_batch(batch_size)
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
                self._access.resize(batch_size)
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
        names = [e.name for e in self.program.equations if e.type.kind == "count"]
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
        old = jax.tree.leaves(self._inputs)
        size = old[0].shape[0] if old and old[0].shape else None
        return jax.tree.map(
            lambda v: (
                jax.ShapeDtypeStruct((batch_size, *v.shape[1:]), v.dtype)
                if v.shape and v.shape[0] == size
                else v
            ),
            self._inputs,
        )

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
        kinds = kinds_of(states)
        if kinds != self._now.kinds:
            raise self._other_states(states, kinds)
        self._watch()
        self._alive(self._now.traces.own(), "trace ")
        self._writes.check(states, through=self._now.traces.shared)
        return Carry(self._alive(states, "state "), self._now.traces.own(give_away))

    def _alive(self, tree: Any, what: str) -> Any:
        """The tree; :class:`CarryError` where an array of it was given away."""
        for k, leaf in enumerate(jax.tree.leaves(tree)):
            if isinstance(leaf, jax.Array) and not is_traced(leaf) and leaf.is_deleted():
                raise CarryError(
                    f"{what}{leaf_names(tree)[k]} of {self._functions.model.name} is an array that was deleted.",
                    got="a buffer that was donated to a jitted function, or was lost in a call that failed while it ran",
                    expected="arrays of the model's own",
                    hint="donate copies (step.init_carry(), jnp.copy); step.reset() brings states and traces back.",
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
        self, fn: Callable, carry: Carry, inputs: tuple, targets: tuple, call: Call, time: int = 1
    ) -> Any:
        params, carry, data = self._placed(carry, (inputs, targets, call), time)
        return fn(params, carry.states, carry.traces, *data)

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
        params = self._alive(self._access.params(), "parameter ")
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
        lengths = {}
        for name, tree in [("xs", inputs), *((f"target {k}", t) for k, t in enumerate(targets))]:
            for leaf in jax.tree.leaves(tree):
                if not jnp.ndim(leaf):
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
            model.flatten_inputs(one)
        for leaf, value in zip(model.inputs, leaves, strict=True):
            if jnp.shape(value) != leaf.aval.shape:
                raise InputError(
                    f"one step of {leaf.path} has the wrong shape for {model.name}.",
                    got=f"{jnp.shape(value)} after the time axis",
                    expected=f"{leaf.aval.shape}",
                    hint="time is axis 0; call step.reset(batch_size=...) after a change of batch size.",
                )


def _call(target: Any, modulator: Any) -> Call:
    """What a call gives beside its inputs, without what it does not give."""
    given = {"target": target, "modulator": modulator}
    return {name: value for name, value in given.items() if value is not None}


def _steps(inputs: tuple[Any, ...]) -> int:
    return jax.tree.leaves(inputs)[0].shape[0]


def _check_callable(loss_fn: Any) -> None:
    if not callable(loss_fn):
        raise InputError(
            "the loss must be a function.", got=repr(loss_fn), expected="loss_fn(out, *targets) -> scalar"
        )


def _check_batch(batch_size: Any) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError("batch_size must be a positive integer.", got=repr(batch_size), expected="1, 2, ...")
