"""A loss function as a jaxpr, with the brainstate states that it reads and writes beside its arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import brainstate
import jax

from etcompile.frontend.host_calls import asks_host
from etcompile.frontend.jaxpr import run_jaxpr

__all__ = ["TracedLoss", "trace_loss"]


@dataclasses.dataclass(frozen=True, eq=False)
class TracedLoss:
    """A function of arrays: ``(constants, values of states, arguments) -> (results, new values)``.

    Attributes
    ----------
    constants : list of arrays
        Arrays that the function closes over.
    states : tuple of brainstate.State
        What it reads or writes, in the order of ``values``.
    written : tuple of bool
        Which of the states it writes.
    asks_host : bool
        It calls back to Python while it runs.
    """

    call: Callable[[list[Any], Sequence[Any], Any], tuple[Any, list[Any]]]
    constants: list[Any]
    states: tuple[Any, ...]
    written: tuple[bool, ...]
    asks_host: bool


def trace_loss(fn: Callable, args: tuple[Any, ...]) -> TracedLoss:
    """Trace ``fn(*args)``; ``args`` are trees of shapes. What ``fn`` raises comes through as it is."""
    traced = brainstate.transform.StatefulFunction(fn, return_only_write=False, name="loss")
    traced.make_jaxpr(*args)
    closed = traced.get_jaxpr(*args)
    states = tuple(traced.get_states(*args))
    results = jax.tree.structure(traced.get_out_shapes(*args)[0])
    trees = [jax.tree.structure(s.value) for s in states]

    def call(constants: list[Any], values: Sequence[Any], given: Any) -> tuple[Any, list[Any]]:
        opened = closed.replace(consts=constants) if constants else closed
        flat = run_jaxpr(opened, *jax.tree.leaves((given, list(values))))
        at = results.num_leaves
        found = jax.tree.unflatten(results, flat[:at])
        new = []
        for tree in trees:
            new.append(jax.tree.unflatten(tree, flat[at : at + tree.num_leaves]))
            at += tree.num_leaves
        return found, new

    return TracedLoss(
        call, list(closed.consts), states, tuple(traced.get_state_trace(*args).been_writen), asks_host(closed)
    )
