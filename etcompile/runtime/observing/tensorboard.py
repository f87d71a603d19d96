"""A run written down for TensorBoard."""

from __future__ import annotations

import itertools
import os
from typing import Any

from etcompile.errors import OptionError
from etcompile.extras import from_extra
from etcompile.runtime.observing.observer import Observation, Observer

__all__ = ["TensorBoard"]

_NUMBERS = itertools.count()


class TensorBoard(Observer):
    """Writes loss, firing rates, gradient norms and steps per second where TensorBoard reads them (``tensorboard --logdir``).

    The tags are ``loss``, ``steps_per_second``, ``activity/<group>`` (for units that spike, spikes a step) and
    ``gradient_norm/<parameter>``, the means of each piece. Steps are counted over all calls; with ``checkpoints=`` they are
    those that the checkpoints count, so a run that goes on after a crash goes on in its curves.

    Parameters
    ----------
    logdir : str or path
        A directory of the run.
    first_step : int
        Steps before the first call.
    writer : optional
        One with ``add_scalar(tag, value, step)`` to be used instead, such as a ``tensorboardX.SummaryWriter`` of yours.

    Raises
    ------
    DependencyError
        Without tensorboardX: ``pip install 'etcompile[tensorboard]'``.
    OptionError
        Where neither or both of ``logdir`` and ``writer`` are given.

    Examples
    --------
    >>> import tempfile, brainstate, etcompile, jax.numpy as jnp, optax
    >>> step = etcompile.compile(brainstate.nn.GRUCell(3, 5), jnp.ones((4, 3)), batch_size=4)
    >>> learn = step.learn(lambda out, y: jnp.mean((out - y) ** 2), optax.adam(1e-2))
    >>> with etcompile.TensorBoard(tempfile.mkdtemp()) as board:
    ...     losses = learn(jnp.ones((20, 4, 3)), jnp.ones((20, 4, 5)), callback=board)
    """

    wants_activity = True
    wants_gradient_norms = True

    def __init__(
        self, logdir: str | os.PathLike | None = None, *, first_step: int = 0, writer: Any = None
    ) -> None:
        if (logdir is None) == (writer is None):
            raise OptionError(
                "TensorBoard writes to a directory or by a writer.",
                got="neither" if logdir is None else "both",
                expected="TensorBoard('runs/gru') or TensorBoard(writer=...)",
            )
        self._own = writer is None
        self._writer = _writer(os.fspath(logdir)) if logdir is not None else writer
        self._before = self._done = first_step

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def begin(self, at: int, total: int) -> None:
        self._before = self._done = at or self._done

    def observe(self, seen: Observation) -> None:
        new, first = self._before + seen.steps - self._done, self._done == self._before
        self._done += new
        self._write("loss", seen.loss)
        if not first:  # the first piece of a call may have been compiled meanwhile
            self._write("steps_per_second", new / seen.seconds)
        for group, value in seen.activity.items():
            self._write(f"activity/{group}", value)
        for path, norms in seen.gradient_norms.items():
            if len(norms):
                self._write(f"gradient_norm/{path}", float(norms.mean()))

    def _write(self, tag: str, value: float) -> None:
        self._writer.add_scalar(tag, value, self._done)

    def end(self) -> None:
        if hasattr(self._writer, "flush"):
            self._writer.flush()

    def close(self) -> None:
        """Close the file; a writer that was given stays open."""
        if self._own:
            self._writer.close()


def _writer(logdir: str) -> Any:
    package = from_extra("tensorboard", "tensorboardX", "TensorBoard's files need tensorboardX.")
    # The file's own name has the second: two runs of one second would write over each other.
    return package.SummaryWriter(logdir, filename_suffix=f".{os.getpid()}.{next(_NUMBERS)}")
