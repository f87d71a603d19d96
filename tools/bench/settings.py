"""How long and how often to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["FULL", "QUICK", "Settings"]


@dataclass(frozen=True)
class Settings:
    """Sequence lengths, repeats, and the size of what the machine is measured with."""

    #: Steps of the sequences, shortest first, and of a long one.
    lengths: Sequence[int] = (200, 500)
    long_steps: int = 5000
    #: Steps of what carries a parameter-shaped trace from step to step: its time per step does not depend on their number.
    slow_steps: int = 50
    #: Steps of models so large that each takes long.
    few_steps: int = 10
    #: Steps that braintrace's window driver handles together: the fastest counts, or all steps. Long ones try the last.
    windows: Sequence[int] = (10, 50)
    #: The same of the program written by hand.
    chunks: Sequence[int] = (100,)
    #: Runs before time is taken: the first compiles, and some libraries compile once more when their states have changed.
    warm_up: int = 2
    #: Each contender runs once a round until it has used its seconds; but at least so many times, unless they take long.
    rounds: int = 9
    least: int = 3
    seconds: float = 1.0
    #: Fresh processes that the time to the first gradient, and that of one call from Python, are taken from.
    processes: int = 3
    #: Bytes of the array that no cache holds, and the side of the matrices for the rate of a large product.
    array: int = 256 << 20
    matrix: int = 2048
    #: Divides the units and channels of all models.
    smaller: int = 1
    #: Whether to measure braintrace as well.
    peer: bool = True

    def units(self, units: int) -> int:
        return max(4, units // self.smaller)


FULL = Settings()
#: Says nothing about speed, but everything runs.
QUICK = Settings(
    lengths=(8, 12),
    long_steps=120,
    slow_steps=6,
    few_steps=3,
    windows=(4,),
    chunks=(4,),
    rounds=2,
    least=1,
    seconds=0.01,
    processes=1,
    array=1 << 20,
    matrix=64,
    smaller=32,
)
