"""Arguments of one step and arguments of many: wrappers that say which is which, and how to take them apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from etcompile.errors import InputError
from etcompile.frontend.given import as_array, refuse_iterators

__all__ = [
    "MultiStepData",
    "SingleStepData",
    "arrays_alone",
    "extract_y_target",
    "has_multi_step",
    "number_of_steps",
    "over_time",
    "repeated",
    "split",
    "unwrap",
]

_keystr = jax.tree_util.keystr


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SingleStepData:
    """Data of one time step: in a call over several steps it is used at every one of them.

    Plain data mean the same; the wrapper says so in as many words.

    Parameters
    ----------
    value : pytree
        As the model takes it: no time axis.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from etcompile.runtime.step_data import SingleStepData
    >>> SingleStepData(jnp.zeros((2, 3))).value.shape
    (2, 3)
    """

    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MultiStepData:
    """Data of several time steps: axis 0 of every leaf is time.

    A call with such an argument runs all its steps. Other arguments, plain or :class:`SingleStepData`, are used at
    every step.

    Parameters
    ----------
    value : pytree
        Every leaf has shape ``(T, ...)``, with one T, at least 1, for all of one call.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from etcompile.runtime.step_data import MultiStepData, number_of_steps
    >>> number_of_steps((MultiStepData({"x": jnp.zeros((10, 2, 3))}), jnp.ones(3)))
    10
    """

    value: Any


def has_multi_step(args: Any) -> bool:
    """Whether there is a :class:`MultiStepData` anywhere in `args`."""
    if arrays_alone(args):
        return False
    refuse_iterators(args)
    return any(isinstance(v, MultiStepData) for v in jax.tree.leaves(args, is_leaf=_is_multi))


def extract_y_target(args: Sequence[Any], index: int = -1) -> Any:
    """The target among the positional arguments of a call: the last, or that at ``index``; None where there are none.

    Examples
    --------
    >>> from etcompile import extract_y_target
    >>> extract_y_target(("x", "y")), extract_y_target(("x", "y"), 0), extract_y_target(())
    ('y', 'x', None)
    """
    if not args:
        return None
    if not -len(args) <= index < len(args):
        raise InputError(
            "there is no such argument.",
            got=f"index={index} of {len(args)}",
            expected="a position among them",
        )
    return args[index]


def number_of_steps(args: Any) -> int:
    """The length that axis 0 of all multi-step leaves in `args` has in common.

    Raises
    ------
    InputError
        If there is no multi-step leaf, one has no axis, lengths differ or are 0, or wrappers stand inside wrappers.
    """
    first: tuple[str, int] | None = None
    for path, leaf in _multi_step_leaves(args):
        shape = np.shape(leaf)
        if not shape:
            raise InputError(
                f"multi-step data at {path} have no time axis.",
                got="shape ()",
                expected="time as axis 0",
                hint="leave what is the same at every step unwrapped, or wrap it in SingleStepData.",
            )
        if shape[0] == 0:
            raise InputError(
                f"multi-step data at {path} are empty.", got=f"shape {shape}", expected="at least one step"
            )
        if first is None:
            first = path, shape[0]
        if shape[0] != first[1]:
            raise InputError(
                "multi-step data differ in length.",
                got=f"{first[0]}: {first[1]} steps, {path}: {shape[0]} steps",
                expected="the same number of steps on axis 0",
            )
    if first is None:
        raise InputError("there are no multi-step data.", expected="an array in MultiStepData")
    return first[1]


def split(args: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Take apart what has a time axis and what has not.

    Parameters
    ----------
    args : pytree
        Arguments, some of them, or parts of them, in wrappers.

    Returns
    -------
    per_step : pytree
        The multi-step leaves alone, time on axis 0: ``xs`` for ``jax.lax.scan``.
    join : callable
        From one step's slice of ``per_step`` to the arguments of that step: `args` without wrappers, everything that
        has no time axis as it is.

    Raises
    ------
    InputError
        As :func:`number_of_steps`; without multi-step data ``per_step`` is empty and nothing is checked but the
        nesting.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from etcompile.runtime.step_data import MultiStepData, split
    >>> per_step, join = split(({"x": MultiStepData(jnp.arange(3)), "gain": 2},))
    >>> join(jax.tree.map(lambda v: v[1], per_step))
    ({'gain': 2, 'x': Array(1, dtype=int...)},)
    """
    if has_multi_step(args):
        number_of_steps(args)
    wrapped = _wrapped(args)
    tree = jax.tree.structure(args, is_leaf=_is_wrapper)
    per_step = tuple(v.value for _, v in wrapped if _is_multi(v))

    def join(step: Any) -> Any:
        if len(step) != len(per_step):
            raise InputError(
                "this is no slice of these arguments.",
                got=f"{len(step)} parts",
                expected=f"{len(per_step)} parts, as in per_step",
            )
        slices = iter(step)
        values = [next(slices) if _is_multi(v) else _bare(v) for _, v in wrapped]
        return jax.tree.unflatten(tree, values)

    return per_step, join


def unwrap(args: Any) -> Any:
    """Arguments of a single step without their wrappers.

    Raises
    ------
    InputError
        If there are multi-step data, or wrappers inside wrappers.
    """
    if arrays_alone(args):
        return args
    wrapped = _wrapped(args)
    for path, value in wrapped:
        if _is_multi(value):
            raise InputError(
                f"multi-step data at {path} in a call of a single step.",
                got="MultiStepData",
                expected="data of one step",
            )
    return jax.tree.unflatten(
        jax.tree.structure(args, is_leaf=_is_wrapper), [_bare(value) for _, value in wrapped]
    )


def over_time(args: Any) -> Any:
    """Arguments of a sequence without their wrappers: time is axis 0 of all, :class:`SingleStepData` are repeated."""
    refuse_iterators(args)
    wrapped = _wrapped(args)
    if not any(_is_wrapper(v) for _, v in wrapped):
        return args
    timed = [
        leaf for _, v in wrapped if not isinstance(v, SingleStepData) for leaf in jax.tree.leaves(_bare(v))
    ]
    steps = next((np.shape(v)[0] for v in timed if np.shape(v)), None)
    if steps is None:
        raise InputError("nothing says how many steps there are.", expected="inputs with time on axis 0")
    return _every_step(args, wrapped, steps, lambda v: isinstance(v, SingleStepData))


def repeated(args: Any) -> Any:
    """Arguments of a call with some :class:`MultiStepData`: whatever else there is, is repeated; time is axis 0 of all."""
    return _every_step(args, _wrapped(args), number_of_steps(args), lambda v: not _is_multi(v))


def _every_step(args: Any, wrapped: list[tuple[str, Any]], steps: int, same: Callable[[Any], bool]) -> Any:
    def repeat(value: Any) -> Any:
        return jax.tree.map(lambda v: jnp.broadcast_to(v, (steps, *jnp.shape(v))), _bare(value))

    values = [repeat(v) if same(v) else _bare(v) for _, v in wrapped]
    return jax.tree.unflatten(jax.tree.structure(args, is_leaf=_is_wrapper), values)


def arrays_alone(args: Any) -> bool:
    """Whether there is nothing but arrays, in tuples: the common case, at little cost."""
    if isinstance(args, tuple):
        return all(map(arrays_alone, args))
    return args is None or isinstance(args, (np.ndarray, jax.Array))


def _is_multi(value: Any) -> bool:
    return isinstance(value, MultiStepData)


def _is_wrapper(value: Any) -> bool:
    return isinstance(value, (SingleStepData, MultiStepData))


def _bare(value: Any) -> Any:
    return value.value if _is_wrapper(value) else value


def _wrapped(args: Any) -> list[tuple[str, Any]]:
    """Wrappers, and leaves outside of them, with their paths; wrappers do not stand inside wrappers."""
    found = [
        (f"args{_keystr(p)}", v) for p, v in jax.tree_util.tree_leaves_with_path(args, is_leaf=_is_wrapper)
    ]
    for path, outer in found:
        if not _is_wrapper(outer):
            continue
        for below, inner in jax.tree_util.tree_leaves_with_path(outer.value, is_leaf=_is_wrapper):
            if _is_wrapper(inner):
                raise InputError(
                    f"wrapped data at {path} hold wrapped data.",
                    got=f"{type(inner).__name__} at {path}{_keystr(below)} inside {type(outer).__name__}",
                    expected="wrappers side by side",
                    hint="wrap the leaves of a dict or tuple one by one.",
                )
    return found


def _multi_step_leaves(args: Any) -> list[tuple[str, Any]]:
    return [
        (
            f"{path}{_keystr(below)}",
            leaf if hasattr(leaf, "shape") else as_array(leaf, f"multi-step data at {path}"),
        )
        for path, outer in _wrapped(args)
        if _is_multi(outer)
        for below, leaf in jax.tree_util.tree_leaves_with_path(outer.value)
    ]
