"""A sparse product seen as one: weights times what their senders send, summed at their receivers, by events.

    y[s] = w[s] x[send(s)],    out[r] = sum over s with recv(s) = r of y[s]

As a site its result is ``out``, with a number for each receiver; credits of y are those of ``out`` at the receivers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from etcompile.frontend.jaxpr import Operation, run_operations
from etcompile.precision import accumulator
from etcompile.sites.events import Synapses
from etcompile.sites.gathered import Gathered
from etcompile.sites.operation import Array, Presynaptic

__all__ = ["Summed"]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Summed(Gathered):
    """A gathered weight and the sum of its products; ``y`` is the sum.

    Attributes
    ----------
    synapses : Synapses
        The elements of the weight with the flat places, in x and in the sum, of what each reads and where it is added.
    summing : tuple of Operation
        What makes the sum of the products.
    each : int
        Variable of the products.
    """

    unfiltered = True

    synapses: Synapses
    summing: tuple[Operation, ...]
    each: int

    @property
    def shared(self) -> tuple[tuple[int, int], ...]:
        return ()

    @property
    def contracted_axes(self) -> tuple[int, ...]:
        return ()

    def respond(self, v: Array, x: Presynaptic | Array) -> Array:
        """The sums, as the operations of the step make them."""
        each = Gathered.respond(self, v, x)
        made = run_operations(self.summing, {self.each: each})
        return made[self.summing[-1].outputs[0]]

    def by_events(self, weight: Array, x: Array) -> Array:
        """The sums, of the synapses whose senders send."""
        sent = self.factor((x,))
        found = self.synapses.arriving(
            weight.ravel(), sent.ravel(), lambda: self.respond(weight, (x,)).ravel()
        )
        return found.reshape(self.y.shape)

    def pullback(self, x: Presynaptic | Array, credit: Array) -> Array:
        sent = self.factor(x) if isinstance(x, tuple) else x
        found = self.synapses.product(credit.ravel(), sent.ravel())
        return found.reshape(self.weight.shape).astype(self.weight.dtype)

    def pullback_of_steps(self, x: Presynaptic | Array, credit: Array) -> Array:
        """The sum over steps of :meth:`pullback`, of the synapses whose senders send."""
        return self.met(jnp.zeros(self.weight.shape, accumulator(self.weight.dtype)), x, credit).astype(
            self.weight.dtype
        )

    def met(self, total: Array, x: Presynaptic | Array, credit: Array) -> Array:
        """A total of the weight's shape with :meth:`pullback` of the credits of all steps added."""
        sent = jax.vmap(lambda *v: self.factor(v))(*x) if isinstance(x, tuple) else x
        flat = credit.reshape(len(credit), -1), sent.reshape(len(sent), -1), total.ravel()
        return self.synapses.meeting(*flat).reshape(self.weight.shape)

    def at_synapses(self, values: Any) -> Array:
        """For each synapse what an array of the sums' shape has at its receiver."""
        return self.synapses.of_receivers(values.ravel()).reshape(self.weight.shape)

    def one_of_each(self, values: Array) -> Array:
        """For each receiver what an array of the weight's shape has at one of its synapses; zero where there is none."""
        return self.synapses.one_of_each(values.ravel()).reshape(self.y.shape)

    def sent_to(self, factor: Array) -> Array:
        """For each synapse what its sender sends."""
        return self.synapses.of_senders(factor.ravel()).reshape(self.weight.shape)
