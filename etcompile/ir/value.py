"""Values of a program that is being written: what a learning rule computes with."""

from __future__ import annotations

from typing import Any, Protocol

from etcompile.errors import ProgramError
from etcompile.ir.program import Ref
from etcompile.ir.types import Type

__all__ = ["Value", "Writer"]


class Writer(Protocol):
    """What a value needs of the program that it belongs to."""

    def op(self, op: str, *args: Any) -> Value:
        """Append an equation and return its value."""
        ...


class Value:
    """A value of the program at one step; ``+ - * / @`` and :attr:`prev` build new ones."""

    def __init__(self, builder: Writer, ref: Ref, kind: Type) -> None:
        self._builder, self.ref, self.type = builder, ref, kind

    @property
    def prev(self) -> Value:
        """The value one step before; zero at the start."""
        if self.ref.delay:
            raise ProgramError(
                f"{self.ref} already lies one step back.", hint="carry it one step more with p.recur."
            )
        return Value(self._builder, Ref(self.ref.name, -1), self.type)

    def __add__(self, other: Value | float) -> Value:
        return self._builder.op("add", self, self._as_value(other))

    def __radd__(self, other: float) -> Value:
        return self._builder.op("add", self._as_value(other), self)

    def __sub__(self, other: Value | float) -> Value:
        return self._builder.op("sub", self, self._as_value(other))

    def __rsub__(self, other: float) -> Value:
        return self._builder.op("sub", self._as_value(other), self)

    def __mul__(self, other: Value | float) -> Value:
        return self._builder.op("mul", self, other)

    def __rmul__(self, other: float) -> Value:
        return self._builder.op("mul", float(other), self)

    def __truediv__(self, other: Value | float) -> Value:
        return self._builder.op("div", self, self._as_value(other))

    def __matmul__(self, other: Value) -> Value:
        return self._builder.op("matmul", self, other)

    def _as_value(self, other: Value | float) -> Value:
        return other if isinstance(other, Value) else self._builder.op("number", float(other))

    def __repr__(self) -> str:
        return f"{self.ref} : {self.type}"
