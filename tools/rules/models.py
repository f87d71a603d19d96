"""The models, as a user would write them: nothing here knows about learning rules."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp

__all__ = ["GRUNet", "SpikingNet", "spike"]


class GRUNet(brainstate.nn.Module):
    """A gated recurrent unit whose reset gate acts after the recurrent product, and a linear readout.

    With gates z and r, candidate c, hidden state h and inputs x::

        z[t], r[t] = sigmoid(W_gates x[t] + U_gates h[t-1])
        c[t] = tanh(W x[t] + r[t] * (U h[t-1]))
        h[t] = z[t] h[t-1] + (1 - z[t]) c[t]

    So no gate of one unit reaches another within the step, which keeps the pattern of ``snap`` small: its paper takes this
    variant for that reason. ``keep`` is what the bias of z starts from: the higher, the longer the memory before training.
    """

    def __init__(self, num_in: int, num_hidden: int, num_out: int, keep: float = 0.0):
        super().__init__()
        self.num_hidden = num_hidden
        bias = jnp.concatenate([jnp.full(num_hidden, keep), jnp.zeros(2 * num_hidden)])
        self.w = brainstate.nn.Linear(num_in, 3 * num_hidden, b_init=bias)
        normal = brainstate.nn.init.Normal(scale=1 / num_hidden**0.5)
        self.u = brainstate.ParamState(normal((num_hidden, 3 * num_hidden)))
        self.readout = brainstate.nn.Linear(num_hidden, num_out)

    def init_state(self, batch_size: int | None = None) -> None:
        self.h = brainstate.HiddenState(self._zeros(batch_size))

    def reset_state(self, batch_size: int | None = None) -> None:
        self.h.value = self._zeros(batch_size)

    def _zeros(self, batch_size: int | None) -> jax.Array:
        return jnp.zeros((self.num_hidden,) if batch_size is None else (batch_size, self.num_hidden))

    def update(self, x: jax.Array) -> jax.Array:
        h = self.h.value
        z_in, r_in, c_in = jnp.split(self.w(x), 3, axis=-1)
        z_back, r_back, c_back = jnp.split(h @ self.u.value, 3, axis=-1)
        z, r = jax.nn.sigmoid(z_in + z_back), jax.nn.sigmoid(r_in + r_back)
        self.h.value = z * h + (1 - z) * jnp.tanh(c_in + r * c_back)
        return self.readout(self.h.value)


@jax.custom_jvp
def spike(v: jax.Array) -> jax.Array:
    """1 where v is above 0; its derivative is that of a fast sigmoid."""
    return (v > 0).astype(v.dtype)


@spike.defjvp
def _spike_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (v,), (dv,) = primals, tangents
    return spike(v), 0.3 * dv * jnp.maximum(1 - jnp.abs(v), 0.0)


class SpikingNet(brainstate.nn.Module):
    """Recurrent leaky integrate-and-fire neurons with adaptive thresholds, and a readout of spikes.

    With potential v, adaptation a, spikes z and inputs x::

        z[t] = v[t] > 1 + gain a[t]
        v[t] = beta v[t-1] (1 - z[t-1]) + W_in x[t] + b + W_rec z[t-1]
        a[t] = rho a[t-1] + z[t-1]
        out  = W_out z[t] + c
    """

    def __init__(
        self,
        num_in: int,
        num_hidden: int,
        num_out: int,
        beta: float = 0.8,
        rho: float = 0.96,
        gain: float = 0.3,
    ):
        super().__init__()
        self.num_hidden = num_hidden
        self.beta, self.rho, self.gain = beta, rho, gain
        self.w_in = brainstate.nn.Linear(num_in, num_hidden, w_init=brainstate.nn.init.Normal(scale=1.0))
        normal = brainstate.nn.init.Normal(scale=0.5 / num_hidden**0.5)
        self.w_rec = brainstate.ParamState(normal((num_hidden, num_hidden)))
        self.readout = brainstate.nn.Linear(num_hidden, num_out)

    def init_state(self, batch_size: int | None = None) -> None:
        self.v = brainstate.HiddenState(self._zeros(batch_size))
        self.a = brainstate.HiddenState(self._zeros(batch_size))

    def reset_state(self, batch_size: int | None = None) -> None:
        self.v.value, self.a.value = self._zeros(batch_size), self._zeros(batch_size)

    def _zeros(self, batch_size: int | None) -> jax.Array:
        return jnp.zeros((self.num_hidden,) if batch_size is None else (batch_size, self.num_hidden))

    def spikes(self) -> jax.Array:
        """Spikes of the moment, 0 or 1."""
        return spike(self.v.value - 1.0 - self.gain * self.a.value)

    def update(self, x: jax.Array) -> jax.Array:
        z = self.spikes()
        self.v.value = self.beta * self.v.value * (1 - z) + self.w_in(x) + z @ self.w_rec.value
        self.a.value = self.rho * self.a.value + z
        return self.readout(self.spikes())
