"""Reading what was measured: cases with their runs, medians and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cases import TITLES

__all__ = [
    "ANEW",
    "AUTO",
    "BPTT",
    "BRAINTRACE",
    "CALLS",
    "CAUSAL",
    "CHECKPOINT",
    "DROPPED",
    "EVENTS",
    "FORWARD",
    "HAND",
    "KEPT",
    "WINDOWS",
    "Found",
    "found_cases",
    "label_of",
    "ratio",
]

#: The contenders, as they are called in results: etcompile in chunks and step by step,
AUTO, CAUSAL = "etcompile", "step by step"
#: with traces at the end where it does without, without where it makes them, reset before each sequence, and sparse networks by
#: events,
KEPT, DROPPED, ANEW, EVENTS = "traces kept", "no traces", "reset before each", "by events"
#: braintrace step by step and in windows,
BRAINTRACE, WINDOWS = "braintrace", "braintrace, windows"
#: and what people write themselves.
BPTT, CHECKPOINT, HAND, FORWARD = "bptt", "checkpointed", "by hand", "forward"

#: Calls from Python; beside each the model alone under brainstate's `jit`, and a bare jitted function of the same arguments.
CALLS = {
    who: (f"{who}, brainstate", f"{who}, bare")
    for who in ("step(x)", "value_and_grad(loss)(x, y)", "learn(loss, sgd)(xs, ys)")
}


def ratio(above: float | None, below: float | None) -> float | None:
    """One number over another, if both are there."""
    return above / below if above is not None and below else None


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
        return f"{TITLES[self.model]} {units}"

    @property
    def label(self) -> str:
        return f"{self.title}, batch {self.batch}"

    @property
    def steps(self) -> list[int]:
        """Lengths of sequences of etcompile's runs, shortest first."""
        return sorted({r["steps"] for r in self.data["runs"] if r["who"] in (AUTO, *CALLS)})

    def labelled(self, steps: int) -> str:
        """The label, with the length where there are several."""
        return self.label + (f", {steps} steps" if len(self.steps) > 1 else "")

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

    def fastest_peer(self, steps: int) -> tuple[float | None, int | None]:
        """Milliseconds of one step of braintrace's fastest mode, and the steps of its windows (1: step by step).

        Nothing where its windows were not tried: what is fastest is not known then.
        """
        if not any(r["who"] == WINDOWS and r["steps"] == steps for r in self.data["runs"]):
            return None, None
        one, windows = self.milliseconds(BRAINTRACE), self.milliseconds(WINDOWS, steps)
        found = self.run(WINDOWS, steps)
        if windows is None or found is None or (one is not None and one < windows):
            return one, 1 if one is not None else None
        return windows, found["window"]

    def first_of_peer(self, steps: int) -> float | None:
        """The shortest time of braintrace's modes to a first gradient; nothing where there are windows, untried."""
        times = [self.seconds(who, steps) for who in (BRAINTRACE, WINDOWS)]
        known = [seconds for seconds in times if seconds is not None]
        return min(known) if known and (steps == 1 or times[1] is not None) else None

    def faster(self, steps: int, who: str = AUTO) -> float | None:
        """How many times faster than braintrace's fastest mode, per step."""
        return ratio(self.fastest_peer(steps)[0], self.milliseconds(who, steps))

    def floor(self) -> float | None:
        """Milliseconds that products alone take, and of a step with an update its traces read and written once."""
        products = self.data.get("floor")
        if not products:
            return None
        if self.kind != "update":
            return 1e3 * (products["loop"] + products["time"])
        rate = self.trace_bandwidth
        return 1e3 * (products["loop"] + 2 * self.data["trace_bytes"] / rate) if rate else None

    @property
    def trace_bandwidth(self) -> float | None:
        """Bytes per second over an array of the size of the traces, measured between the runs of this case."""
        values = self.data.get("trace_bandwidth")
        return statistics.median(values) if values else None

    def share(self) -> float | None:
        """The part of that bandwidth that a causal step uses, if it reads and writes each trace element once."""
        ms, rate = self.milliseconds(AUTO), self.trace_bandwidth
        return 2 * self.data["trace_bytes"] / (ms / 1e3) / rate if ms and rate else None

    def growth(self, who: str) -> float | None:
        """By what part the peak of temporary memory grows from the short sequence to the long one."""
        runs = [r for r in self.data["runs"] if r["who"] == who and "error" not in r]
        if len(runs) < 2 or not runs[0]["temporary"]:
            return None
        return runs[-1]["temporary"] / runs[0]["temporary"] - 1

    def errors(self) -> Iterator[tuple[str, str]]:
        """Contenders that failed, and why."""
        if "error" in self.data:
            yield "the case", self.data["error"]
        for r in self.data["runs"]:
            if "error" in r:
                yield r["who"], r["error"]
            yield from ((f"{r['who']} of {k}", why) for k, why in r.get("failed", {}).items())


def found_cases(results: Mapping[str, Any], kind: str, rule: str | None = None) -> list[Found]:
    """The cases of a kind in order of measurement."""
    found = [Found(data) for data in results["cases"].values()]
    return [f for f in found if f.kind == kind and rule in (None, f.rule)]


def label_of(results: Mapping[str, Any]) -> str:
    """What one machine's results are called: make of processor, its family and model if known, and version of JAX."""
    machine = results["machine"]
    make = machine["processor"].replace("(R)", "").split()[0]
    if machine.get("family"):
        make = f"{make} {machine['family']}"
    return f"{make}, JAX {'.'.join(machine['versions']['jax'].split('.')[:2])}"
