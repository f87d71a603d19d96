"""A readout that leaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import brainstate
import jax.numpy as jnp
import numpy as np
import saiunit as u

from etcompile.errors import OptionError
from etcompile.nn.decay import decay_of_step, has_unit, time_constant

__all__ = ["LeakyRateReadout"]


class LeakyRateReadout(brainstate.nn.Module):
    """Leaky readout ``r = exp(-dt / tau) * r + x @ W``.

    The usual last layer of a spiking network: it sums weighted spikes, and forgets with the time constant tau [1]_.
    Its memory is element by element, so D-RTRL cuts nothing in it: compiled by itself the step is exact, and behind
    other layers the gradient of its own weight still is.

    Parameters
    ----------
    in_size, out_size : int or tuple of int
        Sizes of input and output without the batch axis; all but the last axis must be equal.
    tau : Quantity, ParamState or Param
        Time constant with a unit of time: one, or one per output unit. In a ``ParamState`` or ``brainstate.nn.Param`` it is
        trained. dt is that of ``brainstate.environ`` at each call.
    w_init, r_init : callable or array
        Initial weights and state; ``brainstate.nn`` initialisers. Default: Kaiming normal, zero.
    name : str, optional

    Attributes
    ----------
    weight : ParamState
        W, an array of shape ``(in_size[-1], out_size[-1])``; its dtype is that of the layer.
    r : HiddenState
        The state and output, shape ``(batch, *out_size)``, or ``out_size`` without a batch size. Made by
        :meth:`init_state`.

    Raises
    ------
    OptionError
        For sizes that do not fit each other, a tau without a unit of time or not positive; and at a call when dt is
        not set, or has no unit of time.

    References
    ----------
    .. [1] G. Bellec et al., *A solution to the learning dilemma for recurrent networks of spiking neurons*, Nature
       Communications 11, 2020, 3625.

    Examples
    --------
    >>> import brainstate, etcompile, jax.numpy as jnp, saiunit as u
    >>> from etcompile.nn import LeakyRateReadout
    >>> with brainstate.environ.context(dt=1.0 * u.ms):
    ...     step = etcompile.compile(LeakyRateReadout(8, 3, tau=20 * u.ms), jnp.ones((4, 8)), batch_size=4)
    >>> step(jnp.ones((4, 8))).shape, step.exact
    ((4, 3), True)
    """

    def __init__(
        self,
        in_size: int | Sequence[int],
        out_size: int | Sequence[int],
        tau: Any = 5.0 * u.ms,
        w_init: Callable | Any | None = None,
        r_init: Callable | Any | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)  # pyright: ignore[reportCallIssue]
        inner, outer = _sizes("in_size", in_size), _sizes("out_size", out_size)
        if inner[:-1] != outer[:-1]:
            raise OptionError(
                "in_size and out_size may differ in the last axis only.",
                got=f"in_size={inner}, out_size={outer}",
                expected="equal axes before the last",
            )
        self.in_size, self.out_size = inner, outer
        time_constant("tau", _value(tau), outer)
        self.tau = tau
        self._r_init = brainstate.nn.init.ZeroInit() if r_init is None else r_init
        w_init = brainstate.nn.init.KaimingNormal() if w_init is None else w_init
        self.weight = brainstate.ParamState(_initial("w_init", w_init, (inner[-1], outer[-1])))

    def init_state(self, batch_size: int | None = None, **kwargs: Any) -> None:
        """Make r, with a batch axis in front if ``batch_size`` is given."""
        self.r = brainstate.HiddenState(self._start(batch_size))

    def reset_state(self, batch_size: int | None = None, **kwargs: Any) -> None:
        """Set r to its initial value, with a batch axis in front if ``batch_size`` is given."""
        self.r.value = self._start(batch_size)

    def update(self, x: Any) -> Any:
        """One step: x of shape ``(..., *in_size)``; returns the new r, ``(..., *out_size)``, in r's dtype."""
        r: Any = self.r.value
        decay = jnp.asarray(decay_of_step("tau", _value(self.tau)), jnp.finfo(r.dtype).dtype)
        current: Any = u.linalg.dot(x, self.weight.value)
        self.r.value = decay * r + current.astype(r.dtype)
        return self.r.value

    def _start(self, batch_size: int | None) -> Any:
        weight: Any = self.weight.value
        start = _initial("r_init", self._r_init, _sizes("out_size", self.out_size), batch_size)
        start = start.astype(weight.dtype)
        # Weights with a unit make a state with that unit, also from an initialiser that knows of none.
        return start if has_unit(start) else start * u.get_unit(weight) if has_unit(weight) else start


def _value(tau: Any) -> Any:
    """A time constant as it is now, where it is a trained one."""
    if isinstance(tau, brainstate.State):
        return tau.value
    return tau.value() if isinstance(tau, brainstate.nn.Param) else tau


def _sizes(name: str, size: Any) -> tuple[int, ...]:
    try:
        sizes = tuple(int(n) for n in (size if isinstance(size, Sequence) else (size,)) if n == int(n))
    except (TypeError, ValueError):
        sizes = ()
    if not sizes or min(sizes) < 1 or (isinstance(size, Sequence) and len(sizes) != len(size)):
        raise OptionError(f"{name} must be made of positive integers.", got=repr(size), expected="8, or (8,)")
    return sizes


def _initial(name: str, init: Any, shape: tuple[int, ...], batch_size: int | None = None) -> Any:
    try:
        if not callable(init) and not np.ndim(u.get_mantissa(init)):
            whole = shape if batch_size is None else (batch_size, *shape)
            return u.math.full(whole, init, dtype=brainstate.environ.dftype())
        return brainstate.nn.init.param(init, shape, batch_size, allow_none=False)
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"{name} does not fit.",
            got=str(error).strip(),
            expected=f"an initialiser, or an array of {shape}",
        ) from error
