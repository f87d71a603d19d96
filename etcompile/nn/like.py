"""What a state that accumulates values must look like: a pytree of shapes, dtypes and units."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import saiunit as u

from etcompile.errors import InputError, OptionError
from etcompile.integers import positive_integer
from etcompile.nn.decay import is_quantity

__all__ = ["Like"]


@dataclasses.dataclass(frozen=True)
class _Leaf:
    path: str
    shape: tuple[int, ...]
    dtype: Any
    unit: Any = None

    def zeros(self, batch_size: int | None) -> Any:
        shape = self.shape if batch_size is None else (batch_size, *self.shape[1:])
        values = jnp.zeros(shape, self.dtype)
        return values if self.unit is None else u.Quantity(values, unit=self.unit)


@dataclasses.dataclass(frozen=True)
class Like:
    """Structure, and shape, dtype and unit of every leaf. A quantity is one leaf."""

    tree: Any
    leaves: tuple[_Leaf, ...]

    @classmethod
    def of(cls, example: Any, dtype: Any = None) -> Like:
        """From arrays, quantities, ``jax.ShapeDtypeStruct``, states, or shapes given as ints or tuples of ints."""
        if isinstance(example, tuple) and not example:
            return cls(jax.tree.structure(0), (_Leaf("", (), _float_dtype(None, dtype)),))
        found, tree = jax.tree_util.tree_flatten_with_path(_plain(example), is_leaf=_is_leaf)
        return cls(tree, tuple(_leaf(_path(path), value, dtype) for path, value in found))

    def zeros(self, batch_size: int | None = None) -> Any:
        """Zeros; with ``batch_size``, axis 0 of every leaf has that length (a scalar gets such an axis)."""
        if batch_size is not None:
            batch_size = positive_integer("batch_size", batch_size, error=InputError)
        return jax.tree.unflatten(self.tree, [leaf.zeros(batch_size) for leaf in self.leaves])

    def leak(self, name: str, state: Any, value: Any, decay: Any, gain: float | None = None) -> Any:
        """``decay * state + gain * value``, leaf by leaf, in the state's dtypes and units."""
        given, tree = jax.tree.flatten(_plain(value), is_leaf=is_quantity)
        if tree != self.tree:
            raise InputError(
                f"{name} got another structure than it was made for.",
                got=str(tree),
                expected=str(self.tree),
                hint=f"make the {name} from an example of what it shall accumulate.",
            )
        held = jax.tree.leaves(state, is_leaf=is_quantity)
        moved = [_leaked(name, *each, decay, gain) for each in zip(self.leaves, held, given, strict=True)]
        return jax.tree.unflatten(self.tree, moved)


def _leaked(name: str, leaf: _Leaf, state: Any, value: Any, decay: Any, gain: float | None) -> Any:
    held, new = u.get_mantissa(state), _mantissa(name, leaf, jnp.shape(u.get_mantissa(state)), value)
    if gain is not None:
        new = gain * new
    # A strong float64 decay would promote the state.
    moved = jnp.asarray(decay, jnp.finfo(leaf.dtype).dtype) * held + new
    return moved if leaf.unit is None else u.Quantity(moved, unit=leaf.unit)


def _mantissa(name: str, leaf: _Leaf, shape: tuple[int, ...], value: Any) -> jax.Array:
    """`value` as an array in the leaf's unit and dtype."""
    what = f"{name}: leaf {leaf.path}" if leaf.path else name
    unit = u.UNITLESS if leaf.unit is None else leaf.unit
    if u.get_dim(value) != u.get_dim(u.Quantity(1.0, unit=unit)):
        raise InputError(
            f"{what} has another unit than it was made for.",
            got=str(u.get_unit(value)),
            expected=str(unit),
            hint=f"make the {name} from an example that carries the unit.",
        )
    number = value.to_decimal(unit) if is_quantity(value) else value
    if jnp.shape(number) != shape:
        raise InputError(
            f"{what} has another shape than the state.",
            got=str(jnp.shape(number)),
            expected=str(shape),
            hint="reset_state(batch_size=...) changes axis 0, reset_state() brings the first shape back.",
        )
    dtype = getattr(number, "dtype", None)
    if dtype == jax.dtypes.float0 or (
        dtype is not None and jnp.promote_types(dtype, leaf.dtype) != leaf.dtype
    ):
        raise InputError(
            f"{what} would lose precision.",
            got=str(dtype),
            expected=f"{leaf.dtype}, or what fits in it",
            hint=f"make the {name} from an example of that dtype, or with dtype=...",
        )
    return jnp.asarray(number, leaf.dtype)


def _leaf(path: str, value: Any, dtype: Any) -> _Leaf:
    if _is_shape(value):
        shape = value if isinstance(value, tuple) else (value,)
        if any(n < 0 for n in shape):
            raise OptionError(
                "a shape has no negative lengths.", got=repr(value), expected="(3, 4), for example"
            )
        return _Leaf(path, tuple(int(n) for n in shape), _float_dtype(None, dtype))
    try:
        number = u.get_mantissa(value)
        kind = number.dtype if hasattr(number, "dtype") else jnp.result_type(number)
        shape = tuple(jnp.shape(number))
    except (TypeError, ValueError):
        raise OptionError(
            "cannot tell a shape from this.",
            got=f"{type(value).__name__}{' at ' + path if path else ''}: {value!r}",
            expected="an array, a quantity, a jax.ShapeDtypeStruct, or a shape such as (3, 4)",
        ) from None
    unit = value.unit if is_quantity(value) else None
    return _Leaf(path, shape, _float_dtype(kind if hasattr(number, "dtype") else None, dtype), unit)


def _float_dtype(found: Any, asked: Any) -> Any:
    """The dtype asked for, else that of the example, else brainstate's default."""
    if asked is not None:
        try:
            dtype = jnp.dtype(asked)
        except TypeError:
            dtype = None
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            raise OptionError(
                "dtype must be a floating-point or complex dtype.", got=repr(asked), expected="jnp.float32"
            )
        return dtype
    # Spikes may be integers or booleans; what accumulates them is not.
    if found is None or not jnp.issubdtype(found, jnp.inexact):
        return jnp.dtype(brainstate.environ.dftype())
    return jnp.dtype(found)


def _plain(tree: Any) -> Any:
    """States as their values, and any mapping at the top as a dict, which is what gradients come in."""
    if isinstance(tree, Mapping):
        tree = dict(tree)
    return jax.tree.map(
        lambda v: v.value if isinstance(v, brainstate.State) else v,
        tree,
        is_leaf=lambda v: isinstance(v, brainstate.State) or _is_leaf(v),
    )


def _is_leaf(value: Any) -> bool:
    return is_quantity(value) or _is_shape(value)


def _is_shape(value: Any) -> bool:
    return _is_length(value) or (isinstance(value, tuple) and bool(value) and all(map(_is_length, value)))


def _is_length(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))


def _path(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
