"""Traces written once in some steps beside traces written at every step: ``python tools/bench/write_every.py``.

Whole steps of the benchmark's models with an update of the weights at each, for some numbers of ``Schedule(write_every=)``; and
what ``"auto"`` takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import ours
from clock import shortest
from models import MODELS, Data

import etcompile

__all__ = ["milliseconds"]

_CASES = (
    "gru-256-16",
    "gru-512-8",
    "gru-512-16",
    "gru-1024-8",
    "gru-1024-16",
    "lstm-512-16",
    "spiking-512-8",
    "conv-16-8",
)


def milliseconds(
    model: str, units: int, batch: int, every: Sequence[int], steps: int, rounds: int
) -> tuple[dict[int, float], etcompile.Report]:
    """Of a step with an update, the shortest of some runs, by the steps between two writes; and what the default reports."""
    data = Data(MODELS[model], units, batch)

    def compiled(k: int | str) -> etcompile.Step:
        return ours.compiled(data, "d_rtrl", data.model(), write_every=k)

    learners = {k: ours.updates(compiled(k)) for k in every}
    runs = {k: lambda given, learn=learn: learn(*given) for k, learn in learners.items()}
    seconds = shortest(runs, data.sequence(steps), rounds)
    return {k: 1e3 * s / steps for k, s in seconds.items()}, compiled("auto").report()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tools/bench/write_every.py", description=__doc__)
    parser.add_argument(
        "--cases", nargs="+", default=_CASES, metavar="MODEL-UNITS-BATCH", help=" ".join(_CASES)
    )
    parser.add_argument(
        "--every", nargs="+", type=int, default=[1, 2, 4, 8], help="steps between writes, 1 among them"
    )
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=8, help="runs of each, in turns; the shortest counts")
    options = parser.parse_args()
    for case in options.cases:
        model, units, batch = case.split("-")
        found, report = milliseconds(
            model, int(units), int(batch), options.every, options.steps, options.rounds
        )
        told = ", ".join(f"every {k} {ms:.3g} ms ({found[1] / ms:.2f})" for k, ms in found.items())
        auto = sorted(set(report.written_every.values())) or [1]
        print(
            f"{case}, {report.trace_bytes / 2**20:.3g} MiB: {told}; auto {', '.join(map(str, auto))}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
