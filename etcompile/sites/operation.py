"""What a weight operation is: how a weight meets data at a site, y = op(weight, x), as the rest of the compiler asks of it.

A trace of y by the weight has the axes of y, and behind them those axes of the weight that y does not have, the *contracted*
ones. The axes that both have are *shared*: y[i] is made of the weights [i] alone. What multiplies a credit there is the
*factor*: dy/dw at the weight's own place, an array over y and the contracted axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from etcompile.errors import UnsupportedError
from etcompile.frontend.jaxpr import Aval, Graph, Operation, bind, function_name, read
from etcompile.ir.header import Site, SiteKind
from etcompile.precision import accumulator

__all__ = ["LinearOperation", "Presynaptic", "Product", "WeightOperation", "WeightUse"]

Array = Any
#: A trace for an operation without a closed form keeps y x weight numbers per state; more than this is refused.
TRACE_LIMIT = 1 << 26
#: What an operation reads beside the weight; an array alone is a factor.
Presynaptic = tuple[Array, ...]
#: Where along each axis of y a part of it begins and ends.
Span = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class WeightUse:
    """A weight as an operand of an operation of the step: what a weight operation is recognised by.

    Attributes
    ----------
    graph : Graph
    operation : Operation
    operand : int
        Which operand the weight is.
    spread : callable
        Computes ``spreads``.
    """

    graph: Graph
    operation: Operation
    operand: int
    spread: Callable[[Graph, Operation, int], bool]

    @property
    def name(self) -> str:
        """Name of the primitive; for ``jax.custom_jvp`` and ``jax.custom_vjp`` that of the function."""
        return function_name(self.operation)

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the primitive."""
        return self.operation.params

    @property
    def avals(self) -> tuple[Aval, ...]:
        """Shapes and dtypes of the operands."""
        return tuple(map(self.graph.aval, self.operation.inputs))

    @cached_property
    def spreads(self) -> bool:
        """Whether some element of the weight reaches several elements of the results."""
        return self.spread(self.graph, self.operation, self.operand)


@dataclasses.dataclass(frozen=True, eq=False)
class WeightOperation(SiteKind):
    """A weight meeting data at one site.

    To add one, write a subclass with :meth:`recognise`, :attr:`shared` and :meth:`factor`, and register it with
    :func:`etcompile.weight_operation`. All other methods follow from these; they are there to be faster. With more axes of
    the weight shared, the trace is smaller: one that shares none has an entry for each element of y and each weight.

    Attributes
    ----------
    name : str
        What programs call it.
    closed : bool
        Whether the factor has a closed form that does not depend on the weight: y is linear in the weight, up to a term
        without it.
    traced : bool
        Whether there can be a trace, and not a one-step gradient only.
    weight_is_y : bool
        Whether the weight itself plays the part of y: one site for all of its uses.
    by_element : bool
        Whether each element of the weight makes one of y. In a loop the weight itself then plays the part of y.
    unfiltered : bool
        Whether credits of many steps should meet what the operation reads, and never a filter of it.
    params : tuple of str
        Paths of the parameters in the weight.
    weight, y : Aval
        ``shape`` and ``dtype``.
    operation : Operation or None
        None where the weight itself is y.
    operand : int
        Which of its operands the weight is.
    others : tuple of Aval
        The other operands.
    """

    name: ClassVar[str]
    traced: ClassVar[bool] = True
    weight_is_y: ClassVar[bool] = False
    by_element: ClassVar[bool] = False
    unfiltered: ClassVar[bool] = False

    params: tuple[str, ...]
    weight: Aval
    y: Aval
    operation: Operation | None = None
    operand: int = -1
    others: tuple[Aval, ...] = ()

    # -- what it is -----------------------------------------------------------------------------------------------

    @classmethod
    def recognise(cls, use: WeightUse) -> bool:
        """Whether this use of a weight is of this kind."""
        raise NotImplementedError

    @classmethod
    def at(cls, use: WeightUse, params: tuple[str, ...]) -> WeightOperation:
        """The operation at a use that :meth:`recognise` said yes to, of a weight made of these parameters."""
        avals = use.avals
        y = use.graph.aval(use.operation.outputs[0])
        others = (*avals[: use.operand], *avals[use.operand + 1 :])
        return cls(params, avals[use.operand], y, use.operation, use.operand, others)

    @property
    def shared(self) -> tuple[tuple[int, int], ...]:
        """Axes that y and the weight have in common, each as (axis of y, axis of the weight)."""
        raise NotImplementedError

    def factor(self, x: Presynaptic) -> Array:
        """The presynaptic value as one array in which y is linear: one that broadcasts over y's and the contracted axes.

        Parameters
        ----------
        x : tuple of arrays
            The operands beside the weight.
        """
        raise NotImplementedError

    @staticmethod
    def factor_shape(site: Site) -> tuple[int, ...]:
        return (*site.y, *(site.contracted or ()))

    # -- what follows from that: axes -----------------------------------------------------------------------------

    @property
    def contracted_axes(self) -> tuple[int, ...]:
        """Axes of the weight that a trace has beside y's, in the trace's order."""
        kept = {axis for _, axis in self.shared}
        return tuple(axis for axis in range(len(self.weight.shape)) if axis not in kept)

    @cached_property
    def contracted(self) -> tuple[int, ...]:
        """Sizes of the contracted axes."""
        return tuple(self.weight.shape[axis] for axis in self.contracted_axes) if self.traced else ()

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """Axes of y that are axes of the weight."""
        return tuple(axis for axis, _ in self.shared)

    @cached_property
    def weight_axes(self) -> tuple[int, ...]:
        """The weight's axes in the order of a gradient that a trace gives: shared ones, then contracted ones."""
        return (*(axis for _, axis in self.shared), *self.contracted_axes)

    @property
    def matrix_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Axes of the weight as rows (of y) and columns (of x), where y is a product of a matrix with x; None elsewhere."""
        return None

    # -- values ---------------------------------------------------------------------------------------------------

    @property
    def x_dtype(self) -> Any:
        """Dtype in which the operation reads what a factor holds."""
        return self.y.dtype

    @property
    def reads(self) -> tuple[Aval, ...]:
        """Shapes and dtypes of a presynaptic value."""
        return self.others

    def presynaptic(self, env: dict[int, Array]) -> Presynaptic:
        """The operands beside the weight."""
        if self.operation is None:
            return ()
        return tuple(read(env, v) for k, v in enumerate(self.operation.inputs) if k != self.operand)

    def by_step(self, x: Presynaptic) -> tuple[Presynaptic, Callable[[Presynaptic], Presynaptic]]:
        """Of presynaptic values of many steps what differs between them, and how one step's is made of its part."""
        return x, lambda now: now

    def apply(self, weight: Array, x: Presynaptic) -> Array:
        """y, as the operation computes it."""
        assert self.operation is not None
        values = list(x)
        values.insert(self.operand, weight)
        return bind(self.operation, values)[0]

    def logical(self, factor: Array) -> Array:
        """A factor as one that broadcasts over y's and the contracted axes."""
        return factor

    def respond(self, v: Array, x: Presynaptic | Array) -> Array:
        """What a variation of the weight does to y, which is linear in it: the transpose of :meth:`pullback`."""
        factor, of_factor, of_y, of_weight = self._product(x)
        return jnp.einsum(factor, of_factor, v, of_weight, of_y).astype(self.y.dtype)

    def pullback(self, x: Presynaptic | Array, credit: Array) -> Array:
        """Weight gradient of a credit of y; ``x`` is a presynaptic value or a factor."""
        factor, of_factor, of_y, of_weight = self._product(x)
        wide = accumulator(jnp.result_type(factor, credit))
        found = jnp.einsum(factor, of_factor, credit, of_y, of_weight, preferred_element_type=wide)
        return found.astype(self.weight.dtype)

    def _product(self, x: Presynaptic | Array) -> tuple[Array, list[int], list[int], list[int]]:
        """The factor, and for :func:`jax.numpy.einsum` its axes, those of y and those of the weight."""
        factor = self.logical(self.factor(x) if isinstance(x, tuple) else x)
        n, full = len(self.y.shape), (*self.y.shape, *self.contracted)
        traced = [*self.kept, *range(n, len(full))]
        of_weight = [traced[place] for place in np.argsort(self.weight_axes)]
        narrow = tuple(a for a in self.kept if factor.shape[a] == 1)  # the other operand has these
        of_factor = [a for a in range(len(full)) if a not in narrow]
        wide = jnp.broadcast_to(jnp.squeeze(factor, narrow), [full[a] for a in of_factor])
        return wide, of_factor, list(range(n)), of_weight

    def pullback_of_steps(self, x: Presynaptic | Array, credit: Array) -> Array:
        """:meth:`pullback` summed over steps, along a leading axis of both: one product over time and batch.

        The weight is the same in all of them.
        """
        try:
            return self._pulled_at_once(x, credit)
        except NotImplementedError:  # as in `mapped`
            zeros = jnp.zeros(self.weight.shape, accumulator(self.weight.dtype))
            add = lambda total, now: (total + self.pullback(*now).astype(total.dtype), None)  # noqa: E731
            return lax.scan(add, zeros, (x, credit))[0].astype(self.weight.dtype)

    def _pulled_at_once(self, x: Presynaptic | Array, credit: Array) -> Array:
        weight = jax.ShapeDtypeStruct(self.weight.shape, self.weight.dtype)
        pull = jax.linear_transpose(lambda v: jax.vmap(lambda now: self.respond(v, now))(x), weight)
        return pull(credit.astype(self.y.dtype))[0]

    def narrowed(self, span: Span) -> WeightOperation | None:
        """The operation that makes this part of y alone, of a part of the weight; None where there is none of the kind."""
        return None

    def pulled_within(self, x: Presynaptic | Array, credit: Array, span: Span, steps: bool) -> Array:
        """:meth:`pullback`, or with ``steps`` :meth:`pullback_of_steps`, of a credit that is zero outside of a span of y."""
        part = self if span == tuple((0, n) for n in self.y.shape) else self.narrowed(span)
        if part is None or part is self:
            return self.pullback_of_steps(x, credit) if steps else self.pullback(x, credit)
        inside = tuple(slice(*ends) for ends in span)
        inner = credit[(slice(None), *inside)] if steps else credit[inside]
        found = part.pullback_of_steps(x, inner) if steps else part.pullback(x, inner)
        pads = [(0, 0, 0)] * found.ndim
        for of_y, of_weight in self.shared:
            start, stop = span[of_y]
            pads[of_weight] = (start, self.y.shape[of_y] - stop, 0)
        return lax.pad(found, jnp.zeros((), found.dtype), pads)

    # -- size -----------------------------------------------------------------------------------------------------

    @property
    def too_large(self) -> bool:
        """Whether a trace has no closed form, and more numbers than one would want to store."""
        return not self.closed and self.traced and self._trace_size > TRACE_LIMIT

    @property
    def _trace_size(self) -> int:
        return math.prod((*self.y.shape, *self.contracted))

    def cannot_store(self, hint: str) -> UnsupportedError:
        """What to raise where a trace that is too large would be stored."""
        assert self.operation is not None
        return UnsupportedError(
            f"the trace of {'+'.join(self.params)} at {self.operation.name} has no closed form: it cannot be stored.",
            where=self.operation.source,
            got=f"{self._trace_size:,} numbers per state",
            expected=f"at most {TRACE_LIMIT:,}",
            hint=hint,
        )


class LinearOperation(WeightOperation):
    """An operation that is linear in the weight as it stands, so that JAX transposes it."""

    def presynaptic_of(self, factor: Array) -> Presynaptic:
        """A factor, which has y's dtype, as the operation's operand: real values stay real beside a complex y."""
        real = jnp.issubdtype(factor.dtype, jnp.complexfloating) and not jnp.issubdtype(
            self.x_dtype, jnp.complexfloating
        )
        return ((factor.real if real else factor).astype(self.x_dtype),)

    def respond(self, v: Array, x: Presynaptic | Array) -> Array:
        return self.apply(v, x if isinstance(x, tuple) else self.presynaptic_of(x))

    def pullback(self, x: Presynaptic | Array, credit: Array) -> Array:
        operands = x if isinstance(x, tuple) else self.presynaptic_of(x)
        zeros = jax.ShapeDtypeStruct(self.weight.shape, self.weight.dtype)
        transposed = jax.linear_transpose(lambda w: self.apply(w, operands), zeros)
        return transposed(credit.astype(self.y.dtype))[0]


class Product(LinearOperation):
    """An operation that is linear in its other operand as well: that operand is the factor."""

    @property
    def x_dtype(self) -> Any:
        return self.others[0].dtype

    @staticmethod
    def factor_shape(site: Site) -> tuple[int, ...]:
        return site.presynaptic[0]

    def factor(self, x: Presynaptic) -> Array:
        return x[0]
