"""A loop inside a step: many rounds of one body, kept as one operation.

A short ``scan`` is unrolled; a longer one stays a loop, in the analysis, in the derivatives and in the compiled program, so
that nothing grows with the number of rounds but the arrays that have one entry for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from etcompile.frontend.jaxpr import Graph

__all__ = ["Loop", "Use", "stopped", "within"]

Array = Any
#: A use of a value: numbers of operations, each in the body of the loop before it, and the number of an operand.
Use = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """What a loop does.

    Attributes
    ----------
    body : Graph
        One round: (constants, carried values, slices) -> (carried values, results of this round).
    length : int
    reverse : bool
        Whether the last slice comes first.
    constants, carried : int
        How many of the operands are the same in every round, and how many go from round to round; the others have one
        slice for each round.
    known : int
        How many operands, the last ones, are the loop's own results, computed before. They are what the loop gives, and
        its derivatives are those of the rounds.
    quiet : bool
        Whether the rounds do nothing beside their results.
    """

    body: Graph
    length: int
    reverse: bool
    constants: int
    carried: int
    known: int = 0
    quiet: bool = False

    @property
    def operands(self) -> int:
        """How many operands the rounds read."""
        return len(self.body.inputs)

    def run(self, values: Sequence[Array], cuts: Mapping[Use, Any] | None = None) -> list[Array]:
        """The loop's results: carried values at the end, then the results of all rounds, stacked.

        ``cuts`` maps uses in the body to the elements at which no derivative passes.
        """
        operands = list(values[: self.operands])
        if not self.known:
            return self._rounds(operands, cuts)

        @jax.custom_jvp
        def results(operands: list[Array], known: list[Array]) -> list[Array]:
            return known

        def tangents(primals: Any, given: Any) -> Any:
            at, known = primals
            moving = [k for k, t in enumerate(given[0]) if not isinstance(t, _ZERO)]

            def fn(*moved: Array) -> list[Array]:
                full = list(at)
                for k, v in zip(moving, moved, strict=True):
                    full[k] = v
                return self._rounds(full, cuts)

            found = jax.jvp(fn, tuple(at[k] for k in moving), tuple(given[0][k] for k in moving))[1]
            return known, found

        results.defjvp(tangents, symbolic_zeros=True)
        return list(results(operands, list(values[self.operands :])))

    def _rounds(self, operands: list[Array], cuts: Mapping[Use, Any] | None) -> list[Array]:
        n, m = self.constants, self.constants + self.carried
        avals = [self.body.avals[v] for v in self.body.inputs]
        fixed = operands[:n]
        start = [_typed(v, a.dtype) for v, a in zip(operands[n:m], avals[n:m], strict=True)]

        def one(carry: list[Array], slices: list[Array]) -> tuple[list[Array], list[Array]]:
            found = self.body.evaluate(*fixed, *carry, *slices, known={} if self.quiet else None, cuts=cuts)
            carry = [_typed(v, a.dtype) for v, a in zip(found[: self.carried], avals[n:m], strict=True)]
            return carry, found[self.carried :]

        end, stacked = lax.scan(one, start, operands[m:], length=self.length, reverse=self.reverse)
        return [*end, *stacked]


_ZERO = jax.custom_derivatives.SymbolicZero


def _typed(value: Array, dtype: Any) -> Array:
    """Without a weak type, which would change from round to round."""
    return value if jnp.issubdtype(dtype, jax.dtypes.extended) else lax.convert_element_type(value, dtype)


def stopped(value: Array, mask: Any) -> Array:
    """A value through which no derivative passes at the elements of ``mask``."""
    return lax.stop_gradient(value) if mask.all() else jnp.where(mask, lax.stop_gradient(value), value)


def within(uses: Mapping[Use, Any] | None, number: int) -> dict[Use, Any]:
    """Of uses those inside of the loop that is operation ``number``, as seen from its body."""
    return {use[1:]: value for use, value in (uses or {}).items() if len(use) > 2 and use[0] == number}
