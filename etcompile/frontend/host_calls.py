"""Whether a program asks the host for something while it runs: a call that can fail when arrays were already given away."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from etcompile.frontend.jaxpr import inner_programs

__all__ = ["asks_host", "graph_asks_host"]

#: Prints tell the host something and want no answer; they do not fail.
_TOLD = frozenset({"debug_print"})


def asks_host(jaxpr: Any) -> bool:
    """Whether a jaxpr calls back to Python, itself or in a program inside of it."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return any(_asks(eqn.primitive, eqn.params) for eqn in jaxpr.eqns)


def graph_asks_host(operations: Iterable[Any]) -> bool:
    """The same of the operations of a :class:`~etcompile.frontend.jaxpr.Graph`."""
    return any(
        _asks(o.primitive, o.params) or (o.loop is not None and graph_asks_host(o.loop.body.operations))
        for o in operations
    )


def _asks(primitive: Any, params: dict[str, Any]) -> bool:
    if params.get("callback") is not None and primitive.name not in _TOLD:
        return True
    return any(map(asks_host, inner_programs(params)))
