"""Which states and inputs change with the batch size: those with an axis that numbers examples, the leading one as a rule."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from etcompile.analysis.analysis import Analysis
from etcompile.analysis.examples import Examples, find_examples, leading_is_examples

__all__ = ["BatchAxes", "batch_axes", "batch_leaves"]

#: Of the ways in which states may have a batch axis so many are tried.
_TRIED = 32


@dataclasses.dataclass(frozen=True)
class BatchAxes:
    """What changes with the batch size.

    Attributes
    ----------
    states : tuple of (int or None)
        For every leaf of the states the axis that numbers examples.
    inputs : tuple of bool
        For every leaf of the inputs whether its leading axis does.
    """

    states: tuple[int | None, ...]
    inputs: tuple[bool, ...]


def batch_leaves(analysis: Analysis) -> tuple[list[bool], list[bool]]:
    """For every leaf of the states and of the inputs whether its leading axis is the batch.

    The analysis of examples says so of floating-point leaves. Of others those are taken whose leading axis has the same length,
    without raw random keys. Compiling for the new size shows whether that was right.
    """
    examples = find_examples(analysis)
    return _leaves(analysis, examples, _size(analysis, examples))


def batch_axes(analysis: Analysis, states: Sequence[Any]) -> Iterator[BatchAxes]:
    """What may change with the batch size, the likely first; compiling for another size shows what is right.

    Where the examples of a batch meet (batch norm, a mean over the batch) no path of the step tells their axis from one of units.
    What tells them apart is that the model runs with another number of the one and not of the other. States go along where they
    must: as few as possible. ``states`` are the leaves that are looked at, none where the model makes its states itself.
    """
    examples = find_examples(analysis)
    size = _size(analysis, examples)
    found, given = _leaves(analysis, examples, size)
    sure = tuple(0 if known else None for known in found[: len(states)])
    likely = BatchAxes(sure, tuple(given))
    of_length = tuple(_may_be_batch(leaf.aval, size) for leaf in analysis.model.given)
    if any(given) or not any(of_length):
        yield likely
    axes = [
        [d for d, n in enumerate(v.shape) if n == size and not _raw_key(v)] if axis is None else [axis]
        for axis, v in zip(sure, states, strict=True)
    ]
    options = [[None, *some] if axis is None else some for axis, some in zip(sure, axes, strict=True)]
    ways = sorted(itertools.islice(itertools.product(*options), 1024), key=lambda way: -way.count(None))
    ways = (*ways[:_TRIED], tuple(next(iter(some), None) for some in axes))
    yield from dict.fromkeys((*(BatchAxes(way, of_length) for way in ways), likely))


def _size(analysis: Analysis, examples: Examples) -> int:
    """The number of examples, or of what may be examples: the length of the first axis of the inputs."""
    first = next((leaf.aval.shape for leaf in analysis.model.given if leaf.aval.shape), (0,))
    return examples.size or first[0]


def _leaves(analysis: Analysis, examples: Examples, size: int) -> tuple[list[bool], list[bool]]:
    model = analysis.model
    along = examples.along if examples.size else leading_is_examples(analysis, size)

    def is_batch(var: int, aval: Any) -> bool:
        return _may_be_batch(aval, size) and (not aval.differentiable or var in along)

    found = [is_batch(v, leaf.aval) for v, leaf in zip(model.state_vars, model.states, strict=True)]
    parts = iter(found)
    states = [
        any(list(itertools.islice(parts, form.parts))) and not (form.bounds and form.axis == 0)
        for form in model.state_forms
    ]
    return states, [is_batch(v, leaf.aval) for v, leaf in zip(model.input_vars, model.given, strict=False)]


def _may_be_batch(aval: Any, size: int) -> bool:
    return aval.shape[:1] == (size,) and not _raw_key(aval)


def _raw_key(aval: Any) -> bool:
    return aval.shape == (2,) and str(aval.dtype) == "uint32"
