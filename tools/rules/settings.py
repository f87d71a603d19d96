"""What is trained how: tasks with their models and numbers of updates, and the search of the learning rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import brainstate
from models import GRUNet, SpikingNet
from tasks import Copy, DelayedMatch, JapaneseVowels, Sums, Task

__all__ = ["EVERY", "EXPERIMENTS", "FULL", "QUICK", "STREAMS", "Experiment", "Search"]


@dataclass(frozen=True)
class Experiment:
    """A task, a model for it, and how many batches it is trained on."""

    task: Task
    make: Callable[[], brainstate.nn.Module]
    model: str
    updates: int


@dataclass(frozen=True)
class Search:
    """Learning rates that every rule may choose from, the seeds, and how precisely to measure."""

    rates: tuple[float, ...] = (3e-3, 1e-2, 2e-2)
    #: Of every rule in the expected order.
    seeds: tuple[int, ...] = tuple(range(12))
    #: The number of seeds, the first of them, for all other rules.
    few: int = 3
    #: The first seeds, at whose weights gradients are compared.
    points: int = 6
    #: Learning rate and share of the updates by backpropagation that lead to the point where gradients are compared.
    reference_rate: float = 1e-2
    reference_share: float = 0.25
    #: Batches whose gradients are summed before they are compared.
    batches: int = 8
    #: Seconds spent on measuring one rule's time.
    seconds: float = 1.0
    #: Divides the updates.
    shorter: int = 1

    def updates(self, experiment: Experiment) -> int:
        return max(1, experiment.updates // self.shorter)


FULL = Search()
#: Nothing is learnt, but everything runs.
QUICK = dataclasses.replace(
    FULL, rates=(1e-2,), seeds=(0,), few=1, points=1, batches=1, seconds=0.01, shorter=40
)

_COPY, _MATCH, _VOWELS = Copy(16), DelayedMatch(16), JapaneseVowels(10)

EXPERIMENTS = {
    e.task.name: e
    for e in (
        Experiment(_COPY, lambda: GRUNet(_COPY.inputs, 16, _COPY.outputs), "GRU, 16 units", 600),
        Experiment(
            _MATCH,
            lambda: SpikingNet(_MATCH.inputs, 32, _MATCH.outputs),
            "32 adaptive leaky integrate-and-fire neurons, recurrent",
            900,
        ),
        # Without a start that keeps a little, backpropagation finds nothing to hold on to across the silence in some trainings.
        Experiment(
            _VOWELS, lambda: GRUNet(_VOWELS.inputs, 24, _VOWELS.outputs, keep=1.0), "GRU, 24 units", 810
        ),
    )
}

_AT_ONCE, _BACK = Sums(16), Sums(16, back=3)

#: Beside those above, for what the immediate derivative is enough for: without delayed credit, and with an error at every step.
STREAMS = {
    task.name: Experiment(task, lambda: GRUNet(_BACK.inputs, 32, _BACK.outputs), "GRU, 32 units", 600)
    for task in (_AT_ONCE, _BACK)
}
EVERY = {**STREAMS, **EXPERIMENTS}
