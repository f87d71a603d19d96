"""What is measured: each case is one process."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """A kind of measurement, on one model, with one rule.

    ``long``: a sequence is measured at the long length as well.
    """

    kind: str
    model: str
    units: int
    batch: int
    rule: str = "d_rtrl"
    long: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.model}{self.units}-b{self.batch}-{self.rule}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_GRUS = [(units, batch) for units in (128, 256, 512) for batch in (1, 8, 16)]
_OTHERS = [("lstm", 256, 8), ("spiking", 512, 8), ("conv", 16, 8)]
#: GRUs beside the other models, where not all sizes are measured.
_SOME = [("gru", 256, 8), ("gru", 256, 16)]

CASES = (
    *(Case("sequence", "gru", units, batch, long=batch == 8) for units, batch in _GRUS),
    *(Case("sequence", *other, long=True) for other in _OTHERS),
    *(Case("sequence", *one, rule) for rule in ("pp_prop", "e_prop") for one in (*_SOME, *_OTHERS)),
    *(Case("memory", "gru", 256, 8, rule) for rule in ("d_rtrl", "pp_prop", "e_prop")),
    *(Case("memory", *other) for other in _OTHERS),
    *(Case("update", "gru", units, batch) for units, batch in _GRUS if batch > 1),
    *(Case("update", *other) for other in _OTHERS),
    Case("first", "gru", 256, 8),
    *(Case("call", "gru", units, 4) for units in (8, 64)),
)
