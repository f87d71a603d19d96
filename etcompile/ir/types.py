"""The type of a value in a trace program: its kind, whose it is, and its shape. The kinds are in :mod:`etcompile.ir.kinds`."""

from __future__ import annotations

import dataclasses

__all__ = ["Type"]


@dataclasses.dataclass(frozen=True)
class Type:
    """Kind, owner and shape of a value."""

    kind: str
    of: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        dims = ",".join(map(str, self.shape))
        return (
            f"{self.kind} {self.of} {self.dtype}[{dims}]" if self.of else f"{self.kind} {self.dtype}[{dims}]"
        )
