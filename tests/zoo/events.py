"""Sparse connectivity of brainevent: its own primitives, which no rule of the compiler can know by name."""

from __future__ import annotations

import brainevent
import jax.numpy as jnp
import numpy as np

from .base import case
from .spiking import spike
from .written import weights, written

# The default kernels want numba or a C compiler; the plain JAX ones do as well for a handful of synapses.
brainevent.config.set_backend("cpu", "jax_raw")

# Rows send. Every unit reaches several others and not itself.
RECEIVERS = np.array([1, 2, 0, 3, 1, 3, 0, 1, 2], np.int32)
STARTS = np.array([0, 2, 4, 6, 9], np.int32)
SENDERS = np.repeat(np.arange(4), np.diff(STARTS))
NETWORK = brainevent.CSR((jnp.zeros(9), RECEIVERS, STARTS), shape=(4, 4))

RECEIVERS_IN = np.array([0, 1, 2, 3, 0, 2, 1], np.int32)
STARTS_IN = np.array([0, 2, 4, 7], np.int32)
SENDERS_IN = np.repeat(np.arange(3), np.diff(STARTS_IN))
PROJECTION = brainevent.CSR((jnp.zeros(7), RECEIVERS_IN, STARTS_IN), shape=(3, 4))


def dense(w):
    return jnp.zeros((4, 4), w.dtype).at[SENDERS, RECEIVERS].set(w)


def dense_in(w):
    return jnp.zeros((3, 4), w.dtype).at[SENDERS_IN, RECEIVERS_IN].set(w)


def csr(w):
    return NETWORK.with_data(w)


@case("brainevent", "sparse")
def brainevent_csr(batch, dtype):
    def body(p, s, x, *, cut, put, matrix=dense_in):
        h = put("h", jnp.tanh(p["a"] * s["h"] + x @ matrix(p["w"])))
        return {"h": h}, h @ p["V"]

    def model(p, s, x, *, cut, put):
        return body(p, s, x, cut=cut, put=put, matrix=PROJECTION.with_data)

    params = weights(w=(7,), a=(4,), V=(4, 2))
    return written(body, params, {"h": (4,)}, exact=True, batch=batch, dtype=dtype, model_body=model)


@case("brainevent", "sparse")
def brainevent_csr_recurrent(batch, dtype):
    def body(p, s, x, *, cut, put, matrix=dense):
        h = put("h", jnp.tanh(p["a"] * s["h"] + x @ p["U"] + cut(s["h"]) @ matrix(p["w"])))
        return {"h": h}, h @ p["V"]

    def model(p, s, x, *, cut, put):
        return body(p, s, x, cut=cut, put=put, matrix=csr)

    params = weights(w=(9,), U=(3, 4), a=(4,), V=(4, 2))
    return written(body, params, {"h": (4,)}, exact=False, batch=batch, dtype=dtype, model_body=model)


case("brainevent", "sparse", "no_batch", batch=None, name="brainevent_csr_no_batch")(brainevent_csr_recurrent)


@case("brainevent", "sparse", "spiking")
def brainevent_binary_events(batch, dtype):
    """Spikes as events: only the rows of units that spiked are read."""

    def body(p, s, x, *, cut, put, multiply=lambda z, w: z @ dense(w)):
        i = put("i", 0.7 * s["i"] + 1.5 * (x @ p["U"]) + multiply(cut(s["z"]), p["w"]))
        v = put("v", 0.8 * s["v"] * (1 - s["z"]) + 0.4 * i)
        z = put("z", spike(v - 0.5))
        return {"i": i, "v": v, "z": z}, z @ p["V"]

    def model(p, s, x, *, cut, put):
        return body(p, s, x, cut=cut, put=put, multiply=lambda z, w: brainevent.BinaryArray(z) @ csr(w))

    return written(
        body,
        weights(w=(9,), U=(3, 4), V=(4, 2)),
        dict.fromkeys("ivz", (4,)),
        exact=False,
        batch=batch,
        dtype=dtype,
        model_body=model,
        initial={"z": lambda z: (z > 0.3).astype(z.dtype)},
        spikes=("z",),
    )
