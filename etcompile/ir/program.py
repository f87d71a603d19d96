"""The intermediate representation: recurrence equations over values that exist at every time step.

A :class:`TraceProgram` is an immutable list of typed equations in the manner of a synchronous dataflow language. A
reference is to ``v[t]`` or to ``v[t-1]`` (carried, zero at the start).
Programs hold no arrays, no states and no jax objects: they print, parse back, compare and hash.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

from etcompile.ir.header import Header
from etcompile.ir.types import Type
from etcompile.shown import html_of

__all__ = ["Argument", "Equation", "Gradient", "Ref", "Symbol", "TraceProgram", "made_from"]


@dataclasses.dataclass(frozen=True)
class Ref:
    """A value at this step (``delay`` 0) or the step before (-1)."""

    name: str
    delay: int = 0

    def __str__(self) -> str:
        return f"{self.name}[t{self.delay:+d}]" if self.delay else f"{self.name}[t]"


@dataclasses.dataclass(frozen=True)
class Symbol:
    """The name of a group, relation, site or function."""

    name: str

    def __str__(self) -> str:
        return self.name


Argument = Ref | Symbol | float | int


@dataclasses.dataclass(frozen=True)
class Equation:
    """``name[t] = op(*args) : type``."""

    name: str
    op: str
    args: tuple[Argument, ...]
    type: Type

    @cached_property
    def refs(self) -> tuple[Ref, ...]:
        return tuple(a for a in self.args if isinstance(a, Ref))


@dataclasses.dataclass(frozen=True)
class Gradient:
    """``value`` is added to the gradient of the site's effective weight at every step."""

    site: str
    value: Ref


@dataclasses.dataclass(frozen=True, repr=False)
class TraceProgram:
    """An online-learning rule for one model.

    Attributes
    ----------
    name : str
        Name of the algorithm.
    header : Header
        The model's groups, sites, relations and cuts.
    equations : tuple of Equation
        In an order in which every ``v[t]`` is defined before it is used.
    gradients : tuple of Gradient
    exact : bool
        Whether the sum of the gradients over a sequence equals backpropagation through time.
    window : int or None
        None: credit within the step is that of one step. A number: sequences are cut into windows of so many steps (0: the
        whole call), inside of which credit is that of backpropagation through time.
    end : str or None
        What stands for credit from beyond a window: nothing, or ``"synthetic"``, a prediction from the states at its end.
    """

    name: str
    header: Header
    equations: tuple[Equation, ...] = ()
    gradients: tuple[Gradient, ...] = ()
    exact: bool = False
    window: int | None = None
    end: str | None = None

    @cached_property
    def _named(self) -> Mapping[str, Equation]:
        return {equation.name: equation for equation in reversed(self.equations)}

    def equation(self, name: str) -> Equation:
        return self._named[name]

    def uses(self) -> Iterator[Ref]:
        for equation in self.equations:
            yield from equation.refs
        for gradient in self.gradients:
            yield gradient.value

    @cached_property
    def carried(self) -> tuple[str, ...]:
        """Names of the values that some equation or gradient reads one step later, in program order."""
        late = {ref.name for ref in self.uses() if ref.delay == -1}
        return tuple(e.name for e in self.equations if e.name in late)

    def __str__(self) -> str:
        from etcompile.ir.printer import format_program

        return format_program(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_of(self)


def made_from(equations: Iterable[Equation], names: Iterable[str]) -> set[str]:
    """Values that these are made from, at this or any earlier step; they themselves included."""
    by_name = {e.name: e for e in equations}
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found and name in by_name:
            found.add(name)
            waiting += [ref.name for ref in by_name[name].refs]
    return found
