"""Walks over a graph that meet no more than what they are about, in program order or against it."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from etcompile.frontend.jaxpr import Graph

__all__ = ["BackwardWalk", "ForwardWalk"]


class BackwardWalk:
    """Operations that make variables, last one first; what reads a value is met before what makes it.

    Variables are added while the walk goes on: those that an operation reads, and from which it goes on.
    """

    def __init__(self, graph: Graph, variables: Iterable[int]) -> None:
        self._made_by = graph.made_by
        self._waiting: list[int] = []
        self._met: set[int] = set()
        for v in variables:
            self.add(v)

    def add(self, variable: int) -> None:
        number = self._made_by.get(variable)
        if number is not None and number not in self._met:
            self._met.add(number)
            heapq.heappush(self._waiting, -number)

    def __iter__(self) -> Iterator[int]:
        while self._waiting:
            yield -heapq.heappop(self._waiting)


class ForwardWalk:
    """Operations that read variables, first one first; variables that they make are added while the walk goes on."""

    def __init__(self, graph: Graph, variables: Iterable[int]) -> None:
        self._read_by = graph.read_by
        self._waiting: list[int] = []
        self._met: set[int] = set()
        for v in variables:
            self.add(v)

    def add(self, variable: int) -> None:
        for number in self._read_by.get(variable, ()):
            if number not in self._met:
                self._met.add(number)
                heapq.heappush(self._waiting, number)

    def __iter__(self) -> Iterator[int]:
        while self._waiting:
            yield heapq.heappop(self._waiting)
