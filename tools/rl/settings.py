"""What is learnt by what: tasks with their steps, rules, learning rates and seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from worlds import CartPole, MaskedCartPole, MemoryChain, TMaze

__all__ = ["FULL", "QUICK", "QUICK_TASKS", "RULES", "TASKS", "Protocol", "Task"]


@dataclass(frozen=True)
class Task:
    """An environment, for how many steps of each agent, and what chance comes to."""

    name: str
    title: str
    world: Any
    steps: int
    chance: float
    most: float = 1.0
    #: Further options of ``step.learn_td``.
    options: Mapping[str, Any] = field(default_factory=dict)


#: Rewards at every step add up to values of 50, and what two positions tell of a velocity is small.
_SCALED = {"normalise_observations": True, "scale_rewards": True}

TASKS = {
    t.name: t
    for t in (
        *(
            Task(f"maze-{n}", f"T-maze, corridor {n}", TMaze(n), steps, 0.5)
            for n, steps in ((10, 8_000), (20, 8_000), (40, 24_000))
        ),
        *(
            Task(f"chain-{n}", f"memory chain, {n} steps", MemoryChain(n), 4_000, 0.5)
            for n in (2, 4, 8, 16, 32)
        ),
        Task("cartpole", "CartPole", CartPole(), 40_000, 22.0, 500.0, _SCALED),
        Task("masked-cartpole", "masked CartPole", MaskedCartPole(), 40_000, 22.0, 500.0, _SCALED),
    )
}

#: The rule, and the same network with a rule that keeps no memory: backpropagation truncated to one step.
RULES = {"d_rtrl": "d_rtrl", "one step": "sltt"}


@dataclass(frozen=True)
class Protocol:
    """The same for every cell: all seeds for all rates."""

    rates: tuple[float, ...] = (3e-3, 1e-2)
    seeds: tuple[int, ...] = tuple(range(10))
    agents: int = 8
    gamma: float = 0.98
    lam: float = 0.9
    entropy: float = 0.01
    #: Pieces of a run: bars of the curve, and of the progress.
    pieces: int = 20
    #: Pieces at the end that count.
    last: int = 4
    #: Divides the steps.
    shorter: int = 1

    def steps(self, task: Task) -> int:
        """Steps of one piece."""
        return max(1, task.steps // self.shorter // self.pieces)


FULL = Protocol()
#: One task of each kind: with ``--quick`` most of the time goes to compiling.
QUICK_TASKS = ("maze-10", "chain-8", "masked-cartpole")

#: Little is learnt, but everything runs.
QUICK = dataclasses.replace(FULL, rates=(3e-3,), seeds=(0, 1), agents=4, pieces=5, last=1, shorter=20)
