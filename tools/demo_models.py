"""The two models of the demo, written as any brainstate user would write them.

Nothing here knows about etcompile: no marks on parameters, no special layers.
"""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp


class GRUNet(brainstate.nn.Module):
    """Stock layers: a gated recurrent unit and a linear readout."""

    def __init__(self, num_in: int, num_hidden: int, num_out: int):
        super().__init__()
        self.cell = brainstate.nn.GRUCell(num_in, num_hidden)
        self.readout = brainstate.nn.Linear(num_hidden, num_out)

    def update(self, x: jax.Array) -> jax.Array:
        return self.readout(self.cell(x))


@jax.custom_jvp
def spike(v: jax.Array) -> jax.Array:
    """1 where the scaled potential is above threshold; its derivative is that of a fast sigmoid."""
    return (v > 0).astype(v.dtype)


@spike.defjvp
def _spike_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (v,), (dv,) = primals, tangents
    return spike(v), dv / (1 + jnp.abs(2 * v)) ** 2


class SpikingNet(brainstate.nn.Module):
    """Recurrent leaky integrate-and-fire neurons with exponential synapses, and a linear readout.

    With membrane potential v, synaptic activation s, spikes z and inputs x::

        v[t] = beta * v[t-1] + W_in x[t] + W_rec s[t-1] + b
        z[t] = v[t] > 1,  v[t] <- v[t] - z[t]
        s[t] = alpha * s[t-1] + z[t]
        out  = W_out s[t] + c
    """

    def __init__(self, num_in: int, num_hidden: int, num_out: int, beta: float = 0.7, alpha: float = 0.9):
        super().__init__()
        self.num_hidden = num_hidden
        self.beta = beta
        self.alpha = alpha
        self.w_in = brainstate.nn.Linear(num_in, num_hidden)
        small = brainstate.nn.init.Orthogonal(scale=0.2)
        self.w_rec = brainstate.ParamState(small((num_hidden, num_hidden)))
        self.readout = brainstate.nn.Linear(num_hidden, num_out)

    def init_state(self, batch_size: int | None = None) -> None:
        shape = (self.num_hidden,) if batch_size is None else (batch_size, self.num_hidden)
        self.v = brainstate.HiddenState(jnp.zeros(shape))
        self.s = brainstate.HiddenState(jnp.zeros(shape))

    def reset_state(self, batch_size: int | None = None) -> None:
        self.v.value = jnp.zeros_like(self.v.value)
        self.s.value = jnp.zeros_like(self.s.value)

    def update(self, x: jax.Array) -> jax.Array:
        v = self.beta * self.v.value + self.w_in(x) + self.s.value @ self.w_rec.value
        z = spike(v - 1.0)
        self.v.value = v - z
        self.s.value = self.alpha * self.s.value + z
        return self.readout(self.s.value)
