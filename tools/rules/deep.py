"""``python tools/rules/deep.py``: gradients in stacks of two, four and eight layers, and the tables of docs/deep.md.

Every cell, a stack on a task, is one file in the output folder; cells that are there are not measured again, so a run that
was stopped goes on. Rows of the page that the folder has no file for stay. ``--quick`` shows in minutes that everything runs, and
prints the tables.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import deep_page
import environment
from deep_measure import (
    DEPTHS,
    FULL,
    QUICK,
    TASKS,
    TRAINED,
    Cell,
    Protocol,
    Training,
    load,
    measure,
    save,
    train,
)
from rich.progress import Progress
from stacks import KINDS


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not options.page_only:
        run(options, QUICK if options.quick else FULL)
    found = (load(options.out, Cell), load(options.out, Training))
    if options.quick:
        print(deep_page.render("", *found))
        return 0
    text = deep_page.render(options.page.read_text(encoding="utf-8"), *found)
    options.page.write_text(text, encoding="utf-8")
    print(options.page)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python tools/rules/deep.py", description=description)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--depths", nargs="+", type=int, help="all, or 2 with --quick")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--quick", action="store_true", help="few updates, one seed, small, and no page")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument(
        "--page-only", action="store_true", help="write the page from what was measured before"
    )
    parser.add_argument("--out", type=Path, help="folder of results (out/deep, out/deep-quick)")
    parser.add_argument("--page", type=Path, default=environment.ROOT / "docs" / "deep.md")
    options = parser.parse_args(arguments)
    options.depths = options.depths or (DEPTHS[:1] if options.quick else DEPTHS)
    options.out = options.out or Path("out/deep-quick" if options.quick else "out/deep")
    return options


def run(options: argparse.Namespace, protocol: Protocol) -> None:
    """One stack after the other, gradients first, each cell saved at its end."""
    left = [
        (make, kind, depth, tasks)
        for make, what, depths in ((measure, Cell, options.depths), (train, Training, (TRAINED,)))
        for depth in depths
        for kind in options.kinds
        if (tasks := _left(options, what, kind, depth))
    ]
    with Progress(disable=not sys.stdout.isatty()) as shown:
        bar = shown.add_task("stacks", total=sum(len(tasks) for *_, tasks in left))
        for make, kind, depth, tasks in left:
            begun = time.perf_counter()
            for found in make(kind, depth, tasks, protocol, lambda what: shown.update(bar, description=what)):
                save(found, options.out)
                shown.update(bar, advance=1)
                numbers = found.whole if isinstance(found, Cell) else found.accuracies
                told = "  ".join(f"{label} {sum(v) / len(v):.2f}" for label, v in numbers.items())
                took = time.perf_counter() - begun
                print(f"{kind:7}{depth:2} {found.task:7}{told}  {took:.0f} s", flush=True)


def _left(options: argparse.Namespace, what: type[Cell] | type[Training], kind: str, depth: int) -> list[str]:
    """The tasks of a stack that are to be measured."""
    there = {} if options.again else load(options.out, what)
    return [t for t in options.tasks if (kind, depth, t) not in there]


if __name__ == "__main__":
    raise SystemExit(main())
