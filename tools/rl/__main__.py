"""``python tools/rl``: agents learn tasks that need memory, and docs/reinforcement.md gets the figures.

Every cell, a network with a rule on a task, is one file in the output folder; cells that are there are not measured again,
so a run that was stopped goes on. What the page shows of them is kept beside it, in reinforcement.json, and cells that the
folder does not have stay as they were. ``--quick`` shows in minutes that everything runs, and writes elsewhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import environment
import page
from measure import keep, kept, load, measure, save
from models import MODELS
from rich.progress import Progress
from settings import FULL, QUICK, QUICK_TASKS, RULES, TASKS, Protocol


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    protocol = QUICK if options.quick else FULL
    there = {} if options.again else load(options.out)
    cells = [
        (task, model, rule)
        for task in options.tasks
        for model in options.models
        for rule in RULES
        if (task, model, rule) not in there
    ]
    if not options.page_only:
        run(cells, protocol, options.out)
    found = {name: result.cell() for name, result in load(options.out).items()}
    if not options.quick:
        found = kept(options.page.with_suffix(".json")) | found
    text, picture = page.render(options.page.read_text(encoding="utf-8"), found, protocol)
    if options.quick:
        print(text)
        return 0
    keep(found, options.page.with_suffix(".json"))
    options.page.write_text(text, encoding="utf-8")
    options.page.with_suffix(".svg").write_text(picture, encoding="utf-8")
    print(f"{options.page}, {options.page.with_suffix('.svg')}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python tools/rl", description=description)
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASKS), help="all, or with --quick one of each kind"
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--quick", action="store_true", help="few steps and seeds, and no page")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument(
        "--page-only", action="store_true", help="write the page from what was measured before"
    )
    parser.add_argument("--out", type=Path, help="folder of results (out/rl, out/rl-quick)")
    parser.add_argument("--page", type=Path, default=environment.ROOT / "docs" / "reinforcement.md")
    options = parser.parse_args(arguments)
    options.tasks = options.tasks or (QUICK_TASKS if options.quick else TASKS)
    options.out = options.out or Path("out/rl-quick" if options.quick else "out/rl")
    return options


def run(cells: list[tuple[str, str, str]], protocol: Protocol, out: Path) -> None:
    """One cell after the other, each saved at its end."""
    with Progress(disable=not sys.stdout.isatty()) as shown:
        whole = shown.add_task("cells", total=len(cells))
        for task, model, rule in cells:
            begun = time.perf_counter()
            steps = protocol.steps(TASKS[task]) * protocol.pieces
            one = shown.add_task(f"{task} {model} {rule}", total=steps)
            result = measure(
                TASKS[task], model, rule, protocol, lambda n, one=one: shown.update(one, advance=n)
            )
            save(result, out)
            shown.remove_task(one)
            shown.update(whole, advance=1)
            scores = " ".join(f"{s:.3f}" for s in result.scores.mean(axis=1))
            print(f"{task:10} {model:4} {rule:9} {scores}  {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
