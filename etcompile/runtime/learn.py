"""Online learning proper: the weights change while the sequence runs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import brainstate
import jax
import jax.numpy as jnp

from etcompile.errors import OptionError
from etcompile.frontend.captured import Same
from etcompile.frontend.jaxpr import in_transformation, is_traced
from etcompile.integers import positive_integer
from etcompile.keywords import refuse_others
from etcompile.runtime.checks import as_inputs, check_sequence, stacked_steps, steps_of
from etcompile.runtime.gradients import (
    environment_of,
    environments,
    joined_loss,
    sequence_gradients,
    step_gradients,
)
from etcompile.runtime.jitted import Around
from etcompile.runtime.learned_again import LearnedAgain
from etcompile.runtime.losses import JoinedLoss, LossFunction, check_mask
from etcompile.runtime.observing.measures import Measures, Wanted, observation
from etcompile.runtime.observing.observer import Observer, as_observers, observed
from etcompile.runtime.progress import in_pieces, piece_lengths, segment_lengths
from etcompile.runtime.step_data import over_time

if TYPE_CHECKING:
    from rich.progress import Progress

    from etcompile.runtime.checkpoints import Checkpoints
    from etcompile.runtime.model_states import ModelAccess
    from etcompile.runtime.step import Step

__all__ = ["Learner"]

#: Compiled loops kept per learner.
_KEPT = 16

#: Of a loop's data, modulator, mask and environment of a call without any.
_NOTHING_ELSE = None, None, ((), ())


class Learner:
    """Runs sequences through a compiled step and updates its weights every ``update_every`` steps.

    Made by :meth:`Step.learn`. Calling it with ``(xs, *targets)``, time on axis 0, returns the losses of all steps, taken with
    the weights of each moment. Gradients are summed from update to update; a rest that does not fill ``update_every`` steps
    waits for the next call. Model states and traces go on from call to call; ``step.reset()`` starts a new sequence.

    Parameters
    ----------
    step : Step
    loss : LossFunction
        ``loss_fn(out, *targets) -> scalar``, with ``has_aux`` and ``outputs`` of :meth:`Step.learn`: whether it returns
        ``(loss, aux)``, and whether a call returns outputs as well.
    optimizer : optax.GradientTransformation or braintools optimiser
        With ``init(params)`` and ``update(grads, state, params)``; or with ``register_trainable_weights(states)`` and
        ``update(grads)``.
    update_every : int
        Steps between updates. The weights are fixed in between, so these steps run as a chunk where the rule has chunks.

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
    >>> step = etcompile.compile(Net(), jnp.ones((4, 3)), batch_size=4)
    >>> learner = step.learn(lambda out, y: jnp.mean((out - y) ** 2), optax.adam(1e-2))
    >>> learner(jnp.ones((20, 4, 3)), jnp.ones((20, 4, 2))).shape
    (20,)
    """

    def __init__(
        self,
        step: Step,
        loss: LossFunction,
        optimizer: Any,
        update_every: int,
    ) -> None:
        update_every = positive_integer("update_every", update_every)
        self._step = step
        self._loss = loss
        self._every = update_every
        self._update, self._optimizer_states = _update_function(optimizer, step.executor.live)
        zeros = jax.tree.map(jnp.zeros_like, {path: s.value for path, s in step.param_states.items()})
        self._sum = brainstate.ShortTermState(zeros)
        self._count = brainstate.ShortTermState(jnp.zeros((), jnp.int32))
        self._loops: dict[Any, Around] = {}
        self._again: LearnedAgain | None = None

    def __call__(
        self,
        xs: Any,
        *targets: Any,
        modulator: Any = None,
        mask: Any = None,
        progress: bool | Progress = False,
        checkpoints: Checkpoints | None = None,
        callback: Callable[[int, Any], None] | Observer | Sequence[Any] | None = None,
        **others: Any,
    ) -> Any:
        """Losses of all steps, ``(T,)``; the model's parameters and states advance.

        ``t`` and ``i`` of ``brainstate.environ`` around the call are those of its first step, and count up as in
        :meth:`Step.scan_value_and_grad`.

        With ``progress``, ``checkpoints`` or ``callback`` the sequence runs in pieces, each from where the one before stopped, so
        the numbers are those of one call. An interrupted call leaves everything as it was after its last whole piece.

        Parameters
        ----------
        xs, *targets : pytrees of arrays
            Time on axis 0; what is the same at every step in :class:`etcompile.SingleStepData`.
        modulator : pytree of arrays, optional
            For rules that read one: time on axis 0, or a number.
        mask : array, optional
            As for :meth:`Step.scan_value_and_grad`. A masked step gives no gradient; the optimiser updates as ever.
        progress : bool or rich.progress.Progress
            As for :meth:`Step.scan_value_and_grad`.
        checkpoints : Checkpoints, optional
            Steps are counted there, and all is saved whenever the count is a multiple of its ``every``.
        callback : callable, Observer, or several of them, optional
            Told after every piece, about 200 times in a call. A function is called as ``callback(steps, losses)``, with the steps
            of this call so far and the losses of the piece; an :class:`etcompile.Observer` is also told of firing rates and
            gradient norms. Ready to use are :class:`etcompile.Dashboard` and :class:`etcompile.TensorBoard`.

        Returns
        -------
        array or tuple
            The losses; with ``learn(outputs=True)`` and ``learn(has_aux=True)`` a tuple of losses, outputs and aux values,
            as far as asked for, time on axis 0.
        """
        if others:
            known = ("modulator", "mask", "progress", "checkpoints", "callback")
            refuse_others("step.learn(loss_fn, optimizer)", others, known)
        plain = modulator is None and mask is None and progress is False and checkpoints is callback is None
        if plain and (again := self._again) is not None:
            with self._step.executor.turns:
                found = again(self._loss, (xs, targets, *_NOTHING_ELSE))
            if found is not None:
                return self._as_asked(found)
        observers = as_observers(callback, progress)
        with self._step.executor.turns:
            return self._learn(xs, targets, modulator, mask, progress, checkpoints, observers)

    def _learn(
        self,
        xs: Any,
        targets: tuple[Any, ...],
        modulator: Any,
        mask: Any,
        progress: bool | Progress,
        checkpoints: Checkpoints | None,
        observers: tuple[Observer, ...],
    ) -> Any:
        given, self._again = (xs, targets), None
        xs, targets, mask = over_time((xs, targets, mask))
        run = self._step.executor
        xs, targets = stacked_steps(run.model, xs, targets)
        run.refuse_unrecorded((xs, targets))
        run.follow_environment()
        check_sequence(run.model, as_inputs(run.model, xs), targets)
        steps = steps_of(xs)
        mask = check_mask(mask, steps)
        every = jax.tree.map(lambda m: m if jnp.ndim(m) else jnp.full(steps, m), modulator)
        run.place_states()
        run.live.look_up()
        joined = joined_loss(run, self._loss, targets, mask, steps)
        around = environments(run, joined, steps)
        data = run.placement.put_batch((xs, targets, every, mask, around), 1)
        if progress is False and checkpoints is None and not observers:
            found = self._run(joined, Wanted(), *data)
            if self._every == 1 and _as_given(data, (*given, *_NOTHING_ELSE)):
                self._again = run.learned_again(self._loop(self._one, joined, Wanted()), joined, data)
            return self._as_asked(found)
        return self._as_asked(self._in_pieces(joined, data, steps, progress, checkpoints, observers))

    def _in_pieces(
        self,
        joined: JoinedLoss,
        data: tuple[Any, ...],
        steps: int,
        progress: bool | Progress,
        checkpoints: Checkpoints | None,
        observers: tuple[Observer, ...],
    ) -> tuple[Any, ...]:
        if checkpoints is None:
            at, head = 0, self._until_update(steps)
            lengths = piece_lengths(steps - head, self._every) if steps > head else [0]
            lengths[0] += head
        else:
            checkpoints.check_goes_on()
            at = checkpoints.at
            fine = progress is not False or bool(observers)
            lengths = segment_lengths(steps, at, checkpoints.every, fine=fine)
        wanted, done = Wanted.by(observers), 0

        def of_piece(*piece: Any) -> Any:
            nonlocal done
            begun = time.perf_counter()
            found = self._run(joined, wanted, *piece)
            if observers:
                losses, _, measured = jax.block_until_ready(found)
                done += len(losses)
                tell(observation(measured, losses, done, steps, at, time.perf_counter() - begun))
            return found

        def after(steps: int) -> None:
            if checkpoints is not None:
                checkpoints.save(self, checkpoints.at + steps)

        with observed(observers, at, steps) as tell:
            return in_pieces(
                self._step.executor,
                of_piece,
                data,
                lengths,
                progress,
                "learning",
                shown=lambda found: found[0],
                after=after,
            )

    def _as_asked(self, found: tuple[Any, ...]) -> Any:
        losses, extra, _ = found
        asked = [losses]
        if self._loss.outputs:
            asked.append(extra["outputs"])
        if self._loss.has_aux:
            asked.append(extra["aux"])
        return asked[0] if len(asked) == 1 else tuple(asked)

    # -- loops --------------------------------------------------------------------------------------------------

    def _run(self, joined: JoinedLoss, wanted: Wanted, *data: Any) -> tuple[Any, ...]:
        """Losses, what else the loss gave, and what was measured, of all steps."""
        run = self._step.executor
        if in_transformation():
            return self._run_parts(joined, wanted, *data)
        run.carry()  # what is wrong with it is said where a loop that is compiled already would not look
        how = self._run_or_put_back if run.asks_host(joined.program) else self._run_parts
        found = how(joined, wanted, *data)
        run.moved()
        return found

    def _run_or_put_back(self, joined: JoinedLoss, wanted: Wanted, *data: Any) -> tuple[Any, ...]:
        """As :meth:`_run_parts`, of a program that asks the host: it may fail there, when some parts have run.

        Everything is then put back.
        """
        run = self._step.executor
        own = list(self.saved_states().values())
        before = [s.value for s in own]
        try:
            with run.unchanged_on_error():
                return jax.block_until_ready(self._run_parts(joined, wanted, *data))
        except BaseException:
            for state, value in zip(own, before, strict=True):
                state.value = value
            raise

    def _run_parts(self, joined: JoinedLoss, wanted: Wanted, *data: Any) -> tuple[Any, ...]:
        """As :meth:`_run`, one compiled loop after another.

        Between two updates the weights are fixed, so the steps there are one chunk, where the program has chunks and it is known
        now how many steps wait.
        """
        steps = len(jax.tree.leaves(data)[0])
        schedules = self._step.executor.functions.schedules
        if self._every == 1 or is_traced(self._count.value) or any(how.cuts_credit for how in schedules):
            return self._loop(self._one, joined, wanted)(*data)
        head = self._until_update(steps)
        blocks = (steps - head) // self._every
        end = head + blocks * self._every

        def part(start: int, stop: int) -> Any:
            return jax.tree.map(lambda v: v[start:stop], data)

        def block(v: Any) -> Any:
            return v.reshape(blocks, self._every, *v.shape[1:])

        parts = []
        if head:
            parts.append(self._loop(self._one, joined, wanted)(*part(0, head)))
        if blocks:
            found = self._loop(self._block, joined, wanted)(*jax.tree.map(block, part(head, end)))
            parts.append(jax.tree.map(lambda v: v.reshape(blocks * self._every, *v.shape[2:]), found))
        if end < steps:
            parts.append(self._loop(self._one, joined, wanted)(*part(end, steps)))
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *v: jnp.concatenate(v), *parts)

    def _until_update(self, steps: int) -> int:
        """Of these steps those that a waiting sum takes first; none is known of inside of a transformation."""
        waiting = self._count.value
        return 0 if is_traced(waiting) else min(-int(waiting) % self._every, steps)

    def _loop(self, one: Callable, joined: JoinedLoss, wanted: Wanted) -> Around:
        """A compiled loop over ``one``; another one where the compilation, or what the loss closes over or reads, is another."""
        read = Same(joined.environment) if joined.environment.reads else None
        key = (one.__name__, wanted, Same(self._step.executor.compilation), read, *self._loss.key())
        if key not in self._loops:
            while len(self._loops) >= _KEPT:
                self._loops.pop(next(iter(self._loops)))
            self._loops[key] = Around(
                lambda *v: brainstate.transform.for_loop(functools.partial(one, joined, wanted), *v),
                self._step.executor.compilation.constants,
            )
        return self._loops[key]

    def saved_states(self) -> dict[str, Any]:
        """What the learner keeps from call to call beside its step: states of the optimiser, summed gradients."""
        waiting = {} if self._every == 1 else {"sum": self._sum, "count": self._count}
        return {**self._optimizer_states(), **waiting}

    @property
    def step(self) -> Step:
        """The compiled step that learns."""
        return self._step

    @property
    def update_every(self) -> int:
        """Steps between updates."""
        return self._every

    def _one(
        self,
        joined: JoinedLoss,
        wanted: Wanted,
        x: Any,
        targets: tuple[Any, ...],
        modulator: Any,
        mask: Any,
        around: tuple[Any, ...],
    ) -> Any:
        run = self._step.executor
        measures = Measures(wanted, run)
        with environment_of(run, joined, around):
            activity = measures.activity_of_step(as_inputs(run.model, x))
            found, grads = step_gradients(run, self._loss, x, targets, modulator, mask)
        keyed = run.live.by_param_state(grads)
        if self._every == 1:
            norms = measures.norms(keyed, jnp.array(True))
            self._update(_uphill(keyed))
            return found.value, found.aux, {"activity": activity, "norms": norms}
        self._sum.value = jax.tree.map(jnp.add, self._sum.value, keyed)
        self._count.value = (self._count.value + 1) % self._every
        norms = measures.norms(self._sum.value, self._count.value == 0)

        def update() -> None:
            self._update(_uphill(self._sum.value))
            self._sum.value = jax.tree.map(jnp.zeros_like, self._sum.value)

        brainstate.transform.cond(self._count.value == 0, update, lambda: None)
        return found.value, found.aux, {"activity": activity, "norms": norms}

    def _block(
        self,
        joined: JoinedLoss,
        wanted: Wanted,
        xs: Any,
        targets: tuple[Any, ...],
        modulator: Any,
        mask: Any,
        around: tuple[Any, ...],
    ) -> Any:
        """All steps from one update to the next; none waits."""
        run = self._step.executor
        measures = Measures(wanted, run)
        with environment_of(run, joined, around):
            activity = measures.activity_of_steps(as_inputs(run.model, xs), self._every)
            found, grads = sequence_gradients(run, self._loss, xs, targets, modulator, mask)
        keyed = run.live.by_param_state(grads)
        norms = measures.norms(keyed, jnp.array(True))
        self._update(_uphill(keyed))
        every = jnp.arange(self._every)
        of_steps = jax.tree.map(lambda v: jnp.broadcast_to(v, every.shape), norms)
        if norms:
            of_steps["updated"] = every == self._every - 1
        return found.value, found.aux, {"activity": activity, "norms": of_steps}


def _as_given(data: tuple[Any, ...], given: tuple[Any, ...]) -> bool:
    """Whether a loop's data are the very arrays of the call, laid out as they were given."""
    (now, tree), (then, structure) = jax.tree.flatten(data), jax.tree.flatten(given)
    return tree == structure and all(a is b for a, b in zip(now, then, strict=True))


def _uphill(grads: Any) -> Any:
    """Gradients as optimisers take them: JAX's is, by a complex parameter, the conjugate of the way uphill."""
    return jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, grads)


def _update_function(
    optimizer: Any, access: ModelAccess
) -> tuple[Callable[[Any], None], Callable[[], dict[str, Any]]]:
    """One update of the parameters in place, for either kind of optimiser, and what finds the optimiser's states.

    An optimiser of optax sees the tree that ``step.params`` is: masks and labels of parameters have its structure.
    """
    params = access.param_states
    if isinstance(optimizer, type):
        raise OptionError(
            "learn needs an optimiser.",
            got=f"the class {optimizer.__name__}",
            expected="one that is made",
            hint=f"make one: {optimizer.__name__}(1e-3).",
        )
    if hasattr(optimizer, "init") and hasattr(optimizer, "update"):
        as_asked = access.of_param_states
        state = brainstate.ShortTermState(
            optimizer.init(as_asked({path: s.value for path, s in params.items()}))
        )

        def update(grads: Any) -> None:
            values = {path: s.value for path, s in params.items()}
            found, new = _updated(optimizer, as_asked(grads), state.value, as_asked(values))
            changes = access.by_param_state(found)
            for path in params:
                _check_change(path, values[path], changes[path])
            state.value = new
            for path, parameter in params.items():
                parameter.value = jax.tree.map(
                    lambda p, c: p + c.astype(p.dtype), values[path], changes[path]
                )

        return update, lambda: {"optimizer": state}
    if hasattr(optimizer, "register_trainable_weights") and hasattr(optimizer, "update"):
        return _registered(optimizer, params), lambda: dict(_states_within(optimizer, "optimizer", set()))
    raise OptionError(
        "learn needs an optimiser.",
        got=repr(optimizer),
        expected="an optax GradientTransformation (optax.adam(1e-3)) or a braintools optimiser (braintools.optim.Adam(1e-3))",
    )


def _updated(optimizer: Any, grads: Any, state: Any, values: Any) -> tuple[Any, Any]:
    """Changes of the parameters and the optimiser's new state."""
    try:
        return optimizer.update(grads, state, values)
    except TypeError as error:
        if "required keyword-only argument" not in str(error):
            raise
        raise OptionError(
            "the optimiser needs more than gradients and parameters.",
            got=str(error),
            expected="an optimiser whose update takes (grads, state, params)",
            hint="a line search evaluates the loss again, which a step that has been taken cannot do; optax.adam(1e-3), for one, "
            "does without.",
        ) from error


def _check_change(path: str, value: Any, change: Any) -> None:
    """Raise :class:`OptionError` unless an optimiser's change has the shapes of the parameter."""
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(v)] for v in (value, change)]
    if shapes[0] != shapes[1]:
        raise OptionError(
            f"the optimiser's change of parameter {path} does not have its shape.",
            got=str(shapes[1]),
            expected=str(shapes[0]),
        )


def _registered(optimizer: Any, params: dict[str, Any]) -> Callable[[Any], None]:
    """The update of an optimiser that has the parameters registered, under whatever keys."""

    def held() -> Any:
        manager = getattr(optimizer, "param_states", None)
        return {} if manager is None or not hasattr(manager, "to_pytree") else manager.to_pytree()

    def states(tree: Any) -> dict[int, Any]:
        return {id(s): s for s in jax.tree.leaves(tree, is_leaf=_is_state)}

    there = states(held())
    ours = states(params)
    others = [s for i, s in there.items() if i not in ours]
    if others:
        raise OptionError(
            "the optimiser holds parameters that this step does not train.",
            got=f"{len(others)} of {len(there)} registered states",
            expected=f"the parameters of the step: {', '.join(params)}",
            hint="make one optimiser for each model, or leave the registration to learn().",
        )
    missing = {path: s for path, s in params.items() if id(s) not in there}
    if missing:
        optimizer.register_trainable_weights(missing)
    if not states(held()):  # an optimiser of another kind: it takes the keys that it was given
        return optimizer.update

    def update(grads: Any) -> None:
        by_state = {id(s): grads[path] for path, s in params.items()}
        optimizer.update(jax.tree.map(lambda s: by_state[id(s)], held(), is_leaf=_is_state))

    return update


def _is_state(value: Any) -> bool:
    return isinstance(value, brainstate.State)


def _states_within(owner: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """States other than parameters that an optimiser holds: in attributes, lists and dicts, and in its schedules.

    A schedule is no node of brainstate's graph; like the optimiser it has a ``state_dict``.
    """
    if id(owner) in seen:
        return
    seen.add(id(owner))
    if isinstance(owner, brainstate.State):
        if not isinstance(owner, brainstate.ParamState):
            yield path, owner
        return
    if isinstance(owner, dict):
        children = owner.items()
    elif isinstance(owner, (list, tuple)):
        children = enumerate(owner)
    else:
        children = vars(owner).items() if hasattr(owner, "state_dict") else ()
    for name, child in children:
        yield from _states_within(child, f"{path}.{name}", seen)
