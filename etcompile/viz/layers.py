"""Repeated layers are drawn once, with a count.

Layers are told by the user's own names: ``layers.3.weight``, ``h3``, ``blocks[3].w``. Layers in a row are the same where all
that stands in them is, by kind, shape and the way in which gradients are made, and where edges repeat: each layer leads to the
next one (or to all that follow), all read the same, and what follows reads the last one or all. Where layers alternate, several
together repeat.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etcompile.viz.graph import Graph
from etcompile.viz.style import node_style

__all__ = ["FEWEST", "MANY", "collapsed", "layer_of"]

#: Layers that are drawn one by one if there are no more.
FEWEST = 3
#: Nodes of a graph beyond which layers of different sizes are drawn as one, too.
MANY = 24
#: So many layers repeat together at most.
_PERIODS = 3

Layer = tuple[str, int]
Place = Hashable  # of a node in its layer, the same in all layers that repeat


@dataclass(frozen=True)
class _Run:
    """Layers that repeat, each as the nodes at its places."""

    name: str
    layers: tuple[Mapping[Place, Any], ...]


def layer_of(path: str) -> Layer | None:
    """The sequence of layers that a path names, and the number in it; None where it names none.

    Examples
    --------
    >>> layer_of("encoder.layers.3.weight"), layer_of("W12"), layer_of("readout.bias")
    (('encoder.layers.', 3), ('', 12), None)
    """
    found = re.search(r"\d+", path)
    if found is None:
        return None
    before, after = path[: found.start()], path[found.end() :]
    # ``h3`` and ``W3`` are two parts of one layer, ``encoder3.h`` and ``decoder3.h`` parts of two.
    leaf = not re.search(r"[.\[\]/]", after.lstrip("]'\""))
    return (re.sub(r"[^.\[\]/]*$", "", before) if leaf else before), int(found[0])


def collapsed(graph: Graph) -> Graph:
    """The graph with the first of repeated layers in the place of all.

    Its nodes say for how many they stand (``count``), which (``layers``) and how much their traces take in all; edges from a
    layer to the next have the kind ``next``. Cuts hold the names of all that are drawn as one.
    """
    graph = _runs_collapsed(graph, sizes=True)
    return _runs_collapsed(graph, sizes=False) if graph.number_of_nodes() > MANY else graph


def _runs_collapsed(graph: Graph, sizes: bool) -> Graph:
    layers = _layers(graph)
    for prefix in dict.fromkeys(prefix for prefix, _ in layers):
        numbers = sorted(number for at, number in layers if at == prefix)
        places = [_places(graph, layers[prefix, number]) for number in numbers]
        looks = [
            {place: _look(graph.nodes[node], sizes) for place, node in layer.items()} for layer in places
        ]
        for start, stop, period in _repeats(looks):
            for first, last in ((start, stop), (start + period, stop), (start, stop - period)):
                joined = [_merged(places[k : k + period]) for k in range(first, last, period)]
                if len(joined) >= FEWEST and _edges_repeat(graph, joined):
                    name = f"{_named(prefix, numbers[first])} \N{HORIZONTAL ELLIPSIS} {_named(prefix, numbers[last - 1])}"
                    graph = _drawn_once(graph, _Run(name, tuple(joined)))
                    break
    return graph


def _named(prefix: str, number: int) -> str:
    return f"{prefix or 'layer '}{number}{']' * prefix.endswith('[')}"


# Layers ----------------------------------------------------------------------------------------------------------------


def _layers(graph: Graph) -> dict[Layer, list[Any]]:
    """Nodes by layer, as the paths of states and parameters say; what is between them belongs to the layer that it is of."""
    of: dict[Any, Layer] = {}
    for node, data in graph.nodes(data=True):
        if data.get("kind") in ("state", "parameter") and "count" not in data:
            found = {layer_of(str(path)) for path in data.get("parts") or (data.get("label", node),)}
            if len(found) == 1 and (layer := found.pop()) is not None:
                of[node] = layer
    for node in graph:
        # What shared weights make is of the layer that it goes to.
        for near in (_made_of(graph, node), _goes_to(graph, node)):
            found = {of.get(other) for other in near}
            if len(found) == 1 and (layer := found.pop()) is not None:
                of.setdefault(node, layer)
    same = _one_sequence(graph, of)
    members: dict[Layer, list[Any]] = {}
    for node in graph:
        if node in of:
            prefix, number = of[node]
            members.setdefault((same[prefix], number), []).append(node)
    return members


def _one_sequence(graph: Graph, of: Mapping[Any, Layer]) -> dict[str, str]:
    """By prefix, that of the sequence which it is part of: states of one list and weights of another may be one layer."""
    numbers: dict[str, set[int]] = {}
    for prefix, number in of.values():
        numbers.setdefault(prefix, set()).add(number)
    joined: dict[tuple[str, str], set[int]] = {}
    for tail, head in graph.edges():
        (a, k), (b, j) = of.get(tail, ("", None)), of.get(head, ("", None))
        if k == j and k is not None and a != b and numbers[a] == numbers[b]:
            joined.setdefault((a, b), set()).add(k)
    same = {prefix: prefix for prefix in numbers}
    for (a, b), found in joined.items():
        if found == numbers[a]:
            one, other = sorted((same[a], same[b]), key=len)
            same |= {prefix: other for prefix, now in same.items() if now == one}
    return same


def _made_of(graph: Graph, node: Any) -> list[Any]:
    """By which nodes it is told of which layer a node is: an operation by its weights, a spike by what spikes."""
    wanted = {"operation": "weight", "surrogate": "data"}.get(str(graph.nodes[node].get("kind")))
    return [tail for tail, _, kind in graph.in_edges(node, data="kind") if kind == wanted]


def _goes_to(graph: Graph, node: Any) -> list[Any]:
    return [head for _, head, edge in graph.out_edges(node, data="kind") if edge == "immediate"]


def _places(graph: Graph, nodes: Iterable[Any]) -> dict[Place, Any]:
    """Each node of a layer by what it is called in any layer; those without a name of their own by their weights."""
    taken: Counter[Place] = Counter()
    places: dict[Place, Any] = {}
    for node in nodes:
        data = graph.nodes[node]
        names = sorted(map(str, _made_of(graph, node))) or [node]
        place = (data.get("kind"), *(_without_number(str(name)) for name in names))
        taken[place] += 1
        places[place, taken[place]] = node
    return places


def _without_number(path: str) -> str:
    return re.sub(r"\d+", "#", path, count=1)


def _look(data: Mapping, sizes: bool) -> Hashable:
    """What has to be the same at one place of all layers."""
    how = re.sub(r"\bg\d+", "g", str(data.get("how", "")))
    look = (node_style("", data), data.get("primitive"), data.get("dtype"), how)
    size = (data.get("shape"), data.get("trace_bytes"), _types(data))
    return (*look, *size) if sizes else (*look, len(data.get("types") or ()))


def _types(data: Mapping) -> tuple[str, ...]:
    return tuple(map(_without_number, data.get("types") or ()))


def _merged(layers: Sequence[Mapping[Place, Any]]) -> dict[Place, Any]:
    if len(layers) == 1:
        return dict(layers[0])
    return {(k, place): node for k, layer in enumerate(layers) for place, node in layer.items()}


def _repeats(looks: Sequence[Mapping[Place, Hashable]]) -> Iterator[tuple[int, int, int]]:
    """Where layers repeat, ``(start, stop, period)``: the longest of what is left, again and again; short periods first."""
    free = 0
    while len(looks) - free >= FEWEST:
        found = [
            (stop - start, -period, start)
            for period in range(1, _PERIODS + 1)
            for start in range(free, len(looks) - period)
            if (stop := _stop(looks, start, period)) - start >= FEWEST * period
        ]
        if not found:
            return
        length, minus, start = max(found)
        yield start, start + length, -minus
        free = start + length


def _stop(looks: Sequence[Mapping[Place, Hashable]], start: int, period: int) -> int:
    """Behind the last whole period that is like the first."""
    stop = start + period
    while stop + period <= len(looks) and all(looks[stop + k] == looks[start + k] for k in range(period)):
        stop += period
    return stop


# Edges -----------------------------------------------------------------------------------------------------------------


def _edges_repeat(graph: Graph, layers: Sequence[Mapping[Place, Any]]) -> bool:
    """Whether one layer with what goes in and out tells all edges."""
    at = {node: (k, place) for k, layer in enumerate(layers) for place, node in layer.items()}
    between: dict[Hashable, set[tuple[int, int]]] = {}
    entering: dict[Hashable, set[int]] = {}
    leaving: dict[Hashable, set[int]] = {}
    for tail, head, data in graph.edges(data=True):
        kind = (data.get("kind"), data.get("primitive"))
        if tail in at and head in at:
            (k, p), (j, q) = at[tail], at[head]
            between.setdefault((kind, p, q), set()).add((k, j))
        elif head in at:
            entering.setdefault((kind, tail, at[head][1]), set()).add(at[head][0])
        elif tail in at:
            leaving.setdefault((kind, at[tail][1], head), set()).add(at[tail][0])
    count = range(len(layers))
    all_of = set(count)
    pairs = [{(k, j) for k in count for j in count if chosen(k, j)} for chosen in _WAYS]
    return (
        all(set(found) in _unions(pairs) for found in between.values())
        and all(found in (all_of, {0}) for found in entering.values())
        and all(found in (all_of, {len(layers) - 1}) for found in leaving.values())
    )


#: Pairs of layers between which an edge may repeat: in each, from each to the next, to all later ones; and back.
_WAYS = (
    lambda k, j: k == j,
    lambda k, j: j == k + 1,
    lambda k, j: j > k,
    lambda k, j: j == k - 1,
    lambda k, j: j < k,
)


def _unions(pairs: Sequence[set]) -> list[set]:
    """Inside and, or, forward and, or, backward."""
    return [a | b | c for a in (set(), pairs[0]) for b in (set(), *pairs[1:3]) for c in (set(), *pairs[3:])]


def _drawn_once(graph: Graph, run: _Run) -> Graph:
    first, *others = run.layers
    at = {node: (k, place) for k, layer in enumerate(run.layers) for place, node in layer.items()}
    found = graph.copy()
    for layer in others:
        found.remove_nodes_from(layer.values())
    for place, node in first.items():
        found.nodes[node].update(
            _of_all([graph.nodes[layer[place]] for layer in run.layers]), layers=run.name
        )
    for tail, head, data in graph.edges(data=True):
        (k, p), (j, q) = at.get(tail, (None, tail)), at.get(head, (None, head))
        if k is not None and j is not None and k != j:
            kind = "cut" if data.get("kind") == "cut" else "next"
            if {k, j} == {0, 1} and not _has(found, first[p], first[q], kind, data.get("cut")):
                found.add_edge(first[p], first[q], **_edge(data, kind, k, j))
        elif k == len(others) and j is None and not _has(found, first[p], head, data.get("kind")):
            found.add_edge(first[p], head, **data)
    return _cuts_together(graph, found, run, at)


def _edge(data: Mapping, kind: str, k: int, j: int) -> dict[str, Any]:
    return {**data, "kind": kind, "to": "next" if j > k else "one before"}


def _has(graph: Graph, tail: Any, head: Any, kind: object, cut: object = None) -> bool:
    there = graph.get_edge_data(tail, head, default={}).values()
    return any(edge.get("kind") == kind and (cut is None or edge.get("cut") == cut) for edge in there)


def _of_all(nodes: Sequence[Mapping]) -> dict[str, Any]:
    """What is said of a node that stands for several: what is the same of all, bytes in all."""
    about: dict[str, Any] = dict(count=len(nodes), labels=tuple(str(data.get("label", "")) for data in nodes))
    sizes = [data.get("trace_bytes") or 0 for data in nodes]
    about |= dict(trace_bytes=sum(sizes), each=sizes[0] if len(set(sizes)) == 1 else None)
    if len({data.get("how") for data in nodes}) > 1:
        about["how"] = re.sub(r"\bg\d+", "its group", str(nodes[0].get("how")))
    about |= {key: None for key in ("shape", "source") if len({data.get(key) for data in nodes}) > 1}
    return about if len({_types(data) for data in nodes}) == 1 else {**about, "types": ()}


def _cuts_together(graph: Graph, found: Graph, run: _Run, at: Mapping[Any, tuple[int, Place]]) -> Graph:
    """Cuts of the first layer, and those that lead to the second from the first, with the names of those like them."""
    into: dict[int, list[str]] = {}
    for _, head, data in graph.edges(data=True):
        if data.get("kind") == "cut" and head in at:
            names = into.setdefault(at[head][0], [])
            if str(data.get("cut")) not in names:
                names.append(str(data.get("cut")))
    # The k-th cut of each layer is the same cut; the first layer may lack those that come from the one before.
    columns: dict[str, tuple[str, ...]] = {}
    first, *others = (into.get(k, []) for k in range(len(run.layers)))
    for k in range(max(map(len, (first, *others)), default=0)):
        same = tuple(names[k] for names in (first, *others) if k < len(names))
        columns.update(dict.fromkeys(same, same))
    for _, _, data in found.edges(data=True):
        if data.get("kind") == "cut" and str(data.get("cut")) in columns:
            names = columns[str(data["cut"])]
            data.update(cut=names[0], names=names, layers=run.name)
    return found
