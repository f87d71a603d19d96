"""Does the order that the field expects come out? A check of each pair of neighbours in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

__all__ = ["SURE", "Pair", "check"]

#: A difference counts when it is larger than so many of its standard errors.
SURE = 2.0


@dataclass(frozen=True)
class Pair:
    """Two neighbours of the expected order, and how far the upper one is above the lower one."""

    upper: str
    lower: str
    difference: float
    #: Standard error of the difference.
    error: float

    @property
    def verdict(self) -> str:
        """``holds``, ``not separated`` or ``reversed``."""
        if abs(self.difference) <= SURE * self.error or self.difference == 0.0:
            return "not separated"
        return "holds" if self.difference > 0 else "reversed"


def check(order: Sequence[Sequence[str]], found: Mapping[str, Sequence[float]]) -> list[Pair]:
    """Every pair of neighbours in ``order``, rungs of a ladder from best to worst.

    ``found`` has one number per seed for each name. Seeds are the same for every rule, and so are their weights and data: the
    difference is taken seed by seed. A name with a single number, such as chance, is compared with the mean of the other.
    Names that were not measured are left out, and so are those with one seed above: their error is not known.
    """
    known = [[name for name in rung if found.get(name)] for rung in order]
    return [
        _pair(upper, lower, found)
        for above, below in pairwise(known)
        for upper in above
        for lower in below
        if len(found[upper]) > 1
    ]


def _pair(upper: str, lower: str, found: Mapping[str, Sequence[float]]) -> Pair:
    above, below = np.asarray(found[upper]), np.asarray(found[lower])
    shared = len(above) if len(below) == 1 else min(len(above), len(below))
    each = above[:shared] - (below if len(below) == 1 else below[:shared])
    return Pair(upper, lower, float(each.mean()), float(each.std(ddof=1) / shared**0.5))
