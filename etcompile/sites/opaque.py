"""Operations with several results: there is no one y to follow, so a weight there has its one-step gradient only."""

from __future__ import annotations

from etcompile.sites.direct import Direct
from etcompile.sites.operation import WeightUse

__all__ = ["Opaque"]


class Opaque(Direct):
    """The weight, used there alone, plays the part of y: its credit comes through all results."""

    name = "opaque"
    closed = False
    traced = False

    @classmethod
    def recognise(cls, use: WeightUse) -> bool:
        return True
