"""``python tools/rules``: train every learning rule on three tasks, and write docs/rules.md.

Results are kept in the output folder, one file for each rule and task; ``--tasks`` and ``--rules`` measure some anew. The page
is written from all, and keeps its rows of what the folder does not have. ``--quick`` shows in minutes that every rule runs, on
the shortest tasks, and writes to out/rules-quick.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import environment
import page
from measure import Result, load, measure, save
from settings import EVERY, EXPERIMENTS, FULL, QUICK, STREAMS, Search
from table import CLAIM, ENTRIES, RULES, Entry

COMMAND = "make rules"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    search = QUICK if options.quick else FULL
    started = time.perf_counter()
    written = [f.read_text(encoding="utf-8") if f.exists() else "" for f in _files(options.page)]
    if not options.page_only:
        cells = [
            (task, entry)
            for entry in ENTRIES
            for task in options.tasks
            if entry.label in options.rules and ((task in EXPERIMENTS and entry in RULES) or entry in CLAIM)
        ]
        first = [c for c in cells if not c[1].rate_of]
        for part in (first, [c for c in cells if c[1].rate_of]):
            run(part, search, options.jobs, options.out, page.rates(written[0]))
    results = load(options.out)
    text, picture = page.render(results, search, COMMAND, *written)
    for file, content in zip(_files(options.page), (text, picture), strict=True):
        file.write_text(content, encoding="utf-8")
    print(f"{', '.join(map(str, _files(options.page)))}: {time.perf_counter() - started:.0f} seconds")
    return 0


def _files(page: Path) -> tuple[Path, Path]:
    """The page and its picture."""
    return page, page.with_suffix(".svg")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python tools/rules", description=description)
    labels = [e.label for e in ENTRIES]
    parser.add_argument("--tasks", nargs="+", choices=list(EVERY), help="(all; match and sums if quick)")
    parser.add_argument("--rules", nargs="+", choices=labels, default=labels, metavar="RULE")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few updates of everything on the shortest tasks, in out/rules-quick",
    )
    parser.add_argument(
        "--page-only", action="store_true", help="write the page from what was measured before"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder of results (out/rules)")
    parser.add_argument("--page", type=Path, help="(docs/rules.md)")
    options = parser.parse_args(arguments)
    options.tasks = options.tasks or [
        *(STREAMS if options.quick else EXPERIMENTS),
        *(["match"] if options.quick else STREAMS),
    ]
    options.out = options.out or Path("out/rules-quick" if options.quick else "out/rules")
    options.page = options.page or (options.out if options.quick else environment.ROOT / "docs") / "rules.md"
    return options


def run(
    cells: Iterable[tuple[str, Entry]],
    search: Search,
    jobs: int,
    out: Path,
    earlier: Mapping[tuple[str, str], float],
) -> None:
    """Measure, each in one of several processes, and save what came out; ``earlier`` are rates chosen before."""
    known = {**earlier, **{cell: r.rate for cell, r in load(out).items() if r.rate}}
    work = [(task, e.label, search, known.get((task, e.rate_of))) for task, e in cells]
    if jobs == 1:
        for item in work:
            tell(measure(*item), out)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(measure, *item) for item in work]):
            tell(future.result(), out)


def tell(result: Result, out: Path) -> None:
    save(result, out)
    numbers = " ".join(f"{a:.2f}" for a in result.accuracies)
    print(f"{result.task:8}{result.label:20}{numbers or result.note}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
