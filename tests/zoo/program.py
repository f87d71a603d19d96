"""What else a step may hold: control flow, custom derivatives, random numbers, trees, units, plain functions."""

from __future__ import annotations

import brainstate
import jax
import jax.numpy as jnp
import saiunit as u

from .base import case, cast, from_module, linear, shape
from .written import drive, weights, written

DENSE = {"U": (3, 4), "W": (4, 4), "b": (4,), "V": (4, 2)}
ELEMENTWISE = {"U": (3, 4), "a": (4,), "b": (4,), "V": (4, 2)}


# --- Calls and custom derivatives -----------------------------------------------------------------------------------


@jax.custom_vjp
def soft_step(v):
    return jax.nn.sigmoid(4 * v)


def _soft_step_forward(v):
    return soft_step(v), v


def _soft_step_backward(v, g):
    return (g / (1.0 + v * v),)


soft_step.defvjp(_soft_step_forward, _soft_step_backward)


@jax.custom_jvp
def soft_step_forward_mode(v):
    """`soft_step` for oracles that differentiate forward."""
    return jax.nn.sigmoid(4 * v)


@soft_step_forward_mode.defjvp
def _soft_step_jvp(primals, tangents):
    (v,), (dv,) = primals, tangents
    return soft_step_forward_mode(v), dv / (1.0 + v * v)


def elementwise(activation, model_activation=None, functional=False, tags=(), recurrent=False):
    """``h' = activation(a h + x U + b)``, with or without ``h W``."""

    def build(batch, dtype):
        def body(p, s, x, *, cut, put, activation=activation):
            y = drive(p, x, s["h"], cut) if recurrent else x @ p["U"] + p["b"]
            h = put("h", activation(p["a"] * s["h"] + y))
            return {"h": h}, h @ p["V"]

        def model(p, s, x, *, cut, put):
            return body(p, s, x, cut=cut, put=put, activation=model_activation or activation)

        params = weights(**ELEMENTWISE, **({"W": (4, 4)} if recurrent else {}))
        return written(
            body,
            params,
            {"h": (4,)},
            exact=not recurrent,
            batch=batch,
            dtype=dtype,
            model_body=model,
            functional=functional,
        )

    return build


def substeps(h):
    """Five small steps of a leaky equation."""
    return jax.lax.scan(lambda v, _: (v + 0.2 * (jnp.sin(v) - v), None), h, None, length=5)[0]


def for_loop_substeps(h):
    return jax.lax.fori_loop(0, 3, lambda i, v: v + 0.1 * (jnp.tanh(2 * v) - v), h)


def branches(h):
    """The branch depends on the data, the operands are elementwise."""
    return jax.lax.cond(jnp.sum(jax.lax.stop_gradient(h)) > 0, jnp.tanh, lambda v: 0.5 * jnp.sin(v), h)


def switch(h):
    which = jnp.clip(jnp.sum(jax.lax.stop_gradient(h)) / 2 + 1, 0, 2).astype(int)
    return jax.lax.switch(which, [jnp.tanh, lambda v: 0.5 * v, jnp.sin], h)


case("control", "not_smooth", name="custom_jvp")(elementwise(soft_step_forward_mode))
case("control", "not_smooth", name="custom_vjp")(elementwise(soft_step_forward_mode, soft_step))
case("control", "not_smooth", name="custom_vjp_recurrent")(
    elementwise(soft_step_forward_mode, soft_step, recurrent=True)
)
case("control", name="remat")(elementwise(jax.checkpoint(lambda v: jnp.tanh(jnp.sin(v)))))
case("control", name="jit_inside")(elementwise(jax.jit(lambda v: jnp.tanh(v) + 0.1 * v)))
case("control", name="scan_substeps")(elementwise(substeps))
case("control", name="scan_substeps_recurrent")(elementwise(substeps, recurrent=True))
case("control", name="for_loop_substeps")(elementwise(for_loop_substeps))
case("control", "not_smooth", name="cond")(elementwise(branches))
case("control", "not_smooth", name="cond_recurrent")(elementwise(branches, recurrent=True))
case("control", "not_smooth", name="switch")(elementwise(switch))
case("control", name="brainstate_for_loop")(
    elementwise(
        substeps,
        lambda h: brainstate.transform.scan(
            lambda v, _: (v + 0.2 * (jnp.sin(v) - v), None), h, jnp.arange(5)
        )[0],
    )
)
case("control", "not_smooth", name="relu_and_clip")(
    elementwise(lambda v: jnp.clip(jax.nn.relu(v), 0, 3) + 0.1 * v)
)
case("control", name="gelu_and_softplus")(
    elementwise(lambda v: jnp.tanh(jax.nn.gelu(v) - 0.3 * jax.nn.softplus(v)))
)
case("control", "not_smooth", name="where_both")(
    elementwise(lambda v: jnp.where(v > 0, jnp.tanh(v), 0.3 * jnp.sin(v)), recurrent=True)
)
case("control", name="weight_inside_jit")(lambda batch, dtype: _weight_inside(jax.jit, batch, dtype))
case("control", name="weight_inside_remat")(lambda batch, dtype: _weight_inside(jax.checkpoint, batch, dtype))


def _weight_inside(wrap, batch, dtype):
    def body(p, s, x, *, cut, put):
        h = put(
            "h", wrap(lambda w, x, h: jnp.tanh(0.5 * h + x @ w["U"] + cut(h) @ w["W"] + w["b"]))(p, x, s["h"])
        )
        return {"h": h}, h @ p["V"]

    return written(body, weights(**DENSE), {"h": (4,)}, exact=False, batch=batch, dtype=dtype)


@case("control")
def weight_inside_the_substeps(batch, dtype):
    """An elementwise parameter and a constant drive used at each of three sub-steps."""

    def body(p, s, x, *, cut, put):
        y = x @ p["U"] + p["b"]

        def substep(h, _):
            return h + 0.3 * (jnp.tanh(p["a"] * h + y) - h), None

        h = put("h", jax.lax.scan(substep, s["h"], None, length=3)[0])
        return {"h": h}, h @ p["V"]

    return written(body, weights(**ELEMENTWISE), {"h": (4,)}, exact=True, batch=batch, dtype=dtype)


@case("control", "not_smooth")
def cond_on_the_input(batch, dtype):
    """The state moves only on some steps."""

    def body(p, s, x, *, cut, put):
        y = x @ p["U"] + p["b"]
        h = jax.lax.cond(
            jnp.sum(x) > 0, lambda h, y: jnp.tanh(p["a"] * h + y), lambda h, y: 0.9 * h, s["h"], y
        )
        h = put("h", h)
        return {"h": h}, h @ p["V"]

    return written(body, weights(**ELEMENTWISE), {"h": (4,)}, exact=True, batch=batch, dtype=dtype)


@case("control")
def while_without_parameters(batch, dtype):
    """A loop that counts: no trained parameter and no state goes through it."""

    def body(p, s, x, *, cut, put):
        _, scale = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 0.9), (0, 1.0))
        h = put("h", jnp.tanh(p["a"] * s["h"] * scale + x @ p["U"] + p["b"]))
        return {"h": h}, h @ p["V"]

    return written(body, weights(**ELEMENTWISE), {"h": (4,)}, exact=True, batch=batch, dtype=dtype)


# --- Outputs and losses ----------------------------------------------------------------------------------------------


@case("loss")
def outputs_in_a_tree(batch, dtype):
    """The loss reads several outputs, among them the state itself."""

    def body(p, s, x, *, cut, put):
        h = put("h", jnp.tanh(0.5 * s["h"] + drive(p, x, s["h"], cut)))
        return {"h": h}, {"y": h @ p["V"], "state": [h, x]}

    def loss_fn(out, target):
        h, _ = out["state"]
        return jnp.sum((out["y"] - target) ** 2) + 0.1 * jnp.sum(h**4)

    return written(
        body, weights(**DENSE), {"h": (4,)}, exact=False, batch=batch, dtype=dtype, loss_fn=loss_fn
    )


@case("loss")
def loss_on_some_steps(batch, dtype):
    """Two targets, one a mask that switches the loss off."""

    def body(p, s, x, *, cut, put):
        h = put("h", jnp.tanh(p["a"] * s["h"] + x @ p["U"] + p["b"]))
        return {"h": h}, h @ p["V"]

    targets = (
        cast(jax.random.normal(jax.random.key(3), (7, *shape(batch, 2))), dtype),
        jnp.asarray([1, 0, 0, 1, 0, 0, 1], dtype),
    )
    return written(
        body,
        weights(**ELEMENTWISE),
        {"h": (4,)},
        exact=True,
        batch=batch,
        dtype=dtype,
        targets=targets,
        loss_fn=lambda out, target, on: on * jnp.mean((out - target) ** 2),
    )


@case("loss")
def cross_entropy_of_labels(batch, dtype):
    def body(p, s, x, *, cut, put):
        h = put("h", jnp.tanh(0.5 * s["h"] + drive(p, x, s["h"], cut)))
        return {"h": h}, h @ p["V"]

    labels = jax.random.randint(jax.random.key(4), (7, *shape(batch)), 0, 2)

    def loss_fn(out, label):
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(out) * jax.nn.one_hot(label, 2, dtype=out.dtype), -1))

    return written(
        body,
        weights(**DENSE),
        {"h": (4,)},
        exact=False,
        batch=batch,
        dtype=dtype,
        targets=(labels,),
        loss_fn=loss_fn,
    )


# --- Trees, units, plain functions -----------------------------------------------------------------------------------


@case("trees")
def states_in_a_dict(batch, dtype):
    """One State that holds a dict of two hidden arrays."""

    def body(p, s, x, *, cut, put):
        old = s["cell"]
        v = 0.6 * old["v"] + 0.3 * old["w"] + x @ p["U"]
        w = jnp.tanh(p["a"] * old["w"] + v)
        new = put("cell", {"v": v, "w": w})
        return {"cell": new}, (new["v"] * new["w"]) @ p["V"]

    def zeros(b):
        return {"v": jnp.zeros(shape(b, 4)), "w": jnp.zeros(shape(b, 4))}

    return written(
        body,
        weights(U=(3, 4), a=(4,), V=(4, 2)),
        {"cell": zeros},
        exact=True,
        batch=batch,
        dtype=dtype,
        kind=brainstate.ShortTermState,
    )


@case("units")
def quantities(batch, dtype):
    """Potential in millivolts, current in milliampere, a conductance as the weight."""

    def body(p, s, x, *, cut, put):
        i = put("i", 0.7 * s["i"] + (x * u.mV) @ p["g"])
        v = put("v", 0.8 * s["v"] + (0.5 * u.ohm) * i + p["a"] * s["v"] * jnp.tanh(s["v"].to_decimal(u.mV)))
        return {"i": i, "v": v}, v.to_decimal(u.mV) @ p["V"]

    w = weights(g=(3, 4), a=(4,), V=(4, 2))
    # mV * mS = uA; the current is kept in uA so that nothing rescales it.
    params = {"g": w["g"] * u.msiemens, "a": 0.3 * w["a"], "V": w["V"]}

    def current(b):
        return jnp.zeros(shape(b, 4)) * (u.mV * u.msiemens)

    def potential(b):
        return jnp.zeros(shape(b, 4)) * u.mV

    return written(
        body,
        params,
        {"i": current, "v": potential},
        exact=True,
        batch=batch,
        dtype=dtype,
    )


case("function", name="function_indrnn")(elementwise(jnp.tanh, functional=True))
case("function", name="function_recurrent")(elementwise(jnp.tanh, functional=True, recurrent=True))
case("function", "no_batch", batch=None, name="function_no_batch")(
    elementwise(jnp.sin, functional=True, recurrent=True)
)


@case("function")
def function_lstm(batch, dtype):
    """Parameters and states in nested trees, as plain JAX code keeps them."""

    def body(p, s, x, *, cut, put):
        c, h = s["carry"]
        w = p["lstm"]
        i, f, g, o = jnp.split(x @ w["U"] + cut(h) @ w["W"] + w["b"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        # Both halves are one named state here; c reaches h within it, so `put` comes last.
        c, h = put("carry", (c, jax.nn.sigmoid(o) * jnp.tanh(c)))
        return {"carry": (c, h)}, h @ p["V"]

    w = weights(U=(3, 16), W=(4, 16), b=(16,), V=(4, 2))
    params = {"lstm": {n: w[n] for n in "UWb"}, "V": w["V"]}

    def zeros(b):
        return (jnp.zeros(shape(b, 4)), jnp.zeros(shape(b, 4)))

    return written(
        body,
        params,
        {"carry": zeros},
        exact=False,
        batch=batch,
        dtype=dtype,
        kind=brainstate.ShortTermState,
        functional=True,
    )


# --- Random numbers ---------------------------------------------------------------------------------------------------


class Noisy(brainstate.nn.Module):
    """Noise on the state and dropout before the readout, drawn from brainstate's own random state."""

    def __init__(self):
        super().__init__()
        self.cell = brainstate.nn.Linear(3, 4)
        self.decay = brainstate.ParamState(jnp.full(4, 0.5))
        self.readout = brainstate.nn.Linear(4, 2)

    def init_state(self, batch_size=None, **kwargs):
        self.h = brainstate.HiddenState(jnp.zeros(shape(batch_size, 4)))

    def update(self, x):
        h = self.h.value
        noise = brainstate.random.normal(0.0, 0.1, size=h.shape, dtype=h.dtype)
        self.h.value = jnp.tanh(self.decay.value * h + self.cell(x) + noise)
        kept = brainstate.random.bernoulli(0.7, size=h.shape)
        return self.readout(jnp.where(kept, self.h.value / 0.7, 0.0))


@case("random")
def noise_and_dropout(batch, dtype):
    def step(params, state, x, *, cut, put):
        key, draw = jax.random.split(state["rng"])
        h = state["h"]
        noise = 0.1 * jax.random.normal(draw, h.shape, h.dtype)
        h = put("h", jnp.tanh(params["decay"] * h + linear(params["cell.weight"], x) + noise))
        key, draw = jax.random.split(key)
        kept = jax.random.bernoulli(draw, 0.7, h.shape)
        y = linear(params["readout.weight"], jnp.where(kept, h / 0.7, 0.0))
        return {**state, "h": h, "rng": key}, y

    return from_module(Noisy(), step, groups=(("h",),), exact=True, batch=batch, dtype=dtype, rng_state=True)
