"""The traces as a brainstate state, so that brainstate's transformations carry them."""

from __future__ import annotations

from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["TraceState", "zeros_of"]

#: Bytes up to which an array is copied from numpy's rather than made by a program that has to be compiled first.
_COPIED = 1 << 26


class TraceState(brainstate.ShortTermState):
    """The traces; they are shapes alone until the first use, when they become zeros.

    Whoever reads or writes the value first, be it a transformation that collects its states, finds arrays. These are put in
    unseen by a transformation that is tracing: to it they were always there.

    Parameters
    ----------
    shapes : dict of str to ShapeDtypeStruct
    """

    shapes: dict[str, Any]
    allocated: bool

    def __init__(self, shapes: dict[str, Any]) -> None:
        super().__init__(shapes)
        vars(self).update(shapes=shapes, allocated=False)

    @property
    def value(self) -> Any:
        self._allocate()
        return brainstate.State.value.fget(self)  # type: ignore[attr-defined]

    @value.setter
    def value(self, v: Any) -> None:
        self._allocate()
        brainstate.State.value.fset(self, v)  # type: ignore[attr-defined]

    def _allocate(self) -> None:
        if not self.allocated:
            with (
                jax.ensure_compile_time_eval()
            ):  # arrays, also where the first use is inside of a transformation
                self._write_value(self.zeros())
            vars(self)["allocated"] = True

    def zeros(self) -> Any:
        """New arrays of zeros."""
        return zeros_of(self.shapes)

    def release(self) -> None:
        """Give the memory back; the next use finds zeros. Not for use inside of a transformation."""
        if self.allocated:
            self._write_value(self.shapes)
            vars(self)["allocated"] = False


def zeros_of(shapes: Any) -> Any:
    """Arrays of zeros in the place of shapes."""

    def zeros(s: jax.ShapeDtypeStruct) -> Any:
        small = s.size * s.dtype.itemsize <= _COPIED
        if small:  # memory of its own, which may be given away
            return jax.device_put(np.zeros(s.shape, s.dtype), may_alias=False)
        return jnp.zeros(s.shape, s.dtype)

    return jax.tree.map(zeros, shapes)
