"""The traces as a brainstate state, so that brainstate's transformations carry them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

from etcompile.frontend.jaxpr import in_transformation, is_traced
from etcompile.frontend.module import gives_nothing_away, recording
from etcompile.frontend.user_code import called_from

__all__ = ["TraceState", "zeros_of"]

#: Bytes up to which an array is copied from numpy's rather than made by a program that has to be compiled first.
_COPIED = 1 << 26


class TraceState(brainstate.ShortTermState):
    """The traces; they are shapes alone until the first use, when they become zeros.

    Whoever reads or writes the value first, be it a transformation that collects its states, finds arrays. These are put in
    unseen by a transformation that is tracing: to it they were always there.

    A step gives the buffers of its traces away to the next one. Whatever went through ``value`` may be held by others as well,
    so it is copied first, once; what the step alone has seen (:meth:`own`, :meth:`set_own`) is not.

    What a sequence leaves may be put in later, at the first use (:meth:`set_later`): the work is saved where nobody asks.

    Parameters
    ----------
    shapes : dict of str to ShapeDtypeStruct

    Attributes
    ----------
    allocated : bool
        They are arrays.
    shared : bool
        Somebody beside the step may hold them.
    cleared : bool
        They are zero, since nobody has written others.
    """

    shapes: dict[str, Any]
    allocated: bool
    shared: bool
    cleared: bool
    _make: Callable[[], Any] | None  # makes them, where they are not made yet

    def __init__(self, shapes: dict[str, Any]) -> None:
        super().__init__(shapes)
        vars(self).update(shapes=shapes, allocated=False, shared=False, cleared=True, _make=None)

    @property
    def value(self) -> Any:
        vars(self)["shared"] = True
        return self.own()

    @value.setter
    def value(self, v: Any) -> None:
        self.set_own(v)
        vars(self)["shared"] = True

    def restore_value(self, v: Any) -> None:
        """Put in other traces; brainstate, which counts this as no write, does so where a transformation was traced."""
        super().restore_value(v)
        if not called_from(2).startswith("brainstate."):
            vars(self).update(_make=None, allocated=True, shared=True, cleared=False)

    def own(self) -> Any:
        """The traces, for who lets nobody else have them."""
        self._allocate()
        if self._plainly():
            return self._read_value()
        return brainstate.State.value.fget(self)  # type: ignore[attr-defined]

    def alone(self) -> Any | None:
        """The traces, if they are there and the step alone has seen them; for who knows that no transformation runs."""
        held = vars(self)
        return held["_value"] if held["allocated"] and not held["shared"] else None

    def put(self, traces: Any) -> None:
        """Put in traces that nobody else has, in the place of those that :meth:`alone` gave."""
        vars(self)["_value"] = traces

    def to_give(self, traces: Any) -> Any:
        """The traces as :meth:`own` gave them, in buffers that nobody else holds and that may be given away."""
        if gives_nothing_away() or not (self.shared or in_transformation()):
            return traces
        return jax.tree.map(lambda v: v if is_traced(v) else jnp.copy(v), traces)

    def set_own(self, traces: Any) -> None:
        """Put in traces that nobody else has."""
        vars(self)["_make"] = None
        self._allocate()
        if self._plainly():
            self._write_value(traces)
        else:
            brainstate.State.value.fset(self, traces)  # type: ignore[attr-defined]
        vars(self).update(shared=False, cleared=False)

    def set_later(self, make: Callable[[], Any]) -> None:
        """Put in what ``make`` gives, at the first use."""
        self.release()
        vars(self).update(shared=False, cleared=False, _make=make)

    @property
    def empty(self) -> bool:
        """Whether there is nothing but zeros, which are not even made."""
        return not self.allocated and self._make is None

    def copy_of(self, other: TraceState) -> None:
        """Be a copy of others of the same shapes."""
        self.set_own(jax.tree.map(jnp.copy, other.own()))
        vars(self)["cleared"] = other.cleared

    def clear(self, others: Any) -> None:
        """Traces of zero, but for ``others``, by name."""
        self.set_own({**self.zeros(), **others})
        vars(self)["cleared"] = True

    def _plainly(self) -> bool:
        """Whether nobody follows reads and writes of states: then there is no need to tell brainstate of them."""
        return not (recording() or in_transformation())

    def _allocate(self) -> None:
        if not self.allocated:
            with (
                jax.ensure_compile_time_eval()
            ):  # arrays, also where the first use is inside of a transformation
                self._write_value(self.zeros() if self._make is None else self._make())
            vars(self).update(allocated=True, shared=False, _make=None)

    def zeros(self) -> Any:
        """New arrays of zeros."""
        return zeros_of(self.shapes)

    def release(self) -> None:
        """Give the memory back; the next use finds zeros. Not for use inside of a transformation."""
        if self.allocated:
            self._write_value(self.shapes)
        vars(self).update(allocated=False, cleared=True, _make=None)


def zeros_of(shapes: Any) -> Any:
    """Arrays of zeros in the place of shapes."""

    def zeros(s: jax.ShapeDtypeStruct) -> Any:
        small = s.size * s.dtype.itemsize <= _COPIED
        if small:  # memory of its own, which may be given away
            return jax.device_put(np.zeros(s.shape, s.dtype), may_alias=False)
        return jnp.zeros(s.shape, s.dtype)

    return jax.tree.map(zeros, shapes)
