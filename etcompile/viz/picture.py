"""What is drawn, whichever view it is of: nodes in boxes, edges between them, cuts with their numbers."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

__all__ = ["Box", "Cut", "Edge", "Node", "Picture"]


@dataclass(frozen=True)
class Node:
    """A node.

    Attributes
    ----------
    name : hashable
        Edges go by it.
    style : str
        Key into `NODES`.
    head, details : tuple of str
        Lines of its text.
    tip : str
        What is said where one points at it.
    amount : int
        Bytes carried from step to step, drawn as an area; 0 draws none.
    said : str
        The line beside the area.
    box : str
        Name of the innermost box that it stands in, or nothing.
    """

    name: Hashable
    style: str
    head: tuple[str, ...]
    details: tuple[str, ...] = ()
    tip: str = ""
    amount: int = 0
    said: str = ""
    box: str = ""


@dataclass(frozen=True)
class Edge:
    """An edge; ``style`` is a key into `EDGES`.

    One that leads to all nodes of a box ends at its frame, ``into``. One that leads ``back`` does not order what it joins.
    """

    tail: Hashable
    head: Hashable
    style: str
    tip: str = ""
    into: str = ""
    back: bool = False


@dataclass(frozen=True)
class Box:
    """A frame around nodes, ``inside`` of another one or of none; ``style`` is a key into `BOXES`."""

    name: str
    style: str
    head: str
    details: tuple[str, ...] = ()
    inside: str = ""


@dataclass(frozen=True)
class Cut:
    """One cut and the edges of the graph that it stands for.

    Attributes
    ----------
    name : str
        As in the report, for example ``"c0"``.
    primitive, source, meaning : str
        The operation where the local Jacobian stops, the line of the model, what is lost.
    paths : tuple of (str, str)
        Pairs of nodes: where the credit would have come from, and the state it would have reached.
    names : tuple of str
        Itself, and the same cut in the other layers that one is drawn for.
    layers : str
        Those layers, or nothing.
    """

    name: str
    primitive: str = ""
    source: str = ""
    meaning: str = ""
    paths: tuple[tuple[str, str], ...] = ()
    names: tuple[str, ...] = ()
    layers: str = ""


@dataclass(frozen=True)
class Picture:
    """A view, ready to be laid out.

    Boxes stand before those inside of them. Where the drawing is ``narrow``, the legend goes beside it, else below.
    """

    title: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...] = ()
    boxes: tuple[Box, ...] = ()
    cuts: tuple[Cut, ...] = ()
    rankdir: str = "TB"
    narrow: bool = False
