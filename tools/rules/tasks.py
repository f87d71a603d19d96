"""Three tasks that need memory, copy after a delay, delayed match to sample, and who said the vowel; and streams of sums.

Every task gives batches of inputs ``(time, batch, inputs)`` and targets ``(time, batch, outputs)``. A target is one-hot where an
answer is asked for and zero elsewhere, so one loss serves all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np

__all__ = ["Batch", "Copy", "DelayedMatch", "JapaneseVowels", "Sums", "Task", "accuracy"]


@dataclass(frozen=True)
class Batch:
    """Inputs (time, batch, inputs) and targets (time, batch, outputs), both float32."""

    inputs: np.ndarray
    targets: np.ndarray


def accuracy(outputs: np.ndarray, targets: np.ndarray) -> float:
    """The share of right answers among those asked for; shapes (time, batch, outputs)."""
    asked = targets.sum(axis=-1) > 0
    return float((outputs.argmax(axis=-1) == targets.argmax(axis=-1))[asked].mean())


@dataclass(frozen=True)
class Task:
    """What all tasks share: sizes, and where training and test batches come from.

    ``train(rng, count, level)`` gives ``count`` batches stacked on axis 0; ``level`` is the difficulty of a curriculum.
    """

    batch_size: int

    name = "task"
    title = "task"
    inputs = 0
    outputs = 0
    #: Difficulty that the first batches have; None without a curriculum.
    first_level: int | None = None

    @property
    def steps(self) -> int:
        raise NotImplementedError

    @property
    def chance(self) -> float:
        raise NotImplementedError

    def train(self, rng: np.random.Generator, count: int, level: int | None = None) -> Batch:
        raise NotImplementedError

    def test(self, rng: np.random.Generator, level: int | None = None) -> Batch:
        """Sequences to measure accuracy on; ``level`` None is the difficulty that accuracy is reported for."""
        raise NotImplementedError

    def _stacked(self, count: int, one: Callable[[], Batch]) -> Batch:
        batches = [one() for _ in range(count)]
        return Batch(np.stack([b.inputs for b in batches]), np.stack([b.targets for b in batches]))


@dataclass(frozen=True)
class Copy(Task):
    """A stream of symbols, one of them marked; at a cue, the marked one is to be named.

    Inputs are one line per symbol, one for the mark and one for the cue. The delay is the number of steps between mark and cue,
    each with another symbol, to be ignored: what to keep must be told from what to drop, long before the answer. All sequences
    are as long as the longest delay makes them: with a shorter one the mark comes later, and the answer always falls on the last
    step. The level of the curriculum is the longest delay of the moment; training batches take delays from 1 up to it. Tests have
    delays 1, 2, 4 and so on, equally often.
    """

    symbols: int = 4
    longest: int = 64
    #: Test sequences of each delay.
    repeats: int = 32

    name = "copy"
    title = "copy after a delay"
    first_level: int | None = 1

    @property
    def inputs(self) -> int:
        return self.symbols + 2

    @property
    def outputs(self) -> int:
        return self.symbols

    @property
    def steps(self) -> int:
        return self.longest + 2

    @property
    def chance(self) -> float:
        return 1.0 / self.symbols

    @property
    def delays(self) -> list[int]:
        """The delays of a test: 1, 2, 4 and so on."""
        return [2**k for k in range(self.longest.bit_length())]

    def sample(self, rng: np.random.Generator, size: int, delay: int) -> Batch:
        """Sequences with one delay, the steps between the mark and the cue."""
        marked = self.longest - delay
        stream = np.eye(self.symbols, dtype=np.float32)[
            rng.integers(self.symbols, size=(self.steps - 1, size))
        ]
        inputs = np.zeros((self.steps, size, self.inputs), np.float32)
        targets = np.zeros((self.steps, size, self.outputs), np.float32)
        inputs[:-1, :, : self.symbols] = stream
        inputs[marked, :, -2] = 1.0
        inputs[-1, :, -1] = 1.0
        targets[-1] = stream[marked]
        return Batch(inputs, targets)

    def train(self, rng: np.random.Generator, count: int, level: int | None = None) -> Batch:
        longest = self.longest if level is None else level
        return self._stacked(
            count, lambda: self.sample(rng, self.batch_size, int(rng.integers(1, longest + 1)))
        )

    def test(self, rng: np.random.Generator, level: int | None = None) -> Batch:
        delays = self.delays
        if level is not None:
            return self.sample(rng, self.repeats * len(delays), level)
        each = [self.sample(rng, self.repeats, delay) for delay in delays]
        return Batch(
            np.concatenate([b.inputs for b in each], axis=1),
            np.concatenate([b.targets for b in each], axis=1),
        )


@dataclass(frozen=True)
class DelayedMatch(Task):
    """Two cues with a delay between them, and the question whether they were the same.

    Each cue drives half of the input lines at random times (a spike with probability ``rate`` per step); between cues all lines
    are quiet but for noise (``noise``). The last line is on while the answer is asked for. Each cue alone says nothing.
    """

    lines: int = 8
    cue: int = 4
    delay: int = 8
    answer: int = 4
    rate: float = 0.7
    noise: float = 0.02

    name = "match"
    title = "delayed match to sample"
    outputs = 2

    @property
    def inputs(self) -> int:
        return self.lines + 1

    @property
    def steps(self) -> int:
        return 2 * self.cue + self.delay + self.answer

    @property
    def chance(self) -> float:
        return 0.5

    def sample(self, rng: np.random.Generator, size: int) -> Batch:
        first, second = rng.integers(2, size=(2, size))
        probability = np.full((self.steps, size, self.lines), self.noise)
        half = np.arange(self.lines) * 2 // self.lines
        for cue, start in ((first, 0), (second, self.cue + self.delay)):
            probability[start : start + self.cue] = np.where(half == cue[:, None], self.rate, self.noise)
        inputs = np.zeros((self.steps, size, self.inputs), np.float32)
        inputs[..., :-1] = rng.random(probability.shape) < probability
        inputs[-self.answer :, :, -1] = 1.0
        targets = np.zeros((self.steps, size, 2), np.float32)
        targets[-self.answer :] = np.eye(2, dtype=np.float32)[(first == second).astype(int)]
        return Batch(inputs, targets)

    def train(self, rng: np.random.Generator, count: int, level: int | None = None) -> Batch:
        return self._stacked(count, lambda: self.sample(rng, self.batch_size))

    def test(self, rng: np.random.Generator, level: int | None = None) -> Batch:
        return self.sample(rng, 512)


@dataclass(frozen=True)
class Sums(Task):
    """Two streams of digits; at every step their sum is to be named, modulo the number of symbols.

    The digit of the first stream is that of ``back`` steps ago. With 0 nothing has to be remembered, and the credit of an answer
    belongs to the step that it is given in; with more the digits must be kept, and an error comes at every step.
    """

    symbols: int = 4
    back: int = 0
    length: int = 30

    @property
    def steps(self) -> int:
        return self.length

    @property
    def name(self) -> str:
        return f"sums-{self.back}"

    @property
    def title(self) -> str:
        return f"sums, {self.back} back" if self.back else "sums at once"

    @property
    def inputs(self) -> int:
        return 2 * self.symbols

    @property
    def outputs(self) -> int:
        return self.symbols

    @property
    def chance(self) -> float:
        return 1.0 / self.symbols

    def sample(self, rng: np.random.Generator, size: int) -> Batch:
        first, second = rng.integers(self.symbols, size=(2, self.steps, size))
        digits = np.eye(self.symbols, dtype=np.float32)
        inputs = np.concatenate([digits[first], digits[second]], axis=-1)
        targets = digits[(np.roll(first, self.back, axis=0) + second) % self.symbols]
        targets[: self.back] = 0.0
        return Batch(inputs, targets)

    def train(self, rng: np.random.Generator, count: int, level: int | None = None) -> Batch:
        return self._stacked(count, lambda: self.sample(rng, self.batch_size))

    def test(self, rng: np.random.Generator, level: int | None = None) -> Batch:
        return self.sample(rng, 128)


@dataclass(frozen=True)
class Recordings:
    """Series (count, time, channels), left-aligned and zero-padded, their lengths and their speakers 0 .. 8."""

    series: np.ndarray
    lengths: np.ndarray
    speakers: np.ndarray


@dataclass(frozen=True)
class JapaneseVowels(Task):
    """Nine speakers say a vowel; who was it? Recordings of 7 to 29 frames, answered some silent frames after the longest.

    Twelve coefficients of linear prediction per frame and a line that is on while the recording lasts. The data come with the
    package aeon, in the split of their authors: 270 recordings to train on, 370 to test on. M. Kudo, J. Toyama and M.
    Shimbo, "Multidimensional curve classification using passing-through regions", Pattern Recognition Letters 20, 1999.
    """

    name = "vowels"
    title = "Japanese vowels"
    silence: int = 10

    inputs = 13
    outputs = 9
    frames = 29

    @property
    def steps(self) -> int:
        return self.frames + self.silence

    @property
    def chance(self) -> float:
        """The share of the most frequent speaker in the test set."""
        speakers = self.recordings("TEST").speakers
        return float(np.bincount(speakers).max() / len(speakers))

    def recordings(self, split: str) -> Recordings:
        return _recordings(split)

    def batch(self, recordings: Recordings, chosen: np.ndarray) -> Batch:
        inputs = np.zeros((self.steps, len(chosen), self.inputs), np.float32)
        inputs[: self.frames, :, :-1] = recordings.series[chosen].swapaxes(0, 1)
        inputs[: self.frames, :, -1] = np.arange(self.frames)[:, None] < recordings.lengths[chosen]
        targets = np.zeros((self.steps, len(chosen), self.outputs), np.float32)
        targets[-1] = np.eye(self.outputs, dtype=np.float32)[recordings.speakers[chosen]]
        return Batch(inputs, targets)

    def train(self, rng: np.random.Generator, count: int, level: int | None = None) -> Batch:
        recordings = self.recordings("TRAIN")
        per_epoch = len(recordings.speakers) // self.batch_size
        order = np.concatenate(
            [
                rng.permutation(len(recordings.speakers))[: per_epoch * self.batch_size]
                for _ in range(-(-count // per_epoch))
            ]
        ).reshape(-1, self.batch_size)[:count]
        batches = iter(order)
        return self._stacked(count, lambda: self.batch(recordings, next(batches)))

    def test(self, rng: np.random.Generator, level: int | None = None) -> Batch:
        recordings = self.recordings("TEST")
        return self.batch(recordings, np.arange(len(recordings.speakers)))


@lru_cache
def _recordings(split: str) -> Recordings:
    # Read from the files inside the package; its annotations do not know that two values come back.
    load: Any = import_module("aeon.datasets").load_japanese_vowels
    series, labels = load(split=split)
    padded = np.zeros((len(series), JapaneseVowels.frames, 12), np.float32)
    for row, one in zip(padded, series, strict=True):
        row[: one.shape[1]] = one.T
    lengths = np.array([one.shape[1] for one in series])
    return Recordings(padded, lengths, np.asarray(labels).astype(int) - 1)
