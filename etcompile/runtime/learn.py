"""Online learning proper: the weights change while the sequence runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import brainstate
import jax
import jax.numpy as jnp

from etcompile.errors import OptionError
from etcompile.runtime.progress import in_pieces, piece_lengths, segment_lengths

if TYPE_CHECKING:
    from rich.progress import Progress

    from etcompile.runtime.checkpoints import Checkpoints
    from etcompile.runtime.step import Step

__all__ = ["Learner"]


class Learner:
    """Runs sequences through a compiled step and updates its weights every ``update_every`` steps.

    Made by :meth:`Step.learn`. Calling it with ``(xs, *targets)``, time on axis 0, returns the losses of all steps, taken with
    the weights of each moment. Gradients are summed from update to update; a rest that does not fill ``update_every`` steps
    waits for the next call. Model states and traces go on from call to call; ``step.reset()`` starts a new sequence.

    Parameters
    ----------
    step : Step
    loss_fn : callable
        ``loss_fn(out, *targets) -> scalar``.
    optimizer : optax.GradientTransformation or braintools optimiser
        With ``init(params)`` and ``update(grads, state, params)``; or with ``register_trainable_weights(states)`` and
        ``update(grads)``.
    update_every : int
        Steps between updates.

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

    def __init__(self, step: Step, loss_fn: Callable, optimizer: Any, update_every: int) -> None:
        if isinstance(update_every, bool) or not isinstance(update_every, int) or update_every < 1:
            raise OptionError(
                "update_every must be a positive integer.", got=repr(update_every), expected="1, 2, ..."
            )
        self._step = step
        self._loss_fn = loss_fn
        self._every = update_every
        self._update, self._optimizer_states = _update_function(optimizer, step.param_states)
        zeros = jax.tree.map(jnp.zeros_like, {path: s.value for path, s in step.param_states.items()})
        self._sum = brainstate.ShortTermState(zeros)
        self._count = brainstate.ShortTermState(jnp.zeros((), jnp.int32))
        self._run: Callable | None = None
        self._made_for: Any = None

    def __call__(
        self,
        xs: Any,
        *targets: Any,
        modulator: Any = None,
        progress: bool | Progress = False,
        checkpoints: Checkpoints | None = None,
    ) -> Any:
        """Losses of all steps, ``(T,)``; the model's parameters and states advance.

        With ``progress`` or ``checkpoints`` the sequence runs in pieces, each from where the one before stopped, so the numbers
        are those of one call. An interrupted call leaves everything as it was after its last whole piece.

        Parameters
        ----------
        xs, *targets : pytrees of arrays
            Time on axis 0.
        modulator : pytree of arrays, optional
            For rules that read one: time on axis 0, or a number.
        progress : bool or rich.progress.Progress
            As for :meth:`Step.scan_value_and_grad`.
        checkpoints : Checkpoints, optional
            Steps are counted there, and all is saved whenever the count is a multiple of its ``every``.
        """
        self._step.check_sequence(xs, targets)
        if self._run is None or self._made_for is not self._step.traces_state:
            self._made_for = self._step.traces_state
            self._run = brainstate.transform.jit(lambda *v: brainstate.transform.for_loop(self._one, *v))
        steps = len(jax.tree.leaves(xs)[0])
        every = jax.tree.map(lambda m: m if jnp.ndim(m) else jnp.full(steps, m), modulator)
        self._step.place_states()
        xs, targets, every = self._step.place_data((xs, targets, every), time=1)
        if progress is False and checkpoints is None:
            return self._run(xs, targets, every)
        if checkpoints is None:
            lengths = piece_lengths(steps)
        else:
            checkpoints.check_goes_on()
            lengths = segment_lengths(steps, checkpoints.at, checkpoints.every, fine=progress is not False)

        def after(steps: int) -> None:
            if checkpoints is not None:
                checkpoints.save(self, checkpoints.at + steps)

        return in_pieces(
            self._step, self._run, (xs, targets, every), lengths, progress, "learning", after=after
        )

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

    def _one(self, x: Any, targets: tuple[Any, ...], modulator: Any) -> Any:
        loss, grads = self._step.value_and_grad(self._loss_fn)(x, *targets, modulator=modulator)
        keyed = self._step.by_param_state(grads)
        if self._every == 1:
            self._update(keyed)
            return loss
        self._sum.value = jax.tree.map(jnp.add, self._sum.value, keyed)
        self._count.value = (self._count.value + 1) % self._every

        def update() -> None:
            self._update(self._sum.value)
            self._sum.value = jax.tree.map(jnp.zeros_like, self._sum.value)

        brainstate.transform.cond(self._count.value == 0, update, lambda: None)
        return loss


def _update_function(
    optimizer: Any, params: dict[str, Any]
) -> tuple[Callable[[Any], None], Callable[[], dict[str, Any]]]:
    """One update of the parameters in place, for either kind of optimiser, and what finds the optimiser's states."""
    if hasattr(optimizer, "init") and hasattr(optimizer, "update"):
        state = brainstate.ShortTermState(optimizer.init({path: s.value for path, s in params.items()}))

        def update(grads: Any) -> None:
            values = {path: s.value for path, s in params.items()}
            changes, state.value = optimizer.update(grads, state.value, values)
            for path, parameter in params.items():
                parameter.value = jax.tree.map(
                    lambda p, c: p + c.astype(p.dtype), values[path], changes[path]
                )

        return update, lambda: {"optimizer": state}
    if hasattr(optimizer, "register_trainable_weights") and hasattr(optimizer, "update"):
        optimizer.register_trainable_weights(params)
        return optimizer.update, lambda: dict(_states_within(optimizer, "optimizer", set()))
    raise OptionError(
        "learn needs an optimiser.",
        got=repr(optimizer),
        expected="an optax GradientTransformation (optax.adam(1e-3)) or a braintools optimiser (braintools.optim.Adam(1e-3))",
    )


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
