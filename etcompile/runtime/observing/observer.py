"""What a run tells while it learns, and who is told."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from etcompile.errors import OptionError

__all__ = ["Observation", "Observer", "as_observers", "observed"]


@dataclasses.dataclass(frozen=True, eq=False)
class Observation:
    """What a piece of a sequence tells: one call of compiled code.

    Attributes
    ----------
    steps, total : int
        Steps of the call so far, and all that it has.
    at : int
        Steps before the call: those that its checkpoints count.
    losses : array, ``(n,)``
        Of the piece's steps.
    seconds : float
        That the piece took; the first of each length is compiled meanwhile.
    activity : mapping of str to float
        By hidden group: mean over steps, units and examples of the absolute value that it shows to the rest of the network.
        For units that spike this is the firing rate, in spikes a step.
    spiking : frozenset of str
        Groups that showed nothing but 0 and 1.
    gradient_norms : mapping of str to array, ``(updates,)``
        By parameter: the Euclidean norm of the gradient that the optimiser was given, at each update of the piece.
    dt : float or None
        Seconds of a step, if ``brainstate.environ`` has a ``dt`` in units of time.
    """

    steps: int
    total: int
    at: int
    losses: np.ndarray
    seconds: float
    activity: Mapping[str, float]
    spiking: frozenset[str]
    gradient_norms: Mapping[str, np.ndarray]
    dt: float | None = None

    @property
    def loss(self) -> float:
        """The mean loss of the piece."""
        return float(np.mean(self.losses))


class Observer:
    """What ``learner(xs, ys, callback=...)`` tells of a run, piece by piece; subclass it, and say what shall be measured.

    Attributes
    ----------
    wants_activity : bool
        Whether :attr:`Observation.activity` shall be measured: the part of the step that makes what groups show, once more.
    wants_gradient_norms : bool
        Whether :attr:`Observation.gradient_norms` shall be.
    draws : bool
        Whether it draws in the terminal in place, so that no progress bar can stand beside it.

    Examples
    --------
    >>> import etcompile
    >>> class Silence(etcompile.Observer):
    ...     wants_activity = True
    ...
    ...     def observe(self, seen):
    ...         for group in seen.spiking:
    ...             if seen.activity[group] == 0:
    ...                 print(f"{group} is silent at step {seen.steps}")
    """

    wants_activity = False
    wants_gradient_norms = False
    draws = False

    def begin(self, at: int, total: int) -> None:
        """A call begins: the steps before it, and those that it has."""

    def observe(self, seen: Observation) -> None:
        """A piece has run."""
        raise NotImplementedError

    def end(self) -> None:
        """The call is over, by an error perhaps."""


@dataclasses.dataclass(eq=False)
class _Told(Observer):
    """A plain function that is told of steps and losses."""

    fn: Callable[..., Any]

    def observe(self, seen: Observation) -> None:
        self.fn(seen.steps, seen.losses)


def as_observers(callback: Any, progress: Any) -> tuple[Observer, ...]:
    """Those of the argument ``callback``: nothing, a function, an observer, or several of these."""
    if callback is None:
        return ()
    several = callback if isinstance(callback, (list, tuple)) else (callback,)
    observers = tuple(map(_as_observer, several))
    drawing = [type(one).__name__ for one in observers if one.draws]
    if len(drawing) + (progress is not False) > 1:
        raise OptionError(
            "the terminal has room for one drawing.",
            got=" and ".join([*drawing, f"progress={progress!r}"] if progress is not False else drawing),
            expected="a dashboard or a progress bar",
            hint="leave out progress=: a dashboard shows how far the run is.",
        )
    return observers


def _as_observer(one: Any) -> Observer:
    if isinstance(one, Observer):
        return one
    if isinstance(one, type) and issubclass(one, Observer):
        raise OptionError(
            "the callback must be an observer.",
            got=f"the class {one.__name__}",
            expected="one that is made",
            hint=f"make one: {one.__name__}(...).",
        )
    if not callable(one):
        raise OptionError(
            "the callback must be a function.",
            got=repr(one),
            expected="callback(steps, losses), an etcompile.Observer, or a list of these",
        )
    return _Told(one)


@contextlib.contextmanager
def observed(observers: Sequence[Observer], at: int, total: int) -> Iterator[Callable[[Observation], None]]:
    """A call that observers are told of; yields the function that tells them. Those that began are told of the end."""
    with contextlib.ExitStack() as stack:
        for one in observers:
            stack.callback(one.end)
            one.begin(at, total)

        def tell(seen: Observation) -> None:
            for one in observers:
                one.observe(seen)

        yield tell
