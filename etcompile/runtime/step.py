"""The compiled step: what users call, with what it means. :class:`Executor` does the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from etcompile.adapters.nir import NirSource
from etcompile.errors import CarryError, InputError, ModelError, OptionError, UnsupportedError
from etcompile.integers import positive_integer
from etcompile.keywords import named_arguments, refuse_others
from etcompile.lowering.functions import Carry
from etcompile.lowering.schedules.windowed import check_end
from etcompile.report import Report
from etcompile.runtime.checks import given_with
from etcompile.runtime.executor import Executor
from etcompile.runtime.forward import called, run_sequence
from etcompile.runtime.gradients import called_with_gradients, sequence_gradients
from etcompile.runtime.losses import LossFunction, as_asked, check_callable
from etcompile.runtime.trace_state import TraceState
from etcompile.schedule import check_chunk
from etcompile.shown import html_of, page_of

if TYPE_CHECKING:
    from rich.progress import Progress

    from etcompile.cost.cost import Cost
    from etcompile.graph import HiddenGroupGraph
    from etcompile.ir.program import TraceProgram
    from etcompile.pass_manager import PassRecord
    from etcompile.runtime.learn import Learner
    from etcompile.runtime.td_learner import TDLearner

__all__ = ["Step"]


class Step:
    """A model compiled with a learning rule.

    Calling it runs one time step, advances the model's states and the traces, and is differentiable: inside
    ``brainstate.transform.grad`` the gradient of whatever loss is made from its result is the online gradient. Calls from several
    threads take turns, each going on from what the last one left.

    Attributes
    ----------
    program : TraceProgram
        The trace program; ``print(step.program)`` shows it.
    exact : bool
        Whether gradients summed over a sequence equal backpropagation through time.
    param_states : dict of str to ParamState
        The trained parameters by dotted path.
    graph : HiddenGroupGraph
        Hidden groups, states, weights, operations and cuts: a networkx graph that shows its picture in notebooks.
    passes : tuple of PassRecord
        What each pass did.
    executor : Executor
        Runs the compiled functions, and holds what stands between calls.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    # -- what the step is ---------------------------------------------------------------------------------------

    @property
    def program(self) -> TraceProgram:
        return self.executor.compiled.program

    @property
    def exact(self) -> bool:
        return self.program.exact

    @property
    def passes(self) -> tuple[PassRecord, ...]:
        return self.executor.compiled.records

    @property
    def graph(self) -> HiddenGroupGraph:
        from etcompile.graph import hidden_group_graph

        compiled = self.executor.compiled
        return hidden_group_graph(compiled.analysis, compiled.program, compiled.report().parameters)

    @property
    def param_states(self) -> dict[str, Any]:
        return self.executor.live.param_states

    @property
    def traces(self) -> dict[str, Any]:
        """The traces as they stand, also where they are written later (``Schedule(write_every=)``); copies, safe to keep."""
        run = self.executor
        run.require_arrays()
        with run.turns:
            return jax.tree.map(jnp.array, run.compiled.causal.carried.all_written(run.traces.own()))

    @property
    def traces_state(self) -> TraceState:
        """The brainstate state that holds the traces, for transformations that need it by name."""
        self.executor.require_arrays()
        return self.executor.traces

    @property
    def params(self) -> Any:
        """Values of the trained parameters, with the structure of the gradients; may be set, all at once.

        Of a module a dict by dotted path, of a plain function the tree that it was given. They are the model's own arrays: what
        is donated to a jitted function (``donate_argnums``) has to be set again before the next step.
        """
        return self.executor.live.params()

    @params.setter
    def params(self, values: Any) -> None:
        self.executor.model.flatten_params(values)
        self.executor.live.set_params(values)

    def to_nir(self) -> Any:
        """The ``nir.NIRGraph`` that :func:`etcompile.from_nir` made the model of, with the weights as they are now.

        Nodes, edges and metadata are those of that graph, and so are the arrays that are not trained. ``nir.write`` saves it.
        """
        source = self.executor.live.source
        if not isinstance(source, NirSource):
            raise ModelError(
                "to_nir writes weights back into the NIR graph that a model was made of.",
                got=f"the model {self.program.header.model}, which was made of none",
                expected="a step of etcompile.from_nir(graph, dt=...)",
            )
        return source.with_params(self.params)

    def report(self) -> Report:
        """What is trained how, what is cut, and how much memory the traces take."""
        return self.executor.compiled.report()

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

        Of agents (:meth:`learn_td`) ask their learner, ``learn.cost()``, which adds z and the environment.

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
        >>> step.cost(batch=1024).trace_bytes // (4 * 1024 * 1000 * 4000)
        1
        """
        from etcompile.runtime.cost import step_cost

        return step_cost(self.executor, batch, steps, chunk, loss_fn, targets, has_aux=has_aux)

    def __repr__(self) -> str:
        header, mesh = self.program.header, self.executor.placement.mesh
        devices = "" if mesh is None else f", mesh={dict(mesh.shape)}"
        return (
            f"Step({header.model}, algo={self.program.name}, groups={len(header.groups)}, "
            f"cuts={len(header.cuts)}, exact={self.exact}{devices})"
        )

    def _repr_html_(self) -> str:
        return html_of(self)

    def save_html(self, path: str | Path) -> Path:
        """Write all about the step to one page: report, picture, cuts with their lines, cost, and the program with its letters.

        The page needs no other file and runs no script, so it can be mailed or put beside a run's other results.

        Parameters
        ----------
        path : str or Path
            Where to; what is there is written over.

        Returns
        -------
        Path

        Raises
        ------
        OptionError
            Where the path cannot be written.

        Examples
        --------
        >>> step.save_html("report.html")  # doctest: +SKIP
        """
        path, text = Path(path), page_of(self)
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise OptionError(
                f"the page cannot be written to {path}.",
                got=error.strerror or str(error),
                expected="a file in a directory that is there",
            ) from error
        return path

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        """A step of a deep copy of the model, with states and traces as they stand; nothing is analysed again."""
        new = memo[id(self)] = object.__new__(Step)
        with self.executor.turns:
            new.executor = self.executor.copied(memo)
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
        run = self.executor
        run.follow_environment()
        if batch_size is not None:
            batch_size = _check_batch(batch_size)
            size = run.compiled.causal.model.examples
            if size != batch_size:
                raise CarryError(
                    "this step was compiled for another batch size.",
                    got=f"batch_size={batch_size}",
                    expected="no batch_size: the step has no batch axis"
                    if size is None
                    else f"batch_size={size}",
                    hint=None if size is None else "call step.reset(batch_size=...) first.",
                )
        return run.initial_carry()

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
        run = self.executor
        run.follow_environment()
        run.model.flatten_given(inputs)
        given = run.with_environment(inputs)
        return run.functions.apply(params, carry, given, given_with(self.program, target, modulator))

    # -- running ------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Any, target: Any = None, modulator: Any = None, **others: Any) -> Any:
        """Run one time step; advances the model's states and the traces.

        Arguments wrapped in :class:`etcompile.MultiStepData` have time on axis 0 and make the call one of many steps, at
        which the others are the same; outputs then have time on axis 0. ``target`` and ``modulator`` are for rules that read
        them, where the step is differentiated.
        """
        if others:
            refuse_others("step", others, ("inputs", "target", "modulator"))
        with self.executor.turns:
            return called(self.executor, inputs, target, modulator)

    @named_arguments("step.scan")
    def scan(self, xs: Any, progress: bool | Progress = False) -> Any:
        """Run a sequence forward (time is axis 0) and return all outputs; states and traces advance.

        Steps are handled together as the schedule says of :meth:`scan_value_and_grad`, with the same result.
        ``progress`` as in :meth:`scan_value_and_grad`, and so are ``t`` and ``i`` of ``brainstate.environ``.
        """
        with self.executor.turns:
            return run_sequence(self.executor, xs, progress)

    @named_arguments("step.value_and_grad", then="step.value_and_grad(loss_fn)(x, *targets)")
    def value_and_grad(self, loss_fn: Callable, has_aux: bool = False) -> Callable:
        """A function ``(x, *targets, modulator=None, mask=None) -> (loss, grads)`` that runs one online step.

        Parameters
        ----------
        loss_fn : callable
            ``loss_fn(out, *targets) -> scalar``. It may read states and parameters of the model, which has just taken the step:
            a penalty on rates, potentials or weights is part of the gradient as it is for ``jax.grad``. Other brainstate states
            that it reads or writes (a count of steps, a random key) go on from step to step, without a derivative through them;
            where there would be one, a warning says so.
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
        loss = self._loss(loss_fn, has_aux, "value_and_grad of one step")
        executor = self.executor

        def run(
            x: Any, *targets: Any, modulator: Any = None, mask: Any = None, **others: Any
        ) -> tuple[Any, Any]:
            if others:
                refuse_others("step.value_and_grad(loss_fn)", others, ("modulator", "mask"))
            with executor.turns:
                found, grads = called_with_gradients(executor, loss, x, targets, modulator, mask)
            return as_asked(found, loss), grads

        return run

    @named_arguments("step.scan_value_and_grad", then="step.scan_value_and_grad(loss_fn)(xs, *targets)")
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

        Right after a :meth:`reset`, a sequence is run without traces where that takes no more memory, and they are made when they
        are asked for: by whoever reads them, or goes on from its end. Where the next reset comes first, it takes what one
        without traces takes (``Schedule(keep_traces=False)``), with the same gradient.

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
        loss = self._loss(loss_fn, has_aux)
        if chunk is not None:
            chunk = check_chunk(chunk)
        if reduction not in ("sum", "mean"):
            raise OptionError("reduction must be 'sum' or 'mean'.", got=f"reduction={reduction!r}")
        executor = self.executor

        def run(
            xs: Any,
            *targets: Any,
            modulator: Any = None,
            mask: Any = None,
            progress: bool | Progress = False,
            **others: Any,
        ) -> tuple[Any, Any]:
            refuse_others("step.scan_value_and_grad(loss_fn)", others, ("modulator", "mask", "progress"))
            given = (xs, targets, modulator, mask)
            with executor.turns:
                found, grads = sequence_gradients(
                    executor, loss, *given, chunk=chunk, reduction=reduction, progress=progress
                )
            return as_asked(found, loss), grads

        return run

    @named_arguments("step.learn", then="step.learn(loss_fn, optimizer)(xs, *targets)")
    def learn(
        self,
        loss_fn: Callable,
        optimizer: Any = None,
        update_every: int = 1,
        has_aux: bool = False,
        outputs: bool = False,
    ) -> Learner:
        """A learner: a function ``(xs, *targets) -> losses`` that updates the weights while the sequence runs.

        It takes ``modulator=``, ``mask=``, ``progress=``, ``checkpoints=`` and ``callback=`` as well, see
        :class:`etcompile.runtime.learn.Learner`. ``learner.step`` is this step.

        Parameters
        ----------
        loss_fn : callable
            ``loss_fn(out, *targets) -> scalar``, as for :meth:`value_and_grad`.
        optimizer : optax.GradientTransformation or braintools optimiser
        update_every : int
            Steps between updates. The weights are fixed in between, so these steps run as a chunk where the rule has chunks.
        has_aux : bool
            ``loss_fn`` returns ``(loss, aux)``; a call then returns the aux values after the losses.
        outputs : bool
            A call returns the outputs of all steps after the losses, before aux values.

        Returns
        -------
        Learner
        """
        from etcompile.runtime.learn import Learner

        loss = self._loss(loss_fn, has_aux, "learn", outputs=outputs)
        self.executor.require_arrays()
        return Learner(self, loss, optimizer, update_every)

    @named_arguments("step.learn_td")
    def learn_td(
        self,
        optimizer: Any,
        env: Any = None,
        *,
        method: Any = "actor_critic",
        gamma: float = 0.99,
        lam: float = 0.9,
        entropy: float | None = None,
        critic: float | None = None,
        epsilon: float | Callable | None = None,
        normalise_observations: bool = False,
        scale_rewards: bool = False,
        env_params: Any = None,
        seed: Any = 0,
    ) -> TDLearner:
        """A driver of agents that learn from rewards while they act; see :class:`etcompile.runtime.td_learner.TDLearner`.

        The batch axis of the step numbers the agents. At every step, with the error ``delta = r + gamma V(o') - V(o)``,
        ``z = gamma lam z + gradient`` and ``theta = theta + optimiser(mean of delta z)``; z is kept for each agent, as large as
        all parameters. The gradient is the online gradient of the step's rule (docs/reinforcement.md).

        Parameters
        ----------
        optimizer : optax.GradientTransformation
            It minimises, so its gradients are ``-delta z``. ``etcompile.nn.obgd`` bounds each step.
        env : object or pair of functions, optional
            Pure functions ``reset(key) -> (observation, state)`` and ``step(key, state, action) -> (observation, state, reward,
            done, info)``, or with ``terminated, truncated`` in the place of ``done``, as gymnax has them. Without it the
            environment is outside: ``play`` for gymnasium's, or ``begin`` and ``observe``.
        method : str or object
            ``"actor_critic"`` for outputs ``(logits, value)``, ``"gaussian_actor_critic"`` for ``((mean, spread), value)`` with
            the standard deviation ``softplus(spread)``, ``"q"`` for values of actions; or an object with ``choose``, ``worth``
            and ``objective``.
        gamma, lam : float
            Discount, and decay of the trace beside it, in [0, 1]; their product is below 1.
        entropy : float, optional
            Of an actor: weight of the policy's entropy, times the sign of delta as in arXiv:2410.14606. Default 0.
        critic : float, optional
            Of an actor-critic: weight of the value's gradient beside that of the policy. Default 1.
        epsilon : float or callable, optional
            Of ``"q"``: share of random actions, or a function of the number of steps. Default 0.1.
        normalise_observations : bool
            Mean 0 and variance 1 by what all agents have seen.
        scale_rewards : bool
            By the standard deviation of their discounted sums.
        env_params : pytree, optional
            A last argument of ``reset`` and ``step``; by default the environment's ``default_params``, if it has some.
        seed : int or random key

        Raises
        ------
        OptionError, InputError, UnsupportedError
            For options out of range, outputs that are not what the method expects, rules that read a modulator or a target or
            run in windows, and models that read the time of ``brainstate.environ``.
        """
        from etcompile.runtime.td_learner import TDLearner

        options = {"entropy": entropy, "critic": critic, "epsilon": epsilon}
        with self.executor.turns:
            return TDLearner(
                self,
                optimizer,
                env,
                method=method,
                gamma=gamma,
                lam=lam,
                normalise_observations=normalise_observations,
                scale_rewards=scale_rewards,
                env_params=env_params,
                seed=seed,
                **{name: value for name, value in options.items() if value is not None},
            )

    def _loss(
        self, loss_fn: Any, has_aux: bool, steps_of: str | None = None, outputs: bool = False
    ) -> LossFunction:
        """A loss, once it is clear that this step can run it; ``steps_of`` is what goes on from call to call."""
        check_callable(loss_fn)
        check_end(self.program)
        if steps_of is not None:
            self.executor.functions.require_kept(steps_of)
        return LossFunction(loss_fn, has_aux, outputs)

    # -- starting anew ------------------------------------------------------------------------------------------

    @named_arguments("step.reset")
    def reset(self, batch_size: int | None = None) -> None:
        """Model states and traces back to their initial values; with ``batch_size``, for another batch size.

        Initial values are those the states had when the model was compiled (long-term and random states keep theirs, and so
        does the count of steps by which a rule draws random numbers). With ``batch_size`` they are made anew, by the model's
        ``init_state`` methods. What was compiled is kept for every batch size: a change back, or a last batch that is smaller,
        compiles nothing that was seen before.
        """
        with self.executor.turns:
            if batch_size is None:
                self.executor.reset()
            else:
                self.executor.resize(_check_batch(batch_size))

    def place_states(self) -> None:
        """Put the model's parameters and states and the traces where the schedule's mesh wants them; nothing without a mesh.

        Calls do so by themselves; it is for code that reads these states on its own and expects them on all devices.
        """
        with self.executor.turns:
            self.executor.place_states()


def _check_batch(batch_size: Any) -> int:
    return positive_integer("batch_size", batch_size, error=InputError)
