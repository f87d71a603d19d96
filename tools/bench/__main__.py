"""``python tools/bench``: measure speed and memory side by side, and write docs/benchmarks.md.

Every case runs in a process of its own, one after the other. Its numbers go to a JSON file beside the page; ``--cases`` measures
some anew, and the page is written from all. ``--quick`` shows that everything runs. ``--kernels`` only tells where the time of
some cases goes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import environment
import page
from cases import CASES, Case
from peers import has_braintrace
from process import fresh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from settings import FULL, QUICK, Settings

COMMAND = "make bench"
#: Kernels of a case that are shown.
_SHOWN = 25


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.kernels:
        return show_kernels(chosen(options.kernels), QUICK if options.quick else FULL)
    where = options.page or environment.ROOT / ("out/bench" if options.quick else "docs") / "benchmarks.md"
    where.parent.mkdir(parents=True, exist_ok=True)
    store = where.with_suffix(".json")
    started = time.perf_counter()
    if not options.page_only:
        settings = dataclasses.replace(
            QUICK if options.quick else FULL, peer=has_braintrace() and not options.alone
        )
        cases = chosen(options.cases)
        run(cases, settings, store, kept(store, settings, cases))
    results = json.loads(store.read_text(encoding="utf-8"))
    text, picture = page.render(results, COMMAND)
    where.write_text(text, encoding="utf-8")
    where.with_suffix(".svg").write_text(picture, encoding="utf-8")
    print(f"{where}, {where.with_suffix('.svg')}, {store}: {time.perf_counter() - started:.0f} seconds")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python tools/bench", description=description)
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="only these, as in 'update-gru*'; others keep their numbers",
    )
    parser.add_argument("--quick", action="store_true", help="everything tiny; the page goes to out/bench/")
    parser.add_argument("--alone", action="store_true", help="without braintrace")
    parser.add_argument(
        "--page-only", action="store_true", help="write the page from what was measured before"
    )
    parser.add_argument(
        "--kernels", nargs="+", metavar="PATTERN", help="show the kernels of these cases by time"
    )
    parser.add_argument("--page", type=Path, help="the page; JSON and picture go beside it")
    return parser.parse_args(arguments)


def chosen(patterns: list[str]) -> list[Case]:
    """The cases whose names match; an error if there are none."""
    found = [case for case in CASES if any(fnmatch(case.name, pattern) for pattern in patterns)]
    if not found:
        names = "\n  ".join(case.name for case in CASES)
        raise SystemExit(f"no case is called {' or '.join(patterns)}; there are:\n  {names}")
    return found


def show_kernels(cases: list[Case], settings: Settings) -> int:
    """Print where the time of each case goes."""
    for case in cases:
        found = fresh("kernels:profile", case=case.to_dict(), settings=dataclasses.asdict(settings))
        if "error" in found:
            raise SystemExit(found["error"])
        table = Table(
            "kernel", "ms per step", "runs per step", title=f"{case.name}: {found['ms']:.3g} ms per step"
        )
        for name, ms, runs in found["kernels"][:_SHOWN]:
            table.add_row(name, f"{ms:.4f}", f"{runs:.3g}")
        Console().print(table)
    return 0


def kept(store: Path, settings: Settings, cases: list[Case]) -> dict[str, Any]:
    """What was measured before and is not measured now; an error if it cannot stand beside new numbers."""
    if len(cases) == len(CASES) or not store.exists():
        return {}
    old = json.loads(store.read_text(encoding="utf-8"))
    if old["settings"] != dataclasses.asdict(settings):
        raise SystemExit(
            f"{store} was measured with other settings: measure all cases, or give another --page."
        )
    return {case.name: old["cases"][case.name] for case in CASES if case.name in old["cases"]}


def same_machine(store: Path, found: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The machine as it was found; on the same one, its rates of the time at which the cases that are kept were measured."""
    if not before:
        return found
    old = json.loads(store.read_text(encoding="utf-8"))["machine"]
    rates = ("flops", "bandwidth")
    same = all(old.get(name) == value for name, value in found.items() if name not in rates)
    return old if same else found


def run(cases: list[Case], settings: Settings, store: Path, before: dict[str, Any]) -> None:
    """Measure the machine and the cases, and save after each."""
    how = dataclasses.asdict(settings)
    results: dict[str, Any] = {"settings": how, "cases": before}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("the machine", total=len(cases) + 1)
        results["machine"] = same_machine(store, fresh("machine:measure_machine", settings=how), before)
        if "error" in results["machine"]:
            raise SystemExit(results["machine"]["error"])
        progress.advance(task)
        for case in cases:
            progress.update(task, description=case.name)
            start = time.perf_counter()
            found = fresh("measure:measure", case=case.to_dict(), settings=how)
            found = {"case": case.to_dict(), "runs": [], **found, "took": time.perf_counter() - start}
            measured = {**results["cases"], case.name: found}
            results["cases"] = {c.name: measured[c.name] for c in CASES if c.name in measured}
            store.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            progress.console.print(f"{case.name:36}{found['took']:6.1f} s  {found.get('error', '')}")
            progress.advance(task)


if __name__ == "__main__":
    raise SystemExit(main())
