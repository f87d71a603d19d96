"""Peak memory of a run: what XLA says, and what the process took."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

__all__ = ["resident_growth", "temporary"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def temporary(lowered: Any) -> int:
    """Bytes of a compiled function beside its inputs and outputs."""
    return int(lowered.compile().memory_analysis().temp_size_in_bytes)


def resident_growth(run: Callable[[], Any]) -> int | None:
    """Bytes by which the process grows at most while ``run`` runs; None where the system does not tell.

    Its result counts. ``run`` must have run before: its compilation does not count.
    """
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(
            0
        )  # Give back what earlier runs left, so that this one must ask for it again.
        _CLEAR.write_text("5", encoding="utf-8")  # The peak begins here.
        before = _read("VmRSS")
        result = jax.block_until_ready(run())
        after = _read("VmHWM")
        del result
        return after - before
    except (OSError, AttributeError, KeyError):
        return None


def _read(name: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines())
    return 1024 * int(lines[name].split()[0])
