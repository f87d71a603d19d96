"""Who sends to whom: a synthetic fly brain, and the worm as the package ``cect`` has it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

__all__ = ["Connectome", "fly"]

Array = Any

#: Neurons and connections of the fly brain as models of all of it have them.
NEURONS, CONNECTIONS = 127_400, 14_700_000
REGIONS = 68


@dataclasses.dataclass(frozen=True)
class Connectome:
    """Connections in the order of their receivers.

    Attributes
    ----------
    senders, receivers : array of int, ``[connections]``
    synapses : array of float, ``[connections]``
        How many synapses a connection has.
    signs : array of float, ``[neurons]``
        1 for a neuron that excites, -1 for one that inhibits.
    region : array of int, ``[neurons]``
    """

    senders: Array
    receivers: Array
    synapses: Array
    signs: Array
    region: Array

    @property
    def neurons(self) -> int:
        return len(self.signs)

    @property
    def connections(self) -> int:
        return len(self.senders)

    @property
    def regions(self) -> int:
        return int(self.region.max()) + 1


def fly(scale: float, seed: int) -> Connectome:
    """A synthetic connectome with the sizes of a fly brain's, times ``scale``.

    In- and out-degrees are log-normal, with heavy tails, and correlated, since large neurons have many of both. The synapses of a
    connection are geometric: most have few. A neuron has one sign (Dale's law); three in ten inhibit. Regions differ in size.
    """
    rng = np.random.default_rng(seed)
    neurons, connections = max(REGIONS, round(NEURONS * scale)), round(CONNECTIONS * scale)
    size = rng.lognormal(0.0, 0.7, neurons)
    sends, receives = (size * rng.lognormal(0.0, 0.7, neurons) for _ in range(2))
    in_degree = rng.multinomial(connections, receives / receives.sum())
    receivers = np.repeat(np.arange(neurons, dtype=np.int32), in_degree)
    edges = np.cumsum(sends / sends.sum())
    senders = np.minimum(np.searchsorted(edges, rng.random(connections, np.float32)), neurons - 1)
    return Connectome(
        senders.astype(np.int32),
        receivers,
        rng.geometric(0.3, connections).astype(np.float32),
        np.where(rng.random(neurons) < 0.3, -1.0, 1.0).astype(np.float32),
        _regions(rng, neurons),
    )


def _regions(rng: np.random.Generator, neurons: int) -> Array:
    """Blocks of neurons; none is empty."""
    share = rng.dirichlet(np.full(REGIONS, 3.0))
    counts = 1 + rng.multinomial(neurons - REGIONS, share)
    return np.repeat(np.arange(REGIONS, dtype=np.int32), counts)
