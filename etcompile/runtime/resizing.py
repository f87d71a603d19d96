"""Which states and inputs change with the batch size: those whose leading axis numbers examples."""

from __future__ import annotations

import itertools
from typing import Any

from etcompile.analysis.analysis import Analysis
from etcompile.analysis.examples import find_examples, leading_is_examples

__all__ = ["batch_leaves"]


def batch_leaves(analysis: Analysis) -> tuple[list[bool], list[bool]]:
    """For every leaf of the states and of the inputs whether its leading axis is the batch.

    The analysis of examples says so of floating-point leaves. Of others those are taken whose leading axis has the same length,
    without raw random keys. Compiling for the new size shows whether that was right.
    """
    model, examples = analysis.model, find_examples(analysis)
    first = next((leaf.aval.shape for leaf in model.given if leaf.aval.shape), (0,))
    size = examples.size or first[0]
    along = examples.along if examples.size else leading_is_examples(analysis, size)

    def is_batch(var: int, aval: Any) -> bool:
        if aval.shape[:1] != (size,):
            return False
        if aval.differentiable:
            return var in along
        return not (aval.shape == (2,) and str(aval.dtype) == "uint32")

    found = [is_batch(v, leaf.aval) for v, leaf in zip(model.state_vars, model.states, strict=True)]
    parts = iter(found)
    states = [any(list(itertools.islice(parts, form.parts))) for form in model.state_forms]
    return states, [is_batch(v, leaf.aval) for v, leaf in zip(model.input_vars, model.given, strict=False)]
