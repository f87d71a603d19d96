"""Shapes in the place of arrays, and what is compared to see whether arrays still have them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["kinds_of", "shapes_alone", "shapes_of"]


def shapes_of(tree: Any) -> Any:
    """A tree of shapes in the place of arrays and numbers."""
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(jnp.shape(v), _dtype(v)), tree)


def kinds_of(tree: Any) -> tuple[Any, tuple[tuple[tuple[int, ...], Any], ...]]:
    """Structure, and shape and dtype of every leaf."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((v.shape if hasattr(v, "shape") else jnp.shape(v), _dtype(v)) for v in leaves)


def shapes_alone(tree: Any) -> str | None:
    """The path of a leaf that is a shape without an array, or None if there is none."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = (jax.tree_util.keystr(path) for path, v in leaves if isinstance(v, jax.ShapeDtypeStruct))
    return next(found, None)


def _dtype(value: Any) -> Any:
    return value.dtype if hasattr(value, "dtype") else jnp.result_type(value)
