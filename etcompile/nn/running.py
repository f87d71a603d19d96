"""Running mean and variance of a stream, and what is scaled by them: observations and rewards."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Moments"]

#: Added to a variance before its root is taken, as in the paper.
_LEAST = 1e-8


class Moments(NamedTuple):
    """Number, mean and summed squared differences of what was seen (Welford's algorithm; Chan's for several at once).

    An immutable value, for functions that are compiled: :meth:`seen` returns the next one. The variance is 1 until two values
    were seen [1]_.

    Attributes
    ----------
    count : int array, shape ()
    mean, squares : array
        In the shape of one value.

    References
    ----------
    .. [1] M. Elsayed, G. Vasan and A. R. Mahmood, *Streaming deep reinforcement learning finally works*, 2024,
       arXiv:2410.14606, algorithms 4 to 6.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from etcompile.nn import Moments
    >>> seen = Moments.of(jnp.zeros(2)).seen(jnp.array([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]]))
    >>> print(seen.mean, seen.variance)
    [3. 0.] [4. 0.]
    >>> print(seen.normalised(jnp.array([5.0, 0.0])))
    [1. 0.]
    """

    count: Any
    mean: Any
    squares: Any

    @classmethod
    def of(cls, example: Any) -> Moments:
        """Those of nothing seen yet; ``example`` is an array or shape of one value, of a floating-point dtype."""
        zeros = jnp.zeros(example.shape, example.dtype)
        return cls(jnp.zeros((), jnp.int32), zeros, zeros)

    @property
    def variance(self) -> jax.Array:
        """The unbiased variance, in the shape of one value; 1 until two were seen."""
        return jnp.where(self.count < 2, 1.0, self.squares / jnp.maximum(self.count - 1, 1))

    def seen(self, values: Any, which: Any = None) -> Moments:
        """With more values, ``(N, ...)``; ``which``, ``(N,)``, says which of them count."""
        which = jnp.ones(values.shape[0], bool) if which is None else which
        number = jnp.sum(which, dtype=self.count.dtype)
        counts = which.reshape(-1, *(1,) * (values.ndim - 1))
        mean = jnp.sum(jnp.where(counts, values, 0), axis=0) / jnp.maximum(number, 1)
        squares = jnp.sum(jnp.where(counts, (values - mean) ** 2, 0), axis=0)
        total = self.count + number
        # In the dtype of the mean: integers would divide in 32 bits.
        share = number.astype(self.mean.dtype) / jnp.maximum(total, 1)
        apart = mean - self.mean
        return Moments(
            total,
            (self.mean + apart * share).astype(self.mean.dtype),
            (self.squares + squares + apart**2 * self.count * share).astype(self.squares.dtype),
        )

    def normalised(self, values: Any) -> Any:
        """Mean 0 and variance 1: ``(values - mean) / sqrt(variance + 1e-8)``."""
        return ((values - self.mean) / jnp.sqrt(self.variance + _LEAST)).astype(values.dtype)

    def scaled(self, values: Any) -> Any:
        """Variance 1, and no other mean: ``values / sqrt(variance + 1e-8)``."""
        return (values / jnp.sqrt(self.variance + _LEAST)).astype(values.dtype)
