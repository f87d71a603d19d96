"""Walks over a graph that meet no more than what they are about, in program order or against it."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from etcompile.frontend.jaxpr import Graph

__all__ = ["BackwardWalk", "ForwardWalk"]


class _Walk:
    """Operations beside variables, each once, in an order in which an operation comes before those that it leads to.

    Variables are added while the walk goes on: those to which an operation leads.
    """

    #: 1 in program order, -1 against it.
    _direction: int

    def __init__(self, graph: Graph, variables: Iterable[int]) -> None:
        self._graph = graph
        self._waiting: list[int] = []
        self._met: set[int] = set()
        for v in variables:
            self.add(v)

    def _beside(self, variable: int) -> Iterable[int]:
        """Numbers of the operations to which a variable leads."""
        raise NotImplementedError

    def add(self, variable: int) -> None:
        for number in self._beside(variable):
            if number not in self._met:
                self._met.add(number)
                heapq.heappush(self._waiting, self._direction * number)

    def __iter__(self) -> Iterator[int]:
        while self._waiting:
            yield self._direction * heapq.heappop(self._waiting)


class BackwardWalk(_Walk):
    """From variables to the operations that make them, last one first: what reads a value is met before what makes it."""

    _direction = -1

    def _beside(self, variable: int) -> Iterable[int]:
        made = self._graph.made_by.get(variable)
        return () if made is None else (made,)


class ForwardWalk(_Walk):
    """From variables to the operations that read them, first one first."""

    _direction = 1

    def _beside(self, variable: int) -> Iterable[int]:
        return self._graph.read_by.get(variable, ())
