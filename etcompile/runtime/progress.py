"""Long sequences in pieces, one call of the compiled program each, with a progress bar beside them.

A piece is a run of the same compiled loop over fewer steps, and what a step leaves behind (states, traces, gradients summed so
far, optimiser) goes from piece to piece as it goes from step to step. So the numbers are those of one call, and nothing has to
call back from the device to Python.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from etcompile.errors import InputError, OptionError
from etcompile.extras import from_extra
from etcompile.frontend.jaxpr import is_traced
from etcompile.lowering.functions import Carry
from etcompile.lowering.losses import Loss, LossValue
from etcompile.runtime.executor import Executor

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = [
    "gradients_in_pieces",
    "in_pieces",
    "piece_lengths",
    "progress_bar",
    "refuse_traced",
    "segment_lengths",
]

Array = Any

#: The bar moves about this often in one call.
_PIECES = 200


def piece_lengths(steps: int, chunk: int = 1) -> list[int]:
    """Lengths of the pieces of a sequence: about 200, of a whole number of chunks; the last takes what remains.

    No piece has a single chunk, unless the sequence has: XLA compiles a loop of one turn as no loop, which may round otherwise.
    A length that divides the sequence is preferred, since another length for the last piece has to be compiled as well.

    Examples
    --------
    >>> from etcompile.runtime.progress import piece_lengths
    >>> piece_lengths(11, chunk=2)
    [4, 7]
    """
    least = max(2, -(-(steps // chunk) // _PIECES))
    chunks = next((n for n in range(least, 2 * least) if steps % (n * chunk) == 0), least)
    return _cut(steps, chunks * chunk)


def _cut(steps: int, length: int) -> list[int]:
    whole = max(1, steps // length)
    return [length] * (whole - 1) + [steps - length * (whole - 1)]


def segment_lengths(steps: int, at: int, every: int, fine: bool) -> list[int]:
    """Lengths of the pieces of a sequence that begins at position ``at`` and stops at every multiple of ``every``.

    Between two stops there are about 20 pieces if ``fine``, one if not. They depend on the stops alone, so that a run that
    goes on from one of them is cut, and compiled, as the run that was never interrupted.

    Examples
    --------
    >>> from etcompile.runtime.progress import segment_lengths
    >>> segment_lengths(25, at=5, every=10, fine=False)
    [5, 10, 10]
    """
    length = max(2, -(-every // 20)) if fine else every
    lengths, end = [], at + steps
    while at < end:
        stop = min(end, at // every * every + every)
        lengths += _cut(stop - at, length)
        at = stop
    return lengths


def in_pieces(
    executor: Executor,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    lengths: Sequence[int],
    progress: bool | Progress,
    title: str,
    shown: Callable[[Any], Array] | None = lambda result: result,
    after: Callable[[int], None] = lambda steps: None,
) -> Any:
    """What ``run(*args)`` returns, called piece by piece: arrays with time on axis 0, joined.

    Parameters
    ----------
    executor : Executor
        What runs.
    run : callable
    args : tuple of pytrees
        Time on axis 0; numbers hold for every step.
    lengths : sequence of int
    progress, title
        As for :func:`progress_bar`.
    shown : callable, optional
        What of a result is one loss per step, to be shown.
    after : callable
        Called after each piece with the number of its steps.

    Raises
    ------
    DependencyError, InputError, OptionError
        Before anything ran.
    """
    _check_progress(progress)
    refuse_traced(
        (args, executor.live.params(), executor.carry()), "running in pieces, for progress or checkpoints,"
    )
    steps = sum(lengths)
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if jnp.ndim(leaf) and jnp.shape(leaf)[0] != steps:
            raise InputError(
                "inputs, targets and modulator differ in length.",
                got=f"{jnp.shape(leaf)[0]} steps at args{jax.tree_util.keystr(path)}, {steps} elsewhere",
                expected="the same number of steps on axis 0",
            )
    parts, start = [], 0
    with progress_bar(progress, steps, title) as advance:
        for length in lengths:
            piece = jax.tree.map(lambda v, a=start, n=length: v[a : a + n] if jnp.ndim(v) else v, args)
            parts.append(jax.block_until_ready(run(*piece)))
            start += length
            after(length)
            advance(length, None if shown is None else float(jnp.mean(shown(parts[-1]))))
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *v: jnp.concatenate(v), *parts)


def gradients_in_pieces(
    executor: Executor,
    key: tuple[Any, ...],
    fn: Callable[..., tuple[LossValue, Any, Carry]],
    chunk: int,
    loss: Loss,
    args: tuple[Any, Any, Any],
    progress: bool | Progress,
    wrote: Callable[[Any], None],
) -> tuple[LossValue, Any]:
    """Losses and summed gradients of ``fn(params, carry, loss, inputs, items, call, sums)`` over a sequence.

    The sums go from piece to piece inside of the loops, so they are added up in the order of one call. States and traces are
    written after every piece, and what the loss carries is given to ``wrote``: an interrupted call leaves them as they were
    after its last whole one.
    """

    def from_piece_to_piece(p: Any, s: Any, t: Any, g: Any, n: Any, i: Any, y: Any, c: Any) -> Any:
        """What is given away comes first and in its order: see :func:`etcompile.runtime.calls.apart`."""
        found, sums, carry = fn(p, Carry(s, t), n, i, y, c, g)
        return carry.traces, sums, carry.states, found

    run = executor.jit(
        (*key, "pieces"),
        from_piece_to_piece,
        donate=(3,) if executor.asks_host(loss.program) else (2, 3),
    )
    sums, now = executor.functions.zero_sums(loss), loss

    def piece(inputs: Any, items: Any, call: Any) -> tuple[Array, Any]:
        nonlocal sums, now
        carry = executor.carry(give_away=True)
        traces, sums, states, found = executor.call(
            run, executor.live.params(), carry.states, carry.traces, sums, now, inputs, items, call, loss=now
        )
        executor.commit(Carry(states, traces))
        wrote(found.carried)
        now = dataclasses.replace(now, carried=found.carried)
        return found.value, found.aux

    steps = jax.tree.leaves(args[0])[0].shape[0]
    lengths = piece_lengths(steps, chunk) if executor.functions.causal.keeps else [steps]
    losses, aux = in_pieces(
        executor, piece, args, lengths, progress, "gradients", shown=lambda found: found[0]
    )
    gradients = executor.jit("gradients", executor.functions.gradients)(executor.live.params(), sums)
    return LossValue(losses, aux, now.carried), gradients


@contextlib.contextmanager
def progress_bar(
    progress: bool | Progress, steps: int, title: str
) -> Iterator[Callable[[int, float | None], None]]:
    """A bar over ``steps`` steps; yields ``advance(steps, loss)``.

    The speed leaves out the first piece, which is compiled.

    Parameters
    ----------
    progress : bool or rich.progress.Progress
        True: a bar of its own, on the terminal. A ``Progress``: a task there, with the fields ``speed`` and ``loss``.
    steps : int
    title : str
    """
    _check_progress(progress)
    if progress is False:
        yield lambda steps, loss: None
        return
    shown = _own_progress() if progress is True else progress
    with shown if progress is True else contextlib.nullcontext():
        task = shown.add_task(title, total=steps, speed="", loss="")
        done, begun, first = 0, 0.0, 0

        def advance(steps: int, loss: float | None) -> None:
            nonlocal done, begun, first
            done += steps
            now = time.perf_counter()
            if not begun:
                begun, first = now, done
            speed = f"{(done - first) / (now - begun):,.0f} steps/s" if done > first else ""
            shown.update(task, advance=steps, speed=speed, loss="" if loss is None else f"loss {loss:.4g}")

        yield advance


def _own_progress() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[loss]}"),
    )


def _check_progress(progress: Any) -> None:
    if progress is False:
        return
    rich = from_extra("train", "rich.progress", "a progress bar needs rich.")
    if progress is not True and not isinstance(progress, rich.Progress):
        raise OptionError(
            "progress must be True, False or a rich.progress.Progress.", got=f"progress={progress!r}"
        )


def refuse_traced(values: Any, what: str) -> None:
    """Raise :class:`OptionError` where ``values`` are tracers: Python sees no numbers of theirs."""
    if any(is_traced(v) for v in jax.tree.leaves(values)):
        raise OptionError(
            f"{what} does not work inside of jit and other transformations.",
            got="traced values",
            expected="a call from plain Python; what it runs is compiled anyway",
            hint="call it outside of them.",
        )
