"""What users give as an input of a step: arrays, or a sentence about what they gave instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from etcompile.errors import InputError

__all__ = ["as_array", "refuse_iterators", "refuse_lists", "shape_difference", "shape_hint", "stacked"]


def as_array(value: Any, name: str = "an input") -> Any:
    """``value`` as an array; arrays and shapes as they are."""
    if isinstance(value, (jax.Array, jax.ShapeDtypeStruct)):
        return value
    hint = _way_out(value)
    if hint is None:
        try:
            return jnp.asarray(value)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{name} is no array.", got=f"{type(value).__name__}: {error}", expected="an array of numbers"
            ) from error
    raise InputError(f"{name} is no array.", got=_described(value), expected="an array of numbers", hint=hint)


def refuse_iterators(given: Any, name: str = "an input") -> None:
    """Raise :class:`InputError` for an iterator among arguments, before JAX complains of it in its own words."""
    if isinstance(given, tuple):
        for part in given:
            refuse_iterators(part, name)
    elif isinstance(given, Iterator):
        as_array(given, name)


def refuse_lists(given: Any, expected: Any, name: str, model: str) -> None:
    """Raise :class:`InputError` for a list of arrays where the structure ``expected`` is one array."""
    if not isinstance(given, (list, tuple)) or not jax.tree_util.treedef_is_leaf(expected):
        return
    raise InputError(
        f"{name} is a {type(given).__name__} where {model} takes one array.",
        got=f"a {type(given).__name__} of {len(given)}",
        expected="one array",
        hint=f"stack it: jnp.stack({name}), or jnp.asarray({name}) for numbers.",
    )


def stacked(given: Any, expected: Any, name: str) -> Any:
    """A list with one entry of the structure ``expected`` for each step as one tree, time on axis 0; all else as it is."""
    if not isinstance(given, list) or not given or jax.tree.structure(given) == expected:
        return given
    if any(jax.tree.structure(one) != expected for one in given):
        return given
    steps = [jax.tree.map(lambda v: as_array(v, name), one) for one in given]
    shapes: dict[str, int] = {}
    for k, one in enumerate(steps):
        shapes.setdefault(", ".join(str(v.shape) for v in jax.tree.leaves(one)), k)
    if len(shapes) > 1:
        raise InputError(
            f"the steps of {name} differ in shape.",
            got=", ".join(f"{shape} at step {k}" for shape, k in list(shapes.items())[:4]),
            expected="one shape at every step",
            hint="pad sequences to one length, and give mask= for the steps that count.",
        )
    return jax.tree.map(lambda *v: jnp.stack(v), *steps)


def shape_difference(given: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """What to do about a shape that does not fit: which axis it is, and whether a reset helps."""
    if len(given) == len(expected) + 1 and given[1:] == expected:
        return "there is an axis too many in front: for a sequence use step.scan or scan_value_and_grad."
    if len(given) != len(expected):
        return f"it has {len(given)} axes in place of {len(expected)}; compile again for another shape."
    wrong = [k for k, (a, b) in enumerate(zip(given, expected, strict=True)) if a != b]
    if wrong == [0] and len(expected) > 1:
        reset = f"for another batch size call step.reset(batch_size={given[0]})"
        return f"axis 0 has {given[0]} entries in place of {expected[0]}: {reset}."
    told = ", ".join(f"axis {k} has {given[k]} entries in place of {expected[k]}" for k in wrong)
    kind = " (features)" if wrong == [len(expected) - 1] else ""
    return f"{told}{kind}; give the data that size, or compile again."


def shape_hint(error: Exception, inputs: tuple[Any, ...]) -> str | None:
    """Which axis of which input a failed operation speaks of, for products and sums; None where that cannot be told.

    The data come first in a product; cells join input and state, so that both sizes there have the state's share in them.
    """
    numbers = [
        k for k, x in enumerate(inputs) if isinstance(x, list) and not any(map(jnp.ndim, jax.tree.leaves(x)))
    ]
    if numbers:
        name = "the input" if len(inputs) == 1 else f"input {numbers[0]}"
        return f"{name} is a list of numbers, each of which is an input by itself: jnp.asarray(x) makes an array of it."
    shapes = [tuple(map(int, re.findall(r"\d+", text))) for text in re.findall(r"\(([\d, ]+)\)", str(error))]
    leaves = [(f"input {k}", jnp.shape(leaf)) for k, x in enumerate(inputs) for leaf in jax.tree.leaves(x)]
    leaves = [("the input", leaves[0][1])] if len(leaves) == 1 else leaves
    if len(shapes) != 2:
        return None
    if "contracting dimensions" in str(error) and all(len(shape) == 1 for shape in shapes):
        (met,), (taken,) = shapes
        for name, shape in leaves:
            size = shape[-1] if shape else 0
            wanted = taken if size == met else taken - (met - size)
            if size and met >= size and wanted > 0:
                return f"axis {len(shape) - 1} (features) of {name} has {size} entries where the weight takes {wanted}."
    for name, shape in leaves:
        firsts = {s[0] for s in shapes if s}
        others = {s[1:] for s in shapes}
        if (
            shape
            and len(firsts) == 2
            and shape[0] in firsts
            and (len(others) == 1 or "concatenate" in str(error))
        ):
            (held,) = firsts - {shape[0]}
            return (
                f"axis 0 (batch) of {name} has {shape[0]} entries where the states have {held}: initialise them for "
                f"{shape[0]}, for a module with compile(..., batch_size={shape[0]})."
            )
    return None


def _described(value: Any) -> str:
    return repr(value) if isinstance(value, str) else f"a {type(value).__module__}.{type(value).__name__}"


def _way_out(value: Any) -> str | None:
    """What to do about something that is known to be no array."""
    if isinstance(value, (str, bytes)):
        from etcompile.registry import algorithm_names

        if value in algorithm_names():
            return f"the learning rule goes to algo=: etcompile.compile(model, x, algo={value!r})."
        return "inputs are examples of what the model takes; turn text into numbers first."
    if isinstance(value, Iterator):
        return "an iterator has no shape: stack what it gives, jnp.stack(list(...))."
    if type(value).__module__.split(".")[0] == "torch":
        return "convert it: jnp.asarray(x.detach().cpu().numpy())."
    if isinstance(value, type) or callable(value):
        return "pass an array in its place; a function or class is no input."
    if isinstance(value, (set, frozenset)):
        return "a set has no order: give an array."
    return None
