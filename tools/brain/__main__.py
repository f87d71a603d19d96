"""``python tools/brain``: a brain of leaky integrate-and-fire neurons in which every synapse learns.

    make brain                      # or make worm, or: python tools/brain [--scale 0.01] [--rules d_rtrl ...] [--out DIR]

A synthetic connectome of the size of a fly brain is fitted to a target rate for each of its regions, online: states and
eligibility traces go on, and the weights change after each window. Each rule runs in a process of its own, for its peak
memory. Written to the output folder: for each rule a picture of the rates before and after, and a JSON file of all numbers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import environment  # noqa: F401
import picture
from connectome import Connectome, fly
from fit import RULES, Settings, fit
from network import Network, Times
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from worm import worm

#: What a synapse adds to a current, in units of the threshold: the worm has few.
GAINS = {"fly": 0.01, "worm": 0.05}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.alone:
        one(options, options.rules[0])
        return 0
    mine = sys.argv[1:] if arguments is None else arguments
    for rule in options.rules:
        command = [sys.executable, str(Path(__file__).parent), *mine, "--rules", rule, "--alone"]
        subprocess.run(command, check=True)
    console = Console()
    if not console.is_terminal:  # in a file a column is not cut for want of room
        console = Console(width=130)
    console.print(table([_load(options, rule) for rule in options.rules]))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python tools/brain", description=description)
    parser.add_argument("--of", choices=("fly", "worm"), default="fly", help="whose brain (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the fly's brain (%(default)s)")
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES), metavar="RULE")
    parser.add_argument("--updates", type=int, default=40, help="changes of the weights (%(default)s)")
    parser.add_argument("--window", type=int, default=50, help="steps before each (%(default)s)")
    parser.add_argument("--settle", type=int, default=500, help="steps of the pictures (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="of Adam (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of connectome, targets and noise (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/brain"), help="folder (%(default)s)")
    parser.add_argument("--alone", action="store_true", help="in this process, the first rule alone")
    return parser.parse_args(arguments)


def one(options: argparse.Namespace, rule: str) -> None:
    """Fit with one rule, and write what was found."""
    settings = Settings(options.updates, options.window, options.settle, options.learning_rate, options.seed)
    times = Times()
    network = Network(_connectome(options), times, GAINS[options.of])
    columns = TextColumn(f"{rule:<8}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    with Progress(*columns, TimeElapsedColumn()) as progress:
        bar = progress.add_task("compiling", total=settings.updates)
        tell = lambda k, loss: progress.update(bar, advance=1, description=f"error {loss:.3f}")  # noqa: E731
        found = fit(network, rule, settings, tell)
    _path(options, rule, "json").write_text(json.dumps(found), encoding="utf-8")
    picture.draw(found, times.step, _path(options, rule, "png"))


def table(found: list[dict[str, Any]]) -> Table:
    first = found[0]
    title = f"{first['neurons']:,} neurons, {first['connections']:,} connections, all of which learn"
    times = ("ms a step", "forward", "ratio")
    memory = ("traces", "run", "predicted", "process")
    shown = Table("rule", "error", *times, *memory, "compile", "first", title=title)
    for f in found:
        ms = f["milliseconds"]
        shown.add_row(
            f["rule"],
            f"{f['losses'][0]:.3f} to {f['losses'][-1]:.3f}",
            f"{ms['learning']:.3g}",
            f"{ms['forward']:.3g}",
            f"{ms['learning'] / ms['forward']:.2f}",
            *(_size(f[name]) for name in ("trace_bytes", "run_bytes", "predicted_bytes", "peak_bytes")),
            f"{f['seconds_to_compile']:.1f} s",
            f"{f['seconds_of_first_call']:.1f} s",
        )
    return shown


def _connectome(options: argparse.Namespace) -> Connectome:
    return worm() if options.of == "worm" else fly(options.scale, options.seed)


def _path(options: argparse.Namespace, rule: str, ending: str) -> Path:
    return options.out / f"{rule}.{ending}"


def _load(options: argparse.Namespace, rule: str) -> dict[str, Any]:
    return json.loads(_path(options, rule, "json").read_text(encoding="utf-8"))


def _size(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e3:,.0f} KB"


if __name__ == "__main__":
    sys.exit(main())
