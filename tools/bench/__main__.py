"""``python tools/bench``: measure speed and memory side by side, and write docs/benchmarks.md.

Every case runs in a process of its own, one after the other. Its numbers go to the JSON file of this make of processor and this
version of JAX, in the folder beside the page; ``--cases`` measures some anew, and the page is written from all files. ``--quick``
shows that everything runs. ``--kernels`` only tells where the time of some cases goes.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import environment
import page
from campaign import chosen, run
from cases import Case
from chart import chart
from process import fresh
from rich.console import Console
from rich.table import Table
from settings import FULL, QUICK, Settings
from store import read_all

COMMAND = "make bench"
#: Kernels of a case that are shown.
_SHOWN = 25


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    peer = environment.has_braintrace() and not options.alone
    settings = dataclasses.replace(QUICK if options.quick else FULL, peer=peer)
    if options.kernels:
        return show_kernels(chosen(options.kernels), settings, False if options.no_traces else None)
    where = options.page or environment.ROOT / ("out/bench" if options.quick else "docs") / "benchmarks.md"
    started = time.perf_counter()
    if not options.page_only:
        run(chosen(options.cases), settings, where.with_suffix(""), options.anew)
    everything = read_all(where.with_suffix(""))
    where.write_text(page.render(everything, COMMAND), encoding="utf-8")
    where.with_suffix(".svg").write_text(chart(everything[0]), encoding="utf-8")
    print(f"{where}, {where.with_suffix('.svg')}: {time.perf_counter() - started:.0f} seconds")
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
    parser.add_argument("--anew", action="store_true", help="forget what this machine measured before")
    parser.add_argument(
        "--page-only", action="store_true", help="write the page from what was measured before"
    )
    parser.add_argument(
        "--kernels", nargs="+", metavar="PATTERN", help="show the kernels of these cases by time"
    )
    parser.add_argument(
        "--no-traces", action="store_true", help="with --kernels: of sequences that leave no traces"
    )
    parser.add_argument("--page", type=Path, help="the page; JSON files and picture go beside it")
    return parser.parse_args(arguments)


def show_kernels(cases: list[Case], settings: Settings, keep_traces: bool | None) -> int:
    """Print where the time of each case goes."""
    for case in cases:
        found = fresh(
            "kernels:profile",
            case=case.to_dict(),
            settings=dataclasses.asdict(settings),
            keep_traces=keep_traces,
        )
        if "error" in found:
            raise SystemExit(found["error"])
        table = Table(
            "kernel", "ms per step", "runs per step", title=f"{case.name}: {found['ms']:.3g} ms per step"
        )
        for name, ms, runs in found["kernels"][:_SHOWN]:
            table.add_row(name, f"{ms:.4f}", f"{runs:.3g}")
        Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
