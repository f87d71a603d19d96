"""The weight operations in the order in which they are asked: the first that recognises a use of a weight has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from etcompile.errors import ModelError, OptionError
from etcompile.ir.header import SITE_KINDS
from etcompile.sites.convolution import Convolution
from etcompile.sites.direct import Direct
from etcompile.sites.embedding import Embedding
from etcompile.sites.gathered import Gathered
from etcompile.sites.generic import Generic
from etcompile.sites.matrix import Matrix
from etcompile.sites.opaque import Opaque
from etcompile.sites.operation import WeightOperation, WeightUse

__all__ = ["check_axes", "recognised", "weight_operation"]

Kind = type[WeightOperation]

_SHIPPED: tuple[Kind, ...] = (Gathered, Matrix, Convolution, Embedding, Direct, Generic, Opaque)
#: Those of users, asked first.
_REGISTERED: dict[str, Kind] = {}

SITE_KINDS.update({kind.name: kind for kind in _SHIPPED})

_Subclass = TypeVar("_Subclass", bound=Kind)


def recognised(use: WeightUse) -> Kind:
    """The weight operation that this use of a weight is."""
    return next(kind for kind in (*_REGISTERED.values(), *_SHIPPED) if kind.recognise(use))


def weight_operation(name: str) -> Callable[[_Subclass], _Subclass]:
    """Register a weight operation: a subclass of :class:`etcompile.WeightOperation`.

    It is asked about every use of a weight in models that are compiled from then on, before the operations that come with
    etcompile. A primitive with an implementation in jax is replaced by what it computes before that: to be asked about a
    computation as a whole, write it as a function under ``jax.custom_jvp``, which stays one operation of the function's name.

    Parameters
    ----------
    name : str
        What programs and reports call it. Registering a name again replaces it; the names of the operations that come with
        etcompile are taken.

    Examples
    --------
    >>> import etcompile, jax, jax.numpy as jnp
    >>> @jax.custom_jvp
    ... def scaled_sum(w, x, z):  # y[b, i] = w[i, 0] x[b, i] + w[i, 1] z[b, i]
    ...     return w[:, 0] * x + w[:, 1] * z
    >>> @scaled_sum.defjvp
    ... def scaled_sum_jvp(values, tangents):
    ...     return jax.jvp(scaled_sum.fun, values, tangents)
    >>> @etcompile.weight_operation("scaled_sum")
    ... class ScaledSum(etcompile.WeightOperation):
    ...     @classmethod
    ...     def recognise(cls, use):
    ...         return use.name == "scaled_sum" and use.operand == 0
    ...
    ...     @property
    ...     def shared(self):
    ...         return ((1, 0),)  # y[:, i] is made of w[i]: a trace has two numbers for each element of y
    ...
    ...     def factor(self, x):
    ...         return jnp.stack(x, axis=-1)  # dy[b, i] / dw[i, k]
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise OptionError(
            "weight_operation takes the name of the operation, in parentheses.",
            got=f"weight_operation({name!r})",
            expected='@etcompile.weight_operation("my_product")',
        )
    if name in {kind.name for kind in _SHIPPED}:
        raise OptionError(
            f"{name!r} is the name of a weight operation that comes with etcompile.",
            got=f"@etcompile.weight_operation({name!r})",
            expected="a name that is not taken",
            hint=f"call it 'my_{name}': it is asked before the one that comes with etcompile.",
        )

    def register(kind: _Subclass) -> _Subclass:
        if not (isinstance(kind, type) and issubclass(kind, WeightOperation)):
            raise OptionError(
                "a weight operation is a subclass of etcompile.WeightOperation.",
                got=repr(kind),
                expected=f"class {getattr(kind, '__name__', 'MyProduct')}(etcompile.WeightOperation)",
            )
        kind.name = name
        _REGISTERED[name] = SITE_KINDS[name] = kind
        return kind

    return register


def check_axes(operation: WeightOperation) -> WeightOperation:
    """A user's weight operation, if its axes and its factor fit y and the weight."""
    if type(operation) in _SHIPPED:
        return operation
    y, weight = operation.y.shape, operation.weight.shape
    for of_y, of_weight in operation.shared:
        if not (of_y in range(len(y)) and of_weight in range(len(weight)) and y[of_y] == weight[of_weight]):
            raise _misfit(
                operation,
                "shared",
                (of_y, of_weight),
                f"an axis of y {y} and one of the weight {weight}, as long",
            )
    if sorted(operation.weight_axes) != list(range(len(weight))) or len(set(operation.kept)) != len(
        operation.kept
    ):
        raise _misfit(
            operation, "shared", operation.shared, f"each axis of y {y} and of the weight {weight} once"
        )
    if operation.closed:
        full = (*y, *operation.contracted)
        operands = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operation.reads)
        shape = jax.eval_shape(lambda x: operation.logical(operation.factor(x)), operands).shape
        if not _broadcasts(shape, full):
            raise _misfit(
                operation, "factor", shape, f"{full}: the axes of y, then the contracted ones, or 1"
            )
    return operation


def _broadcasts(shape: Sequence[int], full: Sequence[int]) -> bool:
    return len(shape) == len(full) and all(a in (1, b) for a, b in zip(shape, full, strict=True))


def _misfit(operation: WeightOperation, what: str, got: Any, expected: str) -> ModelError:
    assert operation.operation is not None
    return ModelError(
        f"{what} of the weight operation {operation.name!r} does not fit {' + '.join(operation.params)}.",
        where=operation.operation.source,
        got=f"{what} = {got}",
        expected=expected,
    )
