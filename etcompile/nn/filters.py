"""Leaky accumulators: of gradients, of signals, of presynaptic activity."""

from __future__ import annotations

from typing import Any

import brainstate

from etcompile.errors import OptionError
from etcompile.nn.decay import decay_of_step, fraction, has_unit, is_quantity, time_constant
from etcompile.nn.like import Like

__all__ = ["GradExpon", "KappaFilter", "PresynapticTrace"]


class GradExpon(brainstate.nn.Module):
    """Leaky sum of gradients: ``g = decay * g + grad``.

    A sum over a sequence that forgets: what an online rule wants between updates when the loss of long ago shall
    count less. With a time constant it forgets at the same pace for every length of the time step.

    Parameters
    ----------
    params_or_shapes : pytree
        What the gradients look like: arrays, ``saiunit`` quantities, ``jax.ShapeDtypeStruct``, brainstate states
        (``step.param_states``), or shapes as tuples of ints. Shapes, dtypes and units come from here.
    decay : float or Quantity
        A number in (0, 1), or a time constant with a unit of time: then decay is ``exp(-dt / tau)``, with
        ``brainstate.environ``'s dt at the time of each call.
    dtype : dtype, optional
        Accumulate in this dtype. Default: that of each leaf; for leaves without one (shapes, integers)
        ``brainstate.environ.dftype()``.
    name : str, optional

    Attributes
    ----------
    gradients : ShortTermState
        The accumulated gradients; zeros at the start.

    Raises
    ------
    OptionError
        For a decay that is neither, and at a call with a time constant when dt is not set or has no unit of time.
    InputError
        At a call with gradients of another structure, shape or unit, or of a dtype that would lose precision.

    Examples
    --------
    >>> import brainstate, jax.numpy as jnp, saiunit as u
    >>> from etcompile.nn import GradExpon
    >>> g = GradExpon({"w": jnp.zeros(2, jnp.float32)}, decay=0.5)
    >>> _ = g.update({"w": jnp.ones(2, jnp.float32)})
    >>> print(g.update({"w": jnp.ones(2, jnp.float32)})["w"])
    [1.5 1.5]
    >>> g = GradExpon({"w": (2,)}, decay=20 * u.ms)
    >>> with brainstate.environ.context(dt=1.0 * u.ms):
    ...     total = g.update({"w": jnp.ones(2, jnp.float32)})
    """

    def __init__(
        self, params_or_shapes: Any, decay: Any, *, dtype: Any = None, name: str | None = None
    ) -> None:
        super().__init__(name=name)  # pyright: ignore[reportCallIssue]
        self.decay: Any = time_constant("decay", decay) if has_unit(decay) else fraction("decay", decay)
        self._like = Like.of(params_or_shapes, dtype)
        self.gradients = brainstate.ShortTermState(self._like.zeros())

    @property
    def value(self) -> Any:
        """The accumulated gradients as they stand."""
        return self.gradients.value

    def update(self, grads: Any) -> Any:
        """Add one gradient; returns the accumulated gradients, in the structure, dtypes and units of the state."""
        self.gradients.value = self.advanced(self.gradients.value, grads)
        return self.gradients.value

    def advanced(self, total: Any, grads: Any) -> Any:
        """``decay * total + grads``: the pure function of :meth:`update`, for a total that is kept elsewhere."""
        decay = decay_of_step("decay", self.decay) if is_quantity(self.decay) else self.decay
        return self._like.leak("GradExpon", total, grads, decay)

    def reset_state(self, batch_size: int | None = None, **kwargs: Any) -> None:
        """Zeros of the first shapes; with ``batch_size``, axis 0 of every leaf has that length.

        The latter is for gradients that are kept per example. A gradient that is summed over the batch has no
        batch axis: leave ``batch_size`` out.
        """
        self.gradients.value = self._like.zeros(batch_size)


class _Filter(brainstate.nn.Module):
    """A leaky state with the shape of what it filters."""

    def __init__(self, shape_or_example: Any, init_value: Any, dtype: Any, name: str | None) -> None:
        super().__init__(name=name)  # pyright: ignore[reportCallIssue]
        kind = type(self).__name__
        if (shape_or_example is None) == (init_value is None):
            raise OptionError(
                f"{kind} needs a shape, an example or an initial value, and one of them only.",
                got=f"shape_or_example={shape_or_example!r}, init_value={init_value!r}",
                expected=f"{kind}((4, 3), ...), for example",
            )
        self._like = Like.of(shape_or_example if init_value is None else init_value, dtype)
        zeros = self._like.zeros()
        # a shape given as the initial value is a shape
        start = None if init_value is None or not hasattr(init_value, "dtype") else init_value
        self.state = brainstate.ShortTermState(
            zeros if start is None else self._like.leak(kind, zeros, start, 0.0)
        )

    @property
    def value(self) -> Any:
        """The filtered value as it stands."""
        return self.state.value

    def init_state(self, batch_size: int | None = None, **kwargs: Any) -> None:
        """As :meth:`reset_state`."""
        self.reset_state(batch_size)

    def reset_state(self, batch_size: int | None = None, **kwargs: Any) -> None:
        """Zeros of the first shape; with ``batch_size``, axis 0 has that length (a scalar gets such an axis)."""
        self.state.value = self._like.zeros(batch_size)


class KappaFilter(_Filter):
    """Low-pass filter ``xbar = (1 - kappa) * x + kappa * xbar``.

    A constant input comes out as itself in the end. This is the filter that e-prop puts on eligibility traces to
    match a readout that leaks with kappa [1]_, where the sum has no factor ``1 - kappa``; here it has, so that
    kappa changes the smoothing and not the size.

    Parameters
    ----------
    shape_or_example : int, tuple of int, or pytree of arrays
        Shape of x, batch axis first if there is one, or an example of it, which sets dtype and unit as well.
    kappa : float
        In [0, 1); 0 does not filter.
    init_value : array, optional
        In the place of ``shape_or_example``: the filter also starts with this value. A reset makes it zero.
    dtype : dtype, optional
        Default: that of the example, or ``brainstate.environ.dftype()`` for a shape or integers.
    name : str, optional

    Attributes
    ----------
    state : ShortTermState
        xbar; zeros at the start. Its value is ``value``.

    Raises
    ------
    OptionError
        If kappa is not a number in [0, 1).
    InputError
        At a call with a value of another structure, shape or unit, or of a dtype that would lose precision.

    References
    ----------
    .. [1] G. Bellec et al., *A solution to the learning dilemma for recurrent networks of spiking neurons*, Nature
       Communications 11, 2020, 3625.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from etcompile.nn import KappaFilter
    >>> smooth = KappaFilter(jnp.zeros(2, jnp.float32), kappa=0.5)
    >>> _ = smooth.update(jnp.ones(2, jnp.float32))
    >>> print(smooth.update(jnp.ones(2, jnp.float32)))
    [0.75 0.75]
    """

    def __init__(
        self,
        shape_or_example: Any = None,
        kappa: Any = None,
        *,
        init_value: Any = None,
        dtype: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(shape_or_example, init_value, dtype, name)
        self.kappa = fraction("kappa", kappa, zero=True)

    def update(self, x: Any) -> Any:
        """Take one x; returns the new xbar, of the same shape."""
        self.state.value = self._like.leak("KappaFilter", self.state.value, x, self.kappa, 1.0 - self.kappa)
        return self.state.value


class PresynapticTrace(_Filter):
    """Trace of presynaptic activity ``a = decay * a + x``.

    The part of a weight's influence that belongs to its input alone, as in online training through time [1]_.
    For a neuron that only leaks, with `decay` as its leak, a is all the past that the weight's gradient needs.

    Parameters
    ----------
    shape_or_example : int, tuple of int, or pytree of arrays
        Shape of x, batch axis first if there is one, or an example of it, which sets dtype and unit as well.
    decay : float
        In (0, 1).
    leak : float, optional
        ``decay`` under its other name.
    init_value : array, optional
        In the place of ``shape_or_example``: the filter also starts with this value. A reset makes it zero.
    dtype : dtype, optional
        Default: that of the example, or ``brainstate.environ.dftype()`` for a shape or integers.
    name : str, optional

    Attributes
    ----------
    state : ShortTermState
        a; zeros at the start. Its value is ``value``.

    Raises
    ------
    OptionError
        If decay is not a number in (0, 1).
    InputError
        At a call with a value of another structure, shape or unit, or of a dtype that would lose precision.

    References
    ----------
    .. [1] M. Xiao et al., *Online training through time for spiking neural networks*, 2022, arXiv:2210.04195.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from etcompile.nn import PresynapticTrace
    >>> trace = PresynapticTrace((2,), decay=0.5)
    >>> _ = trace.update(jnp.array([True, False]))
    >>> print(trace.update(jnp.array([True, True])))
    [1.5 1. ]
    """

    def __init__(
        self,
        shape_or_example: Any = None,
        decay: Any = None,
        *,
        leak: Any = None,
        init_value: Any = None,
        dtype: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(shape_or_example, init_value, dtype, name)
        if decay is not None and leak is not None:
            raise OptionError(
                "decay and leak are two names of one number: give one of them.",
                got=f"decay={decay!r}, leak={leak!r}",
                expected="decay=0.9, for example",
            )
        decay = leak if decay is None else decay
        self.decay = fraction("decay", decay)

    @property
    def leak(self) -> float:
        """The decay."""
        return self.decay

    def update(self, x: Any) -> Any:
        """Take one x; returns the new a, of the same shape."""
        self.state.value = self._like.leak("PresynapticTrace", self.state.value, x, self.decay)
        return self.state.value
