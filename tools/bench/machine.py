"""What the machine can do at most, and what it is: the floor that measured times are held against."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from settings import Settings

__all__ = ["Bandwidth", "describe", "measure_machine"]


class Bandwidth:
    """Runs a jitted, in-place ``a * x + b`` over an array that no cache holds: each element is read and written once."""

    def __init__(self, floats: int) -> None:
        self._array = jnp.ones(floats, jnp.float32)
        self.bytes = 2 * self._array.nbytes
        self._scale = jax.jit(lambda x: 0.5 * x + 0.25, donate_argnums=0)

    def __call__(self) -> jax.Array:
        self._array = self._scale(self._array)
        return self._array


def measure_machine(settings: dict[str, Any]) -> dict[str, Any]:
    """Bytes per second, float32 operations per second, and what the machine is."""
    how = Settings(**settings)
    bandwidth = Bandwidth(how.array)
    side = how.matrix
    a = jnp.ones((side, side), jnp.float32)
    product = partial(jax.jit(jnp.matmul), a, a)
    return {
        "bandwidth": bandwidth.bytes / _best(bandwidth, how),
        "flops": 2 * side**3 / _best(product, how),
        **describe(),
    }


def describe() -> dict[str, Any]:
    """Processor, cores and versions."""
    names = ("jax", "brainstate", "braintrace", "etcompile")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version for name in names if (version := _version(name))},
    }


def _best(run: Callable[[], jax.Array], settings: Settings) -> float:
    """The shortest time of a run: what the machine can do if nothing disturbs it."""
    times = []
    for _ in range(3 + settings.rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times[2:])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
