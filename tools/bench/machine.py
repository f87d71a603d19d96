"""What the machine can do at most, and what it is: the floor that measured times are held against."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from clock import best
from settings import Settings

from etcompile.lowering.caches import caches

__all__ = ["Bandwidth", "describe", "measure_machine"]

#: Rows, inner and outer size of a product as it stands in a loop over time.
_ROWS = (16, 256, 512)
_RUNS = 10
#: Bytes that a run moves at the least, so that its call costs little beside.
_MOVED = 16 << 20


class Bandwidth:
    """Runs a jitted, in-place ``a * x + b`` over an array of so many bytes, again and again."""

    def __init__(self, size: int) -> None:
        self._array = jnp.ones(max(1, size // 4), jnp.float32)
        times = max(1, _MOVED // (2 * self._array.nbytes))
        self.bytes = 2 * self._array.nbytes * times

        def scale(x: jax.Array) -> jax.Array:
            return (
                jax.lax.fori_loop(0, times, lambda _, x: 0.5 * x + 0.25, x) if times > 1 else 0.5 * x + 0.25
            )

        self._scale = jax.jit(scale, donate_argnums=0)

    def __call__(self) -> jax.Array:
        self._array = self._scale(self._array)
        return self._array


def measure_machine(settings: dict[str, Any]) -> dict[str, Any]:
    """Bytes per second at each level of memory, float32 operations per second, and what the machine is."""
    how = Settings(**settings)
    sizes = {**{f"level {level}": size // 2 for level, size in caches().items()}, "memory": how.array}
    rates = {}
    for name, size in sizes.items():
        bandwidth = Bandwidth(size)
        rates[name] = bandwidth.bytes / best(bandwidth, _RUNS)
    side = how.matrix
    a = jnp.ones((side, side), jnp.float32)
    product = partial(jax.jit(jnp.matmul), a, a)
    rows, inner, outer = _ROWS
    xs, w = jnp.ones((100, rows, inner)), jnp.ones((inner, outer))
    loop = partial(jax.jit(lambda xs, w: jax.lax.scan(lambda _, x: (None, x @ w), None, xs)[1]), xs, w)
    return {
        "memory": rates,
        "flops": 2 * side**3 / best(product, _RUNS),
        "rows": 2 * len(xs) * rows * inner * outer / best(loop, _RUNS),
        **describe(),
    }


def describe() -> dict[str, Any]:
    """Processor, cores, caches and versions; family and model tell processors apart that bear one name, where Linux says them."""
    names = ("jax", "brainstate", "braintrace")
    said = _cpu_info()
    family, model = said.get("cpu family"), said.get("model")
    return {
        "processor": said.get("model name") or platform.processor() or platform.machine(),
        **({"family": f"{family}.{model}"} if family and model else {}),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": {str(level): size for level, size in caches().items()},
        "python": platform.python_version(),
        "versions": {name: version for name in names if (version := _version(name))},
    }


def _cpu_info() -> dict[str, str]:
    """What Linux says of the first core."""
    info = Path("/proc/cpuinfo")
    first = info.read_text(encoding="utf-8").partition("\n\n")[0] if info.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
