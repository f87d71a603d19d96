"""A run seen in the terminal while it learns."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from etcompile.extras import from_extra
from etcompile.integers import positive_integer
from etcompile.runtime.observing.observer import Observation, Observer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

__all__ = ["Dashboard"]

_BARS = "▁▂▃▄▅▆▇█"

#: Points of a curve.
_WIDTH = 36


class Dashboard(Observer):
    """Loss, firing rates, gradient norms and steps per second, drawn in the terminal by rich while a learner runs.

    The curves are of all calls so far. Used as a context it stays in place from call to call; else each call draws its own.

    Parameters
    ----------
    title : str
    rows : int
        Parameters shown, those with the largest gradients, and groups; of the others their number is said.
    console : rich.console.Console, optional
        Where to draw; by default the standard output.

    Raises
    ------
    DependencyError
        Without rich: ``pip install 'etcompile[train]'``.

    Examples
    --------
    >>> import io, brainstate, etcompile, jax.numpy as jnp, optax
    >>> from rich.console import Console
    >>> step = etcompile.compile(brainstate.nn.GRUCell(3, 5), jnp.ones((4, 3)), batch_size=4)
    >>> learn = step.learn(lambda out, y: jnp.mean((out - y) ** 2), optax.adam(1e-2))
    >>> shown = io.StringIO()
    >>> with etcompile.Dashboard(console=Console(file=shown)) as board:
    ...     for epoch in range(2):
    ...         step.reset()
    ...         losses = learn(jnp.ones((20, 4, 3)), jnp.ones((20, 4, 5)), callback=board)
    >>> "loss" in shown.getvalue() and "steps/s" in shown.getvalue()
    True
    """

    wants_activity = True
    wants_gradient_norms = True
    draws = True

    def __init__(self, title: str = "learning", rows: int = 12, console: Console | None = None) -> None:
        live = from_extra("train", "rich.live", "a dashboard needs rich.")
        self._live_of = lambda: live.Live(self._drawn(), console=console, refresh_per_second=8)
        self._title = title
        self._rows = positive_integer("rows", rows)
        self._live: Any = None
        self._kept_open = False
        self._losses = _Curve()
        self._norms = _Curve()
        self._seen: Observation | None = None
        self._biggest: Mapping[str, float] = {}
        self._done = self._of_call = self._calls = 0
        self._first_bad: int | None = None
        self._since = 0.0
        self._since_steps = 0

    def __enter__(self) -> Dashboard:
        self._kept_open = True
        return self

    def __exit__(self, *error: object) -> None:
        self._kept_open = False
        self._close()

    def begin(self, at: int, total: int) -> None:
        self._calls += 1
        self._of_call = 0
        self._done = max(self._done, at)
        self._since = 0.0
        if self._live is None:
            self._live = self._live_of()
            self._live.start()

    def observe(self, seen: Observation) -> None:
        new, now = seen.steps - self._of_call, time.perf_counter()
        if not self._since:  # the first piece of a call is compiled
            self._since, self._since_steps = now, seen.steps
        self._seen = seen
        self._losses.add(seen.loss, new)
        bad = np.flatnonzero(~np.isfinite(seen.losses))
        if self._first_bad is None and len(bad):
            self._first_bad = self._done + int(bad[0]) + 1
        norms = {path: float(v[-1]) for path, v in seen.gradient_norms.items() if len(v)}
        if norms:
            self._biggest = norms
            self._norms.add(_together(norms), new)
        self._done += new
        self._of_call = seen.steps
        self._live.update(self._drawn())

    def end(self) -> None:
        if not self._kept_open:
            self._close()

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    # -- the drawing --------------------------------------------------------------------------------------------

    def _drawn(self) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.panel import Panel

        if self._seen is None:
            return Panel("waiting for the first piece, which is compiled", title=self._title, box=box.ROUNDED)
        parts: list[Any] = [self._progress(self._seen), self._curves(self._seen)]
        if self._seen.activity:
            parts.append(self._activity(self._seen))
        if self._biggest:
            parts.append(self._gradients())
        if self._first_bad is not None:
            parts.append(f"[bold]the loss is not a finite number since step {self._first_bad:,}[/]")
        return Panel(Group(*parts), title=self._title, box=box.ROUNDED)

    def _progress(self, seen: Observation) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        row = Table.grid(padding=(0, 2))
        row.add_row(
            ProgressBar(total=seen.total, completed=seen.steps, width=30),
            f"{seen.steps:,}/{seen.total:,} steps",
            f"call {self._calls}" if self._calls > 1 else "",
            self._speed(seen),
        )
        return row

    def _speed(self, seen: Observation) -> str:
        steps, seconds = seen.steps - self._since_steps, time.perf_counter() - self._since
        return f"{steps / seconds:,.0f} steps/s" if steps else "compiled"

    def _curves(self, seen: Observation) -> RenderableType:
        table = _table("", "now", "lowest", f"over {self._done:,} steps")
        table.add_row("loss", _number(seen.loss), _number(self._losses.lowest), self._losses.drawn())
        if self._biggest:
            now, lowest = _together(self._biggest), self._norms.lowest
            table.add_row("gradient norm", _number(now), _number(lowest), self._norms.drawn())
        return table

    def _activity(self, seen: Observation) -> RenderableType:
        table = _table("group", "shows", "", "")
        for group in list(seen.activity)[: self._rows]:
            value = seen.activity[group]
            spikes = group in seen.spiking
            rate = f"{value / seen.dt:,.1f} Hz" if spikes and seen.dt else ""
            what = "spikes a step" if spikes else "mean |activity|"
            table.add_row(
                group, _number(value), what, f"{rate}{', silent' if value == 0 else ''}".lstrip(", ")
            )
        return _with_rest(table, len(seen.activity) - self._rows)

    def _gradients(self) -> RenderableType:
        table = _table("gradient of", "norm", "", "")
        largest = sorted(self._biggest, key=lambda path: -_rank(self._biggest[path]))[: self._rows]
        top = max((v for v in self._biggest.values() if math.isfinite(v)), default=0.0)
        for path in (p for p in self._biggest if p in largest):
            value = self._biggest[path]
            share = value / top if top and math.isfinite(value) else 0.0
            table.add_row(path, _number(value), "█" * round(20 * share), "none" if value == 0 else "")
        return _with_rest(table, len(self._biggest) - self._rows)


class _Curve:
    """Means over equal shares of all that was added, drawn with blocks."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, int]] = deque()
        self.lowest = math.inf

    def add(self, value: float, steps: int) -> None:
        self._values.append((value, steps))
        if math.isfinite(value):
            self.lowest = min(self.lowest, value)
        if len(self._values) > 8 * _WIDTH:  # two neighbours become their mean
            pairs = list(self._values)
            self._values = deque(_joined(pairs[k : k + 2]) for k in range(0, len(pairs), 2))

    def drawn(self) -> str:
        parts = np.array_split(np.arange(len(self._values)), min(_WIDTH, max(1, len(self._values))))
        values = list(self._values)
        means = [_joined([values[k] for k in part])[0] for part in parts if len(part)]
        finite = [v for v in means if math.isfinite(v)]
        if not finite:
            return "!" * len(means)
        low, high = min(finite), max(finite)
        return "".join(_block(v, low, high) for v in means)


def _joined(several: list[tuple[float, int]]) -> tuple[float, int]:
    steps = sum(n for _, n in several)
    return sum(v * n for v, n in several) / steps, steps


def _block(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return "!"
    return _BARS[round((value - low) / (high - low) * (len(_BARS) - 1)) if high > low else 0]


def _together(norms: Mapping[str, float]) -> float:
    return math.sqrt(sum(v * v for v in norms.values()))


def _rank(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _number(value: float) -> str:
    return f"{value:.4g}"


def _table(*heads: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for k, head in enumerate(heads):
        table.add_column(head, justify="right" if k in (1,) else "left", no_wrap=True)
    return table


def _with_rest(table: Table, more: int) -> Table:
    if more > 0:
        table.add_row(f"and {more:,} more", "", "", "", style="dim")
    return table
