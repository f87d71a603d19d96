"""What every schedule is given, and what it says and does: the steps of a sequence, from states and traces to the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from etcompile.errors import EtcompileError, UnsupportedError
from etcompile.lowering.causal import CausalProgram, Traces
from etcompile.lowering.losses import Loss, LossValue, StepLoss, loss_and_cotangents, step_loss
from etcompile.lowering.sums import Sums, added, by_name
from etcompile.schedule import Schedule

__all__ = ["Call", "Found", "Item", "Loop", "Plan", "Run", "SequenceSchedule", "Steps", "in_parts"]

Array = Any

#: What belongs to one step's loss: its arguments, the targets first, and the mask of the step; None: no mask.
Item = tuple[tuple[Any, ...], Any]

#: What a call may give beside inputs and targets: ``target`` and ``modulator``.
Call = dict[str, Any]

#: Losses, and what else the loss function returned; of many steps with time on axis 0.
Found = tuple[Array, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loop:
    """What goes from one part of a sequence to the next: states, traces, sums of gradients, and what the loss writes."""

    states: list[Array]
    traces: Traces
    sums: Sums
    carried: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """What some steps are given, time on axis 0; or one step, without that axis.

    Attributes
    ----------
    inputs : pytree
        The user's inputs, joined with the environment.
    items : pytree
        What belongs to the loss of each.
    moving : list of arrays
        What of the call changes from step to step.
    """

    inputs: Any
    items: Item
    moving: list[Array]

    @property
    def count(self) -> int:
        """How many."""
        return jax.tree.leaves(self)[0].shape[0]

    def at(self, step: Any) -> Steps:
        """One of them."""
        return jax.tree.map(lambda v: v[step], self)

    def part(self, first: Any, count: int) -> Steps:
        """Some of them: slices of the call's own arrays, which are never copied whole."""
        return jax.tree.map(lambda v: lax.dynamic_slice_in_dim(v, first, count), self)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One call of a compiled program over a sequence: what is the same at all of its steps.

    Attributes
    ----------
    causal : CausalProgram
    params, weights : list of arrays
        Leaves of the parameters, and the effective weights of the sites that are made of them.
    loss : Loss
    of_step : callable
        The loss of one step on leaves.
    join : callable
        What a step's call brings beside its inputs, from its share of :attr:`Steps.moving`.
    """

    causal: CausalProgram
    params: list[Array]
    weights: list[Array]
    loss: Loss
    of_step: StepLoss
    join: Callable[[list[Array]], Call]

    @classmethod
    def of(
        cls, causal: CausalProgram, params: list[Array], loss: Loss, call: Call
    ) -> tuple[Run, list[Array]]:
        """A run, and what of its call changes from step to step."""
        moving, join = _moving(call)
        of_step = step_loss(causal.model.analysis.model, loss)
        return cls(causal, params, causal.model.hoist(params), loss, of_step, join), moving

    def inputs(self, xs: Any) -> list[Array]:
        """Leaves of the inputs of some steps."""
        return jax.vmap(self.causal.model.analysis.model.flatten_inputs)(xs)

    def call(self, items: Item, moving: list[Array]) -> Call:
        """What the rule may read of one step beside the model: its target and mask, and what came with the call."""
        args, mask = items
        target, of_examples, *_ = (*args, None)  # a plain loss has targets alone
        return {"target": target, "mask": of_examples if mask is None else mask, **self.join(moving)}

    def step(self, loop: Loop, given: Steps) -> tuple[Loop, Found]:
        """One online step: the trace program with the gradients of its loss added to the sums."""
        hoisted = all(site.hoisted for site in self.causal.program.header.sites)
        weights = self.weights if hoisted else self.causal.model.hoist(self.params)
        found, gradients, states, traces = self.step_gradients(
            weights, loop.states, loop.traces, loop.carried, given
        )
        return Loop(states, traces, added(loop.sums, gradients), found.carried), (found.value, found.aux)

    def step_gradients(
        self, weights: list[Array], states: list[Array], traces: Traces, carried: Any, given: Steps
    ) -> tuple[LossValue, Sums, list[Array], Traces]:
        """Loss and gradients of one step, its new states and traces."""

        def loss(outputs: list[Array], new: list[Array]) -> Any:
            return loss_and_cotangents(
                self.of_step, self.loss.program, outputs, new, self.params, carried, given.items
            )

        found, cotangents, sites, step, traces = self.causal.forward_with_gradients(
            weights,
            states,
            traces,
            self.causal.model.analysis.model.flatten_inputs(given.inputs),
            loss,
            self.call(given.items, given.moving),
        )
        return found, by_name(sites, cotangents.params), step.new_states, traces


def _moving(call: Call) -> tuple[list[Array], Callable[[list[Array]], Call]]:
    """What of a call changes from step to step, and how to join one step's share with the numbers that do not."""
    leaves, tree = jax.tree.flatten(call)
    fixed = [jnp.ndim(v) == 0 for v in leaves]

    def join(moving: list[Array]) -> Call:
        rest = iter(moving)
        return jax.tree.unflatten(tree, [v if f else next(rest) for v, f in zip(leaves, fixed, strict=True)])

    return [v for v, f in zip(leaves, fixed, strict=True) if not f], join


class SequenceSchedule:
    """One way to run a trace program over a sequence with the weights fixed, bound to the program.

    The gradient is the same for all, but where a program says that its credit depends on how a sequence is cut (windows).
    A subclass has a ``name``, for ``etcompile.Schedule(how=...)``, and the methods :meth:`size` and :meth:`part`; what it can
    run it says in :meth:`refusal`. Hoisted weights, devices, the loop over parts, the part that remains, and sums of
    gradients from call to call are not its business.

    Attributes
    ----------
    causal : CausalProgram
        The program, with :attr:`causal.program`, ready to run.
    name : str
        Of the class.
    loops : bool
        Of the class: its :meth:`part` is a loop over any number of steps, and gets all of a call.
    cuts_credit : bool
        Whether credit ends where a part ends, so that the steps that are handled together change the gradient.

    A schedule may also run a sequence without a loss (:meth:`forward_size` and :meth:`forward`); where it does not, steps run one
    after the other.

    Examples
    --------
    >>> import etcompile, jax, jax.numpy as jnp
    >>> @etcompile.register_schedule
    ... class Unrolled(etcompile.SequenceSchedule):
    ...     '''Four steps at a time, without a loop.'''
    ...
    ...     name = "unrolled"
    ...
    ...     def size(self, schedule, steps, wanted):
    ...         return min(4, steps)
    ...
    ...     def part(self, run, loop, steps):
    ...         found = []
    ...         for k in range(steps.count):
    ...             loop, of_step = run.step(loop, steps.at(k))
    ...             found.append(of_step)
    ...         return loop, jax.tree.map(lambda *v: jnp.stack(v), *found)
    >>> schedule = etcompile.Schedule(how="unrolled")
    """

    name: ClassVar[str]
    loops: ClassVar[bool] = False

    def __init__(self, causal: CausalProgram) -> None:
        self.causal = causal

    @property
    def cuts_credit(self) -> bool:
        return False

    def refusal(self) -> EtcompileError | None:
        """Why the program cannot be run like this; None: it can.

        Without a method of its own: programs of windows, and traces that are too large to be stored.
        """
        program = self.causal.program
        if program.window is not None:
            return UnsupportedError(
                f"{program.name} runs in windows.",
                got=f"schedule=etcompile.Schedule(how={self.name!r})",
                expected="how=None, or 'windows'",
            )
        for site in self.causal.carried.too_large.values():
            return site.cannot_store("chunk='auto': the whole sequence is one chunk.")
        return None

    def size(self, schedule: Schedule, steps: int, wanted: int | str | None) -> int:
        """Steps to handle together of a call over ``steps`` steps; 0: this schedule is not the one for them.

        ``wanted`` is what the call asks for, None where it asks for nothing; ``schedule`` what the user set for all calls.
        """
        raise NotImplementedError

    @property
    def bytes_of_a_step(self) -> int:
        """What each of many steps that are handled together holds, about; 0 where nothing is held for all of them."""
        return 0

    @property
    def shares(self) -> dict[str, float]:
        """Sites of which a step takes some elements alone, with the part that it may take."""
        return {}

    @property
    def in_order(self) -> SequenceSchedule:
        """What runs instead where a loss does something beside its results, which comes in the order of the steps."""
        return self

    @property
    def held_back(self) -> str:
        """Why long sequences do not run like this, where all but what a step does beside its results is for it; else none."""
        return ""

    def caution(self, size: int, steps: int) -> str:
        """What a user should be told of running ``steps`` steps like this."""
        return ""

    def part(self, run: Run, loop: Loop, steps: Steps) -> tuple[Loop, Found]:
        """Run some steps: the new loop, and the losses with what else the loss gave, time on axis 0."""
        raise NotImplementedError

    def forward_size(self, schedule: Schedule, steps: int) -> int:
        """Steps to handle together of a call without a loss; 0: one after the other."""
        return 0

    def forward(self, weights: list[Array], loop: Loop, inputs: list[Array]) -> tuple[Loop, list[Array]]:
        """Run some steps without a loss: the new loop, and the outputs, time on axis 0."""
        raise NotImplementedError

    def over(self, run: Run, loop: Loop, steps: Steps, size: int) -> tuple[Loop, Found]:
        """Run all steps of a call, ``size`` together."""
        size = steps.count if self.loops else size
        return in_parts(lambda loop, some: self.part(run, loop, some), loop, steps, size)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call over a sequence is run.

    Attributes
    ----------
    how : SequenceSchedule
    size : int
        Steps handled together; 0: all of a call, so that calls of all lengths are one function.
    """

    how: SequenceSchedule
    size: int

    def together(self, steps: int) -> int:
        """How many of ``steps`` steps are handled together."""
        return min(self.size or steps, steps)

    def over(self, run: Run, loop: Loop, steps: Steps) -> tuple[Loop, Found]:
        """Run all steps of a call."""
        return self.how.over(run, loop, steps, self.together(steps.count))


def in_parts(
    one: Callable[[Loop, Steps], tuple[Loop, Any]],
    loop: Loop,
    steps: Steps,
    size: int,
    last: Callable[[Loop, Steps], tuple[Loop, Any]] | None = None,
) -> tuple[Loop, Any]:
    """Run ``one`` over parts of ``size`` steps and what remains; with ``last``, that runs the last part, whatever its length."""
    count = steps.count
    if count <= size:
        return (last or one)(loop, steps)
    whole = (count if last is None else count - 1) // size
    parts = []
    if whole > 1:
        loop, found = lax.scan(lambda now, k: one(now, steps.part(k * size, size)), loop, jnp.arange(whole))
        parts.append(jax.tree.map(lambda v: v.reshape(v.shape[0] * v.shape[1], *v.shape[2:]), found))
    else:
        loop, found = one(loop, steps.part(0, size))
        parts.append(found)
    if whole * size < count:
        loop, found = (last or one)(loop, steps.part(whole * size, count - whole * size))
        parts.append(found)
    return loop, parts[0] if len(parts) == 1 else jax.tree.map(lambda *v: jnp.concatenate(v), *parts)
