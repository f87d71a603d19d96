"""Reading what was measured: cases with their runs, medians and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from models import MODELS

__all__ = [
    "AUTO",
    "BPTT",
    "BRAINTRACE",
    "CALLS",
    "CAUSAL",
    "FORWARD",
    "Found",
    "found_cases",
    "median_bandwidth",
]

#: The contenders, as they are called in results.
AUTO, CAUSAL, BPTT, BRAINTRACE, FORWARD = "etcompile", "step by step", "bptt", "braintrace", "forward"

#: Calls from Python; beside each the model alone under brainstate's `jit`, and a bare jitted function of the same arguments.
CALLS = {who: (f"{who}, brainstate", f"{who}, bare") for who in ("step(x)", "value_and_grad(loss)(x, y)")}


@dataclass(frozen=True)
class Found:
    """What was found in one case."""

    data: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return self.data["case"]["kind"]

    @property
    def model(self) -> str:
        return self.data["case"]["model"]

    @property
    def rule(self) -> str:
        return self.data["case"]["rule"]

    @property
    def batch(self) -> int:
        return self.data["case"]["batch"]

    @property
    def title(self) -> str:
        """The model with its size, as measured."""
        units = self.data.get("units", self.data["case"]["units"])
        return f"{MODELS[self.model].title} {units}"

    @property
    def label(self) -> str:
        return f"{self.title}, batch {self.batch}"

    @property
    def steps(self) -> list[int]:
        """Lengths of sequences of etcompile's runs, shortest first."""
        return sorted({r["steps"] for r in self.data["runs"] if r["who"] in (AUTO, *CALLS)})

    def run(self, who: str, steps: int | None = None) -> Mapping[str, Any] | None:
        """The run of a contender, of that length if one is given; None if it was not measured or failed."""
        for r in self.data["runs"]:
            if r["who"] == who and (steps is None or r["steps"] == steps) and "error" not in r:
                return r
        return None

    def milliseconds(self, who: str, steps: int | None = None) -> float | None:
        """The median time of one step."""
        r = self.run(who, steps)
        return 1e3 * statistics.median(r["seconds"]) / r["steps"] if r and r.get("seconds") else None

    def seconds(self, who: str, steps: int) -> float | None:
        """The median time of a whole run."""
        r = self.run(who, steps)
        return statistics.median(r["seconds"]) if r and r.get("seconds") else None

    def errors(self) -> Iterator[tuple[str, str]]:
        """Contenders that failed, and why."""
        if "error" in self.data:
            yield "the case", self.data["error"]
        yield from ((r["who"], r["error"]) for r in self.data["runs"] if "error" in r)


def found_cases(results: Mapping[str, Any], kind: str, rule: str | None = None) -> list[Found]:
    """The cases of a kind in order of measurement."""
    found = [Found(data) for data in results["cases"].values()]
    return [f for f in found if f.kind == kind and rule in (None, f.rule)]


def median_bandwidth(found: Found) -> float | None:
    """Bytes per second, measured between the runs of this case."""
    values = found.data.get("bandwidth")
    return statistics.median(values) if values else None
