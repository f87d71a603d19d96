"""What a call is given, held against what the step was compiled for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from etcompile.errors import InputError, OptionError
from etcompile.frontend.given import as_array, refuse_iterators, refuse_lists, shape_difference, stacked
from etcompile.frontend.step_model import StepModel
from etcompile.ir.ops import OPS
from etcompile.ir.program import TraceProgram
from etcompile.lowering.functions import Call

__all__ = [
    "as_inputs",
    "check_one",
    "check_sequence",
    "given_with",
    "keywords_of",
    "stacked_steps",
    "steps_of",
]


def as_inputs(model: StepModel, x: Any) -> tuple[Any, ...]:
    """The model's inputs from the one argument of the drivers: a tuple where the model takes several."""
    count = model.input_count
    if count == 1:
        return (x,)
    if not isinstance(x, tuple) or len(x) != count:
        raise InputError(
            f"{model.name} takes {count} inputs.",
            got=type(x).__name__,
            expected=f"a tuple of {count}",
        )
    return x


def stacked_steps(model: StepModel, xs: Any, targets: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Inputs and targets of a sequence; lists with one entry for each step become arrays with time on axis 0."""
    tree = model.input_tree
    children = tree.children()
    given = stacked(xs, children[0] if len(children) == 1 else tree, "xs")
    if len(children) > 1 and isinstance(given, tuple) and len(given) == len(children):
        given = tuple(stacked(x, c, f"xs[{k}]") for k, (x, c) in enumerate(zip(given, children, strict=True)))
    if not any(isinstance(t, list) for t in targets):
        return given, targets
    steps = next((v.shape[0] for v in jax.tree.leaves(given) if getattr(v, "shape", ())), None)

    def of_steps(target: Any) -> bool:
        """A list of as many entries; where each entry could have the time on axis 0 as well, as the inputs are given."""
        if not isinstance(target, list) or len(target) != steps:
            return False
        return given is not xs or any(jnp.shape(v)[:1] != (steps,) for v in jax.tree.leaves(target))

    return given, tuple(
        stacked(t, jax.tree.structure(t[0]), f"target {k}") if of_steps(t) else t
        for k, t in enumerate(targets)
    )


def check_sequence(model: StepModel, inputs: tuple, targets: tuple) -> None:
    """Raise :class:`InputError` unless inputs and targets fit the model and each other; time is axis 0."""
    refuse_iterators((inputs, targets), "xs or a target")
    for given, child in zip(inputs, model.input_tree.children(), strict=False):
        refuse_lists(given, child, "xs", model.name)
    lengths = {}
    for name, tree in [("xs", inputs), *((f"target {k}", t) for k, t in enumerate(targets))]:
        for leaf in jax.tree.leaves(tree):
            if not jnp.ndim(leaf if hasattr(leaf, "ndim") else as_array(leaf, name)):
                raise InputError(
                    f"{name} has no time axis.",
                    got="a scalar",
                    expected="time as axis 0",
                    hint="broadcast it over the steps.",
                )
            lengths.setdefault(jnp.shape(leaf)[0], name)
    if len(lengths) > 1:
        told = ", ".join(f"{name}: {n} steps" for n, name in lengths.items())
        raise InputError(
            "inputs and targets differ in length.",
            got=told,
            expected="the same number of steps on axis 0",
        )
    if 0 in lengths:
        raise InputError("the sequence is empty.", got="T = 0", expected="at least one step")
    one = jax.tree.map(lambda v: jax.ShapeDtypeStruct(jnp.shape(v)[1:], jnp.result_type(v)), inputs)
    check_one(model, one)


def check_one(model: StepModel, one: Any) -> None:
    """Raise :class:`InputError` unless these are shapes of inputs of one step."""
    leaves, tree = jax.tree.flatten(one)
    if tree != model.input_tree:
        model.flatten_given(one)
    for leaf, value in zip(model.given, leaves, strict=True):
        if jnp.shape(value) != leaf.aval.shape:
            raise InputError(
                f"one step of {leaf.path} has the wrong shape for {model.name}.",
                got=f"{jnp.shape(value)} after the time axis",
                expected=f"{leaf.aval.shape}",
                hint="time is axis 0. " + shape_difference(jnp.shape(value), leaf.aval.shape),
            )


#: A rule that reads what a call may give.
_READERS = {"target": "osttp", "modulator": "three_factor"}


def keywords_of(program: TraceProgram) -> frozenset[str]:
    """What a call may give for the program to read, beside inputs and targets of the loss."""
    return frozenset(OPS[e.op].keyword for e in program.equations) - {""}


def given_with(program: TraceProgram, target: Any, modulator: Any) -> Call:
    """What a call gives beside its inputs, without what it does not give."""
    if target is None and modulator is None:
        return {}
    given = {k: v for k, v in (("target", target), ("modulator", modulator)) if v is not None}
    read = keywords_of(program)
    for name, value in given.items():
        if name not in read:
            raise OptionError(
                f"{program.name} reads no {name}.",
                got=f"{name}= of shape {jnp.shape(value)}"
                if hasattr(value, "shape")
                else f"{name}={value!r}",
                hint=f"leave {name}= out, or compile with a rule that reads it, such as algo={_READERS[name]!r}.",
            )
    return given


def steps_of(inputs: Any) -> int:
    """Steps of a sequence: the length of axis 0."""
    return jax.tree.leaves(inputs)[0].shape[0]
