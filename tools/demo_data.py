"""Scikit-learn's handwritten digits, read row by row: eight steps of eight pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

STEPS = 8
PIXELS = 8
CLASSES = 10


@dataclass(frozen=True)
class Digits:
    """Images of shape (examples, time, pixels) between 0 and 1, and their labels."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@dataclass(frozen=True)
class Batch:
    """What a network sees at every step; time is axis 0."""

    pixels: np.ndarray  # (time, batch, pixels)
    labels: np.ndarray  # (time, batch)
    weights: np.ndarray  # (time,)


#: No answer is asked for in the upper half of an image; afterwards every step counts the same.
LOSS_WEIGHTS = np.repeat(np.array([0.0, 0.25], np.float32), STEPS // 2)


def load(split_seed: int = 0) -> Digits:
    """Three quarters to train on, one quarter to test on."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=0.25, random_state=split_seed, stratify=digits.target
    )
    return Digits(train_images, train_labels, test_images, test_labels)


def batches(digits: Digits, rng: np.random.Generator, size: int, noise: float) -> Iterator[Batch]:
    """One pass over the training images in random order, with fresh pixel noise.

    The noise keeps a network of this size from learning the 1347 images by heart.
    """
    order = rng.permutation(len(digits.train_labels))
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        images = digits.train_images[chosen]
        images = images + noise * rng.standard_normal(images.shape, dtype=np.float32)
        labels = np.broadcast_to(digits.train_labels[chosen], (STEPS, size))
        yield Batch(np.swapaxes(images, 0, 1), labels, LOSS_WEIGHTS)


def batches_per_epoch(digits: Digits, size: int) -> int:
    return len(digits.train_labels) // size
