"""Networks put together from `brainpy.state` neurons, synapses and projections, with units.

They have no instrumented step: one step and backpropagation through time of the model itself judge them.
"""

from __future__ import annotations

import brainpy
import brainstate
import braintools
import jax.numpy as jnp
import saiunit as u

from .base import case, from_module

bp = brainpy.state
nn = brainstate.nn
DT = 1.0 * u.ms
SURROGATE = braintools.surrogate.Sigmoid(alpha=2.0)


def normal(scale, unit):
    return braintools.init.Normal(0.0 * unit, scale * unit)


class Net(nn.Module):
    """The input and, if `recurrent`, the last spikes project on one population; a linear readout of its spikes."""

    def __init__(self, neuron, project, recurrent, positive=False):
        super().__init__()
        self.neuron, self.recurrent, self.positive = neuron, recurrent, positive
        self.project = project(neuron, 3 + 5 * recurrent)
        self.readout = nn.Linear(5, 2)

    def update(self, x):
        with brainstate.environ.context(dt=DT):
            if self.positive:
                x = jnp.abs(x)
            if self.recurrent:
                x = jnp.concatenate([x, self.neuron.get_spike()], axis=-1)
            self.project(x)
            return self.readout(self.neuron())


def spikes_of(model: Net, state: dict):
    """The spikes of the population at these states."""
    names = [n for n in ("V", "a", "V_th") if f"neuron.{n}" in state]
    return model.neuron.get_spike(**{n: state[f"neuron.{n}"] for n in names})


def lif(kind, **kwargs):
    def make():
        return kind(5, tau=5.0 * u.ms, V_th=1.0 * u.mV, spk_fun=SURROGATE, **kwargs)

    return make


def gif():
    return bp.Gif(
        5,
        R=1.0 * u.ohm,
        tau=5.0 * u.ms,
        V_rest=0.0 * u.mV,
        V_reset=0.0 * u.mV,
        V_th_inf=1.0 * u.mV,
        V_th_reset=0.8 * u.mV,
        V_th_initializer=braintools.init.Constant(1.0 * u.mV),
        V_initializer=braintools.init.Constant(0.0 * u.mV),
        a=0.05 / u.ms,
        A1=0.3 * u.mA,
        spk_fun=SURROGATE,
    )


def delta(scale):
    def project(post, n_in):
        return bp.DeltaProj(comm=nn.Linear(n_in, 5, w_init=normal(scale, u.mV), b_init=None), post=post)

    return project


def exponential(w_init, unit, out):
    def project(post, n_in):
        return bp.AlignPostProj(
            comm=nn.Linear(n_in, 5, w_init=w_init, b_init=None),
            syn=bp.Expon.desc(5, tau=4.0 * u.ms, g_initializer=braintools.init.Constant(0.0 * unit)),
            out=out(),
            post=post,
        )

    return project


def network(make_neuron, project, *, recurrent=True, positive=False):
    def build(batch, dtype):
        brainstate.random.seed(5)
        return from_module(
            Net(make_neuron(), project, recurrent, positive),
            None,
            groups=None,
            exact=not recurrent,
            batch=batch,
            dtype=dtype,
            x_scale=2.0,
            param_noise=0.01,
            state_noise=0.1 if positive else 0.3,
        )

    return build


def current_based():
    return bp.CUBA.desc(scale=1.0)


def conductance_based():
    return bp.COBA.desc(E=3.0 * u.mV)


def add(name, *arguments, **kwargs):
    case("brainpy", "spiking", "no_step", name=name)(network(*arguments, **kwargs))


CURRENT = exponential(normal(2.0, u.mA), u.mA, current_based)
CONDUCTANCE = exponential(
    braintools.init.Uniform(0.01 * u.msiemens, 0.1 * u.msiemens), u.msiemens, conductance_based
)

add("brainpy_lif_delta", lif(bp.LIF), delta(0.8))
add("brainpy_lif_exponential", lif(bp.LIF), CURRENT)
add("brainpy_lif_exponential_feedforward", lif(bp.LIF), CURRENT, recurrent=False)
add("brainpy_lif_conductance", lif(bp.LIF, R=1.0 * u.kohm), CONDUCTANCE, positive=True)
add("brainpy_lif_hard_reset", lif(bp.LIF, spk_reset="hard"), CURRENT)
add("brainpy_alif_delta", lif(bp.ALIF, tau_a=20 * u.ms), delta(0.8))
add("brainpy_alif_exponential", lif(bp.ALIF, tau_a=20 * u.ms), CURRENT)
add("brainpy_alif_conductance", lif(bp.ALIF, tau_a=20 * u.ms, R=1.0 * u.kohm), CONDUCTANCE, positive=True)
add("brainpy_gif_exponential", gif, CURRENT)


class LeakyNet(Net):
    """The same, read by brainpy's own leaky readout."""

    def __init__(self, neuron, project, recurrent):
        super().__init__(neuron, project, recurrent)
        with brainstate.environ.context(dt=DT):
            self.readout = bp.LeakyRateReadout(5, 2, tau=5.0 * u.ms)


@case("brainpy", "spiking", "no_step")
def brainpy_leaky_rate_readout(batch, dtype):
    brainstate.random.seed(5)
    module = LeakyNet(lif(bp.LIF)(), CURRENT, True)
    return from_module(
        module, None, groups=None, exact=False, batch=batch, dtype=dtype, x_scale=2.0, param_noise=0.05
    )
