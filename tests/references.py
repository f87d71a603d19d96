"""What the oracles and the compiler say of each model of the zoo, computed once in a process for all tests that ask."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import brainstate
import jax
import numpy as np
import pytest
from numpy_evaluation import interpreted
from numpy_gradients import vjp
from oracles import Online, Tree, dense_d_rtrl, identity, keep, summed, time_slice
from shared import shared
from zoo import CASES, Case, Function
from zoo.base import Built

import etcompile

#: Models with an instrumented step, written by hand.
INSTRUMENTED = [c for c in CASES if "no_step" not in c.tags]


def zoo_cases(cases: Iterable[Case]) -> list[Any]:
    """Parameters of a test: cases with their names."""
    return [pytest.param(c, id=c.name) for c in cases]


def fresh(case: Case) -> Built:
    """The model with its states at their random values; the same at every call.

    Models that draw take the numbers that come next, so what runs one is made after all that is `shared`.
    """
    brainstate.random.seed(0)  # stock modules draw their weights
    return case()


def model_of(built: Built):
    """What `etcompile.compile` takes."""
    model = built.model
    if isinstance(model, Function):
        return etcompile.from_function(model.fn, model.params, model.state)
    return model


def compiled(built: Built, algo: Any = "d_rtrl", **options):
    """The compiled step of a built case, at its random states."""
    return etcompile.compile(model_of(built), time_slice(built.xs, 0), algo=algo, **options)


@dataclass(frozen=True)
class Autodiff:
    """What jax says of the model itself, over the sequence.

    Attributes
    ----------
    losses : jax.Array
        (T,)
    outs, states : pytree
        Of every step, stacked.
    first, total : pytree
        The gradients of the first step's loss and of the sum of all.
    losses_of : callable
        The losses at other parameters.
    """

    losses: jax.Array
    outs: Tree
    states: Tree
    first: Tree
    total: Tree
    losses_of: Callable[[Tree], jax.Array]


@shared
def autodiff(case: Case) -> Autodiff:
    """Full backpropagation through time, and that of the first step, traced once."""
    built = fresh(case)
    step = built.plain_step

    def losses_of(params):
        def body(state, inputs):
            x, target = inputs
            state, out = step(params, state, x, cut=identity, put=keep)
            return state, (built.loss_fn(out, *target), out, state)

        _, (losses, outs, states) = jax.lax.scan(body, built.state, (built.xs, tuple(built.targets)))
        return losses, (outs, states)

    losses, pull, (outs, states) = vjp(losses_of, built.params, has_aux=True)
    (first,) = pull(np.eye(len(losses), dtype=losses.dtype)[0])
    (total,) = pull(np.ones_like(losses))
    forward = interpreted(lambda params: losses_of(params)[0])
    return Autodiff(losses, outs, states, first, total, forward)


@shared
def dense(case: Case) -> Online:
    """The dense reference of D-RTRL, from the instrumented step."""
    b = fresh(case)
    return dense_d_rtrl(b.step, b.params, b.state, b.xs, b.targets, b.loss_fn, b.groups)


@shared
def step_of(case: Case):
    """A compiled step to look at: its program, graph and report. `learned` runs it."""
    return compiled(fresh(case))


@dataclass(frozen=True)
class Learned:
    """What `step_of` gave, step by step: losses (T,), gradients of each step and their sum."""

    losses: np.ndarray
    grads_per_step: list[Tree]
    grads: Tree


@shared
def learned(case: Case) -> Learned:
    """D-RTRL by one call for each step."""
    step, built = step_of(case), fresh(case)
    run = step.value_and_grad(built.loss_fn)
    losses, grads = [], []
    for t in range(len(jax.tree.leaves(built.xs)[0])):
        loss, grad = run(time_slice(built.xs, t), *time_slice(tuple(built.targets), t))
        losses.append(loss)
        grads.append(grad)
    return Learned(np.stack(losses), grads, summed(grads))
