"""What is measured: each case is one process."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CASES", "LARGE", "MANY_AXES", "TITLES", "Case"]

#: The models, as the page calls them.
TITLES = {
    "gru": "GRU",
    "lstm": "LSTM",
    "spiking": "spiking",
    "conv": "convolutional",
    "sparse": "sparse spiking",
    "seldom": "2 % spiking, of",
    "often": "5 % spiking, of",
    "deep": "40 layers of",
    "populations": "50 populations of",
    "substeps": "1000 sub-steps of",
    "gla": "gated linear attention",
    "mamba": "Mamba-like",
    "delays": "delayed spiking",
}
#: Those whose states have more axes than what a weight makes: an element of its result reaches many of their elements.
MANY_AXES = ("gla", "mamba", "delays")

#: Those whose programs are large.
LARGE = ("deep", "populations", "substeps")


@dataclass(frozen=True)
class Case:
    """A kind of measurement, on one model, with one rule."""

    kind: str
    model: str
    units: int
    batch: int
    rule: str = "d_rtrl"

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.model}{self.units}-b{self.batch}-{self.rule}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_GRUS = [("gru", units, batch) for units in (128, 256, 512) for batch in (1, 8, 16)]
_OTHERS = [("lstm", 256, 8), ("spiking", 512, 8), ("conv", 16, 8)]
_MANY_AXES = [("gla", 32, 8), ("mamba", 64, 8), ("delays", 512, 8)]
#: GRUs beside the other models, where not all sizes are measured.
_SOME = [("gru", 256, 8), ("gru", 256, 16)]

CASES = (
    *(Case("sequence", *one) for one in (*_GRUS, *_OTHERS, ("lstm", 256, 16), ("spiking", 512, 16))),
    *(Case("sequence", *one, rule) for rule in ("pp_prop", "e_prop") for one in (*_SOME, *_OTHERS)),
    *(Case("sequence", *one) for one in _MANY_AXES),
    *(Case("long", *one) for one in (*(gru for gru in _GRUS if gru[2] == 8), *_OTHERS, *_MANY_AXES)),
    *(Case("memory", "gru", 256, 8, rule) for rule in ("d_rtrl", "pp_prop", "e_prop")),
    *(Case("memory", *other) for other in (*_OTHERS, *_MANY_AXES)),
    *(Case("update", *one) for one in (*(gru for gru in _GRUS if gru[2] > 1), *_OTHERS)),
    *(Case("sparse", "sparse", neurons, 1) for neurons in (1_000, 10_000, 100_000)),
    *(
        Case("sparse-events", model, neurons, 1)
        for neurons in (10_000, 100_000)
        for model in ("seldom", "often")
    ),
    Case("first", "gru", 256, 8),
    *(Case("first", model, 16, 4) for model in LARGE),
    *(Case("call", "gru", units, 4) for units in (8, 64)),
)
