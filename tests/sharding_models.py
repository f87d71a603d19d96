"""Models, data and runs for the tests on several devices; imported by programs that start with as many host devices."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import numpy as np

import etcompile

EXAMPLES, INPUTS, UNITS, OUTPUTS, STEPS = 8, 6, 16, 3, 5


def square(out, y):
    return jnp.mean((out - y) ** 2)


class Gru(brainstate.nn.Module):
    """Fused gates, a recurrent weight, and a readout of three units that no mesh divides."""

    def __init__(self, units=UNITS):
        super().__init__()
        self.cell = brainstate.nn.GRUCell(INPUTS, units)
        self.readout = brainstate.nn.Linear(units, OUTPUTS)

    def update(self, x):
        return self.readout(self.cell(x))


def _weights(**shapes):
    rng = np.random.default_rng(1)
    return {k: jnp.asarray(rng.normal(size=s) / np.sqrt(s[0])) for k, s in shapes.items()}


def spiking():
    """An adaptive neuron with two states and a surrogate gradient; its weights are masked and stored transposed."""

    @jax.custom_jvp
    def spike(v):
        return (v > 0).astype(v.dtype)

    @spike.defjvp
    def _(primals, tangents):
        (v,), (t,) = primals, tangents
        return spike(v), t / (1 + jnp.abs(3 * v)) ** 2

    mask = jnp.asarray(np.arange(UNITS * INPUTS).reshape(UNITS, INPUTS) % 3 > 0, float)

    def step(p, s, x):
        z = spike(s["v"] - 0.3 - s["a"])
        v = 0.8 * s["v"] + x @ (p["w"] * mask).T + z @ p["u"] - z * 0.3
        a = 0.9 * s["a"] + 0.2 * z
        return {"v": v, "a": a, "steps": s["steps"] + 1}, spike(v - 0.3 - a) @ p["out"] + p["b"]

    params = _weights(w=(UNITS, INPUTS), u=(UNITS, UNITS), out=(UNITS, OUTPUTS), b=(OUTPUTS,))
    zeros = jnp.zeros((EXAMPLES, UNITS))
    return etcompile.from_function(step, params, {"v": zeros, "a": zeros, "steps": jnp.zeros((), int)})


def conv():
    """A recurrent convolution over 4 x 4 places with channels last."""

    def step(p, s, x):
        def same(v, w):
            return jax.lax.conv_general_dilated(
                v, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        image = x[:, None, None, :] * jnp.arange(16.0).reshape(1, 4, 4, 1) / 16
        h = jnp.tanh(0.5 * s["h"] + same(image, p["w"]) + same(s["h"], p["u"]) + p["b"])
        return {"h": h}, h.mean((1, 2)) @ p["out"]

    params = _weights(w=(3, 3, INPUTS, UNITS), u=(3, 3, UNITS, UNITS), b=(UNITS,), out=(UNITS, OUTPUTS))
    return etcompile.from_function(step, params, {"h": jnp.zeros((EXAMPLES, 4, 4, UNITS))})


def complex_diagonal():
    """A complex recurrence without a cut: nothing meets but in the readout."""

    def step(p, s, x):
        h = 0.9 * jnp.exp(1j * p["turn"]) * s["h"] + x @ p["w"]
        return {"h": h}, jnp.real(h) @ p["out"]

    params = _weights(turn=(UNITS,), w=(INPUTS, UNITS), out=(UNITS, OUTPUTS))
    return etcompile.from_function(step, params, {"h": jnp.zeros((EXAMPLES, UNITS), complex)})


def packed():
    """Two states of a neuron in one array, one after the other, which have an axis of their own in the graph."""

    def step(p, s, x):
        v, a = s["s"][..., ::2], s["s"][..., 1::2]
        v = jnp.tanh(0.8 * v + x @ p["w"] + v @ p["u"] - 0.3 * a)
        a = 0.9 * a + 0.2 * v
        return {"s": jnp.stack([v, a], -1).reshape(s["s"].shape)}, v @ p["out"]

    params = _weights(w=(INPUTS, UNITS), u=(UNITS, UNITS), out=(UNITS, OUTPUTS))
    return etcompile.from_function(step, params, {"s": jnp.zeros((EXAMPLES, 2 * UNITS))})


def one_example():
    """No batch axis."""

    def step(p, s, x):
        h = jnp.tanh(x @ p["w"] + s["h"] @ p["u"] + 0.5 * s["h"] * p["leak"])
        return {"h": h}, h @ p["out"]

    params = _weights(w=(INPUTS, UNITS), u=(UNITS, UNITS), leak=(UNITS,), out=(UNITS, OUTPUTS))
    return etcompile.from_function(step, params, {"h": jnp.zeros(UNITS)})


MODELS = {
    "gru": Gru,
    "wide_gru": lambda: Gru(64),
    "spiking": spiking,
    "conv": conv,
    "complex_diagonal": complex_diagonal,
    "packed": packed,
    "one_example": one_example,
}


def data(model, examples=EXAMPLES):
    rng = np.random.default_rng(0)
    batch = () if model == "one_example" else (examples,)
    return rng.normal(size=(STEPS, *batch, INPUTS)), rng.normal(size=(STEPS, *batch, OUTPUTS))


def compiled(model, schedule=None, algo="d_rtrl", examples=EXAMPLES, **options):
    brainstate.random.seed(0)
    built = MODELS[model]()
    batch = {"batch_size": examples} if model in ("gru", "wide_gru") else {}
    x = jnp.asarray(data(model, examples)[0][0])
    return etcompile.compile(built, x, algo=algo, schedule=schedule, **batch, **options)


def over(shape, batch="data", units="model", **options):
    """A schedule for a mesh of this shape."""
    mesh = jax.make_mesh(shape, ("data", "model"))
    return etcompile.Schedule(mesh=mesh, batch=batch, units=units, **options)


def difference(found, wanted):
    """The largest relative difference of two trees of arrays."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return float(np.max([_relative(np.asarray(a), np.asarray(b)) for a, b in pairs]))


def _relative(a, b):
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)) if b.size else 0.0


def states(step):
    """Traces and model states as they stand."""
    return jax.tree.map(np.asarray, [step.traces, step.executor.carry().states])
