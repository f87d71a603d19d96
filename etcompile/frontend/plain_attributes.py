"""State that a model keeps in a plain attribute: found after a trace, by the tracers that it left there."""

from __future__ import annotations

import dis
import os
import types
from typing import Any

import jax
import numpy as np

from etcompile.errors import ModelError
from etcompile.frontend.jaxpr import is_traced

__all__ = ["plain_attributes", "refuse_assigned"]

_Held = list[tuple[str, Any, dict[str, Any]]]


def plain_attributes(model: Any) -> _Held:
    """The attributes of all modules of a model that hold arrays outside of any state."""
    held = []
    for path, node in model.nodes().items():
        arrays = {
            name: value for name, value in vars(node).items() if isinstance(value, (jax.Array, np.ndarray))
        }
        held.append((".".join(map(str, path)), node, arrays))
    return held


def refuse_assigned(name: str, held: _Held) -> None:
    """Put arrays back where a trace left tracers in their place, and raise :class:`ModelError` for them."""
    found, lines = [], []
    for path, node, arrays in held:
        for attribute, old in arrays.items():
            if is_traced(vars(node).get(attribute)):
                setattr(node, attribute, old)
                found.append(f"{path}.{attribute}" if path else attribute)
                lines.append(_assigned_at(type(node), attribute))
    if found:
        raise ModelError(
            f"{name} assigns {', '.join(found)} during a step, which is a plain attribute and no state.",
            where=lines[0],
            got="an array that a step changes",
            expected="a brainstate state",
            hint=f"make it one, self.{found[0].split('.')[-1]} = brainstate.HiddenState(...), and read and assign its .value.",
        )


def _assigned_at(cls: type, attribute: str) -> str | None:
    """``file:line`` of the first assignment to an attribute in the methods of a class, outside of its making."""
    for base in cls.__mro__:
        for name, method in vars(base).items():
            if isinstance(method, types.FunctionType) and name not in (
                "__init__",
                "init_state",
                "reset_state",
            ):
                for instruction in dis.get_instructions(method):
                    line = instruction.positions.lineno if instruction.positions else None
                    if instruction.opname == "STORE_ATTR" and instruction.argval == attribute and line:
                        return f"{os.path.basename(method.__code__.co_filename)}:{line}"
    return None
