"""Traces of a relation whose f, or D and f, are constant, written entry by entry as filters of presynaptic values.

The solver of :mod:`etcompile.passes.optimise.collapse_constant_decay`. All elements that share a response of the header share
an entry, one for each state of the group; what an equation says of an entry is a sum of scaled entries and presynaptic values:

    e_t[k] = Σ_j D[k, j] e_{t-1}[j] + f[k] x_t

Where the header knows some of these numbers only, an entry that needs another one is left, and so is what is made of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from etcompile.pass_api import OPS, Argument, Equation, Ref, Relation, Response, Rewriter

__all__ = ["Filters", "Key", "Term", "filters_of"]

#: An entry of a trace: the trace's name, the response of its elements, the state.
Key = tuple[str, Response, int]
Vector = tuple[float | None, ...]
Matrix = tuple[Vector, ...]


@dataclasses.dataclass(frozen=True)
class Term:
    """``factor ** power`` times an entry, or times the presynaptic value ``source`` where there is no ``entry``.

    A factor of None is not constant.
    """

    source: Ref
    entry: Key | None
    factor: Argument | None = 1.0
    power: int = 1


@dataclasses.dataclass(frozen=True)
class Filters:
    """What the traces of a relation are.

    Attributes
    ----------
    responses : mapping of Response to list of int
        Responses that differ in what the traces use of them, each with its numbers in the header.
    traces : tuple of Equation
    sums : mapping of Key to list of Term
        The entries that can differ from zero, each as a sum.
    left : mapping of str to tuple of int
        For each trace the states whose entries can differ from zero, and are no such sums.
    """

    responses: Mapping[Response, list[int]]
    traces: tuple[Equation, ...]
    sums: Mapping[Key, list[Term]]
    left: Mapping[str, tuple[int, ...]]

    def numbers(self, trace: str, state: int) -> list[tuple[Key, int]]:
        """The entries of a state that are sums, each with a number that its response has in the header."""
        keys = ((trace, response, state) for response in self.responses)
        return [(key, number) for key in keys if key in self.sums for number in self.responses[key[1]]]


def filters_of(out: Rewriter, relation: Relation) -> Filters | None:
    """The traces of ``relation`` as filters; None unless all is linear in them, and the same for all of their elements."""
    traces = out.traces(relation.name)
    names = {e.name for e in traces}
    readers = (e for name in names for e in out.readers(name) if e.name not in names)
    if not all(OPS[e.op].contracts for e in readers):
        return None
    decays = any(OPS[e.op].couples for e in traces)
    responses: dict[Response, list[int]] = {}
    for number, response in enumerate(relation.constant):
        used = response if decays else dataclasses.replace(response, decay=None)
        responses.setdefault(used, []).append(number)
    sums: dict[Key, list[Term]] = {}
    for e in traces:
        for response in responses:
            for state in range(len(relation.rows)):
                terms = _terms(out, e, response, state)
                if terms is None:
                    return None
                sums[e.name, response, state] = terms
    live = _live(sums)
    left = _left(live)
    solved = {key: terms for key, terms in live.items() if (key[0], key[2]) not in left}
    states = range(len(relation.rows))
    return Filters(
        responses, traces, solved, {e.name: tuple(k for k in states if (e.name, k) in left) for e in traces}
    )


def _terms(out: Rewriter, e: Equation, response: Response, state: int) -> list[Term] | None:
    """What an equation says of one entry; None if it is no such sum."""
    op = OPS[e.op]
    if op.injects:
        f, x = e.args
        inject = _numbers(out, f, response)
        return None if inject is None or not isinstance(x, Ref) else [Term(x, None, inject[state])]
    if op.couples:
        decay = _numbers(out, e.args[0], response)
        (_, trace) = e.refs
        return None if decay is None else [
            Term(trace, (trace.name, response, j), number) for j, number in enumerate(decay[state])
        ]  # fmt: skip
    if op.terms:
        return [
            Term(ref, (ref.name, response, state), sign) for ref, sign in zip(e.refs, op.terms, strict=True)
        ]
    if op.power:
        scaled = sorted(e.args, key=lambda a: out.kind(a).number)  # the value, then the number
        value, number = scaled
        if isinstance(value, Ref) and out.kind(value).trace and out.kind(number).number:
            return [Term(value, (value.name, response, state), number, op.power)]
    return None


def _numbers(out: Rewriter, argument: Argument, response: Response) -> tuple | None:
    """D or f, or a multiple, as the numbers of a response."""
    e = out.maker(argument)
    if e is None:
        return None
    op = OPS[e.op]
    if op.derivative:
        return getattr(response, op.derivative)
    if op.power == 1:
        number, value = sorted(e.args, key=lambda a: isinstance(a, Ref))
        found = _numbers(out, value, response)
        if isinstance(number, (int, float)) and found is not None:
            return _scaled(number, found)
    return None


def _scaled(number: float, value: tuple) -> tuple:
    return tuple(
        _scaled(number, v) if isinstance(v, tuple) else None if v is None else number * v for v in value
    )


def _left(live: Mapping[Key, list[Term]]) -> set[tuple[str, int]]:
    """Traces and states of entries that need a number that is not constant, or another such entry."""
    left: set[tuple[str, int]] = set()
    while True:
        grown = {
            (trace, state)
            for (trace, _, state), terms in live.items()
            if any(
                t.factor is None or (t.entry is not None and (t.entry[0], t.entry[2]) in left) for t in terms
            )
        }
        if grown == left:
            return left
        left = grown


def _live(sums: Mapping[Key, list[Term]]) -> dict[Key, list[Term]]:
    """Entries, and terms, that can differ from zero: the least fixpoint, starting from zero traces."""
    live: dict[Key, list[Term]] = {}
    while True:
        grown = {
            key: [t for t in terms if t.factor != 0.0 and (t.entry is None or t.entry in live)]
            for key, terms in sums.items()
        }
        grown = {key: terms for key, terms in grown.items() if terms}
        if grown == live:
            return live
        live = grown
