"""Sums over the synapses whose senders are not zero: work in proportion to spikes.

Synapses are ordered by sender once, and each sender's are divided into *blocks* of a few. Who sends is found from the values of
a step; their blocks are listed, at most so many that arrays have a fixed size; and what a sum takes is the synapses of these
blocks, some thousand at a time, as many times as there are such blocks. A zero adds nothing, so the sum is the same for all
values, spikes or not. Where more is sent than the list holds, all synapses are summed.

A sum over steps has no need to go step by step. It goes in *rounds*: the first takes each sender's first event, whenever that
is, the second its second, and so on until nobody has more. So there are as many rounds as the busiest sender has events, and
each synapse's terms are added in the order of time. A round in which many send reads all synapses as they lie in memory, which
costs a fraction of what adding at listed places does; one in which few are left lists them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["Synapses"]

Array = Any

_IN_BOUNDS = lax.GatherScatterMode.PROMISE_IN_BOUNDS
#: Synapses of a block, at least and at most.
_NARROW, _WIDE = 4, 32
#: Synapses that are summed together: enough for one call of each kernel, few enough that little of the last part is empty.
_TOGETHER = 1 << 15
#: Of all synapses the part below which a round of events costs less at listed places, each some eight times as much.
_FEW = 1 / 8
#: Elements that a number of 32 bits cannot tell apart.
_MOST = 1 << 31


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Listed:
    """The blocks of synapses that senders of one step have.

    Attributes
    ----------
    fits : bool
        Whether the list holds all of them; if not, it is empty.
    count : int
        Blocks.
    start : array of int
        The place, by sender, at which each begins.
    size : array of int
        How many synapses each has.
    unit : array of int
        Whose each is.
    """

    fits: Array
    count: Array
    start: Array
    size: Array
    unit: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Part:
    """Some of the blocks of a list, synapse by synapse.

    Attributes
    ----------
    places : array of int
        Of each block's synapses, by sender.
    there : array of bool
        Which of them are synapses of that sender.
    unit : array of int
        The sender of each block.
    """

    places: Array
    there: Array
    unit: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Round:
    """An event of each sender, the first, second or a later one.

    Attributes
    ----------
    step : array of int
        When; of those who have no more of them any step.
    sent : array
        What is sent; of those zero.
    left : int
        Blocks of the others.
    after : array of int
        Which step to look from for the next.
    """

    step: Array
    sent: Array
    left: Array
    after: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Synapses:
    """Synapses by the numbers of the units at their ends.

    Parameters
    ----------
    sender, receiver : array of int
        One number for each synapse.
    senders, receivers : int
        How many units there are.
    share : float
        Of all synapses those that a step may have to sum, at most: what the list has room for.

    Examples
    --------
    >>> import jax.numpy as jnp, numpy as np
    >>> two = Synapses(np.array([0, 2]), np.array([1, 1]), senders=3, receivers=2, share=0.5)
    >>> two.arriving(jnp.array([5.0, 7.0]), jnp.array([1.0, 0.0, 0.0]), lambda: jnp.zeros(2)).tolist()
    [0.0, 5.0]
    """

    sender: np.ndarray
    receiver: np.ndarray
    senders: int
    receivers: int
    share: float

    # -- order and blocks -----------------------------------------------------------------------------------------

    @cached_property
    def _degrees(self) -> np.ndarray:
        return np.bincount(self.sender, minlength=self.senders)

    @cached_property
    def width(self) -> int:
        """Synapses of a block: few enough that little of the last one of each sender is empty."""
        sending = max(1, int(np.count_nonzero(self._degrees)))
        wanted = self.sender.size / sending / 4
        return min(_WIDE, max(_NARROW, 1 << max(0, int(math.log2(max(1.0, wanted))))))

    @cached_property
    def capacity(self) -> int:
        """Blocks of a step that there is room for."""
        return self._part_of_all(self.share)

    def _part_of_all(self, share: float) -> int:
        return max(1, math.ceil(share * int(self._blocks.sum())))

    @cached_property
    def _blocks(self) -> np.ndarray:
        """How many each sender has, with one more that has none."""
        return np.append(-(-self._degrees // self.width), 0).astype(np.int32)

    @cached_property
    def _first(self) -> np.ndarray:
        """The place at which the synapses of each sender begin."""
        return np.concatenate([[0], np.cumsum(self._degrees), [self.sender.size]]).astype(np.int32)

    @cached_property
    def _order(self) -> np.ndarray | None:
        """The synapse at each place; None where they are in this order as they are."""
        if (np.diff(self.sender) >= 0).all():
            return None
        order = np.argsort(self.sender, kind="stable").astype(np.int32)
        return np.pad(order, (0, self.width))

    @cached_property
    def _receivers(self) -> np.ndarray:
        """The receiver at each place, and some more, since a block may end behind the last place."""
        found = self.receiver if self._order is None else self.receiver[self._order[: self.receiver.size]]
        return np.pad(found.astype(np.int32), (0, self.width))

    # -- lists ----------------------------------------------------------------------------------------------------

    def listed(self, sent: Array, capacity: int) -> _Listed:
        """The synapses of those who send, of which ``sent`` has a number for each unit; there is room for ``capacity`` blocks."""
        live = (sent != 0) & (self._degrees > 0)
        needed = jnp.sum(jnp.where(live, self._blocks[:-1], 0))
        fits = needed <= capacity
        units = min(self.senders, capacity)
        (who,) = jnp.nonzero(live, size=units, fill_value=self.senders)
        counts = jnp.asarray(self._blocks)[who]
        ends = jnp.cumsum(counts)
        together = self._together(capacity)
        room = -(-capacity // together) * together
        numbers = jnp.arange(room, dtype=jnp.int32)
        after = jnp.zeros(room + 1, jnp.int32).at[jnp.minimum(ends, room)].add(1)
        of = jnp.minimum(jnp.cumsum(after)[:-1], units - 1)
        unit = jnp.minimum(who[of], self.senders - 1)
        start = jnp.asarray(self._first)[unit] + (numbers - (ends - counts)[of]) * self.width
        left = jnp.where(fits & (numbers < needed), jnp.asarray(self._first)[unit + 1] - start, 0)
        start = jnp.where(left > 0, start, 0)
        return _Listed(fits, jnp.where(fits, needed, 0), start, jnp.minimum(left, self.width), unit)

    def _together(self, capacity: int) -> int:
        """Blocks that are summed together, of a list with room for so many."""
        return min(capacity, max(1, _TOGETHER // self.width))

    def _over(self, found: _Listed, capacity: int, one: Callable[[_Part, Any], Any], start: Any) -> Any:
        """``one`` for each part of a list that holds some blocks, after each other."""
        along, together = jnp.arange(self.width, dtype=jnp.int32), self._together(capacity)

        def of_part(k: Array, total: Any) -> Any:
            start, size, unit = (
                lax.dynamic_slice(v, (k * together,), (together,))[:, None]
                for v in (found.start, found.size, found.unit)
            )
            return one(_Part(start + along, along < size, unit), total)

        return lax.fori_loop(0, -(-found.count // together), of_part, start)

    # -- sums -----------------------------------------------------------------------------------------------------

    def arriving(self, weights: Array, sent: Array, of_all: Callable[[], Array]) -> Array:
        """What arrives at each receiver: the sum of weight times what its senders send; ``of_all`` makes it of all synapses."""
        found = self.listed(sent, self.capacity)

        def one(part: _Part, total: Array) -> Array:
            product = _taken(weights, self._synapses(part.places)) * _taken(sent, part.unit)
            each = jnp.where(part.there, product, jnp.zeros((), product.dtype))
            return _added(total, _taken(self._receivers, part.places), each)

        def of_listed() -> Array:
            zeros = jnp.zeros(self.receivers, jnp.result_type(weights, sent))
            return self._over(found, self.capacity, one, zeros)

        return lax.cond(found.fits, of_listed, of_all)

    def meeting(self, credit: Array, sent: Array, total: Array) -> Array:
        """``total``, a number for each synapse, and the credits of its receiver times what its sender sends, over all steps.

        ``credit`` and ``sent`` have time on axis 0.
        """
        few = self._part_of_all(_FEW)
        following = _following(sent)

        def next_round(after: Array) -> _Round:
            return self._round(following, sent, after)

        def in_order(state: tuple[_Round, Array]) -> tuple[_Round, Array]:
            now, total = state
            asked = _taken(credit, self.of_senders(now.step), self.receiver)
            made = total + (asked * self.of_senders(now.sent)).astype(total.dtype)
            return next_round(_apart(now.after)), made

        def at_places(state: tuple[_Round, Array]) -> tuple[_Round, Array]:
            now, total = state

            def one(part: _Part, total: Array) -> Array:
                asked = _taken(credit, _taken(now.step, part.unit), _taken(self._receivers, part.places))
                product = asked * _taken(now.sent, part.unit)
                each = jnp.where(part.there, product, jnp.zeros((), product.dtype))
                return _added(total, self._synapses(part.places), each.astype(total.dtype))

            total = self._over(self.listed(now.sent, few), few, one, total)
            return next_round(now.after), total

        state = next_round(jnp.zeros(self.senders, jnp.int32)), total
        state = lax.while_loop(lambda state: state[0].left > few, in_order, state)
        return lax.while_loop(lambda state: state[0].left > 0, at_places, state)[1]

    def _round(self, following: Array, sent: Array, after: Array) -> _Round:
        """The first event of each sender at the step ``after`` or later."""
        steps, unit = len(sent), jnp.arange(self.senders, dtype=jnp.int32)
        found = _taken(following, after, unit)
        step = jnp.minimum(found, steps - 1)
        now = jnp.where(found < steps, _taken(sent, step, unit), jnp.zeros((), sent.dtype))
        left = jnp.sum(jnp.where(found < steps, self._blocks[:-1], 0))
        return _Round(step, now, left, jnp.minimum(found + 1, steps))

    def product(self, credit: Array, sent: Array) -> Array:
        """For each synapse the credit of its receiver times what its sender sends."""
        return self.of_receivers(credit) * self.of_senders(sent)

    def of_receivers(self, values: Array) -> Array:
        """For each synapse the value at its receiver."""
        return _taken(values, self.receiver)

    def one_of_each(self, values: Array) -> Array:
        """For each receiver the value at one of its synapses; zero where there is none."""
        found = _taken(values, np.maximum(self._last, 0))
        return jnp.where(self._last >= 0, found, jnp.zeros((), values.dtype))

    @cached_property
    def _last(self) -> np.ndarray:
        found = np.full(self.receivers, -1, np.int32)
        found[self.receiver] = np.arange(self.receiver.size, dtype=np.int32)
        return found

    def of_senders(self, values: Array) -> Array:
        """For each synapse the value at its sender."""
        return _taken(values, self.sender)

    def _synapses(self, places: Array) -> Array:
        if self._order is None:
            return jnp.minimum(places, self.sender.size - 1)
        return _taken(self._order, places)


def _following(sent: Array) -> Array:
    """For each step, and the one behind the last, when each unit sends next, then or later; the number of steps if never."""
    steps = len(sent)

    def before(following: Array, given: tuple[Array, Array]) -> tuple[Array, Array]:
        step, sent = given
        found = jnp.where(sent != 0, step, following)
        return found, found

    never = jnp.full(sent.shape[1:], steps, jnp.int32)
    found = lax.scan(before, never, (jnp.arange(steps, dtype=jnp.int32), sent), reverse=True)[1]
    return jnp.concatenate([found, never[None]])


_ADDED = lax.ScatterDimensionNumbers(
    update_window_dims=(), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,)
)


def _taken(values: Array, *places: Array) -> Array:
    """Elements of an array, at places along each of its axes all of which are there.

    Where 32 bits can number all elements a place is one number: one for each axis would be written to memory first.
    """
    values = jnp.asarray(values)
    if values.size < _MOST:
        number = places[0]
        for size, place in zip(values.shape[1:], places[1:], strict=True):
            number = number * size + place
        values, places = values.ravel(), (number,)
    axes = tuple(range(len(places)))
    numbers = lax.GatherDimensionNumbers(offset_dims=(), collapsed_slice_dims=axes, start_index_map=axes)
    at = jnp.concatenate([one[..., None] for one in jnp.broadcast_arrays(*places)], axis=-1)
    return lax.gather(values, at, numbers, (1,) * len(places), mode=_IN_BOUNDS)


def _added(total: Array, places: Array, values: Array) -> Array:
    """A flat array with values added at places all of which are there."""
    return lax.scatter_add(total, places.reshape(-1, 1), values.ravel(), _ADDED, mode=_IN_BOUNDS)


def _apart(values: Array) -> Array:
    """The same values, put to their places one by one.

    XLA's CPU compiler (as of JAX 0.12) runs a loop in which nothing is scattered as one function, on one thread.
    """
    return jnp.zeros_like(values).at[jnp.arange(values.size)].set(values, mode="promise_in_bounds")
