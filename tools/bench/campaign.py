"""Measuring: the machine, then case after case, each in a process of its own, saved as soon as it is there."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cases import CASES, Case
from process import fresh
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from settings import Settings
from store import Store

__all__ = ["chosen", "run"]


def chosen(patterns: list[str]) -> list[Case]:
    """The cases whose names match; an error if there are none."""
    found = [case for case in CASES if any(fnmatch(case.name, pattern) for pattern in patterns)]
    if not found:
        names = "\n  ".join(case.name for case in CASES)
        raise SystemExit(f"no case is called {' or '.join(patterns)}; there are:\n  {names}")
    return found


def run(
    cases: list[Case],
    settings: Settings,
    folder: Path,
    anew: bool = False,
    call: Callable[..., dict[str, Any]] = fresh,
) -> Path:
    """Measure the cases with ``call``, keep them beside those of before, and give back their file."""
    how = dataclasses.asdict(settings)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("the machine", total=len(cases) + 1)
        machine = call("machine:measure_machine", settings=how)
        if "error" in machine:
            raise SystemExit(machine["error"])
        store = Store(folder, machine, how, anew)
        progress.advance(task)
        for case in cases:
            progress.update(task, description=case.name)
            start = time.perf_counter()
            found = call("measure:measure", case=case.to_dict(), settings=how)
            day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
            more = {"took": time.perf_counter() - start, "measured": day}
            store.add(case.name, {"case": case.to_dict(), "runs": [], **found, **more})
            progress.console.print(f"{case.name:36}{more['took']:6.1f} s  {found.get('error', '')}")
            progress.advance(task)
    return store.path
