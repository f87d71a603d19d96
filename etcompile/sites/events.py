"""Sums over the synapses whose senders are not zero: work in proportion to spikes.

Synapses are ordered by sender once, and each sender's are divided into *blocks* of a few. Who sends is found from the values of
a step; their blocks are listed, at most so many that arrays have a fixed size; and what a sum takes is the synapses of these
blocks, some thousand at a time, as many times as there are such blocks. A zero adds nothing, so the sum is the same for all
values, spikes or not. Where more is sent than the list holds, all synapses are summed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
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
    sent : array
        What each block's sender sends.
    """

    fits: Array
    count: Array
    start: Array
    size: Array
    sent: Array


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
    sent : array
        What the sender sends.
    """

    places: Array
    there: Array
    sent: Array


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
        """Blocks that the list has room for."""
        return max(1, math.ceil(self.share * int(self._blocks.sum())))

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

    # -- sums -----------------------------------------------------------------------------------------------------

    def listed(self, sent: Array) -> _Listed:
        """The synapses of those who send: ``sent`` has a number for each unit."""
        live = (sent != 0) & (self._degrees > 0)
        needed = jnp.sum(jnp.where(live, self._blocks[:-1], 0))
        fits = needed <= self.capacity
        units = min(self.senders, self.capacity)
        (who,) = jnp.nonzero(live, size=units, fill_value=self.senders)
        counts = jnp.asarray(self._blocks)[who]
        ends = jnp.cumsum(counts)
        room = self._parts * self._in_part
        numbers = jnp.arange(room, dtype=jnp.int32)
        after = jnp.zeros(room + 1, jnp.int32).at[jnp.minimum(ends, room)].add(1)
        of = jnp.minimum(jnp.cumsum(after)[:-1], units - 1)
        unit = jnp.minimum(who[of], self.senders - 1)
        start = jnp.asarray(self._first)[unit] + (numbers - (ends - counts)[of]) * self.width
        left = jnp.where(fits & (numbers < needed), jnp.asarray(self._first)[unit + 1] - start, 0)
        start = jnp.where(left > 0, start, 0)
        return _Listed(fits, jnp.where(fits, needed, 0), start, jnp.minimum(left, self.width), sent[unit])

    @property
    def _in_part(self) -> int:
        """Blocks that are summed together."""
        return min(self.capacity, max(1, _TOGETHER // self.width))

    @property
    def _parts(self) -> int:
        """Parts that a full list has."""
        return -(-self.capacity // self._in_part)

    def _over(self, found: _Listed, one: Callable[[_Part, Any], Any], start: Any) -> Any:
        """``one`` for each part of a list that holds some blocks, after each other."""
        along = jnp.arange(self.width, dtype=jnp.int32)

        def of_part(k: Array, total: Any) -> Any:
            start, size, sent = (
                lax.dynamic_slice(v, (k * self._in_part,), (self._in_part,))
                for v in (found.start, found.size, found.sent)
            )
            part = _Part(start[:, None] + along, along < size[:, None], sent[:, None])
            return one(part, total)

        return lax.fori_loop(0, -(-found.count // self._in_part), of_part, start)

    def arriving(self, weights: Array, sent: Array, of_all: Callable[[], Array]) -> Array:
        """What arrives at each receiver: the sum of weight times what its senders send; ``of_all`` makes it of all synapses."""
        found = self.listed(sent)

        def one(part: _Part, total: Array) -> Array:
            product = _taken(weights, self._synapses(part.places)) * part.sent
            each = jnp.where(part.there, product, jnp.zeros((), product.dtype))
            return _added(total, _taken(self._receivers, part.places), each)

        def of_listed() -> Array:
            zeros = jnp.zeros(self.receivers, jnp.result_type(weights, sent))
            return self._over(found, one, zeros)

        return lax.cond(found.fits, of_listed, of_all)

    def meeting(self, credits: Sequence[Array], sent: Array, totals: Sequence[Array]) -> list[Array]:
        """``totals``, each a number for each synapse, with the credits of its receiver times what its sender sends, over steps.

        ``credits``, one array for each total, and ``sent`` have time on axis 0. All sums are made in one pass over the events.
        """

        def one(totals: list[Array], now: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
            credits, sent = now

            def of_part(part: _Part, totals: list[Array]) -> list[Array]:
                at, to = _taken(self._receivers, part.places), self._synapses(part.places)
                products = [_taken(credit, at) * part.sent for credit in credits]
                each = [jnp.where(part.there, v, jnp.zeros((), v.dtype)) for v in products]
                return [
                    _added(total, to, v.astype(total.dtype)) for total, v in zip(totals, each, strict=True)
                ]

            found = self.listed(sent)
            return self._over(found, of_part, totals), found.fits

        def whole(k: Array, totals: list[Array]) -> list[Array]:
            step = beyond[k]
            return [
                total + self.product(credit[step], sent[step]).astype(total.dtype)
                for total, credit in zip(totals, credits, strict=True)
            ]

        made, fits = lax.scan(one, list(totals), (list(credits), sent))
        # Those beyond the list one after the other, in a loop of their own: it has no rounds where there are none, and XLA would
        # copy the sums for a condition at every step.
        (beyond,) = jnp.nonzero(~fits, size=fits.size)
        return lax.fori_loop(0, jnp.sum(~fits), whole, made)

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


_TAKEN = lax.GatherDimensionNumbers(offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,))
_ADDED = lax.ScatterDimensionNumbers(
    update_window_dims=(), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,)
)


def _taken(values: Array, places: Array) -> Array:
    """Elements of a flat array, at places all of which are there."""
    return lax.gather(jnp.asarray(values), places[..., None], _TAKEN, (1,), mode=_IN_BOUNDS)


def _added(total: Array, places: Array, values: Array) -> Array:
    """A flat array with values added at places all of which are there."""
    return lax.scatter_add(total, places.reshape(-1, 1), values.ravel(), _ADDED, mode=_IN_BOUNDS)
