"""Agents' networks, as a user would write them: a recurrent layer, an actor and a critic. Nothing here knows about learning."""

from __future__ import annotations

from typing import Any

import brainstate
import jax
import jax.numpy as jnp

__all__ = ["MODELS", "GRUAgent", "LIFAgent", "LRUAgent"]


class _Agent(brainstate.nn.Module):
    """Heads for actions and value on a recurrent layer of ``units`` features."""

    def __init__(self, inputs: int, actions: int, units: int):
        super().__init__()
        self.inputs, self.units = inputs, units
        self.actor = brainstate.nn.Linear(units, actions, w_init=brainstate.nn.init.Normal(scale=0.1))
        self.critic = brainstate.nn.Linear(units, 1, w_init=brainstate.nn.init.Normal(scale=0.1))

    def zeros(self, batch_size: int | None) -> Any:
        return jnp.zeros((self.units,) if batch_size is None else (batch_size, self.units))

    def heads(self, features: Any) -> tuple[Any, Any]:
        return self.actor(features), self.critic(features)


class GRUAgent(_Agent):
    """A gated recurrent unit (reset gate behind the recurrent product) that starts with gates that keep a little."""

    def __init__(self, inputs: int, actions: int, units: int = 16):
        super().__init__(inputs, actions, units)
        bias = jnp.concatenate([jnp.full(units, 1.0), jnp.zeros(2 * units)])
        self.w = brainstate.nn.Linear(inputs, 3 * units, b_init=bias)
        normal = brainstate.nn.init.Normal(scale=1 / units**0.5)
        self.u = brainstate.ParamState(normal((units, 3 * units)))

    def init_state(self, batch_size: int | None = None) -> None:
        self.h = brainstate.HiddenState(self.zeros(batch_size))

    def update(self, x: Any) -> tuple[Any, Any]:
        h = self.h.value
        z_in, r_in, c_in = jnp.split(self.w(x), 3, axis=-1)
        z_back, r_back, c_back = jnp.split(h @ self.u.value, 3, axis=-1)
        z, r = jax.nn.sigmoid(z_in + z_back), jax.nn.sigmoid(r_in + r_back)
        self.h.value = z * h + (1 - z) * jnp.tanh(c_in + r * c_back)
        return self.heads(self.h.value)


class LRUAgent(_Agent):
    """A linear recurrent unit: complex decays that are learnt (the slowest forget half in 14 steps), features by a tanh.

    A. Orvieto et al., "Resurrecting recurrent neural networks for long sequences", 2023.
    """

    def __init__(self, inputs: int, actions: int, units: int = 16):
        super().__init__(inputs, actions, units)
        size = brainstate.random.uniform(0.6, 0.95, (units,))
        self.nu = brainstate.ParamState(jnp.log(-jnp.log(jnp.asarray(size))))
        self.theta = brainstate.ParamState(brainstate.random.uniform(0.0, 0.3, (units,)))
        normal = brainstate.nn.init.Normal(scale=1 / inputs**0.5)
        self.b_re, self.b_im = (brainstate.ParamState(normal((inputs, units))) for _ in range(2))
        self.c = brainstate.nn.Linear(2 * units, units)

    def init_state(self, batch_size: int | None = None) -> None:
        self.re, self.im = (brainstate.HiddenState(self.zeros(batch_size)) for _ in range(2))

    def update(self, x: Any) -> tuple[Any, Any]:
        size = jnp.exp(-jnp.exp(self.nu.value))
        scale = jnp.sqrt(1 - size**2)
        a, b = size * jnp.cos(self.theta.value), size * jnp.sin(self.theta.value)
        re, im = jnp.asarray(self.re.value), jnp.asarray(self.im.value)
        re, im = (
            a * re - b * im + scale * (x @ self.b_re.value),
            a * im + b * re + scale * (x @ self.b_im.value),
        )
        self.re.value, self.im.value = re, im
        return self.heads(jnp.tanh(self.c(jnp.concatenate([re, im], axis=-1))))


@jax.custom_jvp
def spike(v: Any) -> Any:
    """1 where v is above 0; its derivative is that of a fast sigmoid."""
    return (v > 0).astype(v.dtype)


@spike.defjvp
def _spike_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    (v,), (dv,) = primals, tangents
    return spike(v), 0.3 * dv * jnp.maximum(1 - jnp.abs(v), 0.0)


class LIFAgent(_Agent):
    """Recurrent leaky integrate-and-fire neurons with adaptive thresholds, and heads on filtered spikes.

    With potential v, adaptation a, spikes z, filtered spikes r::

        z[t] = v[t] > 1 + 0.3 a[t]
        v[t] = 0.8 v[t-1] (1 - z[t-1]) + W_in x[t] + b + W_rec z[t-1]
        a[t] = 0.97 a[t-1] + z[t-1]
        r[t] = 0.9 r[t-1] + z[t]
    """

    def __init__(self, inputs: int, actions: int, units: int = 32):
        super().__init__(inputs, actions, units)
        self.w = brainstate.nn.Linear(inputs, units, w_init=brainstate.nn.init.Normal(scale=1.0))
        self.u = brainstate.ParamState(brainstate.nn.init.Normal(scale=0.5 / units**0.5)((units, units)))

    def init_state(self, batch_size: int | None = None) -> None:
        self.v, self.a, self.r = (brainstate.HiddenState(self.zeros(batch_size)) for _ in range(3))

    def spikes(self) -> Any:
        return spike(self.v.value - 1.0 - 0.3 * self.a.value)

    def update(self, x: Any) -> tuple[Any, Any]:
        z = self.spikes()
        self.v.value = 0.8 * self.v.value * (1 - z) + self.w(x) + z @ self.u.value
        self.a.value = 0.97 * self.a.value + z
        self.r.value = 0.9 * self.r.value + self.spikes()
        return self.heads(self.r.value)


MODELS = {"LRU": LRUAgent, "GRU": GRUAgent, "LIF": LIFAgent}
