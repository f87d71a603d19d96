"""A loss function as a jaxpr, with the brainstate states and the environment that it reads beside its arguments."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import brainstate
import jax

from etcompile.frontend.environment import Environment, recorded, traced_with
from etcompile.frontend.host_calls import asks_host
from etcompile.frontend.jaxpr import inputs_used, run_jaxpr

__all__ = ["LossLayout", "TracedLoss", "trace_loss"]


@dataclasses.dataclass(frozen=True)
class LossLayout:
    """Where in a loss's jaxpr things are: numbers of its inputs and results.

    Attributes
    ----------
    outputs : range
        Inputs that are the model's outputs.
    states : tuple of range
        Inputs that are each state's value.
    value : int
        The result that is the loss.
    results : tuple of range
        Results that are each state's new value.
    """

    outputs: range
    states: tuple[range, ...]
    value: int
    results: tuple[range, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class TracedLoss:
    """A function of arrays: ``(constants, values of states, environment, arguments) -> (results, new values)``.

    Attributes
    ----------
    constants : list of arrays
        Arrays that the function closes over.
    states : tuple of brainstate.State
        What it reads or writes, in the order of ``values``.
    written : tuple of bool
        Which of the states it writes.
    environment : Environment
        What it reads in ``brainstate.environ``.
    asks_host : bool
        It calls back to Python while it runs.
    closed : jax.extend.core.ClosedJaxpr
        The function itself; ``layout`` says what its inputs and results are.
    """

    call: Callable[[list[Any], Sequence[Any], tuple[Any, ...], Any], tuple[Any, list[Any]]]
    constants: list[Any]
    states: tuple[Any, ...]
    written: tuple[bool, ...]
    environment: Environment
    asks_host: bool
    closed: Any
    layout: LossLayout


def trace_loss(fn: Callable, args: tuple[Any, ...]) -> TracedLoss:
    """Trace ``fn(*args)``; ``args`` are trees of shapes, the model's outputs first. What ``fn`` raises comes through as it is."""

    def with_entries(given: dict[str, Any]) -> Any:
        def run(around: dict[str, Any], *args: Any) -> Any:
            with brainstate.environ.context(**around):
                return fn(*args)

        stateful = brainstate.transform.StatefulFunction(run, return_only_write=False, name="loss")
        stateful.make_jaxpr(given, *args)
        return stateful

    traced, given, asked = traced_with(with_entries)
    all_args = (given, *args)
    closed = traced.get_jaxpr(*all_args)
    states = tuple(traced.get_states(*all_args))
    results = jax.tree.structure(traced.get_out_shapes(*all_args)[0])
    trees = [jax.tree.structure(s.value) for s in states]
    reads = inputs_used(closed)
    environment = recorded(asked, given, lambda k: k in reads)

    def call(
        constants: list[Any], values: Sequence[Any], moving: tuple[Any, ...], args: Any
    ) -> tuple[Any, list[Any]]:
        opened = closed.replace(consts=constants) if constants else closed
        around = environment.completed(moving, given)
        flat = run_jaxpr(opened, *jax.tree.leaves((around, args, list(values))))
        at = results.num_leaves
        found = jax.tree.unflatten(results, flat[:at])
        new = []
        for tree in trees:
            new.append(jax.tree.unflatten(tree, flat[at : at + tree.num_leaves]))
            at += tree.num_leaves
        return found, new

    written = tuple(traced.get_state_trace(*all_args).been_writen)
    layout = _layout(given, args, trees, results.num_leaves)
    return TracedLoss(
        call, list(closed.consts), states, written, environment, asks_host(closed), closed, layout
    )


def _layout(given: dict[str, Any], args: tuple[Any, ...], trees: Sequence[Any], results: int) -> LossLayout:
    """Inputs are the environment, the arguments and the states; results those of the function and the states."""

    def places(at: int) -> tuple[range, ...]:
        ends = list(itertools.accumulate((t.num_leaves for t in trees), initial=at))
        return tuple(itertools.starmap(range, itertools.pairwise(ends)))

    around = len(jax.tree.leaves(given))
    outputs = range(around, around + len(jax.tree.leaves(args[0])))
    return LossLayout(outputs, places(around + len(jax.tree.leaves(args))), 0, places(results))
