"""Fixed random feedback: targets or errors on their way to a layer, past its own weights."""

from __future__ import annotations

import math
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import saiunit as u

from etcompile.errors import InputError, OptionError
from etcompile.integers import positive_integer

__all__ = ["FixedRandomFeedback"]


class FixedRandomFeedback(brainstate.nn.Module):
    """A random matrix B that is never trained, to carry errors [1]_ or targets [2]_ to a layer.

    Its entries are ``init_scale * jax.random.normal(key, (n_target, n_layer))``. With ``init_scale=n_target**-0.5`` what
    arrives is about as large as one entry of what was sent.

    Parameters
    ----------
    n_target : int
        Length of the last axis of what is projected.
    n_layer : int
        Units of the layer.
    seed : int or jax key, optional
        Where the numbers come from. Equal seeds give equal matrices, so give every layer its own.
    init_scale : float
        Standard deviation of the entries.
    key : jax key, optional
        The seed under its other name; give one of the two.
    dtype : dtype, optional
        Default: ``brainstate.environ.dftype()``.
    name : str, optional

    Attributes
    ----------
    B : jax.Array
        The matrix, shape ``(n_target, n_layer)``. No state: no optimiser finds it, no derivative passes into it, and
        :meth:`reset_state` leaves it alone.

    Raises
    ------
    OptionError
        For sizes that are not positive integers, a scale that is no number, and without a seed or with two.

    References
    ----------
    .. [1] T. P. Lillicrap, D. Cownden, D. B. Tweed and C. J. Akerman, *Random synaptic feedback weights support error
       backpropagation for deep learning*, Nature Communications 7, 2016, 13276.
    .. [2] T. Ortner, L. Pes, J. Gentinetta, C. Frenkel and A. Pantazi, *Online spatio-temporal learning with target
       projection*, AICAS, 2023, arXiv:2304.05124.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from etcompile.nn import FixedRandomFeedback
    >>> feedback = FixedRandomFeedback(10, 64, seed=0)
    >>> feedback.project(jnp.ones((32, 10))).shape
    (32, 64)
    """

    def __init__(
        self,
        n_target: int,
        n_layer: int,
        seed: int | jax.Array | None = None,
        init_scale: float = 0.1,
        *,
        key: jax.Array | None = None,
        dtype: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)  # pyright: ignore[reportCallIssue]
        self.n_target, self.n_layer = _size("n_target", n_target), _size("n_layer", n_layer)
        if (seed is None) == (key is None):
            raise OptionError(
                "FixedRandomFeedback needs a seed or a key, and one of them only.",
                got=f"seed={seed!r}, key={key!r}",
                expected="seed=0, or key=jax.random.key(0)",
            )
        dtype = jnp.dtype(brainstate.environ.dftype() if dtype is None else dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise OptionError("dtype must be a floating-point dtype.", got=str(dtype), expected="jnp.float32")
        numbers = jax.random.normal(_key(seed if key is None else key), (self.n_target, self.n_layer), dtype)
        self.B = jax.lax.stop_gradient(_scale(init_scale) * numbers)

    def project(self, y: Any) -> Any:
        """``y @ B``: shape ``(..., n_target)`` to ``(..., n_layer)``, in y's dtype and unit.

        Integers and booleans, such as one-hot labels, come out in B's dtype.
        """
        shape = jnp.shape(u.get_mantissa(y))
        if not shape or shape[-1] != self.n_target:
            raise InputError(
                "what is projected has the wrong shape.",
                got=str(shape),
                expected=f"(..., {self.n_target})",
                hint="class labels must be one-hot: jax.nn.one_hot(labels, n_target).",
            )
        numbers = jnp.asarray(u.get_mantissa(y))
        kind = numbers.dtype if jnp.issubdtype(numbers.dtype, jnp.inexact) else self.B.dtype
        sent = numbers.astype(kind) @ jax.lax.stop_gradient(self.B).astype(kind)
        return u.Quantity(sent, unit=y.unit) if isinstance(y, u.Quantity) else sent

    def update(self, y: Any) -> Any:
        """As :meth:`project`."""
        return self.project(y)

    def reset_state(self, batch_size: int | None = None, **kwargs: Any) -> None:
        """Nothing: B stays, and has no batch axis."""


def _size(name: str, value: Any) -> int:
    return positive_integer(name, value)


def _scale(value: Any) -> float:
    try:
        scale = math.nan if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError):
        scale = math.nan
    if not math.isfinite(scale):
        raise OptionError("init_scale must be a finite number.", got=repr(value), expected="0.1, for example")
    return scale


def _key(seed: Any) -> jax.Array:
    if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
        return jax.random.key(int(seed))
    if isinstance(seed, (jax.Array, np.ndarray)):
        # A key of today, and the pair of numbers of old that brainstate.random.split_key() gives.
        if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) and not seed.shape:
            return jnp.asarray(seed)
        if seed.dtype == np.uint32 and seed.ndim == 1:
            return jnp.asarray(seed)
    raise OptionError(
        "this is neither a seed nor a key.", got=repr(seed), expected="an integer, or jax.random.key(0)"
    )
