"""What a process takes: its peak so far, and by how much it grows at most while something runs."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

__all__ = ["growth", "held", "peak"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak() -> int:
    """The most memory that the process has had, in bytes, since it began or since :func:`growth` was called."""
    return _read("VmHWM")


def held() -> int:
    """Bytes of all of jax's arrays."""
    return sum(v.nbytes for v in jax.live_arrays())


def growth(run: Callable[[], Any]) -> int:
    """Bytes by which the process grows at most while ``run`` runs."""
    gc.collect()
    # What earlier runs left is given back, so that this one must ask for it again; then the peak begins anew.
    ctypes.CDLL(None).malloc_trim(0)
    before = _read("VmRSS")
    _CLEAR.write_text("5", encoding="utf-8")
    result = jax.block_until_ready(run())
    after = _read("VmHWM")
    del result
    return after - before


def _read(name: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines())
    return 1024 * int(lines[name].split()[0])
