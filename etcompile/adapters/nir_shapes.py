"""The shapes of what NIR nodes take and give: found from the inputs on, not taken from what nodes say of themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.adapters.nir_nodes import Discretisation, as_read, fields_of, kind_of
from etcompile.adapters.nir_wiring import Path, Wiring, dotted
from etcompile.errors import ModelError

__all__ = ["dtype_of", "shapes_of"]


def shapes_of(wiring: Wiring, arrays: Mapping[Path, Any], how: Discretisation) -> dict[Path, tuple[int, ...]]:
    """The shape of what each node takes, without a batch axis; ModelError where shapes do not fit."""
    plain = dataclasses.replace(how, batched=False)
    taken: dict[Path, tuple[int, ...]] = {}
    shown: dict[Path, tuple[int, ...]] = {}
    dtype = dtype_of(arrays)
    top = set(wiring.inputs.values())
    for path, node in wiring.nodes.items():
        if path in top:
            taken[path] = _shape_of_input(path, node)
        elif path in wiring.registers:
            taken[path] = _declared(node)
        else:
            brought = {
                source: _declared(wiring.nodes[source]) if (source, path) in wiring.late else shown[source]
                for source in wiring.sources[path]
            }
            if len(set(brought.values())) > 1:
                raise ModelError(
                    f"edges bring arrays of different shapes to the NIR node {dotted(path)}.",
                    got=", ".join(f"{shape} from {dotted(source)}" for source, shape in brought.items()),
                    expected="one shape: what they bring is summed",
                )
            taken[path] = next(iter(brought.values()))
        _check_element_wise(path, node, taken[path])
        shown[path] = _shape_shown(path, node, arrays[path], taken[path], dtype, plain)
    for path in wiring.nodes:
        for source in wiring.sources[path]:
            if shown[source] != taken[path]:
                raise ModelError(
                    f"the NIR node {dotted(source)} gives an array of another shape than its own arrays have.",
                    got=f"{shown[source]} for {dotted(path)}",
                    expected=f"{taken[path]}; a node that closes a loop needs arrays of its full shape",
                )
    return taken


def _shape_of_input(path: Path, node: Any) -> tuple[int, ...]:
    shape = (node.input_type or {}).get("input")
    if shape is None:
        raise ModelError(
            f"the NIR input {dotted(path)} has no shape.",
            got="None",
            expected="the shape of one example without batch and time, such as nir.Input(np.array([3]))",
        )
    return tuple(int(n) for n in np.asarray(shape).reshape(-1))


def _declared(node: Any) -> tuple[int, ...]:
    """The shape that the arrays of a node in a loop have."""
    fields = ["delay"] if hasattr(node, "delay") else fields_of(node)
    return np.broadcast_shapes(*(np.shape(getattr(node, name)) for name in fields))


def _check_element_wise(path: Path, node: Any, shape: tuple[int, ...]) -> None:
    """The arrays of a neuron have the shape of what it takes, or one element."""
    if not kind_of(node).element_wise:
        return
    for field in [*fields_of(node), *(["delay"] if hasattr(node, "delay") else [])]:
        own = np.shape(getattr(node, field))
        fits = len(own) == len(shape) and all(n in (1, m) for n, m in zip(own, shape, strict=True))
        if math.prod(own) != 1 and not fits:
            raise ModelError(
                f"{dotted(path)}.{field} does not fit what its node takes.",
                got=f"{own} for {shape}",
                expected=f"{shape}",
            )


def _shape_shown(
    path: Path, node: Any, arrays: Mapping[str, Any], shape: tuple[int, ...], dtype: Any, how: Discretisation
) -> tuple[int, ...]:
    state = {name: jnp.zeros(shape, dtype) for name in kind_of(node).states}
    if hasattr(node, "delay"):
        return shape
    try:
        out = jax.eval_shape(
            lambda x: kind_of(node).step(node, as_read(node, arrays), state, x, how)[1],
            jax.ShapeDtypeStruct(shape, dtype),
        )
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        sizes = {name: np.shape(value) for name, value in arrays.items()}
        raise ModelError(
            f"the NIR node {dotted(path)} cannot take what leads to it.",
            got=f"an array of shape {shape} for a {type(node).__name__} with {sizes}: {error}",
            expected="the shape without batch and time: channels in front, or the inputs of the weight's columns",
        ) from error
    return tuple(out.shape)


def dtype_of(arrays: Mapping[Path, Mapping[str, jax.Array]]) -> Any:
    """The dtype of all arrays."""
    leaves = jax.tree.leaves(dict(arrays))
    return leaves[0].dtype if leaves else jnp.result_type(float)
