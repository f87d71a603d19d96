"""Where a case's time goes: the kernels that XLA made of etcompile's program, as JAX's own profiler sees them."""

from __future__ import annotations

import gzip
import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import ours
from cases import Case
from clock import timed
from models import MODELS, Data
from settings import Settings

__all__ = ["profile"]

#: Events of these names hold others.
_HOLDING = (
    "Thunk",
    "while",
    "call",
    "end: ",
    "Pjit",
    "Python",
    "Common",
    "PjRt",
    "Slinky",
    "$",
    "Execute",
    "TfrtCpu",
)


def profile(
    case: dict[str, Any], settings: dict[str, Any], keep_traces: bool | None = None
) -> dict[str, Any]:
    """Milliseconds of a step, and its kernels, longest first: ``{"ms": ..., "kernels": [[name, ms, runs per step], ...]}``.

    ``keep_traces`` as of ``etcompile.Schedule``; None: as the case has it. Kernels on several threads run side by side, and a
    profiled run takes longer: their sum says nothing.
    """
    one, how = Case(**case), Settings(**settings)
    data = Data(MODELS[one.model], how.units(one.units), one.batch)
    step = ours.compiled(data, one.rule, data.model(), keep_traces)
    steps = how.slow_steps if one.kind == "update" else how.lengths[-1]
    run = ours.updates(step) if one.kind == "update" else ours.sequence(step)
    xs, ys = data.sequence(steps)
    seconds = [timed(lambda: run(xs, ys))[0] for _ in range(1 + how.least)][1:]
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            timed(lambda: run(xs, ys))
        (trace,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in events:
        name = event.get("name", "")
        if event.get("ph") == "X" and not name.startswith(_HOLDING):
            spent[name] += event["dur"]
            count[name] += 1
    kernels = [[name, us / 1e3 / steps, count[name] / steps] for name, us in spent.most_common()]
    return {"ms": 1e3 * statistics.median(seconds) / steps, "kernels": kernels}
